"""Weights for what the sampler did differently from the trainer: exp(log old - log behaviour), never with gradient."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import masked_mean, ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


@part("truncated_importance")
@dataclass(frozen=True)
class TruncatedImportance:
    """min(w, cap) with w the ratio of old to behaviour, of a token or of a whole sequence.

    Args:
        cap: the largest weight.
        level: token, or sequence (the product over the counted tokens of a row).
        normalise: divide by the mean weight of the tokens of the step, so that the size of the step stays.

    Returns:
        Weights [B, T], 1 off the mask.

    Raises:
        ValueError: cap not positive, or the rows carry no behaviour log-probabilities.

    Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
    """

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"
    normalise: bool = False
    needs = (LogProb(of=("old",)),)

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    @property
    def additive(self) -> bool:
        """A mean over the tokens of the step is not that of a slice."""
        return not self.normalise

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        if "behaviour" not in rows.logp:
            raise ValueError("truncated_importance needs rows.logp['behaviour'], which rollouts record")
        gap = stats[LogProb(of=("old",))] - rows.logp["behaviour"]
        gap = torch.where(rows.mask, torch.nan_to_num(gap, nan=0.0), torch.zeros_like(gap))
        if self.level == "sequence":
            gap = gap.sum(1, keepdim=True).expand_as(gap)
        weight = gap.clamp(-20.0, 20.0).exp().clamp(max=self.cap)
        if self.normalise:
            weight = ratio(weight, masked_mean(weight, rows).expand_as(weight))
        return torch.where(rows.mask, weight, torch.ones_like(weight)).detach()
