"""What goes into a store and comes out of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StoredRun:
    """A run as it is written down.

    Args:
        id: number within the store.
        name: unique within the store.
        status: "running", or what `finish` was told ("finished", "failed", ...).
        step: the last step about which anything was logged.
        created, updated, finished: seconds since 1970; `finished` is None while the run goes on.
        summary: what `finish` was told.
        config: the whole configuration; None in lists of runs.
    """

    id: int
    name: str
    recipe: str
    task: str
    model: str
    seed: int
    status: str
    step: int
    created: float
    updated: float
    finished: float | None
    summary: dict[str, Any]
    config: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class StoredRollout:
    """One completion with what was known about it.

    Args:
        prompt, completion: as a person reads them.
        reward: the total; NaN where it could not be scored.
        rewards: by reward function; NaN where one does not apply.
        data_index: which example of the task.
        group: which group of its batch.
        stop: why it ended, the name of a `Stop`.
        length: tokens that the model chose.
        answer: canonical answer, or None.
        tokens: text of each token, for pages that colour them.
        numbers: numbers per token by name, first dimension T: log-probabilities, advantages, ...
        step, id: filled in by the store.
    """

    prompt: str
    completion: str
    reward: float
    rewards: dict[str, float] = field(default_factory=dict)
    data_index: int = 0
    group: int = 0
    stop: str = ""
    length: int = 0
    answer: str | None = None
    tokens: tuple[str, ...] = ()
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    step: int = 0
    id: int = 0


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation as it is written down.

    Args:
        step: after how many steps it was made.
        phase: what for ("before", "after", "during").
        created: seconds since 1970.
        evaluation: what `Evaluation.to_json` wrote; `Evaluation.from_json` reads it.
    """

    step: int
    phase: str
    created: float
    evaluation: dict[str, Any]
