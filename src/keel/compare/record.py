"""A comparison on disk, `RUNS/comparisons/NAME/comparison.json`, and what the run store knows of its cells."""

import contextlib
import fcntl
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import keel
from keel.compare.outcomes import Arm, Budget, Comparison, Outcome
from keel.core.errors import RunError, UserError, nearest
from keel.store.records import StoredRun
from keel.store.store import Store
from keel.train.checkpoint import write_text
from keel.train.configuration import differences

FORMAT = 1
FILE = "comparison.json"


@dataclass
class Record:
    """What is written down of a comparison.

    Args:
        folder: its own.
        conditions: as they were asked for: what all arms share, and how arms and strengths were chosen.
        task, model: as the runs have them.
        arms: the first is the baseline.
        seeds: those of every arm.
        cells: by "arm/seed": run, key, and of failed ones error and log.
        trials: the same of those that chose a strength.
        tuned: what they chose, in words.
        notes: what a reader should know.
        status: running, stopped, failed (some cells), or finished.
        created: seconds since 1970.
        announced, took: seconds that were announced at the last start, and that it took.
        command: that was last given.
    """

    folder: Path
    conditions: dict[str, Any]
    task: str
    model: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    status: str = "running"
    created: float = field(default_factory=time.time)
    announced: float | None = None
    took: float | None = None
    command: str = ""

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.name

    def write(self) -> None:
        """Whole or not at all."""
        data = {
            "format": FORMAT,
            "keel": keel.__version__,
            "name": self.name,
            "status": self.status,
            "created": self.created,
            "conditions": self.conditions,
            "task": self.task,
            "model": self.model,
            "arms": [{"name": a.name, "recipe": a.recipe, "settings": dict(a.settings)} for a in self.arms],
            "seeds": list(self.seeds),
            "cells": self.cells,
            "trials": self.trials,
            "tuned": self.tuned,
            "notes": list(self.notes),
            "announced": self.announced,
            "took": self.took,
            "command": self.command,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / FILE, json.dumps(data, indent=1))

    @staticmethod
    def read(folder: Path) -> "Record":
        """The record in a folder.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise RunError(f"has format {data['format']}, this version reads {FORMAT}", str(folder / FILE))
            return Record(
                folder=folder,
                conditions=data["conditions"],
                task=data["task"],
                model=data["model"],
                arms=tuple(_arm(arm) for arm in data["arms"]),
                seeds=tuple(data["seeds"]),
                cells=data["cells"],
                trials=data["trials"],
                tuned=data["tuned"],
                notes=tuple(data["notes"]),
                status=data["status"],
                created=data["created"],
                announced=data["announced"],
                took=data["took"],
                command=data["command"],
            )
        except FileNotFoundError:
            raise RunError("there is no such comparison", str(folder)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"is no record of a comparison ({type(error).__name__}: {error})"
            raise RunError(what, str(folder / FILE), "Remove it; finished cells are in the run store.") from error

    def check_extends(self, conditions: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Refuse to make another comparison of this one; arms and seeds may come to it.

        Raises:
            RunError: something else differs; it is named.
        """
        found = differences(self.conditions, json.loads(json.dumps(dict(conditions))))
        if gone := [arm.name for arm in self.arms if arm.name not in arms]:
            found.append(f"without {', '.join(gone)}")
        if len(seeds) < len(self.seeds):
            found.append(f"seeds: {len(self.seeds)} -> {len(seeds)}")
        if found:
            fix = "Choose another --name: cells that are the same are not run again."
            raise RunError(f"there is another comparison of that name ({'; '.join(found[:6])})", str(self.folder), fix)


def _arm(data: Mapping[str, Any]) -> Arm:
    settings = tuple(sorted((key, _frozen(value)) for key, value in data["settings"].items()))
    return Arm(data["name"], data["recipe"], settings)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def place(arm: str, seed: int) -> str:
    """Under which a cell is entered."""
    return f"{arm}/{seed}"


# -- all comparisons of a folder -------------------------------------------------------------------------------------


def folder_of(runs: Path, name: str) -> Path:
    """Where a comparison is."""
    return runs / "comparisons" / name


def names(runs: str | Path) -> list[str]:
    """Names of the comparisons beside the runs of a folder, the newest first."""
    found = (Path(runs) / "comparisons").glob(f"*/{FILE}")
    return [path.parent.name for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.parent.name))]


def load(name: str, runs: str | Path = "runs") -> Comparison:
    """A stored comparison with all that is known of its cells now, without running anything.

    Raises:
        RunError: there is none of that name.
    """
    folder = folder_of(Path(runs), name)
    if not (folder / FILE).is_file():
        known = names(runs)
        there = f"There are: {', '.join(known[:8])}." if known else "There are none."
        raise RunError(f"there is no comparison '{name}'.{nearest(name, known)}", str(folder.parent), there)
    return comparison_of(Record.read(folder), Path(runs))


def comparison_of(record: Record, runs: Path) -> Comparison:
    """What is known of a record's cells now."""
    file = runs / "keel.sqlite"
    outcomes = []
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(file, readonly=True)) if file.is_file() else None
        for arm in record.arms:
            for seed in record.seeds:
                outcomes.append(_outcome(arm.name, seed, record.cells.get(place(arm.name, seed), {}), store))
    return Comparison(
        name=record.name,
        arms=record.arms,
        seeds=record.seeds,
        task=record.task,
        model=record.model,
        budget=Budget.parse(record.conditions["budget"].replace(",", "")),
        settings=tuple(sorted((k, _frozen(v)) for k, v in record.conditions["settings"].items())),
        outcomes=tuple(outcomes),
        tuned=record.tuned,
        created=record.created,
    )


def _outcome(arm: str, seed: int, entry: Mapping[str, Any], store: Store | None) -> Outcome:
    name = str(entry.get("run", ""))
    run = finished_run(store, name)
    if run is not None and store is not None:
        return outcome_of(arm, seed, run, store)
    if entry.get("error"):
        return Outcome(arm, seed, "failed", name, str(entry["error"]))
    return Outcome(arm, seed, "missing", name)


def finished_run(store: Store | None, name: str) -> StoredRun | None:
    """The run of that name, if it is finished and was measured."""
    if store is None or not name:
        return None
    try:
        run = store.run(name)
    except UserError:
        return None
    measured = run.status == "finished" and "after" in {e.phase for e in store.evaluations(run.id)}
    return run if measured else None


def outcome_of(arm: str, seed: int, run: StoredRun, store: Store) -> Outcome:
    """A finished run as the outcome of a cell."""
    measured = {e.phase: e.evaluation["values"] for e in store.evaluations(run.id)}
    curves = store.metrics(run.id)
    seconds = 0.0
    spent = []
    for step, value in curves.get("step_time", []):
        seconds += value if math.isfinite(value) else 0.0
        spent.append((step, seconds))
    return Outcome(
        arm=arm,
        seed=seed,
        status="finished",
        run=run.name,
        values=_arrays(measured["after"]),
        before=_arrays(measured.get("before", {})),
        curves={**curves, "seconds": spent},
        tokens=int(run.summary["num_tokens"]),
        seconds=float(run.summary["seconds"]),
        steps=int(run.summary["steps"]),
    )


def _arrays(values: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array([math.nan if v is None else v for v in column], float) for name, column in values.items()}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Refuse a second process on the same comparison.

    Raises:
        RunError: another one is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fix = "Wait for it, or choose another --name: a cell that both want is run once."
            raise RunError("another process is at this comparison", str(folder), fix) from None
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing has come of it
                shutil.rmtree(folder, ignore_errors=True)
