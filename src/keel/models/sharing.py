"""Rows of one prompt in one sequence: the prompt once, then the completions, none of which sees another.

    tokens      p p p p | a a a | b b | c c c c
    positions   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7

A block mask lets a completion token attend to the prompt and to its own completion. The states are those of separate
sequences, for the cost of fewer tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keel.core.rows import Rows

LONGEST = 512  # a longer shared sequence costs more in attention than it saves elsewhere
WORTH = 0.75  # share of the tokens of separate sequences, above which sharing is not worth its mask


@dataclass(frozen=True)
class Shared:
    """Shared sequences of a batch.

    Args:
        ids, positions: tokens and their positions, [N, W], padded on the right.
        segment: 0 for the prompt, 1, 2, ... for the completions, -1 for padding, [N, W].
        sequence: in which sequence a row lies, [B].
        source: the place in it from whose state each completion token was chosen, [B, T].
    """

    ids: Int[Tensor, "N W"]
    positions: Int[Tensor, "N W"]
    segment: Int[Tensor, "N W"]
    sequence: Int[Tensor, "B"]
    source: Int[Tensor, "B T"]

    def mask(self) -> Bool[Tensor, "N 1 W W"]:
        """True where a token (third dimension) sees another (fourth); padding sees itself."""
        width = self.ids.shape[1]
        asks, asked = self.segment[:, :, None], self.segment[:, None, :]
        earlier = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).tril()
        return (((asked == 0) | (asked == asks)) & earlier)[:, None]


def share_prompts(rows: Rows, pad: int) -> Shared | None:
    """Shared sequences for the groups of a batch, or None where that is not worth it.

    A group is shared only if all of its rows have the same prompt, with at least one token.
    """
    prompt_length = rows.prompt_mask.sum(1)
    if not len(rows) or not rows.tokens.shape[1] or bool((prompt_length == 0).any()):
        return None
    ids, sequence = rows.group.unique(return_inverse=True)
    count = len(ids)
    if 2 * count > len(rows):
        return None
    first = torch.full((count,), len(rows), device=rows.device).scatter_reduce(
        0, sequence, torch.arange(len(rows), device=rows.device), "amin"
    )
    leaders = first[sequence]
    same = (rows.prompt_mask == rows.prompt_mask[leaders]) & (
        ~rows.prompt_mask | (rows.prompt_ids == rows.prompt_ids[leaders])
    )
    if not bool(same.all()):
        return None
    present = rows.present
    length = present.sum(1)
    order = torch.argsort(sequence, stable=True)
    before = _exclusive_sums(length[order], sequence[order])
    start = torch.empty_like(length)
    start[order] = before
    start = start + prompt_length
    total = prompt_length[first].scatter_add(0, sequence, length)
    width = int(total.max())
    if width > LONGEST or count * width > WORTH * len(rows) * (int(prompt_length.max()) + int(length.max())):
        return None
    return _laid_out(rows, present, prompt_length, first, sequence, start, (count, width), pad)


def _laid_out(rows, present, prompt_length, first, sequence, start, shape, pad) -> Shared:
    out = torch.full(shape, pad, device=rows.device)
    positions = torch.zeros(shape, dtype=torch.long, device=rows.device)
    segment = torch.full(shape, -1, device=rows.device)
    n, column = rows.prompt_mask[first].nonzero(as_tuple=True)
    place = (rows.prompt_mask[first].cumsum(1) - 1)[n, column]
    out[n, place] = rows.prompt_ids[first][n, column]
    positions[n, place] = place
    segment[n, place] = 0
    b, t = present.nonzero(as_tuple=True)
    where = sequence[b], start[b] + t
    out[where] = rows.tokens[b, t]
    positions[where] = prompt_length[b] + t
    segment[where] = b + 1
    steps = torch.arange(rows.tokens.shape[1], device=rows.device)
    source = (start[:, None] + steps - 1).clamp(max=shape[1] - 1)
    source[:, 0] = prompt_length - 1
    return Shared(out, positions, segment, sequence, source)


def _exclusive_sums(values: Int[Tensor, "B"], group: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Sum of the earlier values of the same group, for rows sorted by group."""
    before = values.cumsum(0) - values
    starts = torch.ones_like(group, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    base = torch.where(starts, before, torch.zeros_like(before)).cummax(0).values
    return before - base
