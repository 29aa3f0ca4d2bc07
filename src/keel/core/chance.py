"""Randomness through one door: `Sample` draws, `Enumerate` goes through everything that could be drawn.

A sampler asks for all its randomness from a `Choice`. Given `Sample(seed)` it is a sampler; given to `law` it yields
its exact law, every outcome with its probability, without a second implementation.

P is the number of prompts, the first dimension of everything; what happens to one must not depend on the others.
"""

import itertools
import math
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.choice import counter_seed, uniforms
from keel.core.drawing import draw, search
from keel.core.errors import UserError

T = TypeVar("T")


@runtime_checkable
class Choice(Protocol):
    """Where randomness comes from.

    Every request has a name. The n-th request under a name gets the same randomness whatever was asked for under other
    names, so that a prompt that needs more rounds than another changes nothing for it.
    """

    def categorical(
        self, log_probs: Float[Tensor, "P *n V"], name: str, draws: int | None = None
    ) -> Int[Tensor, "P *n"] | Int[Tensor, "P *n m"]:
        """An index for each distribution over the last dimension; unnormalised log-probabilities will do.

        Args:
            log_probs: shape [P, *n, V].
            name: of the request.
            draws: m independent indices for each, in a last dimension; their order must not matter to the caller.
        """
        ...

    def uniform(self, breaks: Float[Tensor, "P *n k"], name: str) -> Float[Tensor, "P *n"]:
        """A number in (0, 1), of which only the interval between the breaks (in [0, 1]) that holds it may matter."""
        ...

    def normal(self, shape: tuple[int, ...], name: str) -> Float[Tensor, "P *n"]:
        """Standard normal numbers."""
        ...

    def seed(self, name: str) -> int:
        """A seed for a generator that draws by itself."""
        ...

    def scope(self, name: str) -> "Choice":
        """Randomness for one part of a program, with names of its own: how much it asks for changes nothing outside."""
        ...


class Sample:
    """Draws, by counters: a number depends on the seed, the prompt's index, the name and the place, nothing else.

    Args:
        seed: decides everything.
        index: identity of each prompt, shape [P]; their places in the batch without it.
    """

    def __init__(self, seed: int, index: Int[Tensor, "P"] | None = None):
        self.root, self.index = seed, index
        self.asked: dict[str, int] = {}

    def categorical(
        self, log_probs: Float[Tensor, "P *n V"], name: str, draws: int | None = None
    ) -> Int[Tensor, "P *n"] | Int[Tensor, "P *n m"]:
        """See `Choice`."""
        shape = log_probs.shape[:-1] if draws is None else (*log_probs.shape[:-1], draws)
        numbers = self._numbers(tuple(shape), name, log_probs.device)
        probs = log_probs.flatten(0, -2).softmax(-1)
        if draws is None:
            return draw(probs, numbers.flatten()).view(shape)
        return search(probs.double(), numbers.view(-1, draws))[0].view(shape)

    def uniform(self, breaks: Float[Tensor, "P *n k"], name: str) -> Float[Tensor, "P *n"]:
        """See `Choice`."""
        return self._numbers(tuple(breaks.shape[:-1]), name, breaks.device).to(breaks.dtype)

    def normal(self, shape: tuple[int, ...], name: str) -> Float[Tensor, "P *n"]:
        """See `Choice`: Box and Muller's, of two uniforms each."""
        first, second = self._numbers((*shape, 2), name, torch.device("cpu")).unbind(-1)
        return (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()

    def seed(self, name: str) -> int:
        """See `Choice`."""
        return counter_seed(self.root, name, self._count(name))

    def scope(self, name: str) -> "Sample":
        """See `Choice`."""
        return Sample(self.seed(name), self.index)

    def _count(self, name: str) -> int:
        self.asked[name] = self.asked.get(name, -1) + 1
        return self.asked[name]

    def _numbers(self, shape: tuple[int, ...], name: str, device: torch.device) -> Float[Tensor, "P *n"]:
        index = torch.arange(shape[0]) if self.index is None else self.index
        row = index.to(device) ^ counter_seed(self.root, name, self._count(name))
        size = math.prod(shape[1:])
        place = torch.arange(size, device=device).repeat(shape[0])
        return uniforms(row.repeat_interleave(size), place).view(shape)


class _Branch(Exception):
    """A request that nothing is recorded for."""

    def __init__(self, log_probs: Tensor, draws: int | None):
        self.log_probs, self.draws = log_probs, draws


class Enumerate:
    """Answers requests from a record, one for each of U universes; see `law`.

    Args:
        record: answers so far, each with U as its first dimension.
    """

    def __init__(self, record: list[Tensor]):
        self.record, self.asked = record, 0

    def categorical(
        self, log_probs: Float[Tensor, "U *n V"], name: str, draws: int | None = None
    ) -> Int[Tensor, "U *n"] | Int[Tensor, "U *n m"]:
        """See `Choice`."""
        if self.asked == len(self.record):
            raise _Branch(log_probs.double().log_softmax(-1), draws)
        self.asked += 1
        return self.record[self.asked - 1]

    def uniform(self, breaks: Float[Tensor, "U *n k"], name: str) -> Float[Tensor, "U *n"]:
        """See `Choice`: the middle of an interval, with its length as probability."""
        inside = breaks.double().clamp(0, 1).sort(-1).values
        edges = torch.cat([torch.zeros_like(inside[..., :1]), inside, torch.ones_like(inside[..., :1])], -1)
        lengths = edges.diff(dim=-1)
        lengths = lengths.masked_fill(lengths < 1e-12, 0)  # breaks that differ by rounding are one
        chosen = self.categorical(lengths.log(), name)[..., None]
        return (edges.gather(-1, chosen) + lengths.gather(-1, chosen) / 2)[..., 0].to(breaks.dtype)

    def normal(self, shape: tuple[int, ...], name: str) -> Float[Tensor, "U *n"]:
        """Refused: there are too many real numbers."""
        raise UserError("normal numbers cannot be enumerated", name, "Use Sample(seed).")

    def seed(self, name: str) -> int:
        """Refused: what a generator draws by itself cannot be enumerated."""
        raise UserError("a generator that draws by itself cannot be enumerated", name, "Use Sample(seed).")

    def scope(self, name: str) -> "Enumerate":
        """See `Choice`: one record for all."""
        return self


def law(run: Callable[[int, Choice], T], limit: int = 4_000_000) -> tuple[Float[Tensor, "U"], T]:
    """Every outcome of a program with its probability.

    `run(universes, choice)` is the program on so many copies of one prompt; it is run again from the start for each
    request that it makes, each time with all the answers that may have been given by then.

    >>> coins = lambda universes, choice: choice.categorical(torch.zeros(universes, 2, 2), "coin").sum(1)
    >>> probability, heads = law(coins)
    >>> [float(probability[heads == n].sum()) for n in range(3)]
    [0.25, 0.5, 0.25]

    Args:
        run: the program; its control flow must be the same for all universes, or masked.
        limit: universes at most.

    Returns:
        Probabilities, shape [U], and what `run` returned for the U universes.

    Raises:
        UserError: more universes than `limit`.
    """
    record: list[Tensor] = []
    log_prob = torch.zeros(1, dtype=torch.float64)
    while True:
        try:
            found = run(len(log_prob), Enumerate(record))
            return log_prob.exp(), found
        except _Branch as branch:
            parent, answer, weight = _branches(branch.log_probs, branch.draws, limit)
            record = [old[parent] for old in record] + [answer]
            log_prob = log_prob[parent] + weight


def _branches(
    log_probs: Float[Tensor, "U *n V"], draws: int | None, limit: int
) -> tuple[Int[Tensor, "W"], Int[Tensor, "W ..."], Float[Tensor, "W"]]:
    """Each universe split into all joint answers of positive probability: parents, answers, log-probabilities."""
    if draws is not None:
        if math.comb(log_probs.shape[-1] + draws - 1, draws) > limit:
            raise UserError(f"more than {limit} multisets of {draws}", "Enumerate", "Enumerate a smaller world.")
        log_probs, values = _multisets(log_probs, draws)
    shape = log_probs.shape[1:-1]
    flat = log_probs.reshape(len(log_probs), -1, log_probs.shape[-1])
    parent = torch.arange(len(flat))
    weight = torch.zeros(len(flat), dtype=torch.float64)
    answer = torch.zeros(len(flat), 0, dtype=torch.long)
    for i in range(flat.shape[1]):
        here = flat[parent, i]
        kept, outcome = (here > -math.inf).nonzero(as_tuple=True)
        if len(kept) > limit:
            raise UserError(f"more than {limit} outcomes", "Enumerate", "Enumerate a smaller world.")
        weight = weight[kept] + here[kept, outcome]
        answer = torch.cat([answer[kept], outcome[:, None]], 1)
        parent = parent[kept]
    answer = answer.view(-1, *shape)
    return parent, answer if draws is None else values[answer], weight


def _multisets(log_probs: Float[Tensor, "U *n V"], draws: int) -> tuple[Float[Tensor, "U *n S"], Int[Tensor, "S m"]]:
    """All multisets of m outcomes with their multinomial log-probabilities."""
    size = log_probs.shape[-1]
    values = torch.tensor(list(itertools.combinations_with_replacement(range(size), draws)))
    counts = torch.nn.functional.one_hot(values, size).sum(1).double()  # [S, V]
    ways = math.lgamma(draws + 1) - torch.lgamma(counts + 1).sum(-1)
    safe = log_probs.clamp(min=-1e300)
    impossible = ((log_probs == -math.inf)[..., None, :] & (counts > 0)).any(-1)
    return (safe @ counts.T + ways).masked_fill(impossible, -math.inf), values
