"""Supervised learning as inverse reinforcement learning: the log-ratio to the reference is an implicit reward."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, masked_mean, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats

Matching = Literal["total_variation", "chi2", "hellinger", "js"]
Baseline = Literal["zero", "group", "batch"]


@dataclass(frozen=True)
class StateValue:
    """V = log sum_v exp(logit_v): with Q(y) = logit_y, Q - V is log pi(y), whatever constant all logits share."""

    of: tuple[str, ...] = ("policy",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Canonical name."""
        return "state_value" if self.of == ("policy",) else f"state_value({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        if at.differentiable:
            return at.logits(self.of[0]).logsumexp(-1)
        return at.log_z(self.of[0])


def concave(
    divergence: Matching, z: Float[Tensor, "*n"], largest: float = 10.0
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """phi(z) of a divergence, and its slope, which is the weight of an example.

        total_variation    z                  slope 1
        chi2               z - z^2 / 4        slope 1 - z / 2, 0 at z = 2 and negative beyond
        hellinger          z / (1 + z)        slope 1 / (1 + z)^2, of z > -1
        js                 log(2 - e^-z)      slope 1 / (2 e^z - 1), of z > -log 2

    phi(0) = 0 and phi'(0) = 1 for all. Where the slope of the last two would be above `largest`, phi goes on as a
    straight line of that slope: an example on which the policy has fallen far below the reference still has a
    gradient, and a finite one.

    >>> z = torch.tensor(0.2, dtype=torch.float64)
    >>> [round(float(concave(name, z)[1]), 6) for name in ("total_variation", "chi2", "hellinger", "js")]
    [1.0, 0.9, 0.694444, 0.693094]
    """
    if divergence == "total_variation":
        return z, torch.ones_like(z)
    if divergence == "chi2":
        return z - z.square() / 4, 1 - z / 2
    # the point at which the slope is the largest one
    edge = largest**-0.5 - 1 if divergence == "hellinger" else math.log((1 + 1 / largest) / 2)
    inside = z.clamp(min=edge)
    if divergence == "hellinger":
        value, slope = inside / (1 + inside), (1 + inside).pow(-2)
    else:
        value, slope = (-torch.expm1(-inside)).log1p(), 1 / (2 * inside.exp() - 1)
    below = z < edge
    return torch.where(below, value.detach() + largest * (z - edge), value), torch.where(below, largest, slope)


@part("implicit_reward_matching", paper=20)
@dataclass(frozen=True)
class ImplicitRewardMatching:
    """-coef * mean_i phi(z_i), z = beta sum_t (log pi - log ref)_t, over given completions.

    The soft value of the reward z + v is v for every policy, so that plain likelihood (total variation, phi = z) does
    not know how far the policy has moved. The other divergences weigh an example by phi'(z), which falls as the policy
    makes it likelier than the reference does; at the reference all weights are 1. See `concave`.

    With chi2, the value v can be optimised instead of held at 0:

        L = -mean z + var z / 4,      the variance over the whole batch, or over the completions of each prompt

    z is a sum over tokens: long completions need a smaller beta.

    Args:
        divergence: total_variation, chi2, hellinger or js.
        beta: factor of the log-ratios.
        value: zero holds v at 0; batch and group optimise it (chi2 only).
        largest: weight at which those of hellinger and js are held, towards their poles.
        read_values: measure V and Q = V + log pi of each token, and log their means.
        against: name of the reference model.
        coef: of the whole; 1 / beta makes the first step that of supervised learning.

    Returns:
        A number; 0 without any completion.

    Raises:
        ValueError: beta or largest out of range, an unknown divergence or value, or a value that is optimised with
            another divergence than chi2.

    Source: follows "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections", 2025; the table and the
    form with the variance are derived here, in the way of inverse soft Q-learning.
    """

    divergence: Matching = "chi2"
    beta: float = 0.1
    value: Baseline = "zero"
    largest: float = 10.0
    read_values: bool = False
    against: str = "ref"
    coef: float = 1.0
    additive = False

    def __post_init__(self) -> None:
        for name, known in (("divergence", Matching), ("value", Baseline)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} '{getattr(self, name)}' is not one of {', '.join(get_args(known))}")
        if self.value != "zero" and self.divergence != "chi2":
            raise ValueError(f"value '{self.value}' has a closed form for chi2 only, not for {self.divergence}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if not self.largest > 1:
            raise ValueError(f"largest must be above 1, the weight at the reference, not {self.largest}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference; the values, where they are read."""
        values = (StateValue(),) if self.read_values else ()
        return (LogProb(), LogProb(of=(self.against,)), *values)

    def rewards(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """z of each row."""
        policy, ref = (stats[LogProb(of=(name,))] for name in ("policy", self.against))
        precise = torch.promote_types(policy.dtype, torch.float32)
        gap = policy.to(precise) - ref.to(precise)
        return self.beta * torch.where(rows.mask, gap, torch.zeros_like(gap)).sum(1)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        z = self.rewards(rows, stats)
        weight = (rows.weight * rows.main).to(z)
        if self.value == "zero":
            return -self.coef * weighted_mean(concave(self.divergence, z, self.largest)[0], weight)
        centre = weighted_mean(z, weight) if self.value == "batch" else _group_means(z, rows)
        return -self.coef * weighted_mean(z - (z - centre).square() / 4, weight)

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """rewards/implicit is mean z, and rewards/trust the mean weight phi'(z); values/* as they are read."""
        z = self.rewards(rows, stats)
        weight = (rows.weight * rows.main).to(z)
        _, slope = concave(self.divergence, z, self.largest)
        out = {"rewards/implicit": weighted_mean(z, weight), "rewards/trust": weighted_mean(slope, weight)}
        if self.read_values:
            state, gap = stats[StateValue()], stats[LogProb()]
            out |= {"values/state": masked_mean(state, rows), "values/action": masked_mean(state + gap, rows)}
            out |= {"values/advantage": masked_mean(gap, rows)}
        return out


def _group_means(z: Float[Tensor, "B"], rows: Rows) -> Float[Tensor, "B"]:
    groups = Groups.of(rows)
    return groups.broadcast(groups.mean(z))
