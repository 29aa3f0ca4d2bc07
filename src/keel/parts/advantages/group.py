"""Advantages from the other completions of the same prompt.

R is the return of a completion: its reward plus the sum of its token rewards. A row without any reward is left out of
all statistics and gets advantage 0; so does every row of a tied group, exactly.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns, weighted_mean, weighted_std
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.statistics.stats import Stats


def broadcast(rows: Rows, per_row: Float[Tensor, "B"]) -> Rows:
    """Rows whose advantage is one number for all tokens of a row, 0 for rows without a reward."""
    per_row = torch.nan_to_num(per_row, nan=0.0)
    return rows.with_(advantage=per_row[:, None] * rows.mask)


@part("returns")
@dataclass(frozen=True)
class Returns:
    """A = R: plain REINFORCE, no baseline."""

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        return broadcast(rows, returns(rows))


@part("batch_centre")
@dataclass(frozen=True)
class BatchCentre:
    """A = R - mean of R over the batch."""

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        return broadcast(rows, value - weighted_mean(value, rows.weight * (rows.main & ~value.isnan())))


@part("group_centre")
@dataclass(frozen=True)
class GroupCentre:
    """A = R - mean of R over the group; 0 for a group of one.

    Source: GRPO ("DeepSeekMath", 2024), Dr. GRPO ("Understanding R1-Zero-Like Training", 2025).
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        centred = value - groups.broadcast(groups.mean(value))
        tied = groups.broadcast(groups.tied(value))
        return broadcast(rows, torch.where(tied, torch.zeros_like(centred), centred))


@part("group_std")
@dataclass(frozen=True)
class GroupStd:
    """A / (std of R + epsilon), the std unbiased (n - 1), over the group or the batch.

    A penalty inside the reward is divided, too, which rescales its coefficient by 1 / std.

    Args:
        epsilon: 1e-4 in TRL, 1e-6 in verl.
        scope: group or batch.

    Raises:
        ValueError: epsilon below 0, or another scope.

    Source: "DeepSeekMath", 2024.
    """

    epsilon: float = 1e-4
    scope: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        valid = ~value.isnan()
        if self.scope == "group":
            groups = Groups.of(rows, valid)
            spread = groups.broadcast(groups.std(value))
        else:
            spread = weighted_std(value, rows.weight * (rows.main & valid), rows.exact).expand(len(rows))
        return rows.with_(advantage=ratio(advantage(rows), (spread + self.epsilon)[:, None].expand_as(advantage(rows))))


@part("leave_one_out")
@dataclass(frozen=True)
class LeaveOneOut:
    """A = R_i - mean of the other R_j of the group = G / (G - 1) (R_i - mean); R - mean where enumerated.

    Source: "Back to Basics: Revisiting REINFORCE-Style Optimization", 2024.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        centred = value - groups.broadcast(groups.mean(value))
        if not rows.exact:
            size = groups.size()
            centred = centred * groups.broadcast(ratio(size, (size - 1).clamp(min=0)))
        tied = groups.broadcast(groups.tied(value))
        return broadcast(rows, torch.where(tied, torch.zeros_like(centred), centred))


@part("greedy_baseline")
@dataclass(frozen=True)
class GreedyBaseline:
    """A = R - R of the greedy completion of the same prompt, which the rollout adds (`greedy_baseline: true`).

    Raises:
        ValueError: a group has no greedy completion.

    Source: "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method", 2024.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows)
        baseline_rows = rows.stream == int(Stream.BASELINE)
        count = groups.sum(baseline_rows.to(value.dtype))
        if bool((count[groups.index[rows.main]] != 1).any()):
            raise ValueError("greedy_baseline needs one baseline row in each group: set rollout.greedy_baseline")
        baseline = groups.sum(torch.where(baseline_rows, value, torch.zeros_like(value)))
        return broadcast(rows, (value - groups.broadcast(baseline)) * rows.main)


def advantage(rows: Rows) -> Float[Tensor, "B T"]:
    """The advantage that an earlier part of the chain has set.

    Raises:
        ValueError: none has.
    """
    if rows.advantage is None:
        raise ValueError("this part changes an advantage: put it after one that sets it, such as group_centre")
    return rows.advantage
