"""A batch on its way through the loop, and the prompts that it begins with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keel.core.choice import generator
from keel.core.errors import DataError, TrainingError
from keel.core.rows import Rows
from keel.statistics.stats import Stats
from keel.tasks.task import Text
from keel.train.replay import left
from keel.train.session import Session


@dataclass
class Batch:
    """What `prepare` hands to `update`."""

    rows: Rows
    frozen: Stats
    metrics: dict[str, float]
    texts: list[tuple[Text, str]] = field(default_factory=list)  # prompt and completion of each row
    seen: tuple[Tensor, Stats] | None = None  # rows of the first update, and its statistics
    by_token: dict[str, Tensor] = field(default_factory=dict)  # what it did to each token, on steps that are stored
    fresh: Rows | None = None  # the rows that were drawn, as they were scored
    replayed: dict[str, Tensor] = field(default_factory=dict)  # groups of each memory that stand beside them


def next_examples(session: Session, count: int, data: Sequence[Any] | None = None) -> list[Any]:
    """The next prompts, in an order that the seed decides for each pass over the data: the task's, or those given."""
    examples = session.task.train if data is None else data
    size = len(examples)
    if not size:
        raise DataError("there are no examples to train on", session.task.name)
    gone = left(session)
    if len(gone) >= size:
        raise TrainingError("every prompt has left the ones to train on", session.task.name, "Set leave=false.")
    out: list[Any] = []
    while len(out) < count:
        epoch, i = divmod(session.position.drawn, size)
        example = examples[_order(session, size, epoch)[i]]
        out += [] if example.index in gone else [example]
        session.position.drawn += 1
    return out


def _order(session: Session, size: int, epoch: int) -> list[int]:
    if session.order is None or session.order[0] != epoch:
        order = torch.randperm(size, generator=generator(session.config.seed, "order", epoch)).tolist()
        session.order = (epoch, order)
    return session.order[1]
