"""What a sampler returns: weighted particles, the estimate of Z, and what they cost.

log Z      of the tilt p* = p_0 exp(r / beta) / Z; E[exp(log_z)] = Z for every sampler that says `unbiased`
ESS        1 / sum_i W_i^2
KL         sum_i W_i log(tilt_i) - log Z: what the weighted law spends, in nats
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Meter
from keel.core.chance import Choice


@dataclass(frozen=True, eq=False)
class Step:
    """What happened to the particles in one round; `Particles.trace` is a list of them.

    Args:
        ancestors: particle of the round before that each one continues, shape [P, N].
        start: length of each before the round, in tokens or, where there are none, in rounds, shape [P, N].
        states: the states after it, without their memory.
        log_q: log-probability with which what was added was proposed, shape [P, N].
        log_w: normalised log-weights after it, shape [P, N].
    """

    ancestors: Int[Tensor, "P N"]
    start: Int[Tensor, "P N"]
    states: Any
    log_q: Float[Tensor, "P N"]
    log_w: Float[Tensor, "P N"]


@dataclass(frozen=True, eq=False)
class Particles:
    """Weighted particles, finished.

    Args:
        states: P N finished states, those of a prompt together.
        log_w: normalised log-weights, shape [P, N].
        reward: of each, shape [P, N].
        pick: the one that the sampler puts out, shape [P].
        log_z: estimate of log Z, shape [P]; NaN where the method has none.
        log_z_error: its standard error, shape [P]; NaN where it is not known.
        kl: estimate of KL(output || p_0) in nats, shape [P]; `kl_is_bound` says that it is an upper bound.
        meter: tokens generated and scored.
        ess: effective sample size when the particles were finished, shape [P].
        trace: one `Step` a round, where the sampler keeps it.
        details: whatever else the method reports, one number a prompt.
    """

    states: Any
    log_w: Float[Tensor, "P N"]
    reward: Float[Tensor, "P N"]
    pick: Int[Tensor, "P"]
    log_z: Float[Tensor, "P"]
    log_z_error: Float[Tensor, "P"]
    kl: Float[Tensor, "P"]
    meter: Meter
    kl_is_bound: bool = False
    trace: tuple[Step, ...] = ()
    details: dict[str, Float[Tensor, "P"]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N."""
        return self.log_w.shape[1]

    @property
    def ess(self) -> Float[Tensor, "P"]:
        """Effective sample size of the final weights."""
        return effective_size(self.log_w)

    @property
    def picked(self) -> Int[Tensor, "P"]:
        """The place of each pick among all states."""
        return torch.arange(len(self.pick), device=self.pick.device) * self.count + self.pick


def effective_size(log_w: Float[Tensor, "P N"]) -> Float[Tensor, "P"]:
    """exp(-lse(2 log W)) of normalised log-weights, Kish's effective sample size."""
    return (-(2 * log_w).logsumexp(-1)).exp()


def normalised(log_w: Float[Tensor, "P N"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "P"]]:
    """Log-weights that sum to one, and the log of their sum; uniform where no weight is left."""
    total = log_w.logsumexp(-1)
    lost = total == -math.inf
    safe = torch.where(lost, torch.zeros_like(total), total)
    even = torch.full_like(log_w, -math.log(log_w.shape[1]))
    return torch.where(lost[:, None], even, log_w - safe[:, None]), total


def log_z_error(
    log_w: Float[Tensor, "P N"], eve: Int[Tensor, "P N"], generations: Int[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """Standard error of log Z from one run, by the families of the first particles.

        V = 1 - (N / (N - 1))^(g + 1) sum over pairs of different families of W_i W_j,   se = sqrt(max(V, 0))

    Without resampling it is that of an importance-weighted mean. It is made for multinomial resampling; with the
    other schemes it is about a fifth too small. 1 where one family is left: nothing is known then.

    Args:
        log_w: normalised log-weights.
        eve: the first ancestor of each particle.
        generations: g, how often each prompt was resampled.

    Source: Lee and Whiteley, "Variance estimation in the particle filter", Biometrika 2018.
    """
    n = log_w.shape[1]
    if n == 1:
        return torch.full_like(log_w[:, 0], math.nan)
    family = torch.zeros_like(log_w).scatter_add(1, eve, log_w.exp())
    apart = 1 - family.square().sum(1)
    variance = 1 - (n / (n - 1)) ** (generations.to(log_w) + 1) * apart
    return variance.clamp(min=0).sqrt()


def best(
    score: Float[Tensor, "P N"], rng: Choice, among: Bool[Tensor, "P N"] | None = None, name: str = "pick"
) -> Int[Tensor, "P"]:
    """The place of the highest score of each prompt; of equals each is as likely, for their order means nothing.

    Args:
        score: to be compared.
        rng: chooses among equals.
        among: places that may be taken, one of each prompt at least; all without it.
        name: of the request.
    """
    score = score if among is None else score.masked_fill(~among, -math.inf)
    top = score == score.amax(1, keepdim=True)
    return rng.categorical((top if among is None else top & among).double().log(), name)


def spent(log_w: Float[Tensor, "P N"], log_tilt: Float[Tensor, "P N"], log_z: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """sum_i W_i log(tilt_i) - log Z, particles without weight left out."""
    used = log_w > -math.inf
    return torch.where(used, log_w.exp() * log_tilt, torch.zeros_like(log_w)).sum(1) - log_z
