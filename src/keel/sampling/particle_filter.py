"""The particle filter over scored steps: every round, resample partial samples in proportion to their scores.

    weight="full"    g_t = log psi_t                     towards p_0(x) prod_t psi_t(x_<=t)
    weight="ratio"   g_t = log psi_t - log psi_{t-1}     towards p_0(x) psi_K(x), the tilt

The two are different laws: a score that judges the whole prefix, multiplied in every round, counts what it says about
the first step K times. `log psi = value / beta`; a process reward model with scores s in (0, 1) enters with the odds
s / (1 - s) as potential, that is with value beta logit(s), and with a reward of beta logit(s_K) at the end.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import Kernel
from keel.sampling.particles import Particles
from keel.sampling.resampling import Scheme
from keel.sampling.settings import positive
from keel.sampling.smc import Swarm, advance, finish, renew

Weight = Literal["full", "ratio"]


@part("particle_filter", paper=205)
@dataclass(frozen=True)
class ParticleFilter:
    """The particle filter of the paper, and the one that samples the tilt; see the module.

    Finished particles keep their weight and gain nothing more. With `weight="full"` there is no estimate of Z: the
    details have `log_normaliser`, that of p_0 prod psi_t, and `kl` is that law's.

    Args:
        num_particles: N.
        beta: log psi = value / beta.
        weight: "full", as in the paper, or "ratio".
        resampling: multinomial, stratified, systematic or residual.
        ess_threshold: resample a prompt whose ESS is below this share of N; above 1, every round.
        kernel: how tokens are proposed; the prior without it.
        output: the "best" reward, or "draw" one by weight.
        keep_trace: keep every round, for forests.

    Raises:
        ValueError: a setting out of its range.

    Source: "A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo
    Methods", 2025. There, finished particles are weighted anew in every round.
    """

    num_particles: int = 16
    beta: float = 0.1
    weight: Weight = "full"
    resampling: Scheme = "multinomial"
    ess_threshold: float = 2.0
    kernel: Kernel | None = None
    output: Literal["best", "draw"] = "best"
    keep_trace: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta")
        known_weight(self.weight)

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Run it for all prompts of a chain."""
        swarm = Swarm.start(chain, self.num_particles)
        ancestors = torch.arange(self.num_particles, device=swarm.log_w.device).expand(swarm.log_w.shape)
        while True:
            kept = ancestors if self.keep_trace else None
            advance(swarm, chain, rng, self.beta, self.kernel, kept, full=self.weight == "full")
            if bool(chain.is_done(swarm.x).all()):
                return filtered(finish(swarm, chain, rng, self.beta, self.output, swarm.value), self.weight)
            ancestors = renew(swarm, chain, rng, self.resampling, self.ess_threshold)


def filtered(found: Particles, weight: Weight) -> Particles:
    """With full weights, the normaliser moves to the details, for it is not Z."""
    if weight == "ratio":
        return found
    none: Float[Tensor, "P"] = torch.full_like(found.log_z, math.nan)
    return replace(found, log_z=none, log_z_error=none, details={**found.details, "log_normaliser": found.log_z})


def known_weight(weight: str) -> None:
    """The weight must be one of the two.

    Raises:
        ValueError: it is not.
    """
    if weight not in ("full", "ratio"):
        raise ValueError(f"weight must be full or ratio, not '{weight}'")
