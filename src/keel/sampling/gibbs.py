"""Particle Gibbs: sweeps of a particle filter, each with the path that the one before put out among its particles.

A conditional sweep pins slot 0 to a reference path; the other slots draw their ancestors from all, slot 0 included:

    a_1 = 1,   a_i ~ W (i > 1),   x_t^1 = the reference at t,   x_t^i ~ p_0(. | x_{t-1}^{a_i}),   next path ~ W_K

It leaves the tilt exactly invariant for every N >= 2 and every psi > 0, so that sweeps converge with few particles. The
draws are multinomial, because the other schemes give a pinned slot another law.

Source: Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods", 2010.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import bare
from keel.sampling.particle_filter import Weight, filtered, known_weight
from keel.sampling.particles import Particles, effective_size, spent
from keel.sampling.resampling import resample
from keel.sampling.settings import positive
from keel.sampling.smc import Pinned, Swarm, advance, finish, running


@dataclass(frozen=True, eq=False)
class Path:
    """What leads to a finished state of each prompt, to be pinned.

    Args:
        actions: of each of R rounds, P in each; those of a state that is finished by then do not count.
        values: of the state after each round, shape [P, R]; without them the chain is asked again.
    """

    actions: Sequence[Any]
    values: Float[Tensor, "P R"] | None = None


@dataclass
class Sweep:
    """A finished sweep, and what leads from its particles back to the start.

    Args:
        swarm: its particles, all finished.
        actions: of all P N particles in each round.
        ancestors: slot from which each particle came in each round, each of shape [P, N].
        values: of the particles after each round, each of shape [P, N].
    """

    swarm: Swarm
    actions: list[Any]
    ancestors: list[Int[Tensor, "P N"]]
    values: list[Float[Tensor, "P N"]]

    def path(self, pick: Int[Tensor, "P"]) -> Path:
        """The path that ends in one particle of each prompt."""
        first = torch.arange(len(pick), device=pick.device) * self.swarm.log_w.shape[1]
        slot, actions, values = pick[:, None], [], []
        for t in reversed(range(len(self.actions))):
            actions.append(self.actions[t][first + slot[:, 0]])
            values.append(self.values[t].gather(1, slot))
            slot = self.ancestors[t].gather(1, slot)
        return Path(actions[::-1], torch.cat(values[::-1], 1))


@part("particle_gibbs", paper=205)
@dataclass(frozen=True)
class ParticleGibbs:
    """Sweeps of conditional sequential Monte Carlo; the pick is the path of the last one.

    The first sweep is an ordinary particle filter, whose estimate of Z is the one reported: conditional sweeps have
    none that is unbiased. `moved` is the share of conditional sweeps that left their reference. With `weight="full"`
    the invariant law is p_0 prod psi_t, and there is no estimate of Z.

    Args:
        num_particles: N in a sweep, at least 2.
        num_sweeps: the first one included.
        beta: log psi = value / beta.
        weight: "ratio", towards the tilt, or "full"; see `keel.sampling.particle_filter`.
        ess_threshold: resample a prompt whose ESS is below this share of N; above 1, every round.

    Raises:
        ValueError: a setting out of its range.

    Source: "A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo
    Methods", 2025. Its several references, drawn from one sweep, leave no known law invariant: here there is one.
    """

    num_particles: int = 16
    num_sweeps: int = 4
    beta: float = 0.1
    weight: Weight = "ratio"
    ess_threshold: float = 2.0

    def __post_init__(self) -> None:
        positive(self, "num_sweeps", "beta")
        known_weight(self.weight)
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, not {self.num_particles}: one slot is pinned")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Run it for all prompts of a chain."""
        path, found, first = None, None, None
        moved: list[Float[Tensor, "P"]] = []
        for _ in range(self.num_sweeps):
            inside = rng.scope("sweep")
            done = sweep(chain, inside, self.num_particles, self.beta, path, self.weight, self.ess_threshold)
            found = finish(done.swarm, chain, inside, self.beta, "draw", done.swarm.value)
            first = found if first is None else first
            moved += [] if path is None else [(found.pick > 0).double()]
            path = done.path(found.pick)
        assert found is not None and first is not None
        none = torch.full_like(first.log_z, math.nan)
        details = {**found.details, "moved": torch.stack(moved).mean(0) if moved else none}
        kl = spent(found.log_w, done.swarm.log_psi, first.log_z)
        result = replace(
            found, log_z=first.log_z, log_z_error=first.log_z_error, kl=kl, kl_is_bound=False, details=details
        )
        return filtered(result, self.weight)


def sweep(
    chain: Chain,
    rng: Choice,
    num_particles: int,
    beta: float,
    path: Path | None = None,
    weight: Weight = "ratio",
    ess_threshold: float = 2.0,
) -> Sweep:
    """One sweep, conditional if there is a path to pin; the next path is `sweep.path` of a draw from its weights."""
    swarm = Swarm.start(chain, num_particles)
    ancestors = torch.arange(num_particles, device=swarm.log_w.device).expand(swarm.log_w.shape)
    done = Sweep(swarm, [], [], [])
    while True:
        action = advance(swarm, chain, rng, beta, None, full=weight == "full", pinned=_pinned(swarm, path))
        assert swarm.value is not None
        done.actions.append(action)
        done.ancestors.append(ancestors)
        done.values.append(swarm.value)
        if bool(chain.is_done(swarm.x).all()):
            swarm.x = bare(swarm.x)
            return done
        ancestors = _renew(swarm, chain, rng, ess_threshold, int(path is not None))


def _pinned(swarm: Swarm, path: Path | None) -> Pinned | None:
    """The reference's next action in slot 0 of each prompt, and the value that is known to follow."""
    if path is None:
        return None
    shape, now = swarm.log_w.shape, swarm.rounds
    slots = torch.zeros(shape, dtype=torch.bool, device=swarm.log_w.device)
    slots[:, 0] = True
    prompt = torch.arange(shape[0], device=slots.device).repeat_interleave(shape[1])
    action = path.actions[min(now, len(path.actions) - 1)][prompt]
    value = None
    if path.values is not None:  # a path that ended earlier keeps its last
        value = path.values[:, min(now, path.values.shape[1] - 1), None].expand(shape).flatten()
    return Pinned(slots.flatten(), action, value)


def _renew(swarm: Swarm, chain: Chain, rng: Choice, ess_threshold: float, pinned: int) -> Int[Tensor, "P N"]:
    """Multinomial resampling that leaves the pinned slots as they are; the ancestors of all."""
    count = swarm.log_w.shape[1]
    stay = torch.arange(count, device=swarm.log_w.device).expand(swarm.log_w.shape)
    low = (effective_size(swarm.log_w) < ess_threshold * count * (1 - 1e-9)) & running(swarm, chain)
    if not bool(low.any()):
        return stay
    free = resample(swarm.log_w, "multinomial", rng, f"resample {swarm.rounds}", count - pinned)
    drawn = torch.cat([stay[:, :pinned], free], 1)
    ancestors = torch.where(low[:, None], drawn, stay)
    swarm.descend(chain, ancestors, low)
    even = torch.full_like(swarm.log_w, -math.log(count))
    swarm.log_w = torch.where(low[:, None], even, swarm.log_w)
    return ancestors
