"""A third completion of each pair, a gold answer that is learnt by itself beside the comparison."""

from collections.abc import Sequence

import torch

from keel.core.choice import row_ids
from keel.core.errors import DataError
from keel.core.rows import Rows, cat
from keel.tasks.preferences import GOLD, Preference
from keel.tasks.task import Example
from keel.train.encode import Encoder, supervised_rows
from keel.train.preferences import NLL


def with_gold(
    rows: Rows, preferences: Sequence[Preference], encoder: Encoder, max_length: int | None, seed: int, step: int
) -> tuple[Rows, int]:
    """The rows of pairs with one more for each of them, its gold answer; the mask "nll" then holds these alone.

    Returns:
        The rows, and how many gold answers were cut.

    Raises:
        DataError: a pair has no gold answer, or one that is no text.
    """
    for preference in preferences:
        if not isinstance(preference.columns.get(GOLD), (str, list)):
            what = "this method learns a gold answer beside each pair, and here is none"
            raise DataError(what, f"preference {preference.index}", f"Give the column `{GOLD}`: text, or one message.")
    examples = [Example(p.prompt, {}, p.index) for p in preferences]
    gold, cut = supervised_rows(examples, [p.columns[GOLD] for p in preferences], encoder, max_length, seed, step)
    place = torch.full_like(gold.group, 2)  # after the two of the pair
    weight = torch.tensor([float(p.weight) for p in preferences])
    gold = gold.with_(
        row=row_ids(seed, step, gold.data_index, place),
        group=rows.group.unique(sorted=True),
        weight=weight,
        masks={NLL: gold.mask},
        columns={"score": torch.zeros_like(weight).to(rows.columns["score"]), "position": place},
    )
    compared = rows.with_(masks={NLL: torch.zeros_like(rows.mask)})
    return cat([compared, gold]), cut.completions
