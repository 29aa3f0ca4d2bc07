"""Weights and selections for rows that the sampler drew otherwise than the trainer would: what is too far off goes.

w = pi_old / pi_behaviour throughout, the trainer's own view of the policy that sampled over what the engine recorded. A
weight of 0 keeps the token in the denominator of the mean; a rejected token leaves it: two different losses.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

OLD = LogProb(of=("old",))
LIMIT = 20.0  # log-ratios beyond +-20 are cut before exp
Level = Literal["token", "sequence", "geometric"]


def mismatch(rows: Rows, stats: Stats, who: str) -> Float[Tensor, "B T"]:
    """log w of each token, 0 off the mask and where the sampler reported NaN.

    Raises:
        ValueError: the rows carry no log-probabilities of the sampler.
    """
    if "behaviour" not in rows.logp:
        raise ValueError(f"{who} needs rows.logp['behaviour'], which rollouts record")
    gap = torch.nan_to_num(stats[OLD] - rows.logp["behaviour"], nan=0.0)
    return torch.where(rows.mask, gap, torch.zeros_like(gap)).clamp(-LIMIT, LIMIT)


def within(log_w: Float[Tensor, "B T"], low: float, high: float) -> Bool[Tensor, "B T"]:
    """Where low <= w <= high; the edges belong to it, up to rounding."""
    w = log_w.exp()
    return (w >= low * (1 - 1e-6)) & (w <= high * (1 + 1e-6))


def at_level(log_w: Float[Tensor, "B T"], rows: Rows, level: Level) -> Float[Tensor, "B T"]:
    """log w of the token, of the row (the product), or the row's geometric mean."""
    if level == "token":
        return log_w
    total = log_w.sum(1, keepdim=True)
    if level == "geometric":
        total = ratio(total, rows.lengths[:, None])
    return total.clamp(-LIMIT, LIMIT).expand_as(log_w)


def check_band(low: float, high: float, level: str) -> None:
    if not 0 <= low < high:
        raise ValueError(f"low and high must satisfy 0 <= low < high, not {low} and {high}")
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, not '{level}'")


@part("masked_importance")
@dataclass(frozen=True)
class MaskedImportance:
    """w where low <= w <= high, and 0 elsewhere.

        token       w of the token, judged by itself (IcePop with high = 5)
        sequence    the product over the row, judged by itself
        geometric   w of the token, judged by the row's geometric mean

    Args:
        low, high: what is kept; math.inf for no bound.
        level: what is judged.

    Returns:
        Weights [B, T], 1 off the mask.

    Raises:
        ValueError: not 0 <= low < high, another level, or rows without the sampler's log-probabilities.

    Source: "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model" (IcePop), 2025; the
    levels as in TRL and NeMo-RL.
    """

    low: float = 0.5
    high: float = 2.0
    level: Level = "token"
    needs = (OLD,)
    additive = True

    def __post_init__(self) -> None:
        check_band(self.low, self.high, self.level)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        log_w = mismatch(rows, stats, "masked_importance")
        judged = at_level(log_w, rows, self.level)
        weight = (judged if self.level == "sequence" else log_w).exp()
        weight = torch.where(within(judged, self.low, self.high), weight, torch.zeros_like(weight))
        return torch.where(rows.mask, weight, torch.ones_like(weight)).detach()


@part("stale_negatives")
@dataclass(frozen=True)
class StaleNegatives:
    """0 on rows with A < 0 from which the policy has moved away, mean_t(log pi_behaviour - log pi) > delta; else 1.

    They are far from what the policy would write, and a push away from them has no bound.

    Args:
        delta: in nats a token.
        against: whom the policy is compared with: the sampler as recorded, or the policy that prepared the batch.

    Returns:
        Weights [B, T].

    Raises:
        ValueError: a negative delta, or rows without the sampler's log-probabilities.

    Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025.
    """

    delta: float = 0.05
    against: Literal["behaviour", "old"] = "behaviour"
    needs = (LogProb(), OLD)
    additive = True

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise ValueError(f"delta must not be negative, got {self.delta}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        gap = stats[OLD] - stats[LogProb()].detach()
        gap = torch.where(rows.mask, gap, torch.zeros_like(gap))
        if self.against == "behaviour":
            gap = gap - mismatch(rows, stats, "stale_negatives")
        far = ratio(gap.sum(1), rows.lengths.to(gap.dtype)) > self.delta
        assert rows.advantage is not None
        return torch.where(far[:, None] & (rows.advantage < 0), 0.0, 1.0).to(gap)


@part("trust_region")
@dataclass(frozen=True)
class TrustRegion:
    """0 on tokens that have moved far enough already: p - p_old > high where A > 0, < -low where A < 0; else 1.

    |p - p_old| is the total variation between the two policies as a choice of this token or another. A clip of the
    ratio binds rare tokens hard and likely ones hardly; this one is the other way round.

    Args:
        low, high: in probability.
        against: whom the policy is compared with: the sampler as recorded, or the policy that prepared the batch.

    Returns:
        Weights [B, T].

    Raises:
        ValueError: a negative bound, or rows without the sampler's log-probabilities.

    Source: DPPO, "Rethinking the Trust Region in LLM Reinforcement Learning", 2026; as in prime-rl.
    """

    low: float = 0.2
    high: float = 0.2
    against: Literal["behaviour", "old"] = "behaviour"
    needs = (LogProb(), OLD)
    additive = True

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0:
            raise ValueError(f"low and high must not be negative, got {self.low} and {self.high}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        before = stats[OLD]
        if self.against == "behaviour":
            before = before - mismatch(rows, stats, "trust_region")
        moved = stats[LogProb()].detach().exp() - before.exp()
        assert rows.advantage is not None
        far = ((rows.advantage > 0) & (moved > self.high)) | ((rows.advantage < 0) & (moved < -self.low))
        return torch.where(far & rows.mask, 0.0, 1.0).to(before)
