"""Independent completions by any kernel, and what they say of the tilt.

x ~ q:   KL(q || p_0) = E_q[log q - log p_0],   Z = E_q[exp(r / beta + log p_0 - log q)]
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import Kernel, Twisted, bare, propose
from keel.sampling.particles import Particles, log_z_error, normalised, spent
from keel.sampling.settings import positive


@part("decode")
@dataclass(frozen=True)
class Decode:
    """N independent completions drawn from a kernel, token by token.

    As they are, the weights are equal, the first is the output, and `kl` is the mean of log q - log p_0: an unbiased
    estimate of KL(q || p_0), no bound. Reweighted, the output is drawn by

        log w = r / beta + log p_0 - log q,   log Z = log mean_i w_i

    the log of an unbiased estimate, and `kl` bounds that of the output. Whatever the kernel, more particles come closer
    to the tilt, as long as q gives probability to all that p_0 does.

    Args:
        num_particles: N.
        kernel: how tokens are proposed; the prior without it.
        beta: of the tilt, and of the kernel; inf leaves the prior as it is.
        reweight: correct the kernel by importance weights.

    Raises:
        ValueError: N below 1, or beta not above 0.
    """

    num_particles: int = 1
    kernel: Kernel | None = None
    beta: float = 0.1
    reweight: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        shape = chain.prompts, self.num_particles
        x = chain.init(self.num_particles)
        log_ratio = torch.zeros(shape, dtype=torch.float64, device=chain.is_done(x).device)
        while not bool(chain.is_done(x).all()):
            action, log_p, log_q = propose(chain, x, rng, self.kernel, self.beta)
            x = chain.extend(x, action)
            log_ratio = log_ratio + (log_q.double() - log_p.double()).view(shape)
        reward = chain.reward(x).view(shape)
        if self.reweight:
            return self._weighted(chain, x, reward, log_ratio, rng)
        none = torch.full_like(reward[:, 0], math.nan)
        return Particles(
            states=bare(x),
            log_w=torch.full_like(reward, -math.log(self.num_particles)),
            reward=reward,
            pick=torch.zeros_like(none, dtype=torch.long),
            log_z=none,
            log_z_error=none,
            kl=log_ratio.mean(1),
            meter=chain.meter,
        )

    def _weighted(
        self, chain: Chain, x, reward: Float[Tensor, "P N"], log_ratio: Float[Tensor, "P N"], rng: Choice
    ) -> Particles:
        log_w, total = normalised(reward / self.beta - log_ratio)
        log_z = total - math.log(self.num_particles)
        index = torch.arange(self.num_particles, device=log_w.device).expand(log_w.shape)
        return Particles(
            states=bare(x),
            log_w=log_w,
            reward=reward,
            pick=rng.categorical(log_w, "pick"),
            log_z=log_z,
            log_z_error=log_z_error(log_w, index, torch.zeros_like(index[:, 0])),
            kl=spent(log_w, reward / self.beta, log_z),
            meter=chain.meter,
            kl_is_bound=True,
        )


@part("value_augmented", paper=201)
@dataclass(frozen=True)
class ValueAugmented:
    """Decoding from the base logits plus the value of what they lead to: `Decode` with the `Twisted` kernel.

    The k likeliest tokens are asked for their value, which is centred over them before it is added, so that the others
    count as average; in the limit of a large beta the output is the prior. With the exact soft value and all tokens it
    is the tilt; with the mean value, which is what a regression on samples learns, it is near it where rewards vary
    little below a token. Several rewards are one value (`Combined`).

    The original adds lambda times the values to the logits, then divides all by the temperature tau. Here the chain has
    its temperature already: the same is beta = tau / lambda.

    Args:
        num_particles: N.
        k: tokens whose value is asked for; None takes all.
        beta: of the tilt; tau / lambda.
        reweight: correct the kernel by importance weights.

    Raises:
        ValueError: N or k below 1, or beta not above 0.

    Source: "Value Augmented Sampling for Language Model Alignment and Personalization", 2024.
    """

    num_particles: int = 1
    k: int | None = 20
    beta: float = 1 / 3
    reweight: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta")
        if self.k is not None:
            positive(self, "k")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        return Decode(self.num_particles, Twisted(self.k), self.beta, self.reweight)(chain, rng)
