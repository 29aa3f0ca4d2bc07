"""What samplers achieve for what they cost: accuracy of their output against the tokens that went through a model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from keel.evaluate.intervals import Interval, mean_interval

NUMBERS = ("generated", "scored", "read", "rewards", "ess", "log_z", "log_z_error", "kl", "seconds")


@dataclass(frozen=True)
class Point:
    """One sampler at one budget, over prompts and seeds.

    Args:
        size: the setting that makes the budget (particles, candidates, rollouts).
        accuracy: share of outputs that are correct, with its interval over prompts.
        numbers: means over prompts and seeds: tokens generated, scored, and read again by a server; rewards asked for,
            ESS, log Z and its error, KL of the output, seconds a prompt; NaN where the method has none.
        kl_is_bound: whether the KL is an upper bound.
        prompts, seeds: how many.
    """

    size: int
    accuracy: Interval
    numbers: Mapping[str, float]
    kl_is_bound: bool
    prompts: int
    seeds: int

    @property
    def tokens(self) -> float:
        """Generated and scored together."""
        return self.numbers["generated"] + self.numbers["scored"]


@dataclass(frozen=True)
class Curve:
    """One sampler at growing budgets.

    Args:
        name: of the sampler, and what tells it from others of the same.
        family: under which it is drawn.
        points: by budget.
    """

    name: str
    family: str
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries; null for NaN."""
        rows = []
        for point in self.points:
            numbers = {name: value if np.isfinite(value) else None for name, value in point.numbers.items()}
            rows.append({**asdict(point), "accuracy": point.accuracy.to_json(), "numbers": numbers})
        return {"name": self.name, "family": self.family, "points": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Curve":
        """The inverse of `to_json`."""
        points = []
        for row in data["points"]:
            numbers = {name: np.nan if value is None else value for name, value in row["numbers"].items()}
            points.append(Point(**{**row, "accuracy": Interval.from_json(row["accuracy"]), "numbers": numbers}))
        return Curve(data["name"], data["family"], tuple(points))


def point(
    size: int,
    correct: Float[np.ndarray, "S P"],
    numbers: Mapping[str, Sequence[Sequence[float]]],
    kl_is_bound: bool,
    seed: int = 0,
) -> Point:
    """A point from what each seed found for each prompt; the interval resamples prompts, each with all its seeds.

    Args:
        size: the budget.
        correct: 0 or 1, for each seed and prompt.
        numbers: the same layout, by name.
        kl_is_bound: see `Point`.
        seed: of the bootstrap.
    """
    means = {name: _mean(np.asarray(values, dtype=float)) for name, values in numbers.items()}
    return Point(
        size=size,
        accuracy=mean_interval(correct.mean(0), seed=seed),
        numbers=means,
        kl_is_bound=kl_is_bound,
        prompts=correct.shape[1],
        seeds=correct.shape[0],
    )


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
