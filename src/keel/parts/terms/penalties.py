"""Penalties, [B, T], and the summand that puts one into the loss with a coefficient, a mask and a denominator."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.divergences.vocabulary import ALIASES
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.functionals import Divergence, Entropy, Functional, LogProb, TopPEntropy, Value
from keel.statistics.stats import Stats


@runtime_checkable
class Penalty(Protocol):
    """What a summand adds to the loss at each token; `needs` lists the functionals that it reads."""

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        """To be decreased."""
        ...


@part("summand")
@dataclass(frozen=True)
class Summand:
    """coef * Agg[m * P] in the loss.

    Args:
        penalty: P, [B, T].
        coef: c; 0 drops the summand.
        where: name of a mask of the method, or of the rows, to which the numerator is confined.
        per: "batch" divides by the tokens of the batch, "where" by those of the mask; two different losses.
    """

    penalty: Penalty
    coef: float
    where: str | None = None
    per: Literal["batch", "where"] | None = None

    def __post_init__(self) -> None:
        if self.where is not None and self.per is None:
            raise MethodError(
                f"a summand confined to mask '{self.where}' must say what it is divided by",
                None,
                "Give per='batch' or per='where'.",
            )

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the penalty."""
        return tuple(getattr(self.penalty, "needs", ()))

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the penalty."""
        return tuple(getattr(self.penalty, "heads_read", ()))

    @property
    def additive(self) -> bool:
        """Whether slices of the batch add up, given its denominators."""
        return getattr(self.penalty, "additive", False) and self.per != "where"


@part("sampled_kl")
@dataclass(frozen=True)
class SampledKL:
    """k(log pi - log ref) at the sampled token, times the ratio pi / pi_old if asked.

    As a loss on the policy's samples k1 has gradient 0, k2 that of KL(policy || ref) and k3 that of KL(ref || policy),
    per state; with the differentiable ratio k1 and k3 have that of KL(policy || ref), also off-policy.

    Args:
        estimator: k1, k2 or k3.
        against: name of the reference model.
        with_ratio: multiply by pi / pi_old, through which the gradient flows.

    Raises:
        ValueError: an unknown estimator.

    Source: "DeepSeekMath", 2024 (k3); the ratio as in TRL's bias correction.
    """

    estimator: str = "k3"
    against: str = "ref"
    with_ratio: bool = False
    additive = True

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"estimator '{self.estimator}' is not one of k1, k2, k3")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference; with the ratio, the policy that sampled, too."""
        old = (LogProb(of=("old",)),) if self.with_ratio else ()
        return (LogProb(), LogProb(of=(self.against,)), *old)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        value = estimate(self.estimator, stats[LogProb()] - stats[LogProb(of=(self.against,))])  # type: ignore[arg-type]
        if not self.with_ratio:
            return value
        return (stats[LogProb()] - stats[LogProb(of=("old",))]).clamp(-LIMIT, LIMIT).exp() * value


@part("vocabulary_divergence")
@dataclass(frozen=True)
class VocabularyDivergence:
    """D(policy, against) over the whole vocabulary at each visited position; its gradient is exact for that position.

    Args:
        kind: kl_policy_ref ("reverse KL"), kl_ref_policy ("forward KL") or js.
        against: name of the reference model.

    Raises:
        ValueError: an unknown kind.
    """

    kind: str = "kl_policy_ref"
    against: str = "ref"
    additive = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ALIASES.get(self.kind, self.kind))
        _ = self.needs

    @property
    def needs(self) -> tuple[Functional, ...]:
        """One divergence."""
        return (Divergence(self.kind, self.against),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return stats[Divergence(self.kind, self.against)]


@part("negative_entropy")
@dataclass(frozen=True)
class NegativeEntropy:
    """-H of the policy at each position, so that a positive coefficient is an entropy bonus.

    Args:
        top_p: entropy of the renormalised nucleus that holds this probability; 1 is the whole vocabulary.
    """

    top_p: float = 1.0
    additive = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """One entropy."""
        return (Entropy() if self.top_p >= 1 else TopPEntropy(self.top_p),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return -stats[self.needs[0]]


@part("negative_log_likelihood")
@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log pi(y_t): supervised learning."""

    needs = (LogProb(),)
    additive = True

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return -stats[LogProb()]


@part("value_loss")
@dataclass(frozen=True)
class ValueLoss:
    """max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2, with R from `columns["returns"]`.

    Args:
        epsilon: clip range of the value; None is off.
        head: the value head's name.

    Source: PPO, 2017.
    """

    epsilon: float | None = 0.2
    head: str = "value"
    additive = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The live value."""
        return (Value(self.head),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The value head."""
        return (self.head,)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        if "returns" not in rows.columns:
            raise ValueError("the value loss needs returns: put GAE into the method's chain `advantage`")
        value, target = stats[Value(self.head)], rows.columns["returns"]
        loss = (value - target).square()
        if self.epsilon is not None:
            before = rows.columns["values"]
            near = torch.minimum(torch.maximum(value, before - self.epsilon), before + self.epsilon)
            loss = torch.maximum(loss, (near - target).square())
        return 0.5 * loss
