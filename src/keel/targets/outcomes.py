"""Outcomes with reference probabilities and rewards, from files and from lists."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.core.errors import ConfigError, DataError
from keel.targets.survey import Listed

COLUMNS = ("ref", "log_ref", "reward", "name", "mode", "prompt")


def listed_outcomes(outcomes: str | Path | Sequence[Mapping[str, Any]]) -> list[Listed]:
    """Outcomes, a row each, as prompts in the order in which the prompts appear.

    Args:
        outcomes: a file, or dictionaries with `ref` (a probability) or `log_ref`, `reward`, and optionally `name`,
            `mode` and `prompt`.

    Raises:
        DataError: a row or a file that is malformed, with its place.
    """
    rows = read_rows(outcomes) if isinstance(outcomes, (str, Path)) else list(outcomes)
    groups: dict[str, list[tuple[str, float, float, str]]] = {}
    for number, row in enumerate(rows, 1):
        for key in row:
            if key not in COLUMNS:
                raise DataError(f"unknown column '{key}'", f"outcome {number}", f"Columns: {', '.join(COLUMNS)}.")
        name = str(row.get("name") or number)
        log_ref = _log_probability(row, number)
        outcome = (name, log_ref, _number(row, "reward", number), str(row.get("mode") or name))
        groups.setdefault(str(row.get("prompt") or ""), []).append(outcome)
    if not groups:
        raise DataError("there are no outcomes")
    prompts = []
    for prompt, listed in groups.items():
        names, log_refs, rewards, modes = (list(column) for column in zip(*listed, strict=True))
        try:
            prompts.append(Listed(tuple(names), _double(log_refs), _double(rewards), tuple(modes), prompt))
        except ValueError as error:
            raise DataError(str(error), f"prompt '{prompt}'" if prompt else None) from None
    return prompts


def read_rows(path: str | Path) -> list[Mapping[str, Any]]:
    """Outcomes of a JSON, JSONL or CSV file, one dictionary each.

    Raises:
        DataError: the file cannot be read, or holds no list of outcomes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", str(path)) from None
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"is no JSON ({error})", str(path)) from None
    rows = rows.get("outcomes") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("must hold a list of outcomes", str(path), 'Such as [{"ref": 0.6, "reward": 1}].')
    return rows


def outcome_rows(
    ref: Any, reward: Any, names: Sequence[str] | None = None, modes: Sequence[str] | None = None
) -> list[Mapping[str, Any]]:
    """The columns of one prompt as rows.

    Raises:
        UserError: no columns, or columns of different lengths.
    """
    if ref is None or reward is None:
        raise ConfigError(
            "there is nothing to compute a target of",
            fix="Give ref and reward for every outcome, a file of outcomes, or a model.",
        )
    given = {"ref": ref, "reward": reward, "name": names, "mode": modes}
    if callable(reward) or isinstance(reward, str):
        raise ConfigError("must be one number for each outcome where no model is given", "reward")
    lists = {key: list(values) for key, values in given.items() if values is not None}
    if len({len(values) for values in lists.values()}) != 1:
        sizes = ", ".join(f"{len(values)} {key}" for key, values in lists.items())
        raise ConfigError(f"the columns have different lengths ({sizes})", "ref")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _log_probability(row: Mapping[str, Any], number: int) -> float:
    if row.get("log_ref") not in (None, ""):
        return _number(row, "log_ref", number)
    p = _number(row, "ref", number)
    if p < 0:
        raise DataError(f"ref must be a probability, not {p:g}", f"outcome {number}")
    return math.log(p) if p > 0 else -math.inf


def _number(row: Mapping[str, Any], key: str, number: int) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{key} must be a number, not {row.get(key)!r}", f"outcome {number}") from None
    if math.isnan(value):
        raise DataError(f"{key} must be a number, not NaN", f"outcome {number}")
    return value


def _double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
