"""Samplers that draw whole completions of the prior and choose among them.

    best-of-N        argmax_i r(x_i), x_i ~ p_0
    soft best-of-N   pick i with probability softmax(r_i / beta): the tilt as N grows

Best-of-N is the tilt of another reward, log F(r) at beta = 1 / (N - 1), with F the distribution function of r under
p_0: blind to beta, unmoved by monotone changes of the reward, and KL(output || p_0) <= log N - (N - 1) / N.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.particles import Particles, best, log_z_error, normalised, spent
from keel.sampling.settings import positive


@part("best_of_n")
@dataclass(frozen=True)
class BestOf:
    """The best of N completions by reward; of equals, each is as likely.

    Its weights, spread evenly over the completions of the highest reward, are a description; it has no log Z.

    Args:
        num_particles: N.

    Raises:
        ValueError: N below 1.
    """

    num_particles: int = 16

    def __post_init__(self) -> None:
        positive(self, "num_particles")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        states = chain.complete(chain.init(1), self.num_particles, rng)
        reward = chain.reward(states).view(chain.prompts, -1)
        top = reward == reward.amax(1, keepdim=True)
        none = torch.full_like(reward[:, 0], math.nan)
        n = self.num_particles
        return Particles(
            states=states,
            log_w=(top.to(reward) / top.sum(1, keepdim=True)).log(),
            reward=reward,
            pick=best(reward, rng),
            log_z=none,
            log_z_error=none,
            kl=torch.full_like(none, math.log(n) - (n - 1) / n),
            meter=chain.meter,
            kl_is_bound=True,
        )


@part("soft_best_of_n")
@dataclass(frozen=True)
class SoftBestOf:
    """One of N completions with probability softmax(r / beta): sampling, importance weighting, resampling.

    log Z = lse(r / beta) - log N is the log of an unbiased estimate; sum_i W_i log(N W_i) bounds the KL of the output.

    Args:
        num_particles: N.
        beta: of the tilt.

    Raises:
        ValueError: N below 1, or beta not above 0.
    """

    num_particles: int = 16
    beta: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        states = chain.complete(chain.init(1), self.num_particles, rng)
        return weighted(chain, states, chain.reward(states).view(chain.prompts, -1), self.beta, rng)


def weighted(chain: Chain, states, reward: Float[Tensor, "P N"], beta: float, rng: Choice) -> Particles:
    """Independent completions of the prior with the weights of the tilt."""
    n = reward.shape[1]
    log_w, total = normalised(reward / beta)
    log_z = total - math.log(n)
    index = torch.arange(n, device=log_w.device).expand(log_w.shape)
    return Particles(
        states=states,
        log_w=log_w,
        reward=reward,
        pick=rng.categorical(log_w, "pick"),
        log_z=log_z,
        log_z_error=log_z_error(log_w, index, torch.zeros_like(index[:, 0])),
        kl=spent(log_w, reward / beta, log_z),
        meter=chain.meter,
        kl_is_bound=True,
    )
