"""Comparisons as their pages show them: how far each cell is, and the report, kept until a cell ends."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.core.errors import KeelError, RunError, nearest
from keel.store.store import Store

if TYPE_CHECKING:
    from keel.compare.outcomes import Comparison
    from keel.compare.record import Record

KEPT = 16  # comparisons, and reports, that are kept
HEARD = 600  # seconds without news after which cells that should be running are doubted
_ENDED = ("finished", "failed")
_DIFFER = ("method", "model", "task", "train", "evaluate")  # what arms may differ in, of their configurations


@dataclass(frozen=True)
class CellState:
    """One arm with one seed.

    Args:
        arm, seed: which.
        run: name of its run; "" before it began.
        state: waiting, running, stopped, failed or finished.
        step: the last one of its run.
        error: why it failed.
        stored: whether the run store has it.
    """

    arm: str
    seed: int
    run: str = ""
    state: str = "waiting"
    step: int = 0
    error: str = ""
    stored: bool = False


@dataclass(frozen=True)
class Overview:
    """A comparison in a list, and above its report.

    Args:
        name: of its folder.
        status: running, stopped, failed (some cells), or finished.
        created: seconds since 1970.
        arms: names, the baseline first.
        seeds: of every arm.
        task, model, budget: what all share.
        cells: of all arms and seeds, in their order.
        tuned: what trials chose, in words, by arm.
        notes: what a reader should know.
        took: seconds; None while it runs.
        command: that was last given.
        heard: when something was last known of it, seconds since 1970.
    """

    name: str
    status: str
    created: float
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    task: str
    model: str
    budget: str
    cells: tuple[CellState, ...]
    tuned: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    took: float | None = None
    command: str = ""
    heard: float = 0.0

    def count(self, *states: str) -> int:
        """How many cells are in one of some states."""
        return sum(cell.state in states for cell in self.cells)

    @property
    def is_live(self) -> bool:
        """Whether it is being run, as far as one can see."""
        return self.status == "running" and time.time() - self.heard < HEARD

    @property
    def results(self) -> str:
        """Changes whenever a cell ends."""
        ended = [(cell.arm, cell.seed, cell.run, cell.state) for cell in self.cells if cell.state in _ENDED]
        return hashlib.sha256(repr((ended, self.status, self.arms, self.seeds)).encode()).hexdigest()[:16]

    @property
    def said(self) -> str:
        """How far it is, in words."""
        done, failed = self.count("finished"), self.count("failed")
        parts = [f"{done} of {len(self.cells)} cells finished"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{running} running"] if (running := self.count("running")) else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Unreadable:
    """A folder in which a comparison should be; `why` says what is wrong with it."""

    name: str
    why: str


def overviews(runs: Path, store: Store | None) -> list[Overview | Unreadable]:
    """All comparisons beside the runs, the newest first."""
    from keel.compare.record import names

    found: list[Overview | Unreadable] = []
    for name in names(runs):
        try:
            found.append(overview(runs, name, store))
        except RunError as error:
            found.append(Unreadable(name, str(error)))
    return found


def overview(runs: Path, name: str, store: Store | None) -> Overview:
    """One comparison.

    Raises:
        RunError: it cannot be read.
    """
    from keel.compare.record import FILE, folder_of

    folder = folder_of(runs, name)
    changed = (folder / FILE).stat().st_mtime_ns if (folder / FILE).is_file() else 0
    record = _record(folder, changed)
    known = _runs(store, [str(entry.get("run", "")) for entry in record.cells.values()])
    cells = tuple(_cell(record, arm.name, seed, known) for arm in record.arms for seed in record.seeds)
    heard = max([changed / 1e9, *(updated for _, _, updated in known.values())])
    return Overview(
        name=name,
        status=record.status,
        created=record.created,
        arms=tuple(arm.name for arm in record.arms),
        seeds=record.seeds,
        task=record.task,
        model=record.model,
        budget=str(record.conditions.get("budget", "")),
        cells=cells,
        tuned=record.tuned,
        notes=record.notes,
        took=record.took,
        command=record.command,
        heard=heard,
    )


@dataclass(frozen=True)
class View:
    """What a reader wants of a comparison.

    Args:
        arms: names of those that are compared, the baseline first.
        metric: the one that decides; "" for the usual one.
    """

    arms: tuple[str, ...]
    metric: str = ""


@dataclass(frozen=True)
class Report:
    """The report of a comparison, for a view.

    Args:
        sections: HTML.
        metrics: that could decide.
        metric: that decides; "" where no cell is finished.
        problem: why there is no report; "" where there is one.
    """

    sections: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    metric: str = ""
    problem: str = ""


@functools.lru_cache(maxsize=KEPT)
def report(runs: Path, name: str, results: str, view: View) -> Report:
    """The report, kept for as long as no cell ends.

    Args:
        runs: folder of all runs.
        name: of the comparison.
        results: of its `Overview`; another value is another report.
        view: what is wanted of it.
    """
    from keel.compare.analysis import analyse
    from keel.compare.report import sections

    try:
        whole = _comparison(runs, name, results)
        metrics = tuple(dict.fromkeys(metric for outcome in whole.outcomes for metric in outcome.values))
        if not metrics:
            return Report(problem="No cell is finished yet.")
        chosen = part_of(whole, view.arms)
        if view.metric and view.metric not in metrics:
            problem = f"No cell measured '{view.metric}'.{nearest(view.metric, metrics)}"
            return Report(metrics=metrics, problem=problem)
        if not any(outcome.status == "finished" for outcome in chosen.outcomes):
            return Report(metrics=metrics, problem="None of the cells of these arms is finished yet.")
        analysis = analyse(chosen)
        if view.metric:
            leading = dict.fromkeys([view.metric, *analysis.metrics])
            analysis = analyse(chosen, list(leading))
        leads = analysis.metrics[0] if analysis.metrics else ""
        return Report(tuple(sections(chosen, analysis, _compositions(runs, chosen))), metrics, leads)
    except (KeelError, ValueError) as error:
        return Report(problem=f"These cells cannot be compared: {error}")


def part_of(comparison: Comparison, arms: Sequence[str]) -> Comparison:
    """Some arms of a comparison, in another order."""
    by_name = {arm.name: arm for arm in comparison.arms}
    return replace(
        comparison,
        arms=tuple(by_name[name] for name in arms),
        outcomes=tuple(outcome for outcome in comparison.outcomes if outcome.arm in arms),
    )


def _compositions(runs: Path, comparison: Comparison) -> dict[str, Any] | None:
    """The method of each arm, from the first of its runs that is stored; None where an arm has none."""
    found = {}
    with Store(runs / "keel.sqlite", readonly=True) as store:
        for arm in comparison.arms:
            cell = next(iter(comparison.of(arm.name)), None)
            config = store.run(cell.run).config if cell is not None else None
            if not config:
                return None
            found[arm.name] = {name: config[name] for name in _DIFFER if name in config}
    return found


@functools.lru_cache(maxsize=KEPT)
def _comparison(runs: Path, name: str, results: str) -> Comparison:
    from keel.compare.record import load

    return load(name, runs)


@functools.lru_cache(maxsize=256)
def _record(folder: Path, changed: int) -> Record:
    from keel.compare.record import Record

    return Record.read(folder)


def _runs(store: Store | None, names: Sequence[str]) -> dict[str, tuple[str, int, float]]:
    """Status, step and time of the last news of runs, by name."""
    wanted = [name for name in dict.fromkeys(names) if name]
    found: dict[str, tuple[str, int, float]] = {}
    for begin in range(0, len(wanted) if store is not None else 0, 500):
        some = wanted[begin : begin + 500]
        query = f"SELECT name, status, step, updated FROM runs WHERE name IN ({', '.join('?' * len(some))})"
        assert store is not None
        found |= {name: (status, step, updated) for name, status, step, updated in store.select(query, some)}
    return found


def _cell(record: Record, arm: str, seed: int, known: Mapping[str, tuple[str, int, float]]) -> CellState:
    from keel.compare.record import place

    entry = record.cells.get(place(arm, seed), {})
    run, error = str(entry.get("run", "")), str(entry.get("error", ""))
    if run not in known:
        return CellState(arm, seed, run, "failed" if error else "waiting", error=error)
    status, step, updated = known[run]
    if status == "finished":
        return CellState(arm, seed, run, "finished", step, stored=True)
    if error:
        return CellState(arm, seed, run, "failed", step, error, True)
    running = status == "running" and record.status == "running" and time.time() - updated < HEARD
    return CellState(arm, seed, run, "running" if running else "stopped", step, stored=True)
