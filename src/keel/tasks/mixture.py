"""Several data sets in one: each is drawn in proportion to its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from keel.core.choice import generator
from keel.core.errors import ConfigError
from keel.tasks.preferences import Preference
from keel.tasks.task import Example

T = TypeVar("T", Example, Preference)


def sources_of(data: Any) -> dict[str, float] | None:
    """Paths and weights where several data sets are asked for; None where `data` is one.

    Args:
        data: {path: weight}, or a list of paths, each of which then has weight 1.

    Raises:
        ConfigError: a weight that is no positive number, or a path that is named twice.

    >>> sources_of(["a.jsonl", "b.jsonl"]), sources_of({"a.jsonl": 2}), sources_of("a.jsonl")
    ({'a.jsonl': 1.0, 'b.jsonl': 1.0}, {'a.jsonl': 2.0}, None)
    """
    if isinstance(data, Mapping):
        if not data or any(hasattr(split, "column_names") for split in data.values()):
            return None  # a DatasetDict, or what is no data at all
        for path, weight in data.items():
            fits = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not fits or not 0 < weight < math.inf:
                fix = "For example {'a.jsonl': 2, 'b.jsonl': 1}."
                raise ConfigError(f"must have a positive number as its weight, not {weight!r}", f"data {path}", fix)
        return {str(path): float(weight) for path, weight in data.items()}
    if not isinstance(data, list | tuple) or not data or not all(isinstance(item, str | Path) for item in data):
        return None
    paths = [str(path) for path in data]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise ConfigError("is given twice", f"data {twice[0]}", "Give it once, with the sum of the weights.")
    return dict.fromkeys(paths, 1.0)


def mixed(parts: Mapping[str, Sequence[T]], weights: Mapping[str, float], seed: int) -> list[T]:
    """One pass over several data sets, in which each has its share: n_i = round(w_i max_j len_j / w_j).

    The set that has the most rows for its weight comes once, the others so often that the shares are right: whole as
    many times as that takes, and the rest drawn without replacement by the seed. Every row has a number of its own.

    Args:
        parts: rows by name; empty ones are left out.
        weights: of each of them, positive.
        seed: of the draw.

    >>> from keel.tasks.task import Example
    >>> parts = {"a": [Example("1", {}, 0)], "b": [Example("2", {}, 0), Example("3", {}, 1)]}
    >>> [e.prompt for e in mixed(parts, {"a": 2.0, "b": 1.0}, 0)]
    ['1', '1', '1', '1', '2', '3']
    """
    filled = {name: rows for name, rows in parts.items() if len(rows)}
    if not filled:
        return []
    whole = max(len(rows) / weights[name] for name, rows in filled.items())
    out: list[T] = []
    for name, some in filled.items():
        times, rest = divmod(max(round(whole * weights[name]), 1), len(some))
        drawn = torch.randperm(len(some), generator=generator(seed, "mixture", name))[:rest].tolist()
        out.extend(some[i] for _ in range(times) for i in range(len(some)))
        out.extend(some[i] for i in sorted(drawn))
    return [replace(row, index=index) for index, row in enumerate(out)]


def domain_of(path: str) -> str:
    """The name under which a data set is reported: that of its file, without the ending."""
    return Path(path).stem or path
