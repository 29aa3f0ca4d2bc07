"""Rejection: completions of the prior, accepted with a probability that makes the accepted ones a draw of the tilt.

    rejection         accept x with exp((r(x) - r_max) / beta):   exactly p*, at the rate Z exp(-r_max / beta)
    quasi rejection   accept x with min(1, w(x) / c), w = exp(r / beta), for a ceiling c that w may exceed:

    p_c(x) = p_0(x) min(w(x), c) / Z_c,   accept rate Z_c / c,   D(p_c || p*) -> 0 as c -> max w

Both go by rounds of N completions for each prompt, until every prompt has accepted or the samples are used up; the pick
is one of those that the first lucky round accepted, each as likely. A prompt that is done draws nothing more.

What is estimated (accept rate, Z, divergences) comes from the first round alone, whose size is fixed: a mean over all
rounds would be biased, because luck ends them.

Source for quasi rejection: Eikema, Kruszewski, Dance, Elsahar and Dymetman, "An approximate sampler for energy-based
models with divergence diagnostics", 2022.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.chain import Chain
from keel.core.chance import Choice
from keel.core.errors import UserError
from keel.core.registry import part
from keel.divergences.family import f_divergence
from keel.sampling.kernels import bare, either
from keel.sampling.particles import Particles, log_z_error, normalised, spent
from keel.sampling.settings import positive, share


@part("rejection")
@dataclass(frozen=True)
class Rejection:
    """Rejection sampling: what it accepts is an exact draw of the tilt, without a value and with finite compute.

    A prompt that accepts nothing has `accepted` 0 in its details, and its pick is the last resort: one of all that were
    seen, with probability softmax(r / beta).

    Args:
        bound: r_max, at least every reward. The nearer, the faster.
        num_particles: N, completions in a round.
        max_samples: completions of a prompt at most; rounds that do not fit are not drawn.
        beta: of the tilt.

    Raises:
        ValueError: N or beta not above 0, or max_samples below N.
        UserError: a reward above the bound, when called.

    Source: von Neumann, "Various techniques used in connection with random digits", 1951.
    """

    bound: float
    num_particles: int = 16
    max_samples: int = 256
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        ceiling = torch.full((chain.prompts,), self.bound / self.beta, dtype=torch.float64)
        return _search(chain, rng, self.beta, self.num_particles, self.max_samples, ceiling, self._below)

    def _below(self, reward: Float[Tensor, "P N"]) -> None:
        top = float(reward.max())
        if top > self.bound + 1e-6 * max(1.0, abs(self.bound)):  # a reward may have been rounded to fp32
            raise UserError(
                f"a reward of {top:g} is above the bound of {self.bound:g}, so the law would be wrong",
                "rejection.bound",
                "Raise the bound, or use quasi_rejection, which may be exceeded.",
            )


@part("quasi_rejection")
@dataclass(frozen=True)
class QuasiRejection:
    """Quasi rejection sampling: faster than rejection where weights have a tail, at a divergence that is reported.

    Details: `ceiling` (log c), `accept_rate`, `total_variation` TV(p_c, p*) and `kl_to_tilt` KL(p_c || p*), both
    estimated with self-normalised weights, so that weights never seen are missing from them: they err to the low side.
    The last resort, where nothing was accepted, is drawn with probability proportional to min(w, c).

    Args:
        ceiling: in the unit below.
        unit: "log_weight" takes `ceiling` for log c, in units of r / beta; "quantile" takes log c to be that quantile
            of r / beta among N completions, which are drawn for this and are no candidates; -inf is left out.
        num_particles: N, completions in a round.
        max_samples: candidates of a prompt at most; rounds that do not fit are not drawn.
        beta: of the tilt.

    Raises:
        ValueError: N or beta not above 0, max_samples below N, a quantile outside [0, 1], or an unknown unit.
    """

    ceiling: float = 0.9
    unit: Literal["quantile", "log_weight"] = "quantile"
    num_particles: int = 16
    max_samples: int = 256
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        if self.unit not in ("quantile", "log_weight"):
            raise ValueError(f"unit must be quantile or log_weight, not '{self.unit}'")
        if self.unit == "quantile":
            share(self, "ceiling")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        if self.unit == "log_weight":
            ceiling = torch.full((chain.prompts,), self.ceiling, dtype=torch.float64)
        else:
            states = chain.complete(chain.init(1), self.num_particles, rng.scope("ceiling"))
            log_w = chain.reward(states).view(chain.prompts, -1) / self.beta
            some = log_w.double().masked_fill(log_w == -math.inf, math.nan)
            ceiling = some.nanquantile(self.ceiling, dim=1).nan_to_num(nan=0.0)  # no weight was seen: any will do
        return _search(chain, rng, self.beta, self.num_particles, self.max_samples, ceiling, lambda reward: None)


def trade_off(
    log_w: Float[Tensor, "P n"],
    ceiling: Float[Tensor, "P k"],
    divergences: Sequence[str] = ("tv", "kl_policy_ref"),
) -> dict[str, Float[Tensor, "P k"]]:
    """What each ceiling costs and gives, from log-weights of completions of the prior: accept rate and D(p_c || p*).

        accept rate = mean min(1, w / c),   D = D(W_c || W),   W ~ w,   W_c ~ min(w, c)

    >>> log_w = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> found = trade_off(log_w, torch.tensor([[0.0, 2.0, 3.0]]))
    >>> [round(float(rate), 3) for rate in found["accept_rate"][0]], [round(float(d), 3) for d in found["tv"][0]]
    ([1.0, 0.626, 0.388], [0.394, 0.244, 0.0])

    Args:
        log_w: r / beta of independent completions; -inf has no weight.
        ceiling: log c, as many as wanted for each prompt.
        divergences: names of f-divergences, their first argument p_c.

    Returns:
        `accept_rate` and each divergence by name, shape [P, k].
    """
    clipped = torch.minimum(log_w[:, None], ceiling[:, :, None])
    found = {"accept_rate": (clipped.logsumexp(-1) - math.log(log_w.shape[1]) - ceiling).exp()}
    target = log_w.log_softmax(-1)[:, None].expand(clipped.shape)
    for name in divergences:
        found[name] = f_divergence(name).value(clipped.log_softmax(-1), target)
    return found


@dataclass
class _Kept:
    """The round that each prompt will put out: its completions, their log-weights, and the rewards."""

    states: Any
    log_w: Float[Tensor, "P N"]
    reward: Float[Tensor, "P N"]

    def replace(self, new: "_Kept", where: Bool[Tensor, "P"]) -> "_Kept":
        """The new round for some prompts."""
        states = either(where.repeat_interleave(self.log_w.shape[1]), new.states, self.states)
        choose = where[:, None]
        log_w = torch.where(choose, new.log_w, self.log_w)
        return _Kept(states, log_w, torch.where(choose, new.reward, self.reward))


def _search(
    chain: Chain,
    rng: Choice,
    beta: float,
    count: int,
    limit: int,
    ceiling: Float[Tensor, "P"],
    check: Callable[[Float[Tensor, "P N"]], None],
) -> Particles:
    """Rounds until all prompts have accepted, or the limit is reached."""
    start = chain.init(1)
    ceiling = ceiling.to(chain.is_done(start).device)
    accepted = torch.zeros_like(ceiling, dtype=torch.bool)
    samples = torch.zeros_like(ceiling)
    kept, first, seen = None, None, torch.full_like(ceiling, -math.inf)
    for turn in range(limit // count):
        searching = ~accepted
        states = bare(chain.complete(start, count, rng.scope("round"), searching))
        reward = chain.reward(states, searching.repeat_interleave(count)).view(chain.prompts, count).double()
        check(reward.masked_fill(accepted[:, None], -math.inf))
        clipped = torch.minimum(reward / beta, ceiling[:, None])
        lucky = _happens((clipped - ceiling[:, None]).masked_fill(accepted[:, None], 0), rng, "accept")
        now = lucky.any(1) & searching
        resort, total = normalised(clipped)
        seen = torch.logaddexp(seen, total)
        # of the rounds without luck one is kept, in proportion to its weight: the last resort is drawn from all of them
        leading = (total - seen).masked_fill(now | accepted | (seen == -math.inf), 0)
        taken = _happens(leading[:, None], rng, "last resort")[:, 0] & searching
        even = torch.zeros_like(clipped).masked_fill(~lucky, -math.inf)
        new = _Kept(states, torch.where(now[:, None], normalised(even)[0], resort), reward)
        kept = new if kept is None else kept.replace(new, taken)
        first = reward / beta if turn == 0 else first
        samples, accepted = samples + count * searching, accepted | now
        if bool(accepted.all()):
            break
    assert kept is not None and first is not None
    return _result(chain, rng, kept, first, ceiling, accepted=accepted.double(), samples=samples)


def _happens(log_prob: Float[Tensor, "P n"], rng: Choice, name: str) -> Bool[Tensor, "P n"]:
    prob = log_prob.exp()
    return rng.uniform(prob[..., None], name) < prob


def _result(
    chain: Chain,
    rng: Choice,
    kept: _Kept,
    first: Float[Tensor, "P N"],
    ceiling: Float[Tensor, "P"],
    **details: Float[Tensor, "P"],
) -> Particles:
    log_w, total = normalised(first)
    clipped = torch.minimum(first, ceiling[:, None])
    used, below = normalised(clipped)
    index = torch.arange(first.shape[1], device=first.device).expand(first.shape)
    found = trade_off(first, ceiling[:, None])
    details |= {
        "ceiling": ceiling,
        "accept_rate": found["accept_rate"][:, 0],
        "total_variation": found["tv"][:, 0],
        "kl_to_tilt": found["kl_policy_ref"][:, 0],
    }
    return Particles(
        states=kept.states,
        log_w=kept.log_w,
        reward=kept.reward,
        pick=rng.categorical(kept.log_w, "pick"),
        log_z=total - math.log(first.shape[1]),
        log_z_error=log_z_error(log_w, index, torch.zeros_like(index[:, 0])),
        kl=spent(used, clipped, below - math.log(first.shape[1])),
        meter=chain.meter,
        details=details,
    )


def _check(part: "Rejection | QuasiRejection") -> None:
    positive(part, "num_particles", "beta")
    if part.max_samples < part.num_particles:
        raise ValueError(
            f"max_samples must be at least num_particles, {part.num_particles}, not {part.max_samples}: "
            "no round would fit"
        )
