"""Target distributions over outcomes that are listed: tilts, posteriors, powers, mixtures, best-of-N.

A target is a table of unnormalised log-scores, one row for each prompt. Whatever fits a policy to it needs no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.targets.order import best_of_n_log_prob


@dataclass(frozen=True, eq=False)
class Target:
    """An unnormalised distribution over S outcomes, for each leading index (a prompt).

        P(x) = exp(log_score(x)),     p = P / Z,     log Z = logsumexp_x log_score(x)

    Args:
        log_score: shape [*n, S]; -inf is an outcome without mass.
        log_z: shape [*n], if the outcomes are not all there are and Z is known otherwise; None sums the outcomes.

    Raises:
        ValueError: a score that is NaN or +inf, or a leading index without any mass.

    >>> even = Target(torch.zeros(4))
    >>> (even * Target(torch.tensor([0.0, 0.0, 0.0, -math.inf]))).prob()
    tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """

    log_score: Float[Tensor, "*n S"]
    log_z: Float[Tensor, "*n"] | None = None

    def __post_init__(self) -> None:
        if bool((self.log_score.isnan() | (self.log_score == math.inf)).any()):
            raise ValueError("the scores of a target must be finite or -inf")
        if bool((self.log_score.amax(-1) == -math.inf).any()):
            raise ValueError("a target needs an outcome of positive mass at every prompt")

    @cached_property
    def log_partition(self) -> Float[Tensor, "*n"]:
        """log Z."""
        return self.log_score.logsumexp(-1) if self.log_z is None else self.log_z

    def log_prob(self) -> Float[Tensor, "*n S"]:
        """log p(x)."""
        return self.log_score - self.log_partition[..., None]

    def prob(self) -> Float[Tensor, "*n S"]:
        """p(x)."""
        return self.log_prob().exp()

    def expectation(self, values: Float[Tensor, "*n S"]) -> Float[Tensor, "*n"]:
        """E_p[values]."""
        return masked_product(self.prob(), values).sum(-1)

    def entropy(self) -> Float[Tensor, "*n"]:
        """-sum p log p, in nats."""
        log_p = self.log_prob()
        return -masked_product(log_p.exp(), log_p).sum(-1)

    def gap(self, log_p: Float[Tensor, "*n S"]) -> Float[Tensor, "*n"]:
        """KL(policy || target) of a normalised policy: what is left to gain, divided by beta if this is a tilt.

        Source: "RL with KL penalties is better viewed as Bayesian inference", Korbak et al., 2022.
        """
        return kl_divergence(log_p, self.log_prob())

    def __mul__(self, other: "Target") -> "Target":
        """Product of experts, P(x) Q(x)."""
        return Target(self.log_score + other.log_score)

    def __pow__(self, power: float) -> "Target":
        """P(x)^power; outcomes without mass stay without, whatever the power."""
        return Target(_times(self.log_score, power))

    def __add__(self, other: "Target") -> "Target":
        """Mixture of the unnormalised scores, P(x) + Q(x); see `mixture` for one of the distributions."""
        return Target(torch.logaddexp(self.log_score, other.log_score))


def tilt(log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], beta: float | Float[Tensor, "*n"]) -> Target:
    """The optimum of E[r] - beta KL(policy || ref): q e^{r / beta} / Z.

    Args:
        log_ref: log q, shape [*n, S].
        reward: shape [*n, S].
        beta: positive; one number, or one for each leading index, shape [*n].

    Raises:
        ValueError: beta is not positive.

    >>> tilt(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, math.log(3)]), beta=1.0).prob()
    tensor([0.2500, 0.7500])
    """
    if not bool((torch.as_tensor(beta) > 0).all()):
        raise ValueError(f"beta must be positive, not {beta}")
    by = beta[..., None] if isinstance(beta, Tensor) else beta
    return Target(log_ref + reward / by)


def posterior(log_ref: Float[Tensor, "*n S"], log_likelihood: Float[Tensor, "*n S"]) -> Target:
    """q(x) p(good | x): the reference conditioned on an event; see `exponential_likelihood`, `sigmoid_likelihood`.

    Source: "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
    2024.
    """
    return Target(log_ref + log_likelihood)


def exponential_likelihood(reward: Float[Tensor, "*n S"], gamma: float) -> Float[Tensor, "*n S"]:
    """log p(good | x) = (r - max r) / gamma; its posterior is the tilt with beta = gamma."""
    return (reward - reward.amax(-1, keepdim=True)) / gamma


def sigmoid_likelihood(reward: Float[Tensor, "*n S"], gamma: float, threshold: float) -> Float[Tensor, "*n S"]:
    """log p(good | x) = log sigmoid((r - threshold) / gamma): better than an answer of reward `threshold`."""
    return torch.nn.functional.logsigmoid((reward - threshold) / gamma)


def pointwise(log_ref: Float[Tensor, "*n S"], indicator: Bool[Tensor, "*n S"] | Float[Tensor, "*n S"]) -> Target:
    """The nearest distribution to the reference with all its mass on a set: q phi / E_q[phi], phi in {0, 1}.

    Source: "A Distributional Approach to Controlled Text Generation", Khalifa et al., 2021.
    """
    return Target(log_ref.masked_fill(indicator == 0, -math.inf))


def moments(
    log_ref: Float[Tensor, "*n S"], features: Float[Tensor, "*n S K"], multipliers: Float[Tensor, "K"]
) -> Target:
    """q exp(multipliers . features), whose multipliers `keel.targets.moments.fit_multipliers` finds."""
    return Target(log_ref + features @ multipliers)


def best_of_n(log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], n: float) -> Target:
    """The law of the best of n draws of the reference.

        p(x) = q(x) / q(r = r(x)) (F(r(x))^n - F(r(x)-)^n),     F the cumulative distribution of the reward

    Args:
        log_ref: log q, shape [*n, S]; normalised here.
        reward: shape [*n, S]; equal rewards are chosen among in proportion to q.
        n: number of draws, at least 1; may be as large as a float can be.

    Raises:
        ValueError: n below 1.
    """
    return Target(best_of_n_log_prob(log_ref, reward, n))


def teacher(log_teacher: Float[Tensor, "*n S"]) -> Target:
    """Another model's distribution."""
    return Target(log_teacher)


def log_linear(log_ps: Sequence[Float[Tensor, "*n S"]], weights: Sequence[float]) -> Target:
    """prod_i p_i^{w_i}: a geometric mean, or an extrapolation where a weight is negative.

    base^(1 - lam) teacher^lam goes past the teacher for lam > 1; weights 1/2, 1/2 are the soup of two policies whose
    logits are linear in the weights.

    Raises:
        ValueError: not one weight for each distribution, or a negative weight where its distribution has no mass.

    Source: "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation", 2026; "SALSA:
    Soup-based Alignment Learning for Stronger Adaptation in RLHF", 2024.
    """
    if len(log_ps) != len(weights) or not log_ps:
        raise ValueError(f"{len(log_ps)} distributions need as many weights, not {len(weights)}")
    used = [(log_p, w) for log_p, w in zip(log_ps, weights, strict=True) if w]
    if not used:
        return Target(torch.zeros_like(log_ps[0]))
    return Target(torch.stack([log_p * w for log_p, w in used]).sum(0))


def mixture(targets: Sequence[Target], weights: Sequence[float]) -> Target:
    """sum_i w_i p_i, of the normalised distributions, with weights that are normalised to sum to 1.

    Raises:
        ValueError: not one weight for each target, or one that is negative.
    """
    if len(targets) != len(weights) or not targets or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError("a mixture needs one weight for each target, none negative and not all 0")
    parts = [t.log_prob() + math.log(w / sum(weights)) for t, w in zip(targets, weights, strict=True) if w > 0]
    return Target(torch.stack(parts).logsumexp(0))


def uniform_over_good(reward: Float[Tensor, "*n S"], threshold: float) -> Target:
    """Even over the outcomes with reward of at least `threshold`: no good answer is preferred to another.

    Raises:
        ValueError: a leading index without such an outcome.
    """
    return Target(torch.zeros_like(reward).masked_fill(reward < threshold, -math.inf))


def kl_divergence(log_p: Float[Tensor, "*n S"], log_q: Float[Tensor, "*n S"]) -> Float[Tensor, "*n"]:
    """KL(p || q) = sum p log(p / q) in nats, of normalised log-probabilities that may be -inf or underflow."""
    return masked_product(log_p.exp(), log_p - log_q).sum(-1)


def masked_product(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, 0 where the weight is 0."""
    return torch.where(weight > 0, weight * values, torch.zeros_like(weight))


def _times(log_score: Tensor, power: float) -> Tensor:
    return torch.where(log_score == -math.inf, log_score, log_score * power)
