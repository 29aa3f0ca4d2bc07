"""Controllers own paths of the method and set the values there."""

import math
from dataclasses import dataclass
from typing import Literal

from keel.core.registry import part


@part("constant")
@dataclass(frozen=True)
class Constant:
    """The value at `path` stays as it is: the neutral setting of every controller."""

    path: str
    value: float

    def init(self) -> dict[str, float]:
        """Nothing to remember."""
        return {}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The same value."""
        return {self.path: self.value}, state


@part("schedule")
@dataclass(frozen=True)
class Schedule:
    """The value at `path` goes from `start` to `end` over `steps` batches, then stays.

    Args:
        path: where the value lives, `terms.kl.coef`.
        start, end: values.
        steps: length of the way, in batches.
        shape: linear or cosine.

    Raises:
        ValueError: steps below 1.
    """

    path: str
    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def init(self) -> dict[str, float]:
        """Nothing to remember: the step decides."""
        return {}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The value for batch `step`, counted from 0."""
        way = min(1.0, step / self.steps)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return {self.path: self.start + (self.end - self.start) * way}, state


@part("adaptive_kl")
@dataclass(frozen=True)
class AdaptiveKL:
    """c <- c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), once a batch.

    Args:
        path: where the coefficient lives, `transforms.kl.coef`.
        start: its first value.
        target: KL to hold, in the units of `metric`.
        horizon: rows over which a full correction is made; n is the rows of a batch.
        metric: the metric to read.

    Raises:
        ValueError: target or horizon not positive.

    Source: "Fine-Tuning Language Models from Human Preferences", 2019.
    """

    path: str
    start: float = 0.05
    target: float = 6.0
    horizon: float = 10000.0
    metric: str = "kl"

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon <= 0:
            raise ValueError("target and horizon must be positive")

    def init(self) -> dict[str, float]:
        """The coefficient."""
        return {"value": self.start}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The coefficient after a batch; before the first batch, the starting value."""
        value = state["value"]
        if self.metric in metrics:
            error = min(0.2, max(-0.2, metrics[self.metric] / self.target - 1))
            value *= 1 + error * metrics.get("num_rows", 0.0) / self.horizon
        return {self.path: value}, {"value": value}
