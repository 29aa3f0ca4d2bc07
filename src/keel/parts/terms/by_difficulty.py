"""A KL whose coefficient follows a target, apart for easy, medium and hard prompts."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Aggregation, ratio, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

LEVELS = 3


@part("kl_by_difficulty", paper=53)
@dataclass(frozen=True)
class KLByDifficulty:
    """coef Agg[beta_d k3(log pi - log ref)],   d the difficulty of the row's prompt, from the column `difficulty`.

        e <- decay e + (1 - decay) (KL_d / target - 1, or 0 within `dead` of 0)
        every `every` batches   log beta_d <- log beta_d + rate clip(e, -clip, clip)

    beta_d begins at 1 and stays there while the target is None. KL_d is the mean of k3 over the tokens of a row, over
    the rows of that difficulty. Rows without the column are medium.

    Args:
        coef: of all.
        target: KL per token, in nats.
        rate, clip, dead, decay, every: of the controller.
        aggregation: how the numbers of the tokens become one.
        against: name of the reference model.

    Raises:
        ValueError: a negative coef, a target that is not positive, decay outside [0, 1), or every below 1.

    Source: "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", 2025.
    """

    coef: float = 1e-2
    target: float | None = 0.01
    rate: float = 0.05
    clip: float = 0.2
    dead: float = 0.02
    decay: float = 0.97
    every: int = 100
    aggregation: Aggregation = Aggregation()
    against: str = "ref"
    additive = True

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        if self.target is not None and self.target <= 0:
            raise ValueError(f"target must be positive, not {self.target}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference."""
        return (LogProb(), LogProb(of=(self.against,)))

    def init(self) -> dict[str, Any]:
        """log beta and the averaged error by difficulty, and the batches seen."""
        return {"log_beta": torch.zeros(LEVELS), "error": torch.zeros(LEVELS), "batches": 0}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Float[Tensor, ""]:
        each = estimate("k3", stats[LogProb()] - stats[LogProb(of=(self.against,))])
        beta = state["log_beta"].exp().to(each)[difficulty(rows)]
        return self.coef * self.aggregation(beta[:, None] * each, rows)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """The errors with this batch, and after `every` batches the coefficients."""
        old, ref = LogProb(of=("old",)), LogProb(of=(self.against,))
        live = stats[old] if old in stats else rows.logp.get("behaviour")
        if self.target is None or live is None or ref not in stats:
            return state
        each = torch.where(rows.mask, estimate("k3", live - stats[ref]), torch.zeros_like(stats[ref]))
        per_row = ratio(each.sum(1), rows.lengths.to(each.dtype))
        level, weight = difficulty(rows), rows.weight.to(each.dtype) * rows.main
        error = state["error"].clone()
        for d in range(LEVELS):
            here = weight * (level == d)
            if bool((here > 0).any()):
                error[d] = self.averaged(float(error[d]), float(weighted_mean(per_row, here)))
        batches = state["batches"] + 1
        step = self.rate * error.clamp(-self.clip, self.clip)
        log_beta = state["log_beta"] + step if batches % self.every == 0 else state["log_beta"]
        for d in range(LEVELS):
            metrics[f"kl_by_difficulty/{d}"] = math.exp(float(log_beta[d]))
        return {"log_beta": log_beta, "error": error, "batches": batches}

    def averaged(self, before: float, kl: float) -> float:
        """The averaged error after one more KL."""
        assert self.target is not None
        error = kl / self.target - 1
        error = 0.0 if abs(error) <= self.dead else error
        return self.decay * before + (1 - self.decay) * error


def difficulty(rows: Rows) -> Tensor:
    """0 easy, 1 medium, 2 hard; medium where the rows do not say."""
    found = rows.columns.get("difficulty")
    return torch.ones_like(rows.group) if found is None else found.long()
