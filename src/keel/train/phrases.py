"""Phrases that preference data mark themselves, as a mask of tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from keel.core.errors import DataError
from keel.core.rows import Rows
from keel.parts.terms.token_scores import differing_tokens
from keel.tasks.preferences import Preference
from keel.tasks.task import completion_text
from keel.train.encode import Encoder

COLUMNS = ("chosen_phrases", "rejected_phrases")
PHRASES = "phrases"  # the mask


def with_phrases(rows: Rows, preferences: Sequence[Preference], encoder: Encoder) -> Rows:
    """The rows with `masks["phrases"]`, where some of the pairs have the columns chosen_phrases and rejected_phrases.

    Each is a list of [start, end] in characters of the completion, the end left out; a token counts if a character of
    it does. Pairs without these columns have the tokens in which they differ.

    Args:
        rows: of these pairs, in their order.
        preferences: pairs.
        encoder: whose tokenizer tells where a token stands.

    Raises:
        DataError: a column of another form, or a tokenizer that does not know where its tokens stand.
    """
    marks = any(p.columns.get(column) is not None for p in preferences for column in COLUMNS)
    if rows.pairs is None or not marks or any(len(p.completions) != 2 for p in preferences):
        return rows
    first, second = rows.pairs.chosen, rows.pairs.rejected
    index, partner = torch.cat([first, second]), torch.cat([second, first])
    mask = torch.zeros_like(rows.mask)
    mask[index] = differing_tokens(rows, index, partner)
    for i, preference in enumerate(preferences):
        for k, (column, completion) in enumerate(zip(COLUMNS, preference.completions, strict=True)):
            if preference.columns.get(column) is None:
                continue
            spans = _spans(preference.columns[column], f"preference {preference.index}, {column}")
            marked = torch.tensor(_marked(encoder, completion_text(completion), spans)[: rows.mask.shape[1]])
            mask[2 * i + k] = False
            mask[2 * i + k, : len(marked)] = marked.to(mask)
    return rows.with_(masks={**rows.masks, PHRASES: mask & rows.mask})


def _spans(given: Any, where: str) -> list[tuple[int, int]]:
    sound = isinstance(given, (list, tuple)) and all(
        isinstance(span, (list, tuple)) and len(span) == 2 and all(type(end) is int for end in span) for span in given
    )
    if not sound:
        raise DataError(f"is no list of [start, end] (got {given!r})"[:200], where, "Give places in characters.")
    return [(start, end) for start, end in given]


def _marked(encoder: Encoder, text: str, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Of each token of a text, whether it shares a character with a span."""
    tokenizer: Any = encoder.model.tokenizer
    if not tokenizer.is_fast:
        raise DataError("this tokenizer does not tell where its tokens stand", COLUMNS[0], "Leave the column out.")
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(a < end and start < b for start, end in spans) for a, b in places]
