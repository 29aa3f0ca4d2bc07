"""Advantages that look at the entropy of the policy that sampled."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.aggregate import Groups, masked_mean, ratio, returns
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage, broadcast
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats


@part("entropy_penalty", paper=30)
@dataclass(frozen=True)
class EntropyPenalty:
    """A - coef <H>, <H> the mean entropy over the tokens of the row; 0 where <H> is above `max_entropy`.

    A before it is kept in `columns["outcome_advantage"]`. A small A may change its sign. The filter is for models that
    begin with a low entropy: it is off for good if the mean of the first batch is above `starts_below`.

    Args:
        coef: of the entropy.
        max_entropy: rows above it are dropped, in nats; math.inf keeps all.
        starts_below: mean entropy of the first batch up to which there is a filter at all, in nats.

    Raises:
        ValueError: a negative setting.

    Source: "GTPO: Trajectory-Based Policy Optimization in Large Language Models", 2025.
    """

    coef: float = 0.1
    max_entropy: float = 0.7
    starts_below: float = math.log(2)
    needs = (Entropy(of=("old",)),)

    def __post_init__(self) -> None:
        for name in ("coef", "max_entropy", "starts_below"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def init(self) -> dict[str, Tensor]:
        """The mean entropy of the first batch, and whether there was one."""
        return {"first": torch.zeros(()), "seen": torch.zeros(())}

    def observe(self, rows: Rows, stats: Stats, metrics: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first batch is kept in mind."""
        return {"first": self._first(rows, stats, state).float().cpu(), "seen": torch.ones(())}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        before = advantage(rows)
        entropy = torch.where(rows.mask, stats[Entropy(of=("old",))], 0.0).to(before)
        mean = ratio(entropy.sum(1), rows.lengths.to(before))[:, None]
        filtered = (mean > self.max_entropy) & (self._first(rows, stats, state) <= self.starts_below)
        kept = rows.mask & ~filtered & ~returns(rows).isnan()[:, None]
        shaped = torch.where(kept, before - self.coef * mean, torch.zeros_like(before))
        return rows.with_(advantage=shaped, columns={**rows.columns, "outcome_advantage": before})

    def _first(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Tensor:
        here = masked_mean(stats[Entropy(of=("old",))], rows)
        return torch.where(state["seen"].to(here.device) > 0, state["first"].to(here), here)


@part("token_group_scale", paper=112)
@dataclass(frozen=True)
class TokenGroupScale:
    """A = (R - mu) / (sd + epsilon), mean and population deviation over all tokens of the group: sum(L A) = 0.

    A group in which some |A| is `largest` or more has the mean and the unbiased deviation of its rows.

    Args:
        epsilon: added to the deviation.
        largest: beyond which the rows are counted.

    Raises:
        ValueError: a negative epsilon, or `largest` not positive.

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025 (HAPO).
    """

    epsilon: float = 1e-6
    largest: float = 5.0

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.largest <= 0:
            raise ValueError(f"epsilon must not be negative and largest positive, got {self.epsilon}, {self.largest}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        value = torch.nan_to_num(value, nan=0.0)
        tokens = groups.weight * rows.lengths
        total = groups.sum(tokens)
        by_token = value - groups.broadcast(ratio(groups.sum(tokens * value), total))
        spread = ratio(groups.sum(tokens * by_token.square()), total).clamp(min=0).sqrt()
        by_token = by_token / (groups.broadcast(spread) + self.epsilon)
        by_row = (value - groups.broadcast(groups.mean(value))) / (groups.broadcast(groups.std(value)) + self.epsilon)
        steep = torch.where(groups.weight > 0, by_token.abs(), torch.zeros_like(value)) >= self.largest
        found = torch.where(groups.broadcast(groups.sum(steep.to(value))) > 0, by_row, by_token)
        idle = groups.broadcast(groups.tied(value)) | (groups.weight == 0)
        return broadcast(rows, torch.where(idle, torch.zeros_like(found), found))
