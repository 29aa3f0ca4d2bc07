"""Scores of completions: log-ratios to named models, summed or averaged, mapped after the sum, with features added."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.parts.terms.pairs import Side, part_heads, part_needs
from keel.statistics.functionals import Functional, LogProb, Value

Norm = Literal["sum", "mean"]


@runtime_checkable
class ScoreMap(Protocol):
    """A function of a whole log-ratio; `difference_only` where it leaves a constant of the prompt undetermined."""

    difference_only: bool

    def __call__(self, log_ratio: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The mapped log-ratios."""
        ...


@runtime_checkable
class TokenWeight(Protocol):
    """A factor of each token within a score."""

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        """The factors; those off the completion do not matter."""
        ...


@runtime_checkable
class Feature(Protocol):
    """A number that is added to a score; `difference_only` where a constant of the prompt is undetermined."""

    difference_only: bool

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        """The numbers, times their coefficients."""
        ...


@part("log_ratio")
@dataclass(frozen=True)
class LogRatio:
    """S = scale * map(norm(sum_t w_t (log pi - sum_k e_k log pi_k)_t)) + sum_j feature_j; the map comes after the sum.

    Args:
        against: names of the models in the denominator; none for a score without a reference.
        exponents: e_k, of each of them; None takes 1 for each.
        norm: sum, or mean, which divides by the tokens of the completion.
        map: of the whole log-ratio; None leaves it as it is.
        weight: w, of each token; None is 1.
        scale: of the mapped log-ratio.
        features: what is added.

    Raises:
        ValueError: an unknown norm, or as many exponents as there are no models.

    Source: the common form of DPO and its relatives.
    """

    against: tuple[str, ...] = ("ref",)
    exponents: tuple[float, ...] | None = None
    norm: Norm = "sum"
    map: ScoreMap | None = None
    weight: TokenWeight | None = None
    scale: float = 1.0
    features: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm '{self.norm}' is not one of {', '.join(get_args(Norm))}")
        if self.exponents is not None and len(self.exponents) != len(self.against):
            raise ValueError(f"{len(self.exponents)} exponents for the models {', '.join(self.against) or 'none'}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy's log-probability, those of the models, and what the weight and the features read."""
        own = [LogProb(), *(LogProb(of=(name,)) for name in self.against)]
        return tuple(dict.fromkeys([*own, *part_needs(self.weight, self.map, *self.features)]))

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the weight and of the features."""
        return part_heads(self.weight, *self.features)

    @property
    def difference_only(self) -> bool:
        """Whether a constant of the prompt is undetermined."""
        return any(getattr(item, "difference_only", False) for item in (self.map, *self.features))

    def log_ratio(self, side: Side) -> Float[Tensor, "N T"]:
        """log pi - sum_k e_k log pi_k at each token, in fp32 at least, 0 off the completion."""
        exponents = self.exponents or (1.0,) * len(self.against)
        found = _precise(side.tokens(LogProb()))
        for name, exponent in zip(self.against, exponents, strict=True):
            found = found - exponent * _precise(side.tokens(LogProb(of=(name,))))
        return found

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        values = self.log_ratio(side)
        if self.weight is not None:
            values = values * torch.where(side.mask, self.weight(side), torch.zeros_like(values))
        score = values.sum(1)
        if self.norm == "mean":
            score = ratio(score, side.lengths.to(score))
        if self.map is not None:
            score = self.map(score)
        if self.scale != 1.0:
            score = self.scale * score
        for feature in self.features:
            score = score + feature(side)
        return score


@part("head_score")
@dataclass(frozen=True)
class HeadScore:
    """S = the number that a head reads from the state of a completion's last token: a reward model's score.

    Args:
        head: name of the method's head.
    """

    head: str = "reward"
    difference_only = False

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The head at the last token."""
        return (Value(self.head, where="last"),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The head."""
        return (self.head,)

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        return side.stats[Value(self.head, where="last")][side.index]


def _precise(values: Tensor) -> Tensor:
    """In fp32 at least, whatever the model's type."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
