"""Penalties that hold single tokens: to the policy that sampled, or to a filtered copy of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats
from keel.statistics.transforms import KeepMinP


@part("absolute_log_ratio", paper=47)
@dataclass(frozen=True)
class AbsoluteLogRatio:
    """|log pi - log old| at the sampled token: a pull of the same strength at any distance.

    It has no gradient at log pi = log old, so nothing happens on the first update after the batch was drawn.

    Args:
        against: name of the model that the token is held to.

    Source: KL-Cov, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025.
    """

    against: str = "old"
    additive = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and the other."""
        return (LogProb(), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return (stats[LogProb()] - stats[LogProb(of=(self.against,))]).abs()


@part("filtered_pull", paper=86)
@dataclass(frozen=True)
class FilteredPull:
    """exp(u) - u - 1 with u = log old~(y) - log pi(y), where u > 0; 0 elsewhere.

    old~ is the policy that sampled without the tokens below `min_p` times the likeliest, renormalised. A token that the
    filter removed has u = -inf and is let go; one that it kept is raised towards a probability in which the removed
    mass is shared out. On the policy's samples it has the gradient of KL(old~ || policy), but for the push that this
    would give the removed tokens.

    Args:
        min_p: of the filter.

    Raises:
        ValueError: min_p outside [0, 1].

    Source: "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable Reward", 2025.
    """

    min_p: float = 0.02
    additive = True

    def __post_init__(self) -> None:
        _ = self.target

    @property
    def target(self) -> LogProb:
        """log old~."""
        return LogProb(of=("old",), transform=KeepMinP(self.min_p) if self.min_p else None)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and target."""
        return (LogProb(), self.target)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        live = stats[LogProb()]
        below = (live.detach() < stats[self.target]) & rows.mask
        u = torch.where(below, stats[self.target] - live, torch.zeros_like(live)).clamp(max=LIMIT)
        return torch.expm1(u) - u
