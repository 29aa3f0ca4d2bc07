"""The two halves of a Jensen-Shannon divergence, KL to the mean of policy and reference, estimated from samples."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.aggregate import Aggregation
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.divergences.estimators import estimate
from keel.divergences.sampled import term
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Estimator = Literal["k1", "k2", "k3", "unbiased"]


@part("mixture_kl", paper=21)
@dataclass(frozen=True)
class MixtureKL:
    """k(log pi - log m), m = (pi + ref) / 2 of the sampled token: KL(policy || m), half of 2 JS, on the policy's rows.

    With u = pi / ref and l = log(pi / m) = log 2 - log(1 + 1 / u):

        k1         l                                value KL(policy || m)
        k2         l^2 / 2
        k3         (1 / u - 1) / 2 + l              the same value, less variance
        unbiased   the value of k3, with the gradient of sg(l + 1 / (1 + u) - 1 / 2) log pi

    Only the last has the gradient of KL(policy || m) per state; that of k3 has the slope (u - 1) / (2 u (1 + u)) for
    log pi, which agrees with it to first order at u = 1.

    Args:
        estimator: which one.
        against: name of the reference model.

    Raises:
        ValueError: an unknown estimator.

    Source: "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025 (DPH-RL), whose
    code takes k3. log u is cut at +-20 in the factors, while the gradient of the token stays.
    """

    estimator: Estimator = "k3"
    against: str = "ref"
    additive = True

    def __post_init__(self) -> None:
        _known(self.estimator, get_args(Estimator))

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference."""
        return (LogProb(), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        live, ref = (stats[need] for need in self.needs)
        log_u = _cut(live, ref, rows.mask)
        over_m = math.log(2) - softplus(-log_u)
        if self.estimator != "unbiased":
            return estimate(self.estimator, over_m)
        slope = over_m + (-log_u).sigmoid() - 0.5
        return term(estimate("k3", over_m), slope.detach() * live)


@part("rehearsal_mixture_kl", paper=21)
@dataclass(frozen=True)
class RehearsalMixtureKL:
    """coef KL(stored || m), m = (policy + stored) / 2 of the token, on rows that an earlier policy drew.

        coef Agg[k(l)],   l = log(stored / m) = log 2 - log(1 + u),   u = pi(y_t) / stored(y_t)

    k1 and k3, (u - 1) / 2 - log((1 + u) / 2), have its value and its gradient; while the policy is the one that drew
    the rows k2 and k3 do not move it.

    Args:
        coef: eta, 0.05 to 0.2 in the paper.
        estimator: k1, k2 or k3.
        aggregation: of their tokens.

    Raises:
        ValueError: a negative coef, an unknown estimator, or rows of the stream without `logp["stored"]`.

    Source: as `MixtureKL`.
    """

    coef: float = 0.1
    estimator: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Aggregation = Aggregation("token_mean")
    needs = (LogProb(),)
    additive = False
    stream = "regulariser"
    reads_stored = True

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        _known(self.estimator, ("k1", "k2", "k3"))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        live, stored = stats[LogProb()], rows.stream == int(Stream.REGULARISER)
        if not bool(stored.any()):
            return live.new_zeros(())
        if "stored" not in rows.logp:
            raise ValueError("stored rows need their log-probabilities, logp['stored']")
        log_u = _cut(live, rows.logp["stored"].to(live), rows.mask & stored[:, None])
        values = estimate(self.estimator, math.log(2) - softplus(log_u))
        turned = torch.where(stored, int(Stream.MAIN), int(Stream.REGULARISER))
        return self.coef * self.aggregation(values, rows.with_(stream=turned, totals=None))


def _cut(live: Float[Tensor, "B T"], other: Float[Tensor, "B T"], mask: Tensor) -> Float[Tensor, "B T"]:
    """log u within +-20, and 0 off the mask, with the gradient of the live token even where it is cut."""
    gap = torch.where(mask, live.detach() - other, torch.zeros_like(live)).clamp(-LIMIT, LIMIT)
    return gap + (live - live.detach())


def _known(estimator: str, known: tuple[str, ...]) -> None:
    if estimator not in known:
        raise ValueError(f"estimator '{estimator}' is not one of {', '.join(known)}")
