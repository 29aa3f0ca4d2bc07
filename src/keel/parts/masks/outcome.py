"""Masks that pick completions by what they earned."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from keel.core.aggregate import Groups, scalar_reward
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats


@part("failed", paper=11)
@dataclass(frozen=True)
class Failed:
    """All tokens of the completions that failed, or of the prompts at which every completion did.

        response    r < threshold
        group       r < threshold for every completion of the group that has a reward

    A completion without a reward has not failed, nor has a group without any.

    Args:
        threshold: reward from which on a completion is correct.
        level: response or group.

    Returns:
        Mask [B, T], False on padding.

    Raises:
        ValueError: several reward columns (put a WeightedSum before it).

    Source: "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning", 2025.
    """

    threshold: float = 1.0
    level: Literal["response", "group"] = "response"

    @property
    def additive(self) -> bool:
        """A group may be spread over slices."""
        return self.level == "response"

    def __call__(self, rows: Rows, stats: Stats) -> Bool[Tensor, "B T"]:
        reward = scalar_reward(rows)
        failed = reward < self.threshold
        if self.level == "group":
            groups = Groups.of(rows, ~reward.isnan())
            solved = groups.sum(((reward >= self.threshold) & (groups.weight > 0)).to(groups.weight))
            failed &= groups.broadcast(solved) == 0
        return rows.mask & torch.where(rows.main, failed, torch.zeros_like(failed))[:, None]
