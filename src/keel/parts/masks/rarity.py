"""Tokens that the policy rarely takes."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import token_weight, top_share
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


@part("rare_tokens", paper=86)
@dataclass(frozen=True)
class RareTokens:
    """The least likely of the punished tokens of the batch, and of the rewarded ones.

    Args:
        negative: share of the tokens with A < 0; where it is not 0, at least one token.
        positive: share of those with A > 0.

    Returns:
        Mask [B, T].

    Raises:
        ValueError: a share outside [0, 1], or rows without advantage.

    Source: "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable Reward", 2025. The
    authors' code takes none where the share is no more than one token, which switches it off in small batches.
    """

    negative: float = 0.01
    positive: float = 0.0
    needs = (LogProb(),)

    def __post_init__(self) -> None:
        for name in ("negative", "positive"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")

    def __call__(self, rows: Rows, stats: Stats) -> Bool[Tensor, "B T"]:
        if rows.advantage is None:
            raise ValueError("rare_tokens needs an advantage: the method's chain `advantage` is empty")
        found = self._rarest(rows, stats, rows.advantage < 0, self.negative)
        return found | self._rarest(rows, stats, rows.advantage > 0, self.positive)

    def _rarest(self, rows: Rows, stats: Stats, among: Bool[Tensor, "B T"], share: float) -> Bool[Tensor, "B T"]:
        weight: Float[Tensor, "B T"] = token_weight(rows) * among
        log_prob = stats[LogProb()].detach()
        return top_share(torch.where(rows.mask, -log_prob, torch.zeros_like(log_prob)), share, weight)
