"""Weights that take the gradient from a few tokens of high covariance."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import token_weight, top_share
from keel.core.choice import counter_seed, uniforms
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.masks.covariance import covariance
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

SALT = counter_seed("clip_cov") >> 8  # apart from the numbers that drew the tokens


@part("clip_cov", paper=47)
@dataclass(frozen=True)
class ClipCov:
    """0 on a random few of the tokens that would take the entropy down fastest, 1 elsewhere.

    Candidates have a covariance of log-probability and advantage between `low` and `high`, and are not silenced by the
    surrogate's clip. Of all counted tokens `fraction`, at least one, is drawn from them; all, if there are fewer. The
    denominator of the loss does not change. In an enumerated batch each candidate has its expected weight.

    Args:
        fraction: share of the counted tokens; 0 is off.
        low, high: of the covariance.
        epsilon, epsilon_high: clip range of the surrogate.

    Returns:
        Weights [B, T]; 1 on padding.

    Raises:
        ValueError: fraction outside [0, 1], low above high, or a negative clip range.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025. The draw depends on
    the row and the position alone, so that several updates of a batch rank the tokens alike.
    """

    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    needs = (LogProb(), LogProb(of=("old",)))

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], not {self.fraction}")
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        if self.epsilon < 0 or self.epsilon_high < 0:
            raise ValueError("epsilon and epsilon_high must not be negative")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        ones = torch.ones_like(stats[LogProb()]).detach()
        candidates = self.candidates(rows, stats)
        weight = token_weight(rows)
        available = float((weight * candidates).sum())
        if not available:
            return ones
        share = min(1.0, self.fraction * float(weight.sum()) / available)
        if rows.exact:
            return torch.where(candidates, ones * (1 - share), ones)
        places = torch.arange(rows.tokens.shape[1], device=rows.device)
        keys = uniforms(rows.row.repeat_interleave(len(places)), SALT + places.repeat(len(rows)))
        drawn = top_share(keys.reshape(rows.tokens.shape), share, weight * candidates)
        return torch.where(drawn, torch.zeros_like(ones), ones)

    def candidates(self, rows: Rows, stats: Stats) -> Bool[Tensor, "B T"]:
        """The tokens from which are drawn."""
        assert rows.advantage is not None
        found = covariance(rows, stats)
        rho = (stats[LogProb()].detach() - stats[LogProb(of=("old",))]).exp()
        silent = (rows.advantage > 0) & (rho > 1 + self.epsilon_high)
        silent = silent | ((rows.advantage < 0) & (rho < 1 - self.epsilon))
        return rows.loss_mask & (found > self.low) & (found < self.high) & ~silent
