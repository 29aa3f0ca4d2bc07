"""Advantages with another baseline, or another scale, than the group's mean and deviation."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage, broadcast
from keel.parts.advantages.stream import RewardToGo
from keel.statistics.functionals import LogProb
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats


@part("nonzero_scale")
@dataclass(frozen=True)
class NonzeroScale:
    """A B / #{R != 0}: the scale of the step does not fall with the share of completions that earned something.

    Source: "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning", 2025; counted as in verl.
    The paper counts the samples of groups that are not tied.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        weight = rows.weight * (rows.main & ~value.isnan())
        share = ratio((weight * (value != 0)).sum(), weight.sum())
        return rows.with_(advantage=ratio(advantage(rows), share.expand_as(advantage(rows))))


@part("length_baseline")
@dataclass(frozen=True)
class LengthBaseline:
    """A = R - sum(L R) / sum(L) over the group, L the tokens of a completion.

    The baseline of least variance, if the squared gradient of a completion grows with its length.

    Source: "On-Policy RL with Optimal Reward Baseline", 2025 (OPO).
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        length = groups.weight * rows.lengths
        earned = torch.where(length > 0, length * value, torch.zeros_like(value))
        baseline = ratio(groups.sum(earned), groups.sum(length))
        tied = groups.broadcast(groups.tied(value))
        return broadcast(rows, torch.where(tied, torch.zeros_like(value), value - groups.broadcast(baseline)))


@part("maximum_gain")
@dataclass(frozen=True)
class MaximumGain:
    """A = (R_max - R_second) / (std of the group + epsilon) for the best completion of a group, 0 for all others.

    The maximum of the group less that of the others: without the deviation, an unbiased policy gradient of E[max of G
    rewards], which is pass@G where rewards are 0 and 1. Two that tie for the best teach nothing.

    Args:
        epsilon: added to the deviation; None does not divide.

    Raises:
        ValueError: epsilon below 0.

    Source: "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning", 2025; scaled as in
    verl's estimator `grpo_passk`.
    """

    epsilon: float | None = 1e-6

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        value = torch.nan_to_num(value, nan=0.0)
        low, high = groups.range(value)
        best = (groups.weight > 0) & (value >= groups.broadcast(high))
        lone = groups.broadcast(groups.sum(best.to(value))) == 1
        rest = replace(groups, weight=torch.where(best, torch.zeros_like(groups.weight), groups.weight))
        second = torch.maximum(rest.range(value)[1], low)  # of a single row: itself
        gain = value - groups.broadcast(second)
        if self.epsilon is not None:
            gain = ratio(gain, groups.broadcast(groups.std(value)) + self.epsilon)
        return broadcast(rows, torch.where(best & lone, gain, torch.zeros_like(gain)))


@part("maximum_likelihood")
@dataclass(frozen=True)
class MaximumLikelihood:
    """A = (s - mean of s) / mean of s over the group, s = 1 where R >= threshold: log P(success) in place of P.

        grad log p = grad p / p,     log p = - sum over k of (1 - p)^k / k

    In groups of G, where one without a success has A = 0, the expected step is exactly that of the first G - 1 terms of
    the series, whose k-th is the chance that k completions all fail, over k.

    Args:
        threshold: a completion of at least this return is a success; None takes s = R, which must not be negative.

    Raises:
        ValueError: a negative return without a threshold.

    Source: "Maximum Likelihood Reinforcement Learning", 2026, arXiv 2602.02710.
    """

    threshold: float | None = 0.5

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        if self.threshold is not None:
            value = torch.where(value.isnan(), value, (value >= self.threshold).to(value))
        elif bool((value[rows.main] < 0).any()):
            raise ValueError("maximum_likelihood divides by the mean return: negative ones need a threshold")
        groups = Groups.of(rows, ~value.isnan())
        mean = groups.broadcast(groups.mean(value))
        tied = groups.broadcast(groups.tied(value))
        return broadcast(rows, torch.where(tied, torch.zeros_like(value), ratio(value - mean, mean)))


@dataclass(frozen=True)
class Collision:
    """sum_v pi_v^2 at each position: the chance that two draws agree."""

    of: tuple[str, ...] = ("old",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The canonical name."""
        return f"collision({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        return at.probs(self.of[0], None).square().sum(-1)


@part("optimal_token_baseline")
@dataclass(frozen=True)
class OptimalTokenBaseline:
    """A_t = G_t - b_t, b_t = sum(W_t G_t) / sum(W_t) over the rows of the group that reach position t.

        W_t = sum over u <= t of 1 - 2 pi(y_u) + sum_v pi_v^2

    G_t is the reward to go, and W_t the squared gradient of log pi(y_1..t) in the logits: the baseline of least
    variance at each position, as far as the logits tell. A row's own W and G are in its baseline, so that the expected
    step of a small group is biased.

    Source: optimal token baseline, 2026, arXiv 2602.07078; as in verl.
    """

    needs = (LogProb(of=("old",)), Collision())

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = returns(rows)
        to_go = advantage(RewardToGo()(rows, stats))
        energy = 1 - 2 * stats[LogProb(of=("old",))].exp() + stats[Collision()]
        energy = torch.where(rows.mask, energy, torch.zeros_like(energy)).cumsum(1) * rows.mask
        groups = Groups.of(rows, ~value.isnan())
        share = groups.weight[:, None] * energy
        earned = share * to_go
        zeros = earned.new_zeros(groups.count, earned.shape[1])
        total = zeros.index_add(0, groups.index, share.to(earned))
        baseline = ratio(zeros.index_add(0, groups.index, earned), total)
        gain = to_go - groups.broadcast(baseline)
        idle = value.isnan()
        if rows.token_reward is None:  # the same return everywhere: exactly nothing, not almost
            idle = idle | groups.broadcast(groups.tied(value))
        counted = rows.mask & ~idle[:, None]
        return rows.with_(advantage=torch.where(counted, gain, torch.zeros_like(gain)))
