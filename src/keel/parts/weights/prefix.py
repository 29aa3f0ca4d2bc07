"""Weights for trees: how often a shared beginning counts, and what makes up for branches that were opened by force."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

POLICIES = ("all", "once", "owner", "exclude")


@part("prefix_weight", paper=[109, 204, 206])
@dataclass(frozen=True)
class PrefixWeight:
    """What a token counts in each of the rows that share it, `mult` of them.

        all       1: in every row; k rows count a token k times, in the denominator of a mean over tokens, too
        once      1 / mult
        owner     1 in the first row, 0 in the others
        exclude   0 if shared

    The denominators of the aggregation do not change. Where each row is divided by its own length, copies of a shared
    token do not cancel under `all`; nor do they once a clip cuts gains and losses at different ratios. A beginning that
    was replayed or edited does not come from the policy and needs `exclude`. With row weights, `once` gives a shared
    token the mean weight of its rows; `owner` that of one row.

    Args:
        policy: one of the four.

    Returns:
        Weights [B, T]; 1 on padding, and everywhere if the rows share nothing.

    Raises:
        ValueError: an unknown policy.

    Source: owner is CURE's (2025), exclude R3L's (2026), all LATR's (2025).
    """

    policy: Literal["all", "once", "owner", "exclude"] = "all"
    additive = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not '{self.policy}'")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        ones = torch.ones(rows.tokens.shape, dtype=rows.weight.dtype, device=rows.device)
        if self.policy == "all" or "mult" not in rows.columns:
            return ones
        mult = rows.columns["mult"]
        if self.policy == "once":
            weight = 1 / mult.clamp(min=1).to(ones)
        elif self.policy == "owner":
            weight = rows.columns["owner"].to(ones) / rows.mult.clamp(min=1)  # the field counts an owner for all rows
        else:
            weight = (mult == 1).to(ones)
        return torch.where(mult > 0, weight, ones)


@part("branch_correction")
@dataclass(frozen=True)
class BranchCorrection:
    """pi_old(token) / q(token) of the branches that were opened by force, the product along a row.

    A search that opens k tokens, each once, draws them with q = 1 / k; without the ratio its rows are no samples of the
    policy, and the mean over them is no gradient. Tokens that it never opens stay uncounted. Proposals that the weights
    of a sampler make up for are not forced.

    Args:
        cap: largest weight; None for none.

    Returns:
        Weights [B, T], the same for all tokens of a row; 1 where nothing was forced.

    Raises:
        ValueError: cap not positive.

    Source: importance sampling; off-policy tree search without it is LATR's (2025).
    """

    cap: float | None = None
    additive = True

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        ones = torch.ones(rows.tokens.shape, dtype=rows.weight.dtype, device=rows.device)
        if "correction" not in rows.columns:
            return ones
        log_ratio = rows.columns["correction"].sum(1).clamp(-20.0, 20.0)
        weight = log_ratio.exp().clamp(max=math.inf if self.cap is None else self.cap)
        return weight[:, None].to(ones) * ones
