"""What the package knows of recipes by measurement: verification on exact worlds, and runs beside a baseline."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from keel.core.errors import DataError
from keel.evaluate.intervals import Interval
from keel.verify.measured import Measured, measured

MEASURES = {"pass@1": "pass@1", "pass@16": "pass@16", "kl": "KL"}
TOLD = ("pass@1", "pass@16")  # whose differences stand beside them


@dataclass(frozen=True, eq=False)
class Result:
    """What runs of a recipe gave on a task, on held-out prompts after training.

    Args:
        task: on which.
        seeds: how many runs.
        settings: where the recipe was not at its defaults, in words.
        values: means by measure, with intervals.
        base: the same of the model before training; it has no KL.
        against: the recipe to which it is compared; "" for none.
        more: differences from that recipe by measure, paired by seed and prompt.
        step: seconds of a step; None where it is not known.
        steps: of training.
        completions: of a step.
    """

    task: str
    seeds: int
    settings: str
    values: Mapping[str, Interval]
    base: Mapping[str, Interval]
    against: str
    more: Mapping[str, Interval]
    step: float | None
    steps: int
    completions: int


@functools.cache
def verification() -> Measured | None:
    """The table of verification; None where the package came without one."""
    try:
        return measured()
    except DataError:
        return None


def verified(recipes: Sequence[str]) -> dict[str, str]:
    """What verification found of recipes at their defaults, by name; those that it does not know are left out."""
    table = verification()
    rows = {name: table.of(name) for name in recipes} if table else {}
    return {name: found[0].status for name, found in rows.items() if found}


def results(recipe: str) -> list[Result]:
    """What the packaged runs gave, by task; the benchmark's main one first."""
    tasks = _evidence().get("tasks", {})
    return [
        _result(task, facts, facts["recipes"][recipe]) for task, facts in tasks.items() if recipe in facts["recipes"]
    ]


def machine() -> str:
    """On what the runs were made."""
    return str(_evidence().get("machine", ""))


def _result(task: str, facts: Mapping[str, Any], one: Mapping[str, Any]) -> Result:
    return Result(
        task=task,
        seeds=one["seeds"],
        settings=", ".join(f"{key}={value}" for key, value in one["settings"].items()),
        values=_intervals(one),
        base=_intervals(facts["base"]),
        against=one.get("against", ""),
        more=_intervals(one.get("more", {})),
        step=one["step"],
        steps=facts["steps"],
        completions=facts["completions"],
    )


def _intervals(found: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: Interval.from_json(found[name]) for name in MEASURES if name in found}


def is_apart(difference: Interval) -> bool:
    """Whether an interval of a difference leaves out 0."""
    return difference.known and (difference.low > 0 or difference.high < 0)


@functools.cache
def _evidence() -> Mapping[str, Any]:
    """Written by `python -m benchmarks.methods --write`; nothing where the package came without it."""
    file = resources.files("keel.compare") / "evidence.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
