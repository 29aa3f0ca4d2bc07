"""Denoising Gaussians exactly: chains over latents on which the tilt, Z and every V are known.

    x ~ sum_c w_c N(mu_c, 1),   x_a = a x + sqrt(1 - a^2) noise,   r(x) = -|x - y|^2 / (2 tau^2),   beta = 1

A chain goes from pure noise at a = 0 to data at a = 1. Its start is one point, for at a = 0 a latent says nothing. In
component c, whose share at x_a is w_c N(x_a; a mu_c, 1), a step from a to b is exact:

    x_b | x_a, c ~ N(b mu_c + (a / b) (x_a - a mu_c), 1 - (a / b)^2)
    V(x_a, c) = log(tau^2 / s) / 2 - |mu_c + a (x_a - a mu_c) - y|^2 / (2 s),   s = tau^2 + 1 - a^2
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Meter
from keel.core.chance import Choice

LEVELS = (0.0, 0.4, 0.8, 1.0)


@dataclass(frozen=True, eq=False)
class Latent:
    """Latents, the steps that each has made, and its prompt."""

    x: Float[Tensor, "B d"]
    step: Int[Tensor, "B"]
    prompt: Int[Tensor, "B"]


@dataclass(frozen=True, eq=False)
class World:
    """A mixture of C Gaussians in d dimensions, and the reward's y and tau^2."""

    weight: Float[Tensor, "C"]
    mean: Float[Tensor, "C d"]
    y: Float[Tensor, "d"]
    tau2: float = 0.25

    def log_z(self) -> float:
        """V at the start."""
        return float(self.value(torch.zeros(1, len(self.y)).double(), torch.zeros(1).double()))

    def tilt(self) -> tuple[Float[Tensor, "C"], Float[Tensor, "C d"], float]:
        """Weights, means and the variance of the tilt, a mixture as well."""
        fit = self.weight.log() - (self.mean - self.y).square().sum(1) / (2 * (1 + self.tau2))
        return fit.softmax(0), (self.tau2 * self.mean + self.y) / (1 + self.tau2), self.tau2 / (1 + self.tau2)

    def moments(self) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
        """Mean of the tilt and of its square."""
        weight, mean, variance = self.tilt()
        return weight @ mean, weight @ (mean.square() + variance)

    def shares(self, x: Float[Tensor, "B d"], a: Float[Tensor, "B"]) -> Float[Tensor, "B C"]:
        """log P(c | x_a)."""
        gap = x[:, None] - a[:, None, None] * self.mean
        return (self.weight.log() - gap.square().sum(2) / 2).log_softmax(1)

    def value(self, x: Float[Tensor, "B d"], a: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """V(x_a)."""
        a3, s = a[:, None, None], (self.tau2 + 1 - a.square())[:, None]
        gap = self.mean + a3 * (x[:, None] - a3 * self.mean) - self.y
        of_each = len(self.y) * (self.tau2 / s).log() / 2 - gap.square().sum(2) / (2 * s)
        return (self.shares(x, a) + of_each).logsumexp(1)

    def reward(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B"]:
        """r(x)."""
        return -(x - self.y).square().sum(1) / (2 * self.tau2)


def _world(weight: list[float], mean: list[list[float]], y: list[float]) -> World:
    return World(*(torch.tensor(numbers, dtype=torch.float64) for numbers in (weight, mean, y)))


GAUSSIAN = _world([1.0], [[0.0]], [1.0])
MIXTURE = _world([0.5, 0.5], [[-2.0], [2.0]], [1.0])
SPACE = _world([1.0], [[0.0, 0.0, 0.0]], [1.0, -0.5, 0.0])


class LatentChain:
    """The chain of a world; a `Chain`, and nothing more.

    Args:
        world: data and reward.
        prompts: P, all alike.
        value: from latents and their levels to estimates of V; zero without it.
        levels: a of each step, from 0 to 1.
    """

    def __init__(
        self,
        world: World,
        prompts: int = 1,
        value: Callable[[Tensor, Tensor], Tensor] | None = None,
        levels: tuple[float, ...] = LEVELS,
    ):
        self.world, self.prompts, self.value_of = world, prompts, value
        self.levels, self.horizon = torch.tensor(levels, dtype=torch.float64), len(levels) - 1
        self.meter = Meter(prompts)

    def init(self, n: int) -> Latent:
        """See `Chain`."""
        prompt = torch.arange(self.prompts).repeat_interleave(n)
        zeros = torch.zeros(len(prompt), len(self.world.y), dtype=torch.float64)
        return Latent(zeros, torch.zeros_like(prompt), prompt)

    def propose(self, x: Latent, m: int, rng: Choice, name: str = "action") -> tuple[Tensor, Float[Tensor, "B m"]]:
        """See `Chain`."""
        mean, deviation, shares = self._next(x)
        size = mean.shape[1]
        component = rng.categorical(shares.view(self.prompts, -1, size), f"{name} component", m).view(-1, m, 1)
        noise = rng.normal((self.prompts, len(x.x) // self.prompts * m, mean.shape[2]), name).view(len(x.x), m, -1)
        action = mean.gather(1, component.expand(-1, -1, mean.shape[2])) + deviation * noise
        done = self.is_done(x)
        action = torch.where(done[:, None, None], x.x[:, None], action)
        self.meter.add("generated", (~done).long() * m)
        return action.flatten(0, 1), self.logp(x, action)

    def logp(self, x: Latent, action: Float[Tensor, "B m d"]) -> Float[Tensor, "B m"]:
        """log density of actions; 0 where the chain has ended."""
        mean, deviation, shares = self._next(x)
        gap = (action[:, :, None] - mean[:, None]) / deviation[..., None]
        normal = -gap.square() / 2 - deviation[..., None].log() - math.log(2 * math.pi) / 2
        found = (shares[:, None] + normal.sum(3)).logsumexp(2)
        return torch.where(self.is_done(x)[:, None], 0.0, found)

    def _next(self, x: Latent) -> tuple[Float[Tensor, "B C d"], Float[Tensor, "B 1 1"], Float[Tensor, "B C"]]:
        """Means and deviation of the next latent in each component, and their shares."""
        a, b = (self.levels[(x.step + k).clamp(max=self.horizon)] for k in (0, 1))
        a, b, mean = a[:, None, None], b[:, None, None], self.world.mean
        shift = b * mean + a / b * (x.x[:, None] - a * mean)
        deviation = (1 - (a / b).square()).sqrt()
        deviation = torch.where(self.is_done(x)[:, None, None], 1.0, deviation)
        return shift, deviation, self.world.shares(x.x, a[:, 0, 0])

    def extend(self, x: Latent, action: Float[Tensor, "B d"]) -> Latent:
        """See `Chain`."""
        done = self.is_done(x)
        return Latent(torch.where(done[:, None], x.x, action), x.step + (~done).long(), x.prompt)

    def select(self, x: Latent, index: Int[Tensor, "n"]) -> Latent:
        """See `Chain`."""
        return Latent(x.x[index], x.step[index], x.prompt[index])

    def is_done(self, x: Latent) -> Bool[Tensor, "B"]:
        """See `Chain`."""
        return x.step == self.horizon

    def complete(self, x: Latent, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Latent:
        """See `Chain`."""
        rng = rng.scope("complete")
        if where is not None:
            x = Latent(x.x, torch.where(where, x.step, self.horizon), x.prompt)
        x = self.select(x, torch.arange(len(x.x)).repeat_interleave(m))
        while not bool(self.is_done(x).all()):
            x = self.extend(x, self.propose(x, 1, rng)[0])
        return x

    def reward(self, x: Latent, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`."""
        wanted = self.is_done(x) if where is None else self.is_done(x) & where
        self.meter.add("rewards", wanted)
        return torch.where(wanted, self.world.reward(x.x), 0.0)

    def value(self, x: Latent, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`."""
        found = self.reward(x, where)
        if self.value_of is None:
            return found
        wanted = ~self.is_done(x) if where is None else ~self.is_done(x) & where
        return torch.where(wanted, self.value_of(x.x, self.levels[x.step]), found)

    def key(self, x: Latent) -> list[tuple[float, ...]]:
        """See `Chain`."""
        return [(p, t, *row) for p, t, row in zip(x.prompt.tolist(), x.step.tolist(), x.x.tolist(), strict=True)]


def exact(world: World, prompts: int = 1) -> LatentChain:
    """The chain with V itself as its value."""
    return LatentChain(world, prompts, world.value)
