"""Rehearsal: rows of an earlier policy, or of general data, beside every batch, for the terms that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.choice import counter_seed, uniforms
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.parts.replay.memory import from_tensors, to_tensors

Source = Literal["samples", "solutions", "data"]
Memory = dict[str, Any]


@part("rehearsal", paper=[13, 21])
@dataclass(frozen=True)
class Rehearsal:
    """A fixed number of rows from a pool beside every batch, in the stream REGULARISER.

    The pool is made once, before the first step:

        samples      `samples` completions of the initial policy for each prompt; a prompt of which at least the share
                     `solved` is correct keeps one correct completion, with its log-probabilities in logp["stored"]
        solutions    the task's own solutions, or the completions of its data
        data         the completions of a file

    Only terms of the stream "regulariser" read these rows; advantages, masks, weights, other terms and metrics do not.
    Every pass over the pool has an order of its own, in which domains come in proportion to their rows.

    Args:
        rows: a batch, all its updates together; a smaller pool gives what it has.
        source: samples, solutions or data.
        samples: completions a prompt that are drawn of the initial policy.
        solved: share of them that must be correct.
        threshold: reward, summed over the reward functions, from which on a completion is correct.
        num_prompts: prompts of the task that are looked at, drawn by the seed; None is all of them. Of `data`, the
            rows that are taken.
        leave: solved prompts leave the prompts that are trained on.
        path: the file of `data`, in any of the forms that a task's data may have.

    Raises:
        ValueError: numbers that are not positive, solved outside (0, 1], an unknown source, a path without `data` or
            `data` without one, or `leave` without samples.

    Source: "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025 (DPH-RL):
    samples; "Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models", 2025
    (RECAP): general data, of which its summary says no more.
    """

    rows: int = 8
    source: Source = "samples"
    samples: int = 8
    solved: float = 1.0
    threshold: float = 1.0
    num_prompts: int | None = 256
    leave: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(f"source '{self.source}' is not one of {', '.join(get_args(Source))}")
        for name in ("rows", "samples", "num_prompts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < self.solved <= 1:
            raise ValueError(f"solved must be in (0, 1], not {self.solved}")
        if (self.path is not None) != (self.source == "data"):
            raise ValueError("a path is given with source data, and only then")
        if self.leave and self.source != "samples":
            raise ValueError("leave is for prompts that samples have solved: set source to samples")

    def init(self) -> Memory:
        """Nothing yet."""
        return {"made": False, "left": []}

    def looked_at(self, size: int, seed: int) -> list[int]:
        """Places of the prompts, or rows, from which the pool is made, in ascending order."""
        if self.num_prompts is None or self.num_prompts >= size:
            return list(range(size))
        chance = uniforms(torch.arange(size), counter_seed(seed, "rehearsal prompts") >> 1)
        return chance.argsort(stable=True)[: self.num_prompts].sort().values.tolist()

    def chosen(self, correct: Bool[Tensor, "B"], prompt: Int[Tensor, "B"]) -> Int[Tensor, "n"]:
        """Of each prompt that is solved, the first correct row.

        Args:
            correct: of each sample.
            prompt: to which it belongs.
        """
        ids, index = prompt.unique(return_inverse=True)
        zero = torch.zeros(len(ids), dtype=torch.double, device=prompt.device)
        share = zero.index_add(0, index, correct.double()) / zero.index_add(0, index, torch.ones_like(correct).double())
        place = torch.where(correct, torch.arange(len(correct), device=prompt.device), len(correct))
        first = torch.full_like(ids, len(correct)).scatter_reduce(0, index, place, "amin")
        return first[(share >= self.solved - 1e-9) & (first < len(correct))]

    def made(self, rows: Rows | None, left: Sequence[int] = ()) -> Memory:
        """The memory of a pool.

        Args:
            rows: the pool; None is an empty one.
            left: indices of the examples that leave the training prompts.
        """
        facts = {"made": True, "left": sorted(left) if self.leave else []}
        if rows is None or not len(rows):
            return facts
        stream = torch.full_like(rows.stream, int(Stream.REGULARISER))
        own: dict[str, Any] = {
            "stream": stream,
            "group": torch.arange(len(rows), device=rows.device),
            "reward": None,
            "columns": {},
        }
        return facts | to_tensors(rows.with_(**own).trim())

    def rows_of(self, memory: Memory, step: int, seed: int) -> Rows | None:
        """The rows of batch `step`; None where the pool is empty."""
        pool = from_tensors(memory)
        if pool is None:
            return None
        size = len(pool)
        count = min(self.rows, size)
        places = range(step * count, (step + 1) * count)
        orders = {turn: self.order(pool, turn, seed) for turn in {place // size for place in places}}
        index = torch.stack([orders[place // size][place % size] for place in places])
        rows = pool.select(index).trim()
        return rows.with_(group=torch.arange(count))

    def order(self, pool: Rows, turn: int, seed: int) -> Int[Tensor, "B"]:
        """The order of a pass over the pool: by chance within a domain, and the domains in proportion."""
        chance = uniforms(pool.row, counter_seed(seed, "rehearsal", turn) >> 1)
        return spread_out(pool.domain, chance)


def spread_out(domain: Int[Tensor, "B"], chance: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """An order in which every stretch has each domain in proportion to its size.

    The i-th of the n rows of a domain, in the order of `chance`, comes at (i + 1/2) / n.

    >>> spread_out(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])).tolist()
    [0, 4, 1, 2, 5, 3]
    """
    _, index, counts = domain.unique(return_inverse=True, return_counts=True)
    by_chance = chance.argsort(stable=True)
    order = by_chance[index[by_chance].argsort(stable=True)]  # domain by domain
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(domain), device=domain.device) - start[index[order]]
    return ((rank + 0.5) / counts[index]).argsort(stable=True)
