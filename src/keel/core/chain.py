"""Chains: decoding, denoising and enumerating are one thing.

A chain is a known start x_0, a prior kernel p_0(x_{t+1} | x_t) that can be sampled and usually evaluated, a horizon K
and a terminal reward r. Its tilt, the law that every sampler is after, is

    p*(x_K) = p_0(x_K) exp(r(x_K) / beta) / Z,    psi_K = exp(r / beta),    psi_t(x) = E_{p_0}[psi_{t+1} | x],
    V_t = beta log psi_t,    p*(x' | x) = p_0(x' | x) exp((V_{t+1}(x') - V_t(x)) / beta)

States and actions are batches of B = P N entries, those of a prompt together: tensors or, if they are more than one,
frozen dataclasses of tensors with B in front. `TokenChain` is the base of chains over tokens; a chain over latents
needs the protocol only.

Letters: P prompts, N particles, B = P N states, V vocabulary, T tokens at most, m draws for each state.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chance import Choice
from keel.core.rows import Stop

X = TypeVar("X")


class Meter:
    """What a sampler has cost so far, for each prompt, shape [P].

    Args:
        prompts: P.

    Attributes:
        generated: tokens (or steps) drawn.
        scored: tokens that a value, a reward model or another policy has read to judge them.
        read: tokens of prompts and prefixes that were sent to be continued, where a chain keeps no cache of its own.
        rewards: finished samples whose reward was asked for.
    """

    def __init__(self, prompts: int):
        self.generated = torch.zeros(prompts, dtype=torch.long)
        self.scored = torch.zeros(prompts, dtype=torch.long)
        self.read = torch.zeros(prompts, dtype=torch.long)
        self.rewards = torch.zeros(prompts, dtype=torch.long)

    def add(
        self, name: str, count: Int[Tensor, "B"] | Bool[Tensor, "B"], prompt: Int[Tensor, "B"] | None = None
    ) -> None:
        """Add counts of states: those of a prompt together, the same number of each, unless their prompts are given."""
        total, count = getattr(self, name), count.detach().cpu().long()
        if prompt is not None:
            total.index_add_(0, prompt.cpu(), count)
        else:
            total += count.view(len(total), -1).sum(1)


@runtime_checkable
class Chain(Protocol[X]):
    """What every sampler needs; see the module. `extend` may use up its state: select a copy of what is needed."""

    prompts: int
    horizon: int
    meter: Meter

    def init(self, n: int) -> X:
        """n copies of the start of each prompt."""
        ...

    def propose(self, x: X, m: int, rng: Choice, name: str = "action") -> tuple[Any, Float[Tensor, "B m"]]:
        """m draws of the kernel for each state: B m actions (to be indexed like tensors), and log p_0 of each.

        A finished state proposes itself with log-probability 0.
        """
        ...

    def extend(self, x: X, action: Any) -> X:
        """Every state after its action (B of them); finished states stay as they are."""
        ...

    def select(self, x: X, index: Int[Tensor, "n"]) -> X:
        """States by index, caches and all; the same state may be taken several times."""
        ...

    def is_done(self, x: X) -> Bool[Tensor, "B"]:
        """Finished states."""
        ...

    def complete(self, x: X, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> X:
        """m finished states for each state, drawn from the prior; x stays as it is.

        For states that `where` leaves out nothing is drawn and nothing counted: what stands in the place of their ends
        is finished, and means nothing. What the others draw does not depend on it.
        """
        ...

    def reward(self, x: X, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """r of finished states; 0 for the others, and for those that `where` leaves out."""
        ...

    def value(self, x: X, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """An estimate of V, in units of the reward; the reward itself of finished states."""
        ...

    def key(self, x: X) -> list[Hashable]:
        """What tells states apart, prompts included."""
        ...


Reward = Callable[["Prefix"], Float[Tensor, "B"]]  # of states that are all finished
Value = Callable[["TokenChain", "Prefix", Choice], Float[Tensor, "B"]]  # of all states; only some may count
FIELDS = ("tokens", "logp", "length", "stop", "prompt")  # of a `Prefix`, without its memory


@runtime_checkable
class MaskedValue(Protocol):
    """A value that is dear, and can be told which states it is asked about."""

    def masked(self, chain: Any, x: Any, rng: Choice, where: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Estimates of V; anything for the states that `where` leaves out."""
        ...


def estimate(
    value: Callable[[Any, Any, Choice], Float[Tensor, "B"]], chain: Any, x: Any, rng: Choice, where: Bool[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """What a value says of the states asked for; anything of the others."""
    return value.masked(chain, x, rng, where) if isinstance(value, MaskedValue) else value(chain, x, rng)


@dataclass(frozen=True, eq=False)
class Prefix:
    """States of a chain over tokens.

    Args:
        tokens: what was written so far, right-padded, shape [B, T].
        logp: log p_0 of each token, shape [B, T]; 0 after the end.
        length: tokens written, shape [B].
        stop: why a finished one ended (`Stop`), -1 for unfinished ones, shape [B].
        prompt: number of its prompt, shape [B].
        memory: what the chain needs to go on (caches, states of the model); None for finished work.
    """

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    length: Int[Tensor, "B"]
    stop: Int[Tensor, "B"]
    prompt: Int[Tensor, "B"]
    memory: Any = None

    def __len__(self) -> int:
        return len(self.length)

    @property
    def done(self) -> Bool[Tensor, "B"]:
        """Finished states."""
        return self.stop >= 0

    def text(self, row: int) -> list[int]:
        """Tokens of one state."""
        return self.tokens[row, : int(self.length[row])].tolist()

    def spread(self, place: Int[Tensor, "n"], prompt: Int[Tensor, "B"], pad: int) -> "Prefix":
        """These states in places of a larger batch, without memory; in the others stand finished ones without tokens.

        Args:
            place: of each state, shape [n].
            prompt: of all B.
            pad: token that stands after the end.
        """
        zeros = torch.zeros_like(prompt)
        tokens = self.tokens.new_full((len(prompt), self.tokens.shape[1]), pad)
        empty = Prefix(tokens, self.logp.new_zeros(tokens.shape), zeros, zeros + int(Stop.LENGTH), prompt)
        return Prefix(*(getattr(empty, name).index_copy(0, place, getattr(self, name)) for name in FIELDS))


class TokenChain(ABC):
    """A chain that writes one token at a time, with the probability of every next token at hand.

    Args:
        prompts: P.
        horizon: T, tokens at most.
        pad: token that stands after the end.
        reward: of finished states; zero without it.
        value: estimate of V for unfinished states; zero without it.
    """

    def __init__(self, prompts: int, horizon: int, pad: int, reward: Reward | None = None, value: Value | None = None):
        self.prompts, self.horizon, self.pad = prompts, horizon, pad
        self.reward_of, self.value_of = reward, value
        self.meter = Meter(prompts)
        self.device = torch.device("cpu")

    # -- what a chain of this kind must say ------------------------------------------------------------------------

    @abstractmethod
    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        """log p_0 of every next token; a finished state goes on with `pad` for certain."""

    @abstractmethod
    def _start(self, prompt: Int[Tensor, "B"]) -> Any:
        """The memory before the first token."""

    @abstractmethod
    def _moved(self, memory: Any, index: Int[Tensor, "n"], x: Prefix) -> Any:
        """The memory of selected states; `x` are the states from which they are selected."""

    @abstractmethod
    def _stepped(self, memory: Any, tokens: Int[Tensor, "B"], x: Prefix) -> Any:
        """The memory after one more token; `x` are the states after it."""

    def _ended(self, x: Prefix, tokens: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Why each state ends with its last token (`Stop`), -1 where it goes on; the horizon is looked after."""
        return torch.full_like(x.length, -1)

    # -- the protocol ----------------------------------------------------------------------------------------------

    def init(self, n: int) -> Prefix:
        """See `Chain`."""
        prompt = torch.arange(self.prompts, device=self.device).repeat_interleave(n)
        zeros = torch.zeros_like(prompt)
        shape = len(prompt), self.horizon
        tokens = torch.full(shape, self.pad, dtype=torch.long, device=self.device)
        logp = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return Prefix(tokens, logp, zeros, zeros - 1, prompt, self._start(prompt))

    def at(self, tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"], prompt: Int[Tensor, "B"]) -> Prefix:
        """States, all of them unfinished, that have written these tokens already; it costs nothing on the meter.

        Written again token by token. A chain whose memory forgets finished states must do it another way, because the
        shorter ones are finished until the longer ones are there.
        """
        x = self.select(self.init(1), prompt)
        for t in range(int(length.max()) if len(length) else 0):
            x = self.extend(replace(x, stop=torch.where(t < length, -1, int(Stop.LENGTH))), tokens[:, t])
        return replace(x, stop=torch.full_like(x.stop, -1))

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities."""
        return torch.float32

    def propose(
        self, x: Prefix, m: int, rng: Choice, name: str = "action", log_q: Float[Tensor, "B V"] | None = None
    ) -> tuple[Int[Tensor, "Bm"], Float[Tensor, "B m"]]:
        """See `Chain`; with `log_q`, the draws are from it, and the log-probabilities still those of p_0."""
        log_p = self.log_probs(x)
        log_q = log_p if log_q is None else log_q
        grid = log_q.view(self.prompts, -1, log_q.shape[-1])
        action = rng.categorical(grid, name) if m == 1 else rng.categorical(grid, name, m)
        action = action.reshape(len(x), m)
        self.meter.add("generated", (~x.done).long() * m)
        return action.flatten(), log_p.gather(1, action)

    def successors(self, x: Prefix, k: int | None = None) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """The k likeliest next tokens and their log p_0, likeliest first; all of them without k."""
        log_p = self.log_probs(x)
        found = log_p.topk(min(k or log_p.shape[1], log_p.shape[1]), -1)
        return found.indices, found.values

    def logp(self, x: Prefix, action: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """log p_0 of an action of each state."""
        return self.log_probs(x).gather(1, action[:, None])[:, 0]

    def extend(self, x: Prefix, action: Int[Tensor, "B"]) -> Prefix:
        """See `Chain`."""
        alive = ~x.done
        place = x.length.clamp(max=self.horizon - 1)[:, None]
        action = torch.where(alive, action, torch.full_like(action, self.pad))
        tokens = torch.where(alive[:, None], x.tokens.scatter(1, place, action[:, None]), x.tokens)
        logp = torch.where(alive[:, None], x.logp.scatter(1, place, self.logp(x, action)[:, None].to(x.logp)), x.logp)
        longer = replace(x, tokens=tokens, logp=logp, length=x.length + alive.long())
        ends = self._ended(longer, action)
        ends = torch.where((ends < 0) & (longer.length >= self.horizon), int(Stop.LENGTH), ends)
        longer = replace(longer, stop=torch.where(alive, ends, x.stop))
        return replace(longer, memory=self._stepped(x.memory, action, longer))

    def select(self, x: Prefix, index: Int[Tensor, "n"]) -> Prefix:
        """See `Chain`."""
        rest = {name: getattr(x, name)[index] for name in FIELDS}
        return Prefix(**rest, memory=self._moved(x.memory, index, x))

    def is_done(self, x: Prefix) -> Bool[Tensor, "B"]:
        """See `Chain`."""
        return x.done

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`; the rounds that one prompt needs shift no numbers of another, nor of later requests."""
        rng, prompt = rng.scope("complete"), x.prompt.repeat_interleave(m)
        asked = torch.ones_like(x.done) if where is None else where
        place = asked.repeat_interleave(m).nonzero(as_tuple=True)[0]
        some = self.select(x, place // m)
        while not bool(some.done.all()):
            log_p = self.log_probs(some)
            grid = log_p.new_full((len(prompt), log_p.shape[1]), -math.inf)
            grid[:, self.pad] = 0.0  # nothing to decide in the other places
            grid[place] = log_p
            action = rng.categorical(grid.view(self.prompts, -1, grid.shape[1]), "token").flatten()[place]
            self.meter.add("generated", ~some.done, some.prompt)
            some = self.extend(some, action)
        return some if len(place) == len(prompt) else some.spread(place, prompt, self.pad)

    def reward(self, x: Prefix, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`."""
        wanted = x.done if where is None else x.done & where
        self.meter.add("rewards", wanted)
        return self._of(self.reward_of, x, wanted)

    def value(self, x: Prefix, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`; a value is called with all states, so that its randomness has its place, and may be masked."""
        asked = torch.ones_like(x.done) if where is None else where
        found = self.reward(x, asked)
        if self.value_of is None:
            return found
        wanted = ~x.done & asked
        if not bool(wanted.any()):
            return found
        return torch.where(wanted, estimate(self.value_of, self, x, rng, wanted).to(found), found)

    def key(self, x: Prefix) -> list[Hashable]:
        """See `Chain`: the prompt's number and the tokens."""
        tokens, length, prompt = x.tokens.tolist(), x.length.tolist(), x.prompt.tolist()
        return [(p, *row[:n]) for p, row, n in zip(prompt, tokens, length, strict=True)]

    def _of(
        self, judge: Callable[[Prefix], Float[Tensor, "n"]] | None, x: Prefix, wanted: Bool[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        found = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        if judge is None or not bool(wanted.any()):
            return found
        index = wanted.nonzero(as_tuple=True)[0]
        some = Prefix(*(getattr(x, name)[index] for name in FIELDS))
        return found.index_copy(0, index, judge(some).to(found))
