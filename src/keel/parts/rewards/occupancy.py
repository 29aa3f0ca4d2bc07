"""Rewards for staying where the reference goes: chi-square between the distributions of whole completions."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.anchored import sequence_log_prob
from keel.parts.rewards.curation import LIMIT, scalar_reward
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Kind = Literal["sqrt_chi2", "chi2", "kl"]


@part("occupancy_penalty", paper=4)
@dataclass(frozen=True)
class OccupancyPenalty:
    """Added to the reward of a completion so that the policy gradient is that of a divergence of occupancies.

        u = old(y) / ref(y)     chi2 = E_old[u] - 1
        kl           r - coef log u
        chi2         r - coef 2 (u - 1)
        sqrt_chi2    r - coef (u - 1) / sqrt(chi2),   chi2 the mean of u - 1 over the batch

    A completion is an episode whose states are visited once, so that its occupancy ratio is the ratio of likelihoods
    and needs no discriminator. With sqrt_chi2 the optimum is the reference itself as long as coef is above the standard
    deviation of the reward under it.

    Args:
        coef: in units of reward; the paper takes 0.01 to 1 standard deviations of the reward under the reference.
        kind: which of the three.
        trim: share of the batch left out of the mean of u - 1 at each end, for sampled rows; below 1 / trim rows none.
        clip: bound of what is added; None is none.
        against: name of the reference model.

    Raises:
        ValueError: a negative coef, trim outside [0, 0.5), a clip that is not positive, or several reward columns.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024 (there called ORPO).
    The released reward of chi2 is half of this one, which changes coef only; and where it trims fewer than 100 numbers
    its mean is empty.
    """

    coef: float = 0.1
    kind: Kind = "sqrt_chi2"
    trim: float = 0.01
    clip: float | None = None
    against: str = "ref"

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim must be in [0, 0.5), not {self.trim}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive, not {self.clip}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        log_u = sequence_log_prob(rows, stats, "old") - sequence_log_prob(rows, stats, self.against)
        log_u = torch.nan_to_num(log_u, nan=0.0).clamp(-LIMIT, LIMIT)
        added = -self.coef * slope(log_u, rows.weight * rows.main, self.kind, 0.0 if rows.exact else self.trim)
        added = added if self.clip is None else added.clamp(-self.clip, self.clip)
        return rows.with_(reward=(scalar_reward(rows) + added)[:, None])


def slope(d: Float[Tensor, "B"], weight: Float[Tensor, "B"], kind: Kind, trim: float) -> Float[Tensor, "B"]:
    """What to take off the rewards so that their policy gradient is that of a divergence of occupancies.

    Args:
        d: log(mu_policy / mu_reference) at what the policy visited: known, or a discriminator's.
        weight: of the visits.
        kind: kl gives d, chi2 2 (e^d - 1), sqrt_chi2 (e^d - 1) / sqrt(chi2), undivided where chi2 is not positive.
        trim: share of the visits left out of the mean of e^d - 1 at each end.
    """
    excess = torch.expm1(d)
    if kind == "kl":
        return d
    if kind == "chi2":
        return 2 * excess
    chi2 = trimmed_mean(excess, weight, trim)
    return excess / torch.where(chi2 > 0, chi2, torch.ones_like(chi2)).sqrt()


def trimmed_mean(values: Float[Tensor, "B"], weight: Float[Tensor, "B"], trim: float) -> Float[Tensor, ""]:
    """Mean without the floor(trim n) smallest and largest, n the total weight; a row of weight 2 counts as two.

    >>> float(trimmed_mean(torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.ones(4), 0.25))
    1.5
    """
    order = values.argsort()
    values, weight = values[order], weight[order]
    upto, total = weight.cumsum(0), weight.sum()
    out = (trim * total + 1e-6).floor()
    kept = (upto.clamp(max=total - out) - (upto - weight).clamp(min=out)).clamp(min=0)
    return weighted_mean(values, kept)
