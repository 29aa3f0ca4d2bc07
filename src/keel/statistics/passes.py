"""A micro-batch on its way through the models, and where its numbers belong among those of the whole step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keel.core.rows import Rows
from keel.statistics.functionals import Functional
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats, packed, slots_of


@dataclass
class Pass:
    """One micro-batch: its rows, where its positions lie in the step's [B, T], its tokens and states."""

    index: Tensor
    rows: Rows
    place: tuple[Tensor, Tensor]
    row: Tensor  # of each position, in `index`
    token: Tensor
    hidden: dict[str, Tensor]
    kept: list[Positions] = field(default_factory=list)
    known: dict[int, dict[Hashable, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slopes:
    """The gradient of a loss in the numbers of a functional, of their shape; of packed ones with their slots [B, T]."""

    grad: Tensor
    slots: Tensor | None = None

    @staticmethod
    def of(functional: Functional, grad: Tensor, rows: Rows) -> "Slopes":
        """With the slots of the rows that the numbers are of."""
        return Slopes(grad, slots_of(rows.masks[functional.where]) if packed(functional) else None)


class Collector:
    """Puts numbers of chunks at their places in the step's [B, T], or among those of a named mask."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.values: dict[Functional, Tensor] = {}
        self.slots: dict[str, Tensor] = {}

    def _room(self, functional: Functional, numbers: Tensor, tail: int) -> Tensor:
        if functional not in self.values:
            if packed(functional):
                mask = self.rows.masks[functional.where]
                self.slots.setdefault(functional.where, slots_of(mask))
                shape, tail = torch.Size([int(mask.sum())]), 1
            else:
                shape = self.rows.tokens.shape[:1] if functional.where == "last" else self.rows.tokens.shape
            self.values[functional] = numbers.new_zeros(*shape, *numbers.shape[tail:])
        return self.values[functional]

    def put(self, functional: Functional, batch: Pass, start: int, stop: int, numbers: Tensor) -> None:
        """Numbers of a range of a batch's positions."""
        room = self._room(functional, numbers, 1)
        b, t = batch.place[0][start:stop], batch.place[1][start:stop]
        if functional.where == "last":
            last = is_last(batch)[start:stop]
            room[b[last]] = numbers[last]
        elif packed(functional):
            slot = self.slots[functional.where][b, t]
            room[slot[slot >= 0]] = numbers[slot >= 0]
        else:
            room[b, t] = numbers

    def put_rows(self, functional: Functional, index: Tensor, numbers: Tensor, part: Rows) -> None:
        """Numbers of whole rows, [b, t] or [b]; `index` says which of the step's they are."""
        room = self._room(functional, numbers, 1 if functional.where == "last" else 2)
        if functional.where == "last":
            room[index] = numbers
        elif packed(functional):
            mask = part.masks[functional.where]
            room[self.slots[functional.where][index, : mask.shape[1]][mask]] = numbers
        else:
            room[index, : numbers.shape[1]] = numbers

    def stats(self, functionals: Sequence[Functional]) -> Stats:
        """All that was put."""
        masks = {f.where: self.rows.masks[f.where] for f in functionals if packed(f)}
        return Stats({f: self.values[f] for f in functionals}, masks)


def column_at(batch: Pass, name: str, start: int, stop: int) -> Tensor:
    """What a column per token of the rows holds at some positions, [n, ...]."""
    if name not in batch.rows.columns:
        raise KeyError(f"a functional reads the column '{name}', which the rows do not have")
    return batch.rows.columns[name][batch.row[start:stop], batch.place[1][start:stop]]


def is_last(batch: Pass) -> Tensor:
    """Whether a position is the last chosen token of its row."""
    b = batch.place[0]
    last = torch.ones_like(b, dtype=torch.bool)
    last[:-1] = b[1:] != b[:-1]
    return last
