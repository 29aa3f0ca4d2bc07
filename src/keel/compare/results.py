"""The statistics of a comparison as plain values: what was found of each arm, and of each arm against the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from keel.compare.statistics import Needed
from keel.evaluate.intervals import Interval

BETTER, WORSE, HIGHER, LOWER = "better", "worse", "higher", "lower"
SEEN = (BETTER, WORSE, HIGHER, LOWER)
NO_DIFFERENCE, UNTOLD = "no difference seen", "cannot be told"
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Estimate:
    """A metric of an arm.

    Args:
        arm, metric: their names.
        seeds: of the cells that measured it.
        prompts: those that have a number in every cell.
        runs: mean over prompts of each seed.
        mean: over seeds and prompts, with its 95% interval.
        iqm: interquartile mean over all (seed, prompt) units, the same way.
    """

    arm: str
    metric: str
    seeds: tuple[int, ...] = ()
    prompts: int = 0
    runs: tuple[float, ...] = ()
    mean: Interval = UNKNOWN
    iqm: Interval = UNKNOWN


@dataclass(frozen=True)
class Difference:
    """An arm less the baseline on the same seeds and prompts.

    Args:
        arm, metric: their names.
        seeds: that both have.
        prompts: that both have.
        mean: difference of the means, paired, with its 95% interval.
        iqm: difference of the interquartile means, the same way.
        improvement: P(arm > baseline) for a prompt, the same way; 0.5 where neither is ahead.
        p: of the difference of the means; NaN with one seed.
        adjusted: for the number of arms and metrics.
        verdict: in words.
        needed: seeds with which a difference of this size would be seen.
    """

    arm: str
    metric: str
    seeds: tuple[int, ...] = ()
    prompts: int = 0
    mean: Interval = UNKNOWN
    iqm: Interval = UNKNOWN
    improvement: Interval = UNKNOWN
    p: float = math.nan
    adjusted: float = math.nan
    verdict: str = UNTOLD
    needed: Needed = Needed(None, "one seed")

    @property
    def told(self) -> bool:
        """Whether a difference was seen."""
        return self.verdict in SEEN


@dataclass(frozen=True)
class Spent:
    """What training spent, mean over the finished cells of an arm."""

    tokens: float = math.nan
    seconds: float = math.nan
    steps: float = math.nan


@dataclass(frozen=True)
class Cell:
    """A cell without numbers: of an arm and a seed, its run and why it failed."""

    arm: str
    seed: int
    run: str = ""
    error: str = ""


@dataclass(frozen=True)
class Analysis:
    """The statistics of a comparison.

    Args:
        baseline: name of the first arm.
        arms: names of all.
        metrics: the first decides; the others describe.
        estimates: of each arm and metric.
        differences: of each arm but the baseline, and metric.
        before: metrics before training, over prompts.
        spent: by arm.
        failed: cells that failed; they are in no average.
        missing: cells that have not run.
        notes: what a reader should know, sentences.
        seed: of the resampling.
    """

    baseline: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    estimates: tuple[Estimate, ...] = ()
    differences: tuple[Difference, ...] = ()
    before: Mapping[str, Interval] = field(default_factory=dict)
    spent: Mapping[str, Spent] = field(default_factory=dict)
    failed: tuple[Cell, ...] = ()
    missing: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0

    def estimate(self, arm: str, metric: str) -> Estimate:
        """A metric of an arm; empty if it was not measured."""
        found = (e for e in self.estimates if (e.arm, e.metric) == (arm, metric))
        return next(found, Estimate(arm, metric))

    def difference(self, arm: str, metric: str) -> Difference | None:
        """An arm against the baseline; None for the baseline itself."""
        return next((d for d in self.differences if (d.arm, d.metric) == (arm, metric)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, null for NaN."""
        return _plain(self)

    @staticmethod
    def from_json(data: Any) -> Analysis:
        """The inverse of `to_json`.

        Raises:
            ValueError: something that `to_json` writes is missing, or of another kind.
        """
        try:
            return Analysis(
                baseline=data["baseline"],
                arms=tuple(data["arms"]),
                metrics=tuple(data["metrics"]),
                estimates=tuple(_made(Estimate, one) for one in data["estimates"]),
                differences=tuple(_made(Difference, one) for one in data["differences"]),
                before={name: Interval.from_json(numbers) for name, numbers in data["before"].items()},
                spent={name: _made(Spent, one) for name, one in data["spent"].items()},
                failed=tuple(_made(Cell, one) for one in data["failed"]),
                missing=tuple(_made(Cell, one) for one in data["missing"]),
                notes=tuple(data["notes"]),
                seed=int(data["seed"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no analysis of Keel: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_json()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _made(kind: Any, data: Mapping[str, Any]) -> Any:
    """A dataclass of numbers, texts, intervals and tuples from `_plain`; annotations say which is which."""
    found = {}
    for f in fields(kind):
        value = data[f.name]
        if f.type == "Interval":
            value = Interval.from_json(value)
        elif f.type == "Needed":
            value = Needed(**value)
        elif f.type == "float":
            value = math.nan if value is None else float(value)
        elif str(f.type).startswith("tuple"):
            value = tuple(value)
        found[f.name] = value
    return kind(**found)
