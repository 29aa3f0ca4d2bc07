"""Soft value decoding: every step draws a few candidates from the prior and keeps one of them by its value.

    x'_1 .. x'_M ~ p_0(. | x),   W_j = softmax_j(V_hat(x'_j) / beta),   x <- x'_j with probability W_j

It is soft best-of-M nested in every step: the tilt as M grows if V_hat = V, the prior at M = 1, and the greedy limit
beta -> 0 keeps the best of M. Particles never meet, unlike in sequential Monte Carlo.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Chain, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.kernels import bare
from keel.sampling.particles import Particles
from keel.sampling.settings import positive


@part("soft_value_decoding", paper=211)
@dataclass(frozen=True)
class SoftValueDecoding:
    """N independent chains, each keeping one of M candidates a step; see the module.

    The law of the output is a sum over all that could have been drawn, so there are no weights towards the tilt and no
    log Z. Its KL is bounded: were the candidate kept by a fair die, the output would be a draw from p_0, so that

        KL(output || p_0) <= E[sum over steps of sum_j W_j log(M W_j)]

    by data processing and the chain rule; `kl` is the mean of the sum over the N chains. Equal candidates count as one
    of their joint weight. The last step is judged by the reward itself.

    Args:
        num_particles: N.
        num_candidates: M.
        beta: of the tilt.
        pick: "sample" one by its weight, or the "best" of M (which beta does not change), ties drawn.

    Raises:
        ValueError: a setting out of its range.

    Source: "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding", 2024;
    the released code takes the best, and leaves the last step to chance.
    """

    num_particles: int = 1
    num_candidates: int = 10
    beta: float = 0.1
    pick: Literal["sample", "best"] = "sample"

    def __post_init__(self) -> None:
        positive(self, "num_particles", "num_candidates", "beta")
        if self.pick not in ("sample", "best"):
            raise ValueError(f"pick must be sample or best, not '{self.pick}'")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        x = chain.init(self.num_particles)
        reward = torch.zeros(chain.prompts * self.num_particles, dtype=torch.float64, device=chain.is_done(x).device)
        kl = torch.zeros_like(reward)
        while not bool(chain.is_done(x).all()):
            before = chain.is_done(x)
            x, value, cost = self._step(chain, x, rng)
            reward, kl = torch.where(before, reward, value), kl + cost
        shape = chain.prompts, self.num_particles
        none = torch.full_like(reward.view(shape)[:, 0], math.nan)
        return Particles(
            states=bare(x),
            log_w=torch.full_like(reward.view(shape), -math.log(self.num_particles)),
            reward=reward.view(shape),
            pick=torch.zeros_like(none, dtype=torch.long),  # the chains are independent and alike
            log_z=none,
            log_z_error=none,
            kl=kl.view(shape).mean(1),
            meter=chain.meter,
            kl_is_bound=True,
        )

    def _step(self, chain: Chain, x: Any, rng: Choice) -> tuple[Any, Float[Tensor, "B"], Float[Tensor, "B"]]:
        """States after the step, the value of each, and what the choice has spent, in nats."""
        m = self.num_candidates
        action, _ = chain.propose(x, m, rng, "candidates")
        before = chain.is_done(x)
        first, copies = _distinct(chain, action, before, m)
        rows = torch.arange(len(before), device=before.device)
        after = chain.extend(chain.select(x, rows.repeat_interleave(m)), action)
        own = first == torch.arange(m, device=first.device)
        asked = own & ~before[:, None]
        chain.meter.add("scored", asked.flatten())
        value = chain.value(after, rng, asked.flatten()).view(-1, m)
        log_w = self._weights(value.masked_fill(~own, -math.inf), copies.log())
        spent = torch.where(own, log_w.exp() * (log_w - copies.log()), 0.0).nan_to_num(0.0).sum(1) + math.log(m)
        kept = rng.categorical(log_w.view(chain.prompts, -1, m), "kept").flatten()
        value = value.gather(1, kept[:, None])[:, 0]
        return chain.select(after, rows * m + kept), value, torch.where(before, 0.0, spent)

    def _weights(self, value: Float[Tensor, "B m"], log_copies: Float[Tensor, "B m"]) -> Float[Tensor, "B m"]:
        if self.pick == "best":
            value = torch.where(value == value.amax(1, keepdim=True), 0.0, -math.inf)
            return (value + log_copies).log_softmax(1)
        return (value / self.beta + log_copies).log_softmax(1)


def _distinct(
    chain: Chain, action: Any, done: Bool[Tensor, "B"], m: int
) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m"]]:
    """The first candidate that each one equals, and how many do; steps other than tokens are all taken to differ."""
    if not isinstance(chain, TokenChain):
        place = torch.arange(m, device=done.device).expand(len(done), m)
        return place, torch.ones_like(place, dtype=torch.float64)
    same = action.view(-1, m, 1) == action.view(-1, 1, m)
    return same.int().argmax(2), same.sum(2).double()
