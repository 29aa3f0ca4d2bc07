"""Completions that were right and wrong are treated differently: a weight of the KL, a factor on long mistakes."""

import math
from dataclasses import dataclass

import torch

from keel.core.aggregate import Groups, scalar_reward
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage
from keel.statistics.stats import Stats


@part("difficulty_kl_weight", paper=14)
@dataclass(frozen=True)
class DifficultyKLWeight:
    """Leaves a weight of the KL in `columns["kl_weight"]`: the harder the prompt, the freer its good completions.

        kappa = 1 - exp(-e (1 - d)) where A > 0 and 0 < d < 1,   1 elsewhere;   d = share of wrong completions

    Args:
        threshold: reward from which on a completion is correct.
        column: where the weight is left.

    Raises:
        ValueError: no advantage yet, or several reward columns.

    Source: "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization", 2025 (DADS); e is Euler's
    number. An older formula that survives there as a comment has the difficulty the other way round.
    """

    threshold: float = 1.0
    column: str = "kl_weight"

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        groups = Groups.of(rows, ~reward.isnan())
        easy = groups.broadcast(groups.mean((reward >= self.threshold).to(rows.weight.dtype)))
        gained = (advantage(rows) * rows.mask).sum(1) > 0
        mixed = (easy > 1e-9) & (easy < 1 - 1e-9)
        kappa = torch.where(gained & mixed, -torch.expm1(-math.e * easy), torch.ones_like(easy))
        return rows.with_(columns={**rows.columns, self.column: kappa})


@part("long_mistakes", paper=14)
@dataclass(frozen=True)
class LongMistakes:
    """Wrong completions longer than the mean correct one of their group have a larger negative advantage.

        A <- A (2 - base^-(L - Lbar)) where r < threshold and L > Lbar;   A elsewhere, and where nothing is correct

    The sum over a group is no longer 0.

    Args:
        base: above 1; how fast the factor goes from 1 to 2.
        threshold: reward from which on a completion is correct.

    Raises:
        ValueError: base not above 1, no advantage yet, or several reward columns.

    Source: "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization", 2025 (STCR).
    """

    base: float = 1.00001
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base must be above 1, not {self.base}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward, length = scalar_reward(rows), rows.lengths.to(rows.weight.dtype)
        well = Groups.of(rows, reward >= self.threshold)
        known = well.broadcast(well.sum(well.weight)) > 0
        excess = length - well.broadcast(well.mean(length))
        punished = known & (reward < self.threshold) & (excess > 0)
        factor = torch.where(punished, 2 - (-math.log(self.base) * excess).exp(), torch.ones_like(length))
        return rows.with_(advantage=advantage(rows) * factor[:, None].to(advantage(rows)))
