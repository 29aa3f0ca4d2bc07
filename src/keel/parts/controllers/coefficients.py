"""Controllers own paths of the method and set the values there."""

import math
from dataclasses import dataclass
from typing import Literal

from keel.core.choice import counter_seed
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


@part("on_some_batches", paper=21)
@dataclass(frozen=True)
class OnSomeBatches:
    """The value at `path` is `value` on batches drawn by chance, and `otherwise` on all others.

    A batch is drawn or not by the run's seed and its own number alone. A coefficient of 0 drops the summand, so that
    what only that reads is not measured either: a reference model rests on the batches that are not drawn.

    Args:
        path: where the value lives.
        value: on the batches that are drawn.
        otherwise: on the others.
        share: probability of being drawn.

    Raises:
        ValueError: a share outside [0, 1].

    Source: "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025 (DPH-RL), whose
    code draws a tenth of the micro-batches.
    """

    path: str
    value: float
    otherwise: float = 0.0
    share: float = 0.1
    seeded = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], not {self.share}")

    def init(self, seed: int = 0) -> dict[str, int]:
        """The seed of the run."""
        return {"seed": seed}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The value for batch `step`, counted from 0."""
        chance = counter_seed(state["seed"], "on some batches", self.path, step) / 2**63
        return {self.path: self.value if chance < self.share else self.otherwise}, state


@part("adaptive_kl")
@dataclass(frozen=True)
class AdaptiveKL:
    """c <- c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), once a batch.

    Args:
        path: where the coefficient lives, `transforms.kl.coef`.
        start: its first value.
        target: KL to hold, in the units of `metric`; `kl` is in nats a token, the source's 6 of a whole completion.
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
