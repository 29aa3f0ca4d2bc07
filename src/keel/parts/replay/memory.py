"""Rows kept between batches: as tensors by name, which a checkpoint can hold, and put together with a batch again."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from keel.core.rows import Rows, cat

ROWS = "rows."
OPTIONAL = ("reward", "token_reward", "label", "advantage", "segment")
NAMED = ("inputs", "masks", "logp", "columns", "features")


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """Every field on the CPU under `rows.FIELD`, or `rows.FIELD.NAME` with the name quoted; `from_tensors` reads it.

    Raises:
        ValueError: rows with pairs, or enumerated ones.
    """
    if rows.pairs is not None or rows.exact:
        raise ValueError("enumerated rows, and rows with pairs, cannot be kept for later batches")
    out: dict[str, Tensor] = {}
    for f in fields(Rows):
        value = getattr(rows, f.name)
        if isinstance(value, Tensor):
            out[ROWS + f.name] = value.detach().cpu()
        elif isinstance(value, dict):
            out |= {f"{ROWS}{f.name}.{quote(name, safe='')}": t.detach().cpu() for name, t in value.items()}
    return out


def from_tensors(tensors: Mapping[str, Tensor]) -> Rows | None:
    """The rows of a memory; None if it has none."""
    known: dict = {}
    for key, value in tensors.items():
        if not key.startswith(ROWS):
            continue
        name, _, entry = key.removeprefix(ROWS).partition(".")
        if entry:
            known.setdefault(name, {})[unquote(entry)] = value
        else:
            known[name] = value
    return Rows(**known) if known else None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several origins as one batch.

    What only some of them know is neutral in the others: NaN for a reward, a label or a feature, 0 or False for all
    else. Statistics and losses that would read it look at the rows of one origin alone.

    Raises:
        ValueError: further model inputs that only some rows have.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    width = max(p.tokens.shape[1] for p in parts)
    parts = [p.padded(prompt, width) for p in parts]
    wide = {k: max(p.features[k].shape[1] for p in parts if k in p.features) for p in parts for k in p.features}
    parts = [p.with_(features={k: _widened(v, wide[k]) for k, v in p.features.items()}) for p in parts]
    examples: dict[tuple[str, str], Tensor] = {}
    for p in parts:
        for name in OPTIONAL:
            if getattr(p, name) is not None:
                examples.setdefault((name, ""), getattr(p, name))
        for name in NAMED:
            for key, value in getattr(p, name).items():
                examples.setdefault((name, key), value)
    return cat([_completed(p, examples) for p in parts])


def _widened(feature: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(feature, (0, width - feature.shape[1]), value=torch.nan)


def _completed(rows: Rows, examples: Mapping[tuple[str, str], Tensor]) -> Rows:
    changes: dict = {name: dict(getattr(rows, name)) for name in NAMED}
    for (field, key), like in examples.items():
        own = changes[field].get(key) if key else getattr(rows, field)
        if own is not None:
            continue
        if field == "inputs":
            raise ValueError(f"some rows of this batch have the model input '{key}', and others have not")
        empty = torch.nan if field in ("reward", "label", "features") else 0
        neutral = torch.full((len(rows), *like.shape[1:]), empty, device=rows.device).to(like.dtype)
        if key:
            changes[field][key] = neutral
        else:
            changes[field] = neutral
    return rows.with_(**changes)
