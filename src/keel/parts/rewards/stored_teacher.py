"""Numbers of a teacher that were stored once: the file, and the transform that puts them beside the rows.

A safetensors file holds, for the tokens of all completions one after another,

    tokens [N], ids [N, k], logp [N, k], rest [N]    chosen token, the teacher's likeliest, log-mass of the rest
    data_index [M], start [M + 1]                    of each completion: its example, and where its tokens begin
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from keel.core.errors import DataError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

FORMAT = "keel-top-k-1"


@dataclass(frozen=True, eq=False)
class Stored:
    """The contents of a file; see the module. Examples are in ascending order."""

    data_index: Int[Tensor, "M"]
    start: Int[Tensor, "M1"]
    tokens: Int[Tensor, "N"]
    ids: Int[Tensor, "N k"]
    logp: Float[Tensor, "N k"]
    rest: Float[Tensor, "N"]


@part("stored_teacher")
@dataclass(frozen=True)
class StoredTeacher:
    """Transform: columns teacher_ids and teacher_logp [B, T, k] and teacher_rest [B, T] from a file.

    Rows are found by the number of their example, and their tokens must be those of which the file speaks. Rows that
    have the columns already stay as they are.

    Args:
        path: a file of `keel.train.teachers.store_top_k`.

    Raises:
        DataError: no such file, or it does not know a row's example or speaks of another completion.

    Source: top-k distillation, as common.
    """

    path: str = ""

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        if "teacher_ids" in rows.columns:
            return rows
        known = stored(self.path)
        index = rows.data_index.cpu()
        place = torch.searchsorted(known.data_index, index).clamp(max=max(0, len(known.data_index) - 1))
        found = known.data_index[place] == index if len(known.data_index) else torch.zeros_like(index, dtype=torch.bool)
        if not bool(found.all()):
            missing = index[~found][0].item()
            fix = "Store the teacher's numbers again for this data."
            raise DataError(f"it has no completion of example {missing}", self.path, fix)
        mask = rows.mask.cpu()
        offset = torch.where(mask, mask.cumsum(1) - 1, 0)
        length = known.start[place + 1] - known.start[place]
        where = known.start[place][:, None] + offset
        same = known.tokens[where.clamp(max=len(known.tokens) - 1)] == rows.tokens.cpu()
        if not bool((same | ~mask).all()) or not bool((mask.sum(1) == length).all()):
            what = "it speaks of other completions than the data has now"
            raise DataError(what, self.path, "Store it again, with the same tokenizer, seed and max_length.")
        columns = {
            "teacher_ids": known.ids[where].long(),
            "teacher_logp": known.logp[where].to(rows.weight.dtype),
            "teacher_rest": known.rest[where].to(rows.weight.dtype),
        }
        return rows.with_(columns={**rows.columns, **{name: value.to(rows.device) for name, value in columns.items()}})


def stored(path: str | Path) -> Stored:
    """The contents of a file, read once.

    Raises:
        DataError: it is not there, or is no such file.
    """
    if not str(path):
        raise DataError("no file of a teacher's numbers is named", "stored", "Write one with store_top_k.")
    file = Path(path)
    if not file.is_file():
        raise DataError("there is no such file", str(path), "Write it with keel.train.teachers.store_top_k.")
    return _read(str(file), file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: str, changed: int) -> Stored:
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("format")
        tensors = load_file(path)
        if kind != FORMAT:
            raise ValueError(f"format {kind}, not {FORMAT}")
        return Stored(**tensors)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        what = f"is no file of a teacher's numbers ({' '.join(str(error).split())[:120]})"
        raise DataError(what, path, "Write it with keel.train.teachers.store_top_k.") from error
