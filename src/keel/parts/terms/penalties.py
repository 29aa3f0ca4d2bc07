"""Penalties, [B, T], and the summand that puts one into the loss with a coefficient, a mask and a denominator."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.divergences.family import f_divergence
from keel.divergences.sampled import SAMPLES, Samples, sampled
from keel.divergences.sampled import term as straight_through
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
        stream: the rows of the batch, or those that a regulariser brings along (the slot `replay`), divided by their
            own number.

    Raises:
        MethodError: a mask without `per`.
        ValueError: a negative coef of a divergence, of which the loss would have no minimum.
    """

    penalty: Penalty
    coef: float
    where: str | None = None
    per: Literal["batch", "where"] | None = None
    stream: Literal["main", "regulariser"] = "main"

    def __post_init__(self) -> None:
        if self.where is not None and self.per is None:
            raise MethodError(
                f"a summand confined to mask '{self.where}' must say what it is divided by",
                None,
                "Give per='batch' or per='where'.",
            )
        if self.coef < 0 and isinstance(self.penalty, (SampledKL, SampledDivergence, VocabularyDivergence, RootChi2)):
            raise ValueError(f"coef of a divergence must not be negative, got {self.coef}")

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


Ratio = Literal["none", "detached", "differentiable"]
Level = Literal["token", "sequence"]


@part("sampled_kl")
@dataclass(frozen=True)
class SampledKL:
    """k(log pi - log ref) at the sampled token, times the ratio rho = pi / pi_old if asked.

    As a loss on the policy's samples k1 has gradient 0, k2 that of KL(policy || ref) and k3 that of KL(ref || policy),
    per state. On samples of an older policy the right pairs are sg(rho) k2, and rho k1 or rho k3 with the gradient
    through rho: all three have that of KL(policy || ref), per sample rho l s for the last and for sg(rho) k2.

    A token's KL does not know that it decides which states come next, so its gradient is not that of the sequence. At
    level "sequence" l and rho are those of the whole row, l = sum_t l_t, and each of its L tokens carries k / L:
    under `Aggregation("sequence_mean_token_sum")` the loss is the mean of k, and k2 has the gradient of the sequence's
    KL(policy || ref).

    The value of the estimator is not that of its gradient's objective: k2 estimates no KL, and k3 descends the other
    one. `SampledDivergence` keeps the two apart.

    Args:
        estimator: k1, k2 or k3.
        against: name of the reference model.
        ratio: none, sg(rho) (detached), or rho with its gradient (differentiable); log rho is cut at +-20.
        level: token or sequence.

    Raises:
        ValueError: an unknown estimator, ratio or level.

    Source: "DeepSeekMath", 2024 (k3); the ratio as in TRL's bias correction.
    """

    estimator: str = "k3"
    against: str = "ref"
    ratio: Ratio = "none"
    level: Level = "token"
    additive = True

    def __post_init__(self) -> None:
        _one_of("estimator", self.estimator, ("k1", "k2", "k3"))
        _one_of("ratio", self.ratio, get_args(Ratio))
        _one_of("level", self.level, get_args(Level))

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference; with the ratio, the policy that sampled, too."""
        old = () if self.ratio == "none" else (LogProb(of=("old",)),)
        return (LogProb(), LogProb(of=(self.against,)), *old)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        live = stats[LogProb()]
        log_ratio = live - stats[LogProb(of=(self.against,))]
        log_rho = None if self.ratio == "none" else live - stats[LogProb(of=("old",))]
        if self.level == "token":
            return self._weighted(log_ratio, log_rho)
        log_rho = None if log_rho is None else _row_sum(log_rho, rows)
        return _spread(self._weighted(_row_sum(log_ratio, rows), log_rho), rows)

    def _weighted(self, log_ratio: Tensor, log_rho: Tensor | None) -> Tensor:
        value = estimate(self.estimator, log_ratio)  # type: ignore[arg-type]
        if log_rho is None:
            return value
        rho = log_rho.clamp(-LIMIT, LIMIT).exp()
        return value * (rho.detach() if self.ratio == "detached" else rho)


@part("sampled_divergence")
@dataclass(frozen=True)
class SampledDivergence:
    """An f-divergence of policy and reference from sampled tokens, its gradient unbiased for any f.

    With u = pi / ref and rho = pi / pi_old, the loss sg(value) + surrogate - sg(surrogate):

        samples      value           surrogate               the rows were drawn by
        policy       f(u) / u        sg(f'(u)) log pi        the policy as it is now
        old          rho f(u) / u    sg(rho f'(u)) log pi    the policy when the batch was prepared
        reference    f(u)            sg(u f'(u)) log pi      the reference

    So the number that is logged, `terms/NAME` over its coefficient, is the divergence's value and says nothing of the
    gradient, which is the surrogate's. For kl_policy_ref on the policy's samples the value is k3, the gradient k2's.

    At level "token" both are those of each visited state, and the gradient lacks what a token does to later states. At
    level "sequence" u, rho and log pi are those of the row's L tokens together, and each of them carries 1 / L of the
    loss: under `Aggregation("sequence_mean_token_sum")` the mean of the batch is the divergence of whole sequences,
    value and gradient. Only the KLs of sequences are sums over tokens; for all others the two levels differ in value,
    too.

    Args:
        divergence: an f-divergence by name, policy first: `kl_policy_ref`, `js:0.1`, `alpha:0.5` ...
        samples: who drew the rows: policy, old or reference.
        level: token or sequence.
        against: name of the reference model.

    Raises:
        ValueError: an unknown divergence, source of samples or level.

    Source: "Aligning Language Models with Preferences through f-divergence Minimization", 2023; "The Choice of
    Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025 (samples of the reference).
    """

    divergence: str = "kl_policy_ref"
    samples: Samples = "policy"
    level: Level = "token"
    against: str = "ref"
    additive = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", str(f_divergence(self.divergence)))
        _one_of("samples", self.samples, SAMPLES)
        _one_of("level", self.level, get_args(Level))

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference; on samples of an older policy, that one, too."""
        old = (LogProb(of=("old",)),) if self.samples == "old" else ()
        return (LogProb(), LogProb(of=(self.against,)), *old)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        names = ["policy", self.against, *(["old"] if self.samples == "old" else [])]
        measured = [stats[LogProb(of=(name,))] for name in names]
        if self.level == "token":
            return straight_through(*sampled(f_divergence(self.divergence), self.samples, *measured))
        whole = [_row_sum(log_prob, rows) for log_prob in measured]
        found = straight_through(*sampled(f_divergence(self.divergence), self.samples, *whole))
        return _spread(found, rows)


@part("vocabulary_divergence")
@dataclass(frozen=True)
class VocabularyDivergence:
    """D(policy, against) over the whole vocabulary at each visited position; its gradient is exact for that position.

    Near equality every divergence is f''(1) / 2 times chi-square, so that the same coefficient is four times weaker
    with js than with a KL: `calibrated` divides by f''(1).

    Args:
        kind: an f-divergence by name, policy first: kl_policy_ref ("reverse KL"), kl_ref_policy ("forward KL"), js,
            js:0.1, alpha:0.5, chi2_policy_ref, hellinger, tv ...
        against: name of the reference model.
        calibrated: divide by f''(1).

    Raises:
        ValueError: an unknown kind, the policy as its own reference, or `calibrated` for one without curvature (tv).
    """

    kind: str = "kl_policy_ref"
    against: str = "ref"
    calibrated: bool = False
    additive = True

    def __post_init__(self) -> None:
        kind = f_divergence(self.kind)
        if self.calibrated:
            kind.per_curvature()
        object.__setattr__(self, "kind", str(kind))
        _ = self.needs

    @property
    def needs(self) -> tuple[Functional, ...]:
        """One divergence."""
        return (Divergence(self.kind, self.against),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        value = stats[Divergence(self.kind, self.against)]
        return value / f_divergence(self.kind).curvature if self.calibrated else value


@part("root_chi2", paper=4)
@dataclass(frozen=True)
class RootChi2:
    """sqrt(max(chi2_t, floor)), chi2_t = sum_v (policy_v - ref_v)^2 / ref_v, over the vocabulary at each position.

    The slope of a root is infinite at 0; below the floor it is 0.

    Args:
        against: name of the reference model.
        floor: smallest number of which a root is taken.

    Raises:
        ValueError: floor not positive, or the policy as its own reference.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024, over actions.
    """

    against: str = "ref"
    floor: float = 1e-4
    additive = True

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ValueError(f"floor must be positive, not {self.floor}")
        _ = self.needs

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Chi-square at each position."""
        return (Divergence("chi2_policy_ref", self.against),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return stats[self.needs[0]].clamp(min=self.floor).sqrt()


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} '{value}' is not one of {', '.join(known)}")


def _row_sum(numbers: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, "B 1"]:
    """Over the tokens that a model chose."""
    return torch.where(rows.mask, numbers, torch.zeros_like(numbers)).sum(1, keepdim=True)


def _spread(per_row: Float[Tensor, "B 1"], rows: Rows) -> Float[Tensor, "B T"]:
    """A row's number in equal shares on its tokens."""
    return ratio(per_row, rows.lengths[:, None]) * rows.mask


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
