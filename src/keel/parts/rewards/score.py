"""The rewards of a batch, and which groups leave it because a reward function failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.errors import UserError, describe
from keel.parts.rewards.functions import GIVEN, RewardFunction, call_reward
from keel.parts.rewards.worker import RewardTimeout, RewardWorkerDied
from keel.tasks.task import Text

_PATIENCE = 2  # time-outs and deaths of one function in one batch, after which no further group is tried
_LARGEST = torch.finfo(torch.float32).max  # of a reward; beyond it the batch would hold an infinity
_MESSAGES = 5  # different messages kept for each function


@dataclass(frozen=True)
class Scores:
    """What the reward functions say of a batch.

    Args:
        values: one column for each function; NaN where it does not apply, or failed.
        names: of the columns.
        failed: rows whose group has to leave the batch, because some function failed for it.
        errors: for each function, the number of groups that it failed for.
        messages: for each function that failed, what it said, the first few.
    """

    values: Float[Tensor, "B K"]
    names: tuple[str, ...]
    failed: Bool[Tensor, "B"]
    errors: dict[str, int]
    messages: dict[str, list[str]]


def score(
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_ids: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    group: Sequence[int] | Tensor,
) -> Scores:
    """Score a batch with every function, each in one call.

    Where the call fails (the function raises, exceeds its time limit, returns the wrong number of values or something
    that is no number), each group is scored by itself, so that only those leave which fail again; after three
    time-outs or deaths of the worker process the groups that are left leave untried. A value that is NaN or infinite
    makes its own group leave. Nothing that failed becomes a reward of zero. A function that compares completions
    across groups sees one group at a time in the second attempt.

    Args:
        functions: by name.
        prompts, completions, completion_ids: one entry for each row.
        columns: further keyword lists, one entry for each row.
        group: the group of each row.

    Raises:
        RewardTimeout: a function hangs in a thread, so that the run has to end.
        UserError: a mistake that no second attempt can mend, such as a column that a worker process cannot be sent.
    """
    groups = group.tolist() if isinstance(group, Tensor) else list(group)
    ids = [entry.tolist() if hasattr(entry, "tolist") else list(entry) for entry in completion_ids]
    batch = _Batch(prompts, completions, ids, columns, groups)
    values = torch.full((len(groups), len(functions)), math.nan)
    failed = torch.zeros(len(groups), dtype=torch.bool)
    errors: dict[str, int] = {}
    messages: dict[str, list[str]] = {}
    for k, (name, function) in enumerate(functions.items()):
        attempt = _Attempt(function, batch)
        attempt.run()
        guilty = torch.tensor([g in attempt.guilty for g in groups], dtype=torch.bool)
        column = torch.tensor([math.nan if value is None else value for value in attempt.values])
        values[:, k] = column.masked_fill(guilty, math.nan)
        failed |= guilty
        errors[name] = len(attempt.guilty)
        if attempt.messages:
            messages[name] = list(attempt.messages)[:_MESSAGES]
    return Scores(values, tuple(functions), failed, errors, messages)


@dataclass(frozen=True)
class _Batch:
    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    group: Sequence[int]

    def __post_init__(self) -> None:
        rows = len(self.group)
        given = dict(zip(GIVEN, (self.prompts, self.completions, self.completion_ids), strict=True))
        for name, entries in {**given, **self.columns}.items():
            if len(entries) != rows:
                raise ValueError(f"{name} has {len(entries)} entries for {rows} rows")
        for name in set(given) & set(self.columns):
            raise UserError(f"the data has a column {name!r}, which reward functions get from Keel.", fix="Rename it.")

    def call(self, function: Callable[..., Any], rows: Sequence[int]) -> list[float | None]:
        def pick(entries: Sequence[Any]) -> list[Any]:
            return [_own(entries[row]) for row in rows]

        columns = {name: pick(entries) for name, entries in self.columns.items()}
        ids = [list(self.completion_ids[row]) for row in rows]
        return call_reward(function, pick(self.prompts), pick(self.completions), ids, columns)


def _own(value: Any) -> Any:
    """A copy of lists and dictionaries, so that a function that changes its arguments changes nothing else."""
    if type(value) is list:
        return [_own(item) for item in value]
    return {key: _own(item) for key, item in value.items()} if type(value) is dict else value


@dataclass
class _Attempt:
    """One function on one batch: its values, the groups that it failed for, what it said, the patience used up."""

    function: RewardFunction
    batch: _Batch
    values: list[float | None] = field(default_factory=list)
    guilty: set[int] = field(default_factory=set)
    messages: dict[str, None] = field(default_factory=dict)  # an ordered set
    lost: int = 0

    def run(self) -> None:
        members: dict[int, list[int]] = {}
        for row, g in enumerate(self.batch.group):
            members.setdefault(g, []).append(row)
        self.values = [None] * len(self.batch.group)
        if self._try(range(len(self.batch.group))):
            return
        for g, rows in members.items():
            if self.lost > _PATIENCE:
                self.messages.setdefault(
                    f"not tried further after {self.lost} time-outs or deaths of the worker process"
                )
                self.guilty.add(g)
            elif len(members) == 1 or not self._try(rows):
                self.guilty.add(g)

    def _try(self, rows: Sequence[int]) -> bool:
        """Score some rows; False if the call failed."""
        try:
            values = self.batch.call(self.function, rows)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, RewardTimeout) and error.fatal:
                raise
            self.lost += isinstance(error, RewardTimeout | RewardWorkerDied)
            self.messages.setdefault(str(error) if hasattr(error, "what") else describe(error))
            return False
        for row, value in zip(rows, values, strict=True):
            self.values[row] = value
            if value is not None and not abs(value) <= _LARGEST:
                advice = "; return None if the reward does not apply" if math.isnan(value) else ""
                advice = "; it is too large" if math.isfinite(value) else advice
                self.messages.setdefault(f"returned {value}{advice}")
                self.guilty.add(self.batch.group[row])
        return True
