"""A tabular policy as a chain: every sampler runs on it unchanged, and its law can be enumerated."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix, TokenChain, Value
from keel.core.chance import Choice
from keel.core.rows import Stop
from keel.divergences.family import f_divergence
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.exact.states import soft_values, state_optimum


class TabularChain(TokenChain):
    """The chain of a table of logits, in fp64.

    Args:
        policy: p_0, the table.
        reward: of the sequences in the order of `space.sequences()`, for each of the table's prompts, shape [Q, S].
        index: prompts of the table that the chain's prompts are, shape [P]; each once without it.
        value: estimate of V for unfinished states, or a table of it for every prefix, shape [Q, X].
    """

    def __init__(
        self,
        policy: TabularPolicy,
        reward: Float[Tensor, "Q S"],
        index: Int[Tensor, "P"] | None = None,
        value: Value | Float[Tensor, "Q X"] | None = None,
    ):
        self.space: SequenceSpace = policy.space
        self.index = torch.arange(self.space.prompts) if index is None else index
        self.table = policy.table.detach().double().log_softmax(-1)
        self.rewards, self.logits = reward.double(), policy
        self.places = _places(self.space)
        value_of = _Table(value.double()) if isinstance(value, Tensor) else value
        super().__init__(len(self.index), self.space.horizon, 0, self._reward, value_of)

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities."""
        return torch.float64

    def copies(self, count: int) -> "TabularChain":
        """A chain with each prompt `count` times, for `law`."""
        index = self.index.repeat_interleave(count)
        value = self.value_of.table if isinstance(self.value_of, _Table) else self.value_of
        return TabularChain(self.logits, self.rewards, index, value)

    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        """See `TokenChain`."""
        found = self.table[self.index[x.prompt], self.prefix(x).clamp(max=self.space.prefixes - 1)]
        certain = torch.full_like(found, -math.inf)
        certain[:, self.pad] = 0.0
        return torch.where(x.done[:, None], certain, found)

    def prefix(self, x: Prefix) -> Int[Tensor, "B"]:
        """The number of each state's prefix, counted level by level; beyond `prefixes` at the horizon."""
        V, length = self.space.vocab, x.length
        start = torch.tensor([sum(V**i for i in range(t)) for t in range(self.horizon + 1)])
        code = torch.zeros_like(length)
        for t in range(self.horizon):
            code = torch.where(t < length, code * V + x.tokens[:, t], code)
        return start[length] + code

    def leaf(self, x: Prefix) -> Int[Tensor, "B"]:
        """The place of each finished state in `space.sequences()`."""
        return self.places[_code(self.space, x.tokens)]

    def _reward(self, x: Prefix) -> Float[Tensor, "B"]:
        return self.rewards[self.index[x.prompt], self.leaf(x)]

    def _start(self, prompt: Int[Tensor, "B"]) -> Any:
        return None

    def _moved(self, memory: Any, index: Int[Tensor, "n"], x: Prefix) -> Any:
        return None

    def _stepped(self, memory: Any, tokens: Int[Tensor, "B"], x: Prefix) -> Any:
        return None

    def _ended(self, x: Prefix, tokens: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        if self.space.eos is None:
            return torch.full_like(tokens, -1)
        return torch.where(tokens == self.space.eos, int(Stop.EOS), -1)

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`; from the start, whole sequences are drawn at once."""
        if bool(x.length.any()) or bool(x.done.any()):
            return super().complete(x, m, rng, where)
        tokens, lengths = self.space.sequences()
        log_p = torch.stack([self.logits.log_prob(self.space.rows(q)) for q in range(self.space.prompts)]).detach()
        asked = torch.ones_like(x.done) if where is None else where
        certain = torch.full_like(log_p[0], -math.inf, dtype=torch.float64)
        certain[0] = 0.0
        grid = torch.where(asked[:, None], log_p.double()[self.index[x.prompt]], certain)
        found = rng.categorical(grid.view(self.prompts, -1, len(certain)), "complete", m).flatten()
        asked = asked.repeat_interleave(m)
        done = self.init(len(x) // self.prompts * m)
        self.meter.add("generated", lengths[found] * asked)
        for t in range(self.horizon):
            done = self.extend(done, tokens[found, t])
        place = asked.nonzero(as_tuple=True)[0]
        return done if len(place) == len(done) else self.select(done, place).spread(place, done.prompt, self.pad)


class _Table:
    """A value that is looked up."""

    def __init__(self, table: Float[Tensor, "Q X"]):
        self.table = table

    def __call__(self, chain: TokenChain, x: Prefix, rng: Choice) -> Float[Tensor, "B"]:
        assert isinstance(chain, TabularChain)
        place = chain.prefix(x).clamp(max=self.table.shape[1] - 1)  # finished states are not asked for
        return self.table[chain.index[x.prompt], place]


def soft_value_table(policy: TabularPolicy, reward: Float[Tensor, "Q S"], beta: float) -> Float[Tensor, "Q X"]:
    """V = beta log E_{p_0}[exp(r / beta)] at every prefix: the exact value of the tilt."""
    return state_optimum(policy, reward, beta, "kl_policy_ref").values


def mean_value_table(policy: TabularPolicy, reward: Float[Tensor, "Q S"]) -> Float[Tensor, "Q X"]:
    """U = E_{p_0}[r] at every prefix: what a regression on samples learns; at most V."""
    return soft_values(policy, policy, reward, 0.0, f_divergence("kl_policy_ref")).detach()


def _code(space: SequenceSpace, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B"]:
    code = torch.zeros_like(tokens[:, 0])
    for t in range(space.horizon):
        code = code * space.vocab + tokens[:, t]
    return code


def _places(space: SequenceSpace) -> Int[Tensor, "VT"]:
    """From the number of a padded sequence to its place among the space's."""
    tokens, _ = space.sequences()
    places = torch.full((space.vocab**space.horizon,), -1)
    places[_code(space, tokens)] = torch.arange(len(tokens))
    return places
