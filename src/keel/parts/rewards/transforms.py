"""Transforms of rewards, before the advantages: rows -> rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean, weighted_std
from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("weighted_sum")
@dataclass(frozen=True)
class WeightedSum:
    """The reward columns as one: sum_k w_k r_k over the columns that apply; NaN where none does.

    Args:
        weights: one for each reward function, in their order; None gives each 1.

    Raises:
        ValueError: the number of weights is not that of the columns.
    """

    weights: tuple[float, ...] | None = None

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = _reward(rows)
        if self.weights is not None and len(self.weights) != reward.shape[1]:
            raise ValueError(f"{len(self.weights)} weights for {reward.shape[1]} reward columns")
        weights = reward.new_tensor(self.weights or (1.0,) * reward.shape[1])
        total = torch.nansum(reward * weights, 1)
        nothing = reward.isnan().all(1)
        return rows.with_(reward=torch.where(nothing, torch.full_like(total, torch.nan), total)[:, None])


def summed(rows: Rows, transforms: Mapping[str, Any]) -> Float[Tensor, "B"]:
    """One number a row, as the `WeightedSum` among the transforms weighs its rewards, or all by 1; 0 without any.

    Raises:
        ValueError: rows without reward, or another number of weights than of rewards.
    """
    weighted = next((item for item in transforms.values() if isinstance(item, WeightedSum)), WeightedSum())
    total = _reward(weighted(rows, Stats()))[:, 0]
    return torch.where(total.isnan(), torch.zeros_like(total), total)


@part("clip_reward")
@dataclass(frozen=True)
class ClipReward:
    """min(max(r, low), high), each column.

    Raises:
        ValueError: low above high.
    """

    low: float = -5.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        return rows.with_(reward=_reward(rows).clamp(self.low, self.high))


@part("whiten_reward")
@dataclass(frozen=True)
class WhitenReward:
    """(r - mean) / (std + epsilon) of each column over the main rows of the batch.

    Args:
        centre: subtract the mean, too.
        epsilon: added to the standard deviation.
    """

    centre: bool = True
    epsilon: float = 1e-8

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        columns = []
        for column in _reward(rows).unbind(1):
            weight = rows.weight * (rows.main & ~column.isnan())
            mean = weighted_mean(column, weight) if self.centre else 0.0
            columns.append((column - mean) / (weighted_std(column, weight, rows.exact) + self.epsilon))
        return rows.with_(reward=torch.stack(columns, 1))


@part("overlong")
@dataclass(frozen=True)
class Overlong:
    """Soft punishment of length, added to every reward column: put a WeightedSum before it where there are several.

        0                                      L <= max_length - cache
        ((max_length - cache) - L) / cache     up to max_length
        -1                                     beyond

    Args:
        max_length: tokens at which the punishment is full.
        cache: tokens over which it grows.

    Raises:
        ValueError: cache outside (0, max_length].

    Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", 2025, eq. 13.
    """

    max_length: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_length:
            raise ValueError(f"cache must be in (0, max_length={self.max_length}], not {self.cache}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        length = rows.lengths.float()
        soft = (((self.max_length - self.cache) - length) / self.cache).clamp(-1.0, 0.0)
        return rows.with_(reward=_reward(rows) + soft[:, None])


@part("kl_in_reward")
@dataclass(frozen=True)
class KLInReward:
    """-coef * k(log old - log ref) added to the reward of every token.

    With k1 the expected gradient of the result is that of the reward minus coef * KL(policy || ref) of whole sequences;
    with k2 or k3 it is not.

    Args:
        coef: beta.
        estimator: k1, k2 or k3.
        against: name of the reference model.

    Raises:
        ValueError: a negative coef, or an unknown estimator.

    Source: "Training language models to follow instructions with human feedback", 2022.
    """

    coef: float = 0.05
    estimator: str = "k1"
    against: str = "ref"

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"estimator '{self.estimator}' is not one of k1, k2, k3")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        difference = stats[LogProb(of=("old",))] - stats[LogProb(of=(self.against,))]
        penalty = -self.coef * estimate(self.estimator, difference) * rows.mask  # type: ignore[arg-type]
        return rows.with_(token_reward=penalty if rows.token_reward is None else rows.token_reward + penalty)


def _reward(rows: Rows) -> Tensor:
    if rows.reward is None:
        raise ValueError("these rows have no reward")
    return rows.reward
