"""Features that are added to a score."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.parts.terms.pairs import Side
from keel.statistics.functionals import Functional, LogProb


@part("length_feature")
@dataclass(frozen=True)
class LengthFeature:
    """coef * (tokens of the completion).

    Args:
        coef: factor.

    Source: Park et al., "Disentangling Length from Quality in Direct Preference Optimization", 2024.
    """

    coef: float = 0.1
    difference_only = False

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        return self.coef * side.lengths.to(side.rows.weight)


@part("lost_likelihood")
@dataclass(frozen=True)
class LostLikelihood:
    """-coef * max(0, log ref - log pi) of the whole completion: what it has lost since the reference.

    Args:
        coef: lambda.
        against: the model that it is compared with.

    Raises:
        ValueError: a negative coefficient.

    Source: Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", 2024.
    """

    coef: float = 50.0
    against: str = "ref"
    difference_only = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, not {self.coef}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference."""
        return (LogProb(), LogProb(of=(self.against,)))

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        lost = side.tokens(LogProb(of=(self.against,))) - side.tokens(LogProb())
        return -self.coef * lost.sum(1).clamp(min=0)
