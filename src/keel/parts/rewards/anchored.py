"""Rewards that take the reference's odds out of the optimum among good completions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.curation import group_max, scalar_reward
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("mode_anchor")
@dataclass(frozen=True)
class ModeAnchor:
    """Mode-anchored reward augmentation: among good completions the reward pays back what the reference prefers.

        r'(y) = r(z) + beta (log ref(z) - log ref(y))   where r(y) >= threshold,   r(y) elsewhere

    z is the likeliest good completion under the reference, of the group; on enumerated rows, of all. The optimum of
    E[r'] - beta KL(policy || ref) is ref e^(r' / beta) / Z, in which every good completion has the probability
    ref(z) e^(r(z) / beta) / Z: uniform, whatever the reference's odds. The coefficient must be that of the KL.

    With KL(ref || policy) the same r' does not make the optimum uniform. It is beta ref / (c - r'), in which a good
    completion's probability falls as ref(y) grows wherever the optimum lies above the reference, and grows where it
    lies below: among the answers that the reward lifts, the rarest ends up with the most.

    Args:
        beta: coefficient of the KL in the reward.
        threshold: tau; completions of at least this reward are good.
        against: name of the reference model.

    Raises:
        ValueError: beta not positive, or several reward columns (put a WeightedSum before it).

    Source: "KL-Regularized Reinforcement Learning is Designed to Mode Collapse", 2025, arXiv 2510.20817.
    """

    beta: float
    threshold: float = 1.0
    against: str = "ref"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference."""
        return (LogProb(of=(self.against,)),)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        reference = sequence_log_prob(rows, stats, self.against).to(reward.dtype)
        good = reward >= self.threshold  # False for NaN
        groups = Groups.of(rows, good)
        highest = groups.broadcast(group_max(reference, groups))
        anchor = (groups.weight > 0) & (reference == highest)
        worth = groups.broadcast(group_max(torch.where(anchor, reward, -torch.inf), groups))
        anchored = worth + self.beta * (highest - reference)
        return rows.with_(reward=torch.where(good & highest.isfinite(), anchored, reward)[:, None])


def sequence_log_prob(rows: Rows, stats: Stats, model: str) -> Float[Tensor, "B"]:
    """log p(y | x) of whole completions under a model that was measured."""
    tokens = stats[LogProb(of=(model,))]
    return torch.where(rows.mask, tokens, torch.zeros_like(tokens)).sum(1)
