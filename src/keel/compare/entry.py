"""`keel.compare`: what the command calls."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.compare.arms import Swept
from keel.compare.asked import BUDGET, Asked
from keel.compare.display import Silent, display
from keel.compare.outcomes import Budget
from keel.compare.plan import Conditions
from keel.compare.record import held
from keel.compare.running import Stopping
from keel.compare.tuning import Tuning
from keel.compare.work import Compared, Work
from keel.compare.workers import Launch
from keel.core.errors import ConfigError


def compare(
    recipes: str | Sequence[str],
    task: str | None = None,
    model: str | Path | None = None,
    data: str | Path | None = None,
    reward: str | Sequence[str] | None = None,
    seeds: int = 3,
    budget: str | Budget = BUDGET,
    settings: Mapping[str, Any] | None = None,
    param: Swept | None = None,
    tune: str | Mapping[str, Sequence[Any]] | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    retry_failed: bool = False,
    quiet: bool = False,
) -> Compared:
    """Train by several recipes under the same conditions, with several seeds, and say what can be told apart.

    A cell, one recipe with one seed, is an ordinary run beside all others; one that was run before is not run again.

    Args:
        recipes: names, or `file.py:name`; the first is the baseline.
        task, model, data, reward: as in `keel.train`, by name or path: cells run in processes of their own.
        seeds: 0 .. seeds - 1 for every arm.
        budget: of every cell: "200k-tokens", "5min", "100steps".
        settings: arguments and dotted paths that all arms share.
        param: values by argument or path; every value makes an arm of each recipe that has it.
        tune: "beta" chooses the strength of each arm by trials; {"beta": [0.01, 0.1]} says which values are tried.
        name: of the comparison, and of its folder in `runs/comparisons`.
        runs: folder of all runs.
        workers, threads: processes at a time, and threads of each; by default as many of one thread as there is room.
        ray: address of a Ray cluster, or `local`, where the cells run in place of here.
        retry_failed: run cells again that failed before.
        quiet: say nothing while it runs.

    Raises:
        UserError: a mistake in what was asked for, named with what would be right.
        Stopped: it was told to stop; the same call goes on where it was.
    """
    asked = Asked(
        recipes=(recipes,) if isinstance(recipes, str) else tuple(recipes),
        conditions=Conditions(
            budget=budget if isinstance(budget, Budget) else Budget.parse(budget),
            task=task,
            model=_text(model, "model"),
            data=_text(data, "data"),
            rewards=_rewards(reward),
            settings=tuple(sorted((settings or {}).items())),
        ),
        seeds=seeds,
        swept={key: list(values) for key, values in (param or {}).items()},
        tuning=_tuning(tune),
        name=name,
        runs=Path(runs),
        workers=workers,
        threads=threads,
        ray=ray,
    )
    return run(asked, retry_failed=retry_failed, shown=Silent() if quiet else display())


def run(asked: Asked, *, retry_failed: bool = False, shown: Any = None, launch: Launch | None = None) -> Compared:
    """Run a comparison to its end.

    Args:
        asked: what to compare.
        retry_failed: run cells again that failed before.
        shown: where progress goes.
        launch: starts a worker, in place of a process here.
    """
    began, shown = time.monotonic(), shown or display()
    with held(asked.folder):
        work = Work.begin(asked, shown, launch)
        try:
            with Stopping() as stopping, work.launching() as start:
                work.announce(start, stopping, began, retry_failed)
                work.write()
                work.tune(start, stopping, retry_failed)
                work.cells(start, stopping).run(work.plan.cells(work.record.seeds), retry_failed)
        except BaseException:
            work.stopped()
            raise
        finally:
            shown.close()
        return work.finish(began)


def preview(asked: Asked, shown: Any = None, launch: Launch | None = None) -> dict[str, Any]:
    """What would run: the state of every cell, and how long the rest would take; nothing is trained."""
    began, shown = time.monotonic(), shown or Silent()
    with held(asked.folder):
        work = Work.begin(asked, shown, launch)
        try:
            with Stopping() as stopping, work.launching() as start:
                work.announce(start, stopping, began)
                runner = work.cells(start, stopping)
                cells = [
                    {"arm": cell.arm.name, "seed": cell.seed, "run": cell.name, "state": runner.state(cell)}
                    for cell in work.plan.cells(work.record.seeds)
                ]
        finally:
            shown.close()
            work.stopped()
    return {
        "name": work.record.name,
        "cells": cells,
        "trials": len(work.trial_cells()),
        "workers": work.room.workers,
        "threads": work.room.threads,
        "seconds": work.record.announced,
        "notes": list(work.record.notes),
    }


def _text(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    fix = "Save it, and give its path."
    raise ConfigError(f"cells run in processes of their own (got {type(value).__name__})", name, fix)


def _rewards(reward: Any) -> tuple[str, ...]:
    listed = [] if reward is None else [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    for one in listed:
        if not isinstance(one, str):
            fix = "Put the function into a module, and name it as module:function."
            raise ConfigError("cells run in processes of their own", "reward", fix)
    return tuple(listed)


def _tuning(tune: Any) -> Tuning | None:
    if tune is None or isinstance(tune, str):
        return None if tune is None else Tuning(tune)
    if len(tune) != 1:
        raise ConfigError("one thing is tuned at a time", "--tune", "Sweep the others with --param.")
    ((name, values),) = tune.items()
    return Tuning(name, tuple(values))
