"""Sequential Monte Carlo: N partial samples share a budget; the good ones take over the slots of the bad ones.

    x_t ~ q(. | x_{t-1}),   g = log p_0(x_t | x_{t-1}) - log q(x_t | x_{t-1}) + log psi_t(x_t) - log psi_{t-1}(x_{t-1})
    c = lse(log W + g),   log Z += c,   log W <- log W + g - c,   ESS = exp(-lse(2 log W))
    ESS < tau N and not finished:   a ~ resample(W),   x <- x[a],   W <- 1 / N

with psi_0 = 1 and psi_K = exp(r / beta): E[exp(log Z)] = Z and E[exp(log Z) f(pick)] / Z = E_p*[f] for every N, every
psi > 0 and every scheme of resampling.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Chain, Prefix
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import Kernel, bare, either, propose
from keel.sampling.particles import Particles, Step, best, effective_size, log_z_error, normalised, spent
from keel.sampling.resampling import Scheme, resample
from keel.sampling.settings import positive


@dataclass
class Swarm:
    """Particles on their way.

    Args:
        x: states, P N of them.
        log_w: normalised log-weights, shape [P, N].
        log_psi: log potential of each state, shape [P, N].
        log_z: shape [P].
        eve: the first ancestor of each particle, shape [P, N].
        generations: times that each prompt was resampled, shape [P].
        trace: the rounds so far.
        value: what each was judged at last, in units of the reward, shape [P, N]; None before the first round.
        rounds: how many there were.
    """

    x: Any
    log_w: Float[Tensor, "P N"]
    log_psi: Float[Tensor, "P N"]
    log_z: Float[Tensor, "P"]
    eve: Int[Tensor, "P N"]
    generations: Int[Tensor, "P"]
    trace: list[Step]
    value: Float[Tensor, "P N"] | None = None
    rounds: int = 0

    @staticmethod
    def start(chain: Chain, count: int) -> "Swarm":
        """N equal particles at the start of each prompt; psi_0 = 1."""
        x = chain.init(count)
        shape, device = (chain.prompts, count), chain.is_done(x).device
        even = torch.full(shape, -math.log(count), dtype=torch.float64, device=device)
        index = torch.arange(count, device=device).expand(shape)
        zeros = torch.zeros(chain.prompts, dtype=torch.long, device=device)
        return Swarm(x, even, torch.zeros_like(even), torch.zeros_like(even[:, 0]), index, zeros, [])

    def weigh(self, gain: Float[Tensor, "P N"]) -> None:
        """Multiply the weights by exp(gain)."""
        self.log_w, total = normalised(self.log_w + gain)
        self.log_z = self.log_z + total

    def descend(self, chain: Chain, ancestors: Int[Tensor, "P N"], changed: Bool[Tensor, "P"]) -> None:
        """Go on with these ancestors; the weights are the caller's affair. Prompts not `changed` stay as they are."""
        prompts, count = ancestors.shape
        flat = (ancestors + torch.arange(prompts, device=ancestors.device)[:, None] * count).flatten()
        self.x = chain.select(self.x, flat)
        self.log_psi = self.log_psi.gather(1, ancestors)
        self.value = None if self.value is None else self.value.gather(1, ancestors)
        self.eve = self.eve.gather(1, ancestors)
        self.generations = self.generations + changed.long()


@part("smc", paper=205)
@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo towards p_0 exp(r / beta); see the module.

    Without a value the potential is 1 until the end, and nothing but the final weights tells particles apart. With the
    exact value and its twisted kernel every weight is equal and any N is exact.

    Args:
        num_particles: N.
        beta: of the tilt.
        resampling: multinomial, stratified, systematic or residual.
        ess_threshold: resample a prompt whose ESS is below this share of N; 1 does it whenever weights differ, 0 never.
        kernel: how tokens are proposed; the prior without it.
        output: "draw" one by weight, or the "best" reward.
        keep_trace: keep every round, for forests.

    Raises:
        ValueError: a setting out of its range.

    Source: "A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo
    Methods", 2025, with the potential as a ratio, so that the target is the tilt.
    """

    num_particles: int = 16
    beta: float = 0.1
    resampling: Scheme = "systematic"
    ess_threshold: float = 0.5
    kernel: Kernel | None = None
    output: Literal["draw", "best"] = "draw"
    keep_trace: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_particles", "beta")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Run it for all prompts of a chain."""
        swarm = Swarm.start(chain, self.num_particles)
        ancestors = torch.arange(self.num_particles, device=swarm.log_w.device).expand(swarm.log_w.shape)
        while True:
            advance(swarm, chain, rng, self.beta, self.kernel, ancestors if self.keep_trace else None)
            if bool(chain.is_done(swarm.x).all()):
                return finish(swarm, chain, rng, self.beta, self.output)
            ancestors = renew(swarm, chain, rng, self.resampling, self.ess_threshold)


def renew(swarm: Swarm, chain: Chain, rng: Choice, scheme: Scheme, ess_threshold: float) -> Int[Tensor, "P N"]:
    """Resample the prompts whose ESS is below its share of N, unless they are finished; the ancestors of all."""
    count = swarm.log_w.shape[1]
    low = (effective_size(swarm.log_w) < ess_threshold * count * (1 - 1e-9)) & running(swarm, chain)
    stay = torch.arange(count, device=low.device).expand(swarm.log_w.shape)
    if not bool(low.any()):
        return stay
    even = torch.full_like(swarm.log_w, -math.log(count))
    weights = torch.where(low[:, None], swarm.log_w, even)
    drawn = resample(weights, scheme, rng, f"resample {swarm.rounds}")  # whatever rounds other prompts resample in
    ancestors = torch.where(low[:, None], drawn, stay)
    swarm.descend(chain, ancestors, low)
    swarm.log_w = torch.where(low[:, None], even, swarm.log_w)
    return ancestors


def running(swarm: Swarm, chain: Chain) -> Bool[Tensor, "P"]:
    """Prompts with an unfinished particle."""
    return ~chain.is_done(swarm.x).view(swarm.log_w.shape).all(1)


@dataclass(frozen=True, eq=False)
class Pinned:
    """States whose next action is not drawn but given.

    Args:
        slots: which, shape [B].
        action: of each state, B of them; only those of the slots count.
        value: of each state after it, shape [B]; None asks the chain.
    """

    slots: Bool[Tensor, "B"]
    action: Any
    value: Float[Tensor, "B"] | None = None


def advance(
    swarm: Swarm,
    chain: Chain,
    rng: Choice,
    beta: float,
    kernel: Kernel | None,
    ancestors: Int[Tensor, "P N"] | None = None,
    *,
    full: bool = False,
    pinned: Pinned | None = None,
) -> Any:
    """One round: propose, extend, weigh with g; the actions.

    Args:
        swarm: changed in place.
        chain, rng, beta, kernel: as in `SMC`.
        ancestors: with them, the round is kept in the trace.
        full: weigh with psi_t and not with psi_t / psi_{t-1}; log_psi is then the sum over the rounds.
        pinned: states that do not choose; under the prior only, for another kernel's g would not be theirs.
    """
    shape = swarm.log_w.shape
    start, before = _lengths(swarm), chain.is_done(swarm.x)
    action, log_p, log_q = propose(chain, swarm.x, rng, kernel, beta)
    asked, known = ~before, None
    if pinned is not None:
        action = either(pinned.slots, pinned.action, action)
        if pinned.value is not None:
            asked, known = asked & ~pinned.slots, pinned.value.view(shape)
    swarm.x = chain.extend(swarm.x, action)
    value = chain.value(swarm.x, rng, asked).view(shape)
    if known is not None:
        value = torch.where(asked.view(shape), value, known)
    value = torch.where(before.view(shape), torch.zeros_like(value) if swarm.value is None else swarm.value, value)
    log_psi = swarm.log_psi + value / beta if full else value / beta
    log_psi = torch.where(before.view(shape), swarm.log_psi, log_psi)
    settled = before.view(shape) | (swarm.log_psi == -math.inf)  # finished, or without weight for good
    gain = (log_p - log_q).view(shape) + log_psi - swarm.log_psi
    swarm.weigh(torch.where(settled, torch.zeros_like(gain), gain))
    swarm.log_psi, swarm.value, swarm.rounds = log_psi, value, swarm.rounds + 1
    if ancestors is not None:
        swarm.trace.append(Step(ancestors, start, bare(swarm.x), log_q.view(shape), swarm.log_w))
    return action


def _lengths(swarm: Swarm) -> Int[Tensor, "P N"]:
    """Tokens written so far; where there are none, rounds."""
    if isinstance(swarm.x, Prefix):
        return swarm.x.length.view(swarm.log_w.shape)
    return torch.full_like(swarm.eve, swarm.rounds)


def finish(
    swarm: Swarm,
    chain: Chain,
    rng: Choice,
    beta: float,
    output: str,
    reward: Float[Tensor, "P N"] | None = None,
    **details: Float[Tensor, "P"],
) -> Particles:
    """The result of a swarm in which all are done; rewards that are not given are what each was judged at last."""
    if reward is None:
        reward = swarm.log_psi * beta if swarm.value is None else swarm.value
    families = torch.zeros_like(swarm.log_w).scatter(1, swarm.eve, 1.0).sum(1)
    pick = rng.categorical(swarm.log_w, "pick") if output == "draw" else best(reward, rng, swarm.log_w > -math.inf)
    return Particles(
        states=bare(swarm.x),
        log_w=swarm.log_w,
        reward=reward,
        pick=pick,
        log_z=swarm.log_z,
        log_z_error=log_z_error(swarm.log_w, swarm.eve, swarm.generations),
        kl=spent(swarm.log_w, swarm.log_psi, swarm.log_z),
        meter=chain.meter,
        kl_is_bound=True,
        trace=tuple(swarm.trace),
        details={"resampled": swarm.generations.double(), "families": families, **details},
    )
