"""Rows of examples with two prompts: the same completion once behind each of them."""

from collections.abc import Sequence

import torch

from keel.core.choice import row_ids
from keel.core.errors import DataError
from keel.core.rows import Pairs, Rows
from keel.method import Method
from keel.parts.terms.judge_distillation import DISTIL
from keel.tasks.task import Example, Text
from keel.train.encode import Encoder, Truncated, supervised_rows


def twin_column(method: Method) -> str | None:
    """The column with the other prompt, where a term of the method compares the two."""
    return next((term.twin for term in method.terms.values() if hasattr(term, "twin")), None)


def twin_rows(
    examples: Sequence[Example],
    completions: Sequence[Text],
    column: str,
    encoder: Encoder,
    max_length: int | None,
    seed: int,
    step: int,
) -> tuple[Rows, Truncated]:
    """Two rows for each example, a group and a pair: chosen behind its prompt, rejected behind that of the column.

    The mask `distil` is the completion without its end token.

    Raises:
        DataError: an example has no other prompt.
    """
    both: list[Example] = []
    for example in examples:
        other = example.columns.get(column)
        if not isinstance(other, str | list) or not other:
            fix = "Give each row both prompts; `judge_data` makes them."
            raise DataError(f"has no '{column}'", f"example {example.index}", fix)
        both += [example, Example(other, {}, example.index, example.domain)]
    twice = [completion for completion in completions for _ in range(2)]
    rows, cut = supervised_rows(both, twice, encoder, max_length, seed, step)
    count = torch.arange(len(examples))
    place = torch.arange(2).repeat(len(examples))
    ends = torch.tensor(list(encoder.model.eos_ids), dtype=rows.tokens.dtype)
    ones = torch.ones(len(examples))
    pairs = Pairs(2 * count, 2 * count + 1, ones, ones, ones, torch.zeros_like(ones))
    return rows.with_(
        group=count.repeat_interleave(2),
        row=row_ids(seed, step, rows.data_index, place),
        masks={DISTIL: rows.mask & ~torch.isin(rows.tokens, ends)},
        pairs=pairs,
    ), cut
