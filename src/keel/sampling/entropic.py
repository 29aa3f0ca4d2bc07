"""The entropic particle filter: resampling is flattened early on, where a few over-confident scores would take over.

With W the weights, u = t / K the progress, h = -sum W log W / log N, and Temp 1 unless ESS / N < tau and u < u_early:

    ess       Temp = max(1, (N / ESS) (1 - u))
    entropy   Temp = max(1, 1 / (h + (1 - h) u))
    base      Temp = max(1, 2 - u)

    a ~ W^(1 / Temp), normalised;   W <- 1 / N, or with `correct` W_j / a_j for each copy of j

Look-ahead draws a provisional successor x' of each particle and resamples with (W g(x'))^(1 / Temp); the successor is
then drawn anew, so that copies of a particle differ. It is an auxiliary particle filter, and `correct` is the same: a
depends on nothing that is drawn afterwards, and E[sum_i f(x_i) W_{a_i} / (N a_{a_i})] = sum_j W_j f(x_j).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.particle_filter import Weight, filtered, known_weight
from keel.sampling.particles import Particles, effective_size, normalised
from keel.sampling.resampling import Scheme, resample
from keel.sampling.settings import positive, share
from keel.sampling.smc import Swarm, advance, finish, running

Rule = Literal["ess", "entropy", "base"]


@part("entropic_particle_filter", paper=91)
@dataclass(frozen=True)
class EntropicParticleFilter:
    """A particle filter that anneals its resampling by the effective sample size; see the module.

    With `weight="ratio"` and `correct` the estimate of Z is unbiased; without `correct` nothing is known of Z and of
    the KL, which are NaN. With `weight="full"` the law is another one: see `keel.sampling.particle_filter`. `hottest`
    in the details is the highest temperature of a prompt.

    Args:
        num_particles: N.
        beta: log psi = value / beta.
        weight: "full", as in the paper, or "ratio".
        rule: for the temperature: "ess", "entropy" or "base".
        ess_threshold: tau, share of N below which resampling is flattened.
        early: u_early, progress from which it no longer is.
        max_steps: K; the chain's horizon without it. Where samples are much shorter than K, all of it is early.
        correct: give a copy of j the weight W_j / a_j.
        look_ahead: let the score of a provisional successor join the resampling weight; twice the tokens and scores.
        resampling: multinomial, stratified, systematic or residual.
        output: the "best" reward, or "draw" one by weight.

    Raises:
        ValueError: a setting out of its range.

    Source: "Mitigating Premature Exploitation in Particle-based Monte Carlo for Inference-Time Scaling", 2025; the
    corrected weights are Keel's, and look-ahead follows the auxiliary particle filter of Pitt and Shephard, 1999.
    """

    num_particles: int = 16
    beta: float = 0.1
    weight: Weight = "full"
    rule: Rule = "ess"
    ess_threshold: float = 0.5
    early: float = 0.5
    max_steps: int | None = None
    correct: bool = False
    look_ahead: bool = False
    resampling: Scheme = "systematic"
    output: Literal["best", "draw"] = "best"

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta", *(["max_steps"] if self.max_steps is not None else []))
        share(self, "ess_threshold", "early")
        known_weight(self.weight)
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not '{self.rule}'")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Run it for all prompts of a chain."""
        swarm = Swarm.start(chain, self.num_particles)
        full = self.weight == "full"
        hottest = torch.ones_like(swarm.log_z)
        while True:
            advance(swarm, chain, rng, self.beta, None, full=full)
            if bool(chain.is_done(swarm.x).all()):
                found = finish(swarm, chain, rng, self.beta, self.output, swarm.value, hottest=hottest)
                return filtered(found, self.weight) if self.correct else _without_z(found)
            log_w = swarm.log_w
            if self.look_ahead:
                log_w = normalised(log_w + provisional_gain(swarm, chain, rng, self.beta, full))[0]
            progress = swarm.rounds / (self.max_steps or chain.horizon)
            heat = temperature(log_w, progress, self.rule, self.ess_threshold, self.early)
            hottest = torch.where(running(swarm, chain), torch.maximum(hottest, heat), hottest)
            flatten(swarm, chain, rng, log_w / heat[:, None], self.resampling, self.correct)


def _without_z(found: Particles) -> Particles:
    none = torch.full_like(found.log_z, math.nan)
    return replace(found, log_z=none, log_z_error=none, kl=none, kl_is_bound=False)


def temperature(
    log_w: Float[Tensor, "P N"], progress: float, rule: Rule, ess_threshold: float = 0.5, early: float = 0.5
) -> Float[Tensor, "P"]:
    """The temperature of each prompt's resampling; see the module.

    >>> log_w = torch.tensor([[.9, .5, .5, .1]], dtype=torch.float64).logit().log_softmax(-1)  # scores, as odds
    >>> [round(float(temperature(log_w, 1 / 8, rule)), 6) for rule in ("ess", "entropy", "base")]
    [2.3534, 1.867863, 1.875]

    Args:
        log_w: normalised log-weights.
        progress: u.
        rule: which formula.
        ess_threshold: tau.
        early: u_early.
    """
    count = log_w.shape[1]
    size = effective_size(log_w)
    if count == 1 or progress >= early:
        return torch.ones_like(size)
    if rule == "ess":
        heat = count / size * (1 - progress)
    elif rule == "entropy":
        entropy = torch.special.entr(log_w.exp()).sum(-1) / math.log(count)
        heat = 1 / (entropy + (1 - entropy) * progress)
    else:
        heat = torch.full_like(size, 2 - progress)
    return torch.where(size / count < ess_threshold, heat.clamp(min=1), torch.ones_like(heat))


def flatten(
    swarm: Swarm, chain: Chain, rng: Choice, log_a: Float[Tensor, "P N"], scheme: Scheme, correct: bool
) -> Int[Tensor, "P N"]:
    """Resample the unfinished prompts in proportion to a, which need not be the weights; the ancestors of all.

    Args:
        swarm: changed in place; its weights become 1 / N, or W_j / a_j normalised, the log of whose mean goes to log Z.
        chain, rng, scheme: as in `EntropicParticleFilter`.
        log_a: unnormalised; nothing with weight may be left out.
        correct: take the weights W_j / a_j.
    """
    count = log_a.shape[1]
    going = running(swarm, chain)
    log_a = normalised(log_a)[0]
    even = torch.full_like(log_a, -math.log(count))
    drawn = resample(torch.where(going[:, None], log_a, even), scheme, rng, f"resample {swarm.rounds}")
    stay = torch.arange(count, device=log_a.device).expand(log_a.shape)
    ancestors = torch.where(going[:, None], drawn, stay)
    copied = (swarm.log_w - log_a).gather(1, ancestors) - math.log(count) if correct else even
    swarm.descend(chain, ancestors, going)
    log_w, total = normalised(copied)
    swarm.log_w = torch.where(going[:, None], log_w, swarm.log_w)
    swarm.log_z = swarm.log_z + torch.where(going, total, torch.zeros_like(total))
    return ancestors


def provisional_gain(swarm: Swarm, chain: Chain, rng: Choice, beta: float, full: bool) -> Float[Tensor, "P N"]:
    """log g of one successor of each particle, drawn for this alone; 0 of finished particles."""
    finished = chain.is_done(swarm.x)
    everything = torch.arange(swarm.log_w.numel(), device=swarm.log_w.device)
    copy = chain.select(swarm.x, everything)
    action, _ = chain.propose(copy, 1, rng, "look ahead")
    value = chain.value(chain.extend(copy, action), rng.scope("look ahead"), ~finished)
    gain = value.view(swarm.log_psi.shape) / beta - (0 if full else swarm.log_psi)
    return torch.where(finished.view(gain.shape), torch.zeros_like(gain), gain)
