"""A batch by the origin of its rows: what the policy term reads, what terms read, and what a regulariser reads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keel.core.rows import Rows, Stream
from keel.parts.replay.memory import joined
from keel.statistics.stats import Stats


@dataclass(frozen=True, eq=False)
class Selection:
    """Some rows of a batch with their statistics.

    Args:
        rows, stats: of these alone.
        index: their places in the batch; None for all of it.
        size: rows of the batch.
    """

    rows: Rows
    stats: Stats
    index: Int[Tensor, "n"] | None
    size: int

    def note(self, found: dict[str, Tensor], seen: dict[str, Tensor] | None) -> None:
        """Hand numbers of these rows on as numbers of the batch, 0 elsewhere."""
        for name, value in found.items() if seen is not None else ():
            assert seen is not None
            if self.index is None:
                seen[name] = value
            else:
                seen[name] = value.new_zeros((self.size, *value.shape[1:])).index_put((self.index,), value)


def split(rows: Rows, stats: Stats) -> tuple[Selection, Selection, Selection]:
    """All rows but those of a regulariser; of these the fresh ones; and those of a regulariser.

    The first two are one and the same where nothing is replayed.
    """
    regular = rows.stream == int(Stream.REGULARISER)
    learned = _where(rows, stats, ~regular)
    fresh = learned if bool((rows.fresh | regular).all()) else _where(rows, stats, rows.fresh)
    return learned, fresh, _where(rows, stats, regular)


def prepared_apart(rows: Rows, stats: Stats, prepare: Callable[[Rows, Stats], Rows]) -> Rows:
    """Fresh and replayed rows, each prepared without the others, and the rest as they are, all in their order."""
    regular = rows.stream == int(Stream.REGULARISER)
    parts, places = [], []
    for keep in (rows.fresh, ~rows.fresh & ~regular):
        index = keep.nonzero().flatten()
        if len(index):
            parts.append(prepare(rows.select(index), stats.select(index)))
            places.append(index)
    parts.append(rows.select(regular).with_(reward=None, token_reward=None, advantage=None))
    places.append(regular.nonzero().flatten())
    return joined(parts).select(torch.cat(places).argsort())


def _where(rows: Rows, stats: Stats, keep: Bool[Tensor, "B"]) -> Selection:
    if bool(keep.all()):
        return Selection(rows, stats, None, len(rows))
    index = keep.nonzero().flatten()
    return Selection(rows.select(index), stats.select(index), index, len(rows))
