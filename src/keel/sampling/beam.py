"""Beam search: the few best states are kept, all of them one step longer each round.

logp    log p_0(x)                   the likeliest text
tilt    log p_0(x) + V_hat(x) / beta the mode of the tilt: V_hat is the reward at the end
value   V_hat(x)                     the greedy limit beta -> 0, beam search by a process reward model
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Chain, Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.errors import UserError
from keel.core.registry import part
from keel.sampling.kernels import bare
from keel.sampling.particles import Particles, best
from keel.sampling.settings import positive


@dataclass(frozen=True, eq=False)
class Beams:
    """States that are kept, best first.

    Args:
        x: P N states.
        logp: log p_0 of each, shape [P, N].
        value: the last that was said of each, shape [P, N].
        live: false for copies of the best, which fill places that nobody takes, shape [P, N].
    """

    x: Any
    logp: Float[Tensor, "P N"]
    value: Float[Tensor, "P N"]
    live: Bool[Tensor, "P N"]


@part("beam_search")
@dataclass(frozen=True)
class BeamSearch:
    """Beam search of width N; deterministic over tokens, where the likeliest continuations of each beam compete.

    With `draw`, or where a chain does not go by tokens, each beam draws its continuations from the prior, and equal
    ones count once: the beam search over steps to which other samplers are compared. The pick is the beam of the
    highest score; the weights, equal over the beams, are a description. Finished beams stay and compete as they are.
    Of equal scores the first is kept, which is the likeliest continuation of the best beam; of drawn ones, any.

    `kl` is -log p_0 of the pick: exact for a deterministic search, else a bound in the mean. There is no estimate of
    log Z, but the share of the beams is never above it: `log_z_floor` = log sum_i p_0(x_i) exp(r_i / beta). Latents
    have densities and no probabilities: they can be searched by value alone, and `kl` is NaN.

    Args:
        num_particles: N.
        num_candidates: continuations of each beam.
        score: "logp", "tilt" or "value".
        beta: of the tilt.
        draw: the continuations.

    Raises:
        ValueError: a setting out of its range.
        UserError: latents that are not to be drawn and compared by value, when called.
    """

    num_particles: int = 4
    num_candidates: int = 4
    score: Literal["logp", "tilt", "value"] = "tilt"
    beta: float = 0.1
    draw: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_particles", "num_candidates", "beta")
        if self.score not in ("logp", "tilt", "value"):
            raise ValueError(f"score must be logp, tilt or value, not '{self.score}'")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Search for all prompts of a chain."""
        x = chain.init(self.num_particles)
        if not isinstance(x, Prefix) and not (self.draw and self.score == "value"):
            raise UserError(
                "goes by the probabilities of texts, and the states of this chain are none",
                "beam_search",
                "Set draw and score='value', or take soft_value_decoding.",
            )
        zeros = torch.zeros(chain.prompts, self.num_particles, dtype=torch.float64, device=chain.is_done(x).device)
        beams = Beams(x, zeros, zeros, (torch.arange(self.num_particles) == 0).to(zeros.device).expand(zeros.shape))
        while not bool(chain.is_done(beams.x).all()):
            if self.draw or not isinstance(chain, TokenChain):
                beams = self._drawn(chain, beams, rng)
            else:
                beams = self._likeliest(chain, beams, rng)
        done = beams.live.flatten()
        reward = chain.reward(beams.x, done).view(zeros.shape) if self.score == "logp" else beams.value
        reward = torch.where(beams.live, reward, reward[:, :1])
        even = beams.live.double().log().log_softmax(1)
        tilt = (beams.logp + reward / self.beta).masked_fill(~beams.live, -math.inf)
        none = torch.full_like(reward[:, 0], math.nan)
        return Particles(
            states=bare(beams.x),
            log_w=even,
            reward=reward,
            pick=torch.zeros_like(none, dtype=torch.long),
            log_z=none,
            log_z_error=none,
            kl=-beams.logp[:, 0] if isinstance(beams.x, Prefix) else none,
            meter=chain.meter,
            kl_is_bound=True,
            details={"log_z_floor": tilt.logsumexp(1)} if isinstance(beams.x, Prefix) else {},
        )

    # -- two ways to go on -----------------------------------------------------------------------------------------

    def _likeliest(self, chain: TokenChain, beams: Beams, rng: Choice) -> Beams:
        """By the likeliest tokens; only the live beams, copies would say the same again."""
        tokens, log_p = chain.successors(beams.x, self.num_candidates)
        m = tokens.shape[1]
        live = beams.live.flatten()[:, None] & (log_p > -math.inf)
        logp = beams.logp.flatten()[:, None] + log_p.double()
        if self.score == "logp":  # needs no state before it is kept
            kept, alive = _top(logp.masked_fill(~live, -math.inf).view(len(beams.logp), -1), self.num_particles)
            x = chain.select(beams.x, _rows(kept // m, self.num_particles))
            chain.meter.add("generated", alive.flatten() & ~chain.is_done(x))
            x = chain.extend(x, tokens.view(len(kept), -1).gather(1, kept).flatten())
            return Beams(x, logp.view(len(kept), -1).gather(1, kept), torch.zeros_like(beams.value), alive)
        return self._kept(chain, beams, tokens.flatten(), logp, live, rng, drawn=False)

    def _drawn(self, chain: Chain, beams: Beams, rng: Choice) -> Beams:
        """By draws of the prior, each state once."""
        action, log_p = chain.propose(beams.x, self.num_candidates, rng, "candidates")
        logp = beams.logp.flatten()[:, None] + log_p.double()
        return self._kept(chain, beams, action, logp, None, rng, drawn=True)

    def _kept(
        self,
        chain: Chain,
        beams: Beams,
        action: Any,
        logp: Float[Tensor, "B m"],
        live: Bool[Tensor, "B m"] | None,
        rng: Choice,
        drawn: bool,
    ) -> Beams:
        """The best of the candidates; which are live is a matter of their keys, if it is not known."""
        prompts, m = len(beams.logp), logp.shape[1]
        rows = torch.arange(len(logp), device=logp.device).repeat_interleave(m)
        before = chain.is_done(beams.x)[rows]
        after = chain.extend(chain.select(beams.x, rows), action)
        live = _first(chain.key(after), logp) if live is None else live
        value = beams.value.flatten()[rows]
        if self.score != "logp":
            asked = live.flatten() & ~before
            chain.meter.add("scored", asked)
            value = torch.where(before, value, chain.value(after, rng, asked))
        score = {"logp": logp.flatten(), "tilt": logp.flatten() + value / self.beta, "value": value}[self.score]
        score = score.masked_fill(~live.flatten(), -math.inf).view(prompts, -1)
        kept, alive = _turns(score, self.num_particles, rng) if drawn else _top(score, self.num_particles)
        index = _rows(kept, self.num_particles * m)
        if not drawn:
            chain.meter.add("generated", alive.flatten() & ~before[index])
        grid = alive.shape
        return Beams(chain.select(after, index), logp.flatten()[index].view(grid), value[index].view(grid), alive)


def _top(score: Float[Tensor, "P C"], count: int) -> tuple[Int[Tensor, "P N"], Bool[Tensor, "P N"]]:
    """The best candidates, best first, the first of equals; where there are too few, the best again, not alive."""
    order = score.argsort(stable=True, dim=1, descending=True)[:, :count]
    order = torch.cat([order, order[:, :1].expand(-1, count - order.shape[1])], 1)
    alive = score.gather(1, order) > -math.inf
    alive[:, score.shape[1] :] = False
    return torch.where(alive, order, order[:, :1]), alive


def _turns(score: Float[Tensor, "P C"], count: int, rng: Choice) -> tuple[Int[Tensor, "P N"], Bool[Tensor, "P N"]]:
    """As `_top`, with equals in any order, for that of draws means nothing."""
    left, order, alive = score, [], []
    for _ in range(count):
        among = left > -math.inf
        alive.append(among.any(1))
        among = torch.cat([among[:, :1] | ~alive[-1][:, None], among[:, 1:]], 1)
        order.append(best(left, rng, among, "equals"))
        left = left.scatter(1, order[-1][:, None], -math.inf)
    kept, some = torch.stack(order, 1), torch.stack(alive, 1)
    return torch.where(some, kept, kept[:, :1]), some


def _rows(place: Int[Tensor, "P N"], width: int) -> Int[Tensor, "B"]:
    """Places within prompts as places in the batch."""
    return (place + torch.arange(len(place), device=place.device)[:, None] * width).flatten()


def _first(keys: list, like: Float[Tensor, "B m"]) -> Bool[Tensor, "B m"]:
    """The first state of each key."""
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    found = torch.zeros(len(keys), dtype=torch.bool)
    found[list(first.values())] = True
    return found.view(like.shape).to(like.device)
