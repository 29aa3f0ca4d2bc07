"""Rewards that say how often a completion is chosen: with them, maximum likelihood learns from the chosen.

A selection weight w has mean 1 over what was sampled. With the advantage A = R and the surrogate A log pi, the step is
that of supervised learning on p(y) w(y), the law of the chosen completions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.aggregate import scalar_reward as scalar_reward
from keel.core.choice import counter_seed, uniforms
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

LIMIT = 20.0  # log-ratios beyond it are cut before exp
CHOICE = counter_seed("curated choice")  # the counter of this part's randomness


def group_max(values: Float[Tensor, "B"], groups: Groups) -> Float[Tensor, "N"]:
    """The largest value among the rows of each group that count; -inf without any."""
    return groups.range(values)[1]


@part("curated_choice", paper=207)
@dataclass(frozen=True)
class CuratedChoice:
    """The selection weight of a chooser who takes one of K candidates with probability softmax(r).

        sampled      K for the chosen candidate, 0 for the others
        enumerated   H(y) = E over y_2 .. y_K of K e^r(y) / (e^r(y) + sum_j e^r(y_j))

    A group of m K candidates makes m choices, each among K that the hashes of the rows decide. Rows without a reward
    are no candidates. As K grows H tends to e^r / E[e^r], so that t rounds tilt the first policy by e^(t r).

    The expectation is a single integral, E[a / (a + S)] = int_0^inf a e^(-t a) E[e^(-t a')]^(K - 1) dt with a = e^r,
    taken by the trapezoid rule in log t, which converges faster than any power.

    Args:
        num_candidates: K.
        expected: give every candidate K softmax(r) in place of a draw: the same mean, less noise.

    Raises:
        ValueError: K below 2, or several reward columns.

    Source: "Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences", 2024.
    """

    num_candidates: int = 4
    expected: bool = False

    def __post_init__(self) -> None:
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2, not {self.num_candidates}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        if rows.exact:
            weight = self.enumerated(reward, Groups.of(rows, ~reward.isnan()))
        else:
            weight = self.sampled(reward, rows)
        return rows.with_(reward=torch.where(reward.isnan(), reward, weight)[:, None])

    def sampled(self, reward: Float[Tensor, "B"], rows: Rows) -> Float[Tensor, "B"]:
        """K times whether the row was chosen; with `expected`, K times the probability that it is."""
        groups = choices(rows, ~reward.isnan(), self.num_candidates)
        score = reward + groups.weight.log()
        if self.expected:
            top = groups.broadcast(group_max(score, groups))
            odds = torch.where(groups.weight > 0, (score - top).exp(), 0.0)
            share = ratio(odds, groups.broadcast(groups.sum(odds)))
        else:
            chance = uniforms(rows.row, CHOICE).clamp(min=2.0**-60)
            score = score - (-chance.log()).log().to(score.dtype)  # Gumbel noise: the largest sum is softmax's draw
            share = (score == groups.broadcast(group_max(score, groups))).to(reward.dtype)
        whole = groups.broadcast(groups.sum(groups.weight))
        return torch.where(groups.weight > 0, share * ratio(whole, groups.weight), 0.0)

    def enumerated(self, reward: Float[Tensor, "B"], groups: Groups) -> Float[Tensor, "B"]:
        """H of each row, from the probabilities of its group."""
        low, high = groups.range(reward)
        odds = torch.where(groups.weight > 0, (reward - groups.broadcast(high)).exp(), 1.0).double()
        spread = float(torch.where(high >= low, high - low, 0.0).max())
        step, end = 0.125, 4.0 + spread
        log_t = torch.arange(-40.0, end, step, dtype=torch.float64, device=reward.device)
        decay = torch.exp(-odds[:, None] * log_t.exp())  # e^(-t a), [B, nodes]
        share = ratio(groups.weight.double(), groups.broadcast(groups.sum(groups.weight)).double())
        mean = decay.new_zeros(groups.count, len(log_t)).index_add(0, groups.index, share[:, None] * decay)
        integrand = decay * mean[groups.index] ** (self.num_candidates - 1) * log_t.exp()
        chosen = self.num_candidates * odds * step * integrand.sum(1)
        return torch.where(groups.weight > 0, chosen, 0.0).to(reward.dtype)


def choices(rows: Rows, valid: Bool[Tensor, "B"], size: int) -> Groups:
    """Each group split into as many parts of at least `size` rows as it holds, by the hashes of its rows."""
    groups = Groups.of(rows, valid)
    counted = groups.weight > 0
    order = torch.argsort(rows.row, stable=True)
    order = order[torch.argsort(groups.index[order], stable=True)]
    order = order[counted[order]]
    number = torch.bincount(groups.index[order], minlength=groups.count)
    first = number.cumsum(0) - number
    rank = torch.zeros_like(groups.index)
    rank[order] = torch.arange(len(order), device=order.device) - first[groups.index[order]]
    parts = (number // size).clamp(min=1)
    within = torch.where(counted, rank * parts[groups.index] // number[groups.index].clamp(min=1), 0)
    widest = int(parts.max()) if len(parts) else 1
    return Groups(groups.index * widest + within, groups.count * widest, groups.weight, rows.exact)


@part("best_of_group")
@dataclass(frozen=True)
class BestOfGroup:
    """The selection weight of best-of-n: how often a completion is the best of n, ties shared equally.

        enumerated   (F(r)^n - F(r-)^n) / (F(r) - F(r-)),   F the distribution function of the reward
        sampled      G P(best of a random n of the G in the group)
                     = G [C(#{r_j <= r}, n) - C(#{r_j < r}, n)] / (C(G, n) #{r_j = r})

    The second is unbiased for the first at any G >= n; at G = n all weight is on the best of the group. Rows without a
    reward are left out; a group that has fewer than n others is as if n were their number.

    Args:
        n: completions of which the best is taken.

    Raises:
        ValueError: n below 1, or several reward columns.

    Source: best-of-N in closed form, as in "BOND: Aligning LLMs with Best-of-N Distillation", 2024.
    """

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        groups = Groups.of(rows, ~reward.isnan())
        mass = groups.weight if rows.exact else (groups.weight > 0).to(reward.dtype)
        same = groups.index[:, None] == groups.index
        below = (same & (reward < reward[:, None])).to(reward.dtype) @ mass
        tied = (same & (reward == reward[:, None])).to(reward.dtype) @ mass
        whole = groups.broadcast(groups.sum(mass))
        if rows.exact:
            won = ratio(below + tied, whole) ** self.n - ratio(below, whole) ** self.n
        else:
            won = subsets(below + tied, whole, self.n) - subsets(below, whole, self.n)
        weight = torch.where(groups.weight > 0, won * ratio(whole, tied), 0.0)
        return rows.with_(reward=torch.where(reward.isnan(), reward, weight)[:, None])


def subsets(some: Float[Tensor, "B"], all_: Float[Tensor, "B"], n: int) -> Float[Tensor, "B"]:
    """C(some, m) / C(all, m) with m the smaller of n and `all`: the share of m-subsets that lie within `some`.

    >>> subsets(torch.tensor([3.0]), torch.tensor([4.0]), 2)
    tensor([0.5000])
    """
    share = torch.ones_like(some)
    for j in range(n):
        share = share * torch.where(all_ > j, ratio((some - j).clamp(min=0), (all_ - j).clamp(min=1)), 1.0)
    return share


@part("reference_share", paper=207)
@dataclass(frozen=True)
class ReferenceShare:
    """Part of the training data comes from the reference: w <- (1 - fraction) w + fraction ref(y) / old(y).

    The second summand is maximum likelihood on the reference's own distribution, carried by samples of the policy. With
    w the weight of curated choice the fixed point of a round is

        p = ref / (1 + lam) + lam / (1 + lam) p H,   lam = (1 - fraction) / fraction

    in which p >= ref / (1 + lam), so that near it no ratio exceeds 1 / fraction. Far from it the ratios can
    concentrate on a few rows; the metric `reference_share/ess` is their effective share, 1 where all are equal.

    Args:
        fraction: of the data.
        cap: the largest ratio; None leaves them as they are.
        against: name of the reference model.

    Raises:
        ValueError: fraction outside [0, 1], cap not positive, or several reward columns.

    Source: "Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences", 2024.
    """

    fraction: float = 0.5
    cap: float | None = None
    against: str = "ref"

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], not {self.fraction}")
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def init(self) -> dict[str, Tensor]:
        """Nothing to remember; the part only reports."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        mixed = (1 - self.fraction) * scalar_reward(rows) + self.fraction * self.ratios(rows, stats)
        return rows.with_(reward=mixed[:, None])

    def ratios(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """ref(y) / old(y) of whole completions."""
        gap = stats[LogProb(of=(self.against,))] - stats[LogProb(of=("old",))]
        found = torch.where(rows.mask, gap, torch.zeros_like(gap)).sum(1).clamp(-LIMIT, LIMIT).exp()
        return found if self.cap is None else found.clamp(max=self.cap)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reports the effective share of the ratios, (sum w)^2 / (n sum w^2)."""
        weight, found = rows.weight * rows.main, self.ratios(rows, stats)
        share = ratio((weight * found).sum().square(), weight.sum() * (weight * found.square()).sum())
        metrics["reference_share/ess"] = float(share)
        return state
