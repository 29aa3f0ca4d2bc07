"""Prompts with the completions of other prompts, beside a batch of labelled completions."""

import torch

from keel.core.errors import ConfigError
from keel.core.rows import Rows, cat
from keel.parts.terms.unpaired import MISMATCHED, mismatched


def with_mismatched(rows: Rows, max_length: int | None) -> Rows:
    """The rows, and after them those that `mismatched` makes of them; none where all have one prompt.

    Raises:
        ConfigError: a batch of a single row, which can never have any.
    """
    if len(rows) < 2:
        raise ConfigError(
            "the reference point is estimated from completions of other prompts, and a batch of one has none",
            "train.batch_size",
            "Raise it, or set terms.labels.shift=none.",
        )
    more = mismatched(rows, max_length)
    if not len(more):
        return rows
    own = rows.with_(columns={**rows.columns, MISMATCHED: torch.zeros_like(rows.main)})
    return cat([own, more]).trim()
