"""A comparison in progress: announced, tuned, run, and written down."""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.compare.arms import arms_of
from keel.compare.asked import Asked
from keel.compare.display import Silent
from keel.compare.outcomes import Arm, Comparison
from keel.compare.plan import TRIALS_FROM, Cell, Plan, plan
from keel.compare.publish import publish
from keel.compare.record import FILE, Record, comparison_of
from keel.compare.running import Cells, Stopping
from keel.compare.timing import REPORT, Times, check_budget, in_words, times_of
from keel.compare.tuning import choose, skipped, trial_arms, tuned_arms
from keel.compare.workers import Launch, Room, local, room_for, weights_of
from keel.core.plain import counted
from keel.train.configuration import Configuration
from keel.train.progress import default_reporter
from keel.train.session import Reporter


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparison that has run.

    Args:
        comparison: its cells.
        analysis: what they say, with intervals.
        path: its folder, with `report.html`, `results.csv` and `comparison.json`.
        notes: what a reader should know.
        announced, took: seconds; `announced` is None where no time was known.
    """

    comparison: Comparison
    analysis: Any
    path: Path
    notes: tuple[str, ...] = ()
    announced: float | None = None
    took: float = 0.0

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"


@dataclass
class Work:
    """A comparison in progress.

    Args:
        asked: for what.
        arms: before any strength was tuned.
        plan: of the cells to compare; with `trials` those of the strengths before.
        record: as it is written down.
        shown: where progress goes.
        launch: starts a worker; None takes what `asked` says.
        trials: of the arms, by their names.
        trial_plan: of the trials.
        room: how many cells at a time.
        times: of the kinds of cells.
        written: whether the record is on disk as it is here.
    """

    asked: Asked
    arms: list[Arm]
    plan: Plan
    record: Record
    shown: Any
    launch: Launch | None = None
    trials: dict[str, list[Arm]] = field(default_factory=dict)
    trial_plan: Plan | None = None
    trial_words: str = ""
    room: Room = Room(1, 1)
    times: dict[str, Times] = field(default_factory=dict)
    written: bool = False

    @staticmethod
    def begin(asked: Asked, shown: Any, launch: Launch | None = None) -> "Work":
        """Resolve everything.

        Raises:
            UserError: a mistake in what was asked for.
        """
        arms, notes = arms_of(asked.recipes, asked.swept)
        seeds, folder = tuple(range(asked.seeds)), asked.folder
        before = Record.read(folder) if (folder / FILE).is_file() else None
        if before is not None:
            before.check_extends(asked.to_json(), [arm.name for arm in arms], seeds)
        trials: dict[str, list[Arm]] = {}
        if asked.tuning is not None:
            trials, more = trial_arms(arms, asked.tuning)
            notes += more
        report = _narrated(shown)
        planned = plan(arms, asked.conditions, report=report)
        trial_plan, words = None, ""
        if trials:
            trial_plan, words = _trial_plan(planned, trials, report)
            notes += [] if "other" in words else [f"strengths are chosen {words}, for the task holds out no others"]
        report("done", {})
        known = before or Record(folder, {}, planned.task, planned.model, (), ())
        known.conditions, known.arms, known.seeds = asked.to_json(), planned.arms, seeds
        known.command = asked.command
        known.notes, known.status = tuple(dict.fromkeys([*notes, *planned.notes])), "running"
        work = Work(asked, list(planned.arms), planned, known, shown, launch, trials, trial_plan, words)
        setup = planned.setups[planned.arms[0].name]
        count = len(arms) * len(seeds) + sum(map(len, trials.values()))
        device = setup.config.model.device
        work.room = room_for(count, weights_of(setup.source), device, asked.workers, asked.threads)
        return work

    def write(self) -> None:
        """Write down what is compared, now that nothing speaks against it."""
        self.written = True
        self.record.write()

    def stopped(self) -> None:
        """Write down that it was; of what has not begun nothing is left, so that another may have its name."""
        if self.written:
            self.record.status = "stopped"
            self.record.write()
        elif not (self.record.folder / FILE).exists():
            shutil.rmtree(self.record.folder / "cells", ignore_errors=True)

    def launching(self) -> Any:
        """A context that gives what starts a worker."""
        if self.launch is not None:
            return contextlib.nullcontext(self.launch)
        if self.asked.ray is not None:
            from keel.compare.cluster import on_ray

            return on_ray(self.asked.ray, self)
        return contextlib.nullcontext(local(self.room.gpus if self.room.workers > 1 else 0))

    def cells(self, launch: Launch, stopping: Stopping, trials: bool = False) -> Cells:
        """What runs cells, or trials."""
        return Cells(
            self.asked.runs,
            self.record.folder / "cells",
            self.asked.conditions.budget,
            self.room,
            launch,
            self.shown,
            stopping,
            self.times,
            self.record.trials if trials else self.record.cells,
            self.record.write,
        )

    def trial_cells(self) -> list[Cell]:
        """Those that choose strengths."""
        return [] if self.trial_plan is None else self.trial_plan.cells((TRIALS_FROM,))

    def announce(self, launch: Launch, stopping: Stopping, began: float, retry_failed: bool = False) -> None:
        """Say what is there, what is to run, how, and how long it will take."""
        cells, runner = self.plan.cells(self.record.seeds), self.cells(launch, stopping)
        states = [runner.state(cell) for cell in cells]
        open_ = ("new", "begun", "running", *(("failed",) if retry_failed else ()))
        rest = [cell for cell, state in zip(cells, states, strict=True) if state in open_]
        trials, tried = self.trial_cells(), self.cells(launch, stopping, trials=True)
        rest_trials = [cell for cell in trials if tried.state(cell) in open_]
        for line in (*facts(self, states, len(trials), len(rest_trials)), *self.record.notes):
            self.shown.note(line)
        if not rest and not rest_trials:
            self.record.announced = time.monotonic() - began + REPORT
            return
        budget, folder = self.asked.conditions.budget, self.record.folder / "cells"
        self.shown.note("measuring how long a step takes ...")
        self.times |= times_of([*rest, *rest_trials], self.asked.runs, folder, self.room, launch, lambda: stopping.told)
        check_budget(rest, self.times, budget, self.room)
        each = [self.cells(launch, stopping).seconds(some) for some in (rest_trials, rest) if some]
        known = [seconds for seconds in each if seconds is not None]
        if len(known) < len(each):
            self.record.announced = None
            self.shown.note("how long it takes is not known")
            return
        self.record.announced = time.monotonic() - began + sum(known) + REPORT
        self.shown.note(f"{in_words(self.record.announced)} in all, until {_at(sum(known) + REPORT)}")

    def tune(self, launch: Launch, stopping: Stopping, retry_failed: bool = False) -> None:
        """Run the trials, and put what they chose in the place of the arms."""
        if self.trial_plan is None:
            return
        self.cells(launch, stopping, trials=True).run(self.trial_cells(), retry_failed)
        record = Record(
            self.record.folder,
            self.record.conditions,
            self.record.task,
            self.record.model,
            self.trial_plan.arms,
            (TRIALS_FROM,),
            self.record.trials,
        )
        chosen = choose(self.trials, comparison_of(record, self.asked.runs).outcomes, self.trial_words)
        self.record.tuned = {name: words for name, (_, words) in chosen.items()}
        for name in self.trials:
            if name not in chosen:
                self.record.tuned[name] = "every trial failed: it is compared at its default"
            self.shown.note(f"{name}: {self.record.tuned[name]}")
        self.plan = plan(tuned_arms(self.arms, chosen), self.asked.conditions, report=_narrated(self.shown))
        self.record.arms = self.plan.arms
        self.record.write()

    def finish(self, began: float) -> Compared:
        """The statistics, the pages, and the last entry of the record."""
        comparison = comparison_of(self.record, self.asked.runs)
        plain = {name: _composition(setup.config) for name, setup in self.plan.setups.items()}
        analysis = publish(self.record.folder, comparison, self.asked.command, plain)
        self.record.status = "failed" if comparison.failed else "finished"
        self.record.took = round(time.monotonic() - began, 1)
        self.record.write()
        announced = self.record.announced
        if announced is not None:
            self.shown.note(
                f"announced {in_words(announced)}, took {in_words(self.record.took).removeprefix('about ')}"
            )
        return Compared(comparison, analysis, self.record.folder, self.record.notes, announced, self.record.took)


def facts(work: Work, states: Sequence[str], trials: int, rest_trials: int) -> list[str]:
    """What is compared, what of it is there already, and how the rest will run."""
    record, budget = work.record, work.asked.conditions.budget
    numbers = {name: states.count(name) for name in ("finished", "failed", "running", "begun", "new")}
    words = {"running": "run by another process", "begun": "to be continued", "new": "to run"}
    said = ", ".join(f"{count} {words.get(name, name)}" for name, count in numbers.items() if count)
    sizes = f"{counted(len(record.arms), 'arm')} x {counted(len(record.seeds), 'seed')}"
    lines = [
        f"{record.name}: {sizes} on {record.task}, {budget} each: {said}",
        str(work.room),
    ]
    if trials:
        lines.insert(
            1,
            f"before that {counted(trials, 'trial')} of strengths under the same budget, {rest_trials} of them to run",
        )
    return lines


def _trial_plan(planned: Plan, trials: Mapping[str, Sequence[Arm]], report: Reporter) -> tuple[Plan, str]:
    setup = planned.setups[planned.arms[0].name]
    evaluate = setup.config.evaluate
    held_out = len(setup.task.held_out) - evaluate.skip
    compared = min(evaluate.num_prompts, held_out)
    skip = skipped(compared, held_out)
    arms = [arm for some in trials.values() for arm in some]
    found = plan(arms, planned.conditions, skip, report)
    count = min(evaluate.num_prompts, held_out - skip)
    which = f"on {count} other held-out prompts" if skip else f"on the {count} held-out prompts that are compared"
    return found, f"{which}, seed {TRIALS_FROM}"


def _narrated(shown: Any) -> Reporter:
    """Bars where the built-in model is trained first, if anything is shown at all."""
    return default_reporter() if type(shown) is not Silent else (lambda *_: None)


def _composition(config: Configuration) -> dict[str, Any]:
    """What two arms may differ in."""
    data = config.to_dict()
    return {key: data[key] for key in ("method", "model", "task", "train", "evaluate")}


def _at(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(time.time() + seconds))
