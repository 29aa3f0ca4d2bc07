"""A comparison as files: JSON with everything, CSV of its cells, CSV of its statistics."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keel.compare.outcomes import Arm, Budget, Comparison, Outcome
from keel.compare.results import Analysis
from keel.report.page import write

FORMAT = 1
_CELL = ("arm", "recipe", "settings", "seed", "status", "run", "error", "tokens", "seconds", "steps")


def to_json(comparison: Comparison, analysis: Analysis | None = None) -> dict[str, Any]:
    """All that is known, as plain values; null for numbers that are not finite.

    Args:
        comparison: with its outcomes.
        analysis: its statistics, under "analysis".
    """
    data = {
        "format": FORMAT,
        "name": comparison.name,
        "arms": [{"name": a.name, "recipe": a.recipe, "settings": _settings(a.settings)} for a in comparison.arms],
        "seeds": list(comparison.seeds),
        "task": comparison.task,
        "model": comparison.model,
        "budget": {"amount": comparison.budget.amount, "unit": comparison.budget.unit},
        "settings": _settings(comparison.settings),
        "outcomes": [_outcome(outcome) for outcome in comparison.outcomes],
        "tuned": dict(comparison.tuned),
        "created": comparison.created,
    }
    return data if analysis is None else {**data, "analysis": analysis.to_json()}


def from_json(data: Mapping[str, Any]) -> Comparison:
    """The comparison that `to_json` wrote.

    Raises:
        ValueError: something that `to_json` writes is missing, of another kind, or of another format.
    """
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']} of a comparison cannot be read, only {FORMAT}")
        return Comparison(
            name=data["name"],
            arms=tuple(Arm(a["name"], a["recipe"], _frozen(a["settings"])) for a in data["arms"]),
            seeds=tuple(data["seeds"]),
            task=data["task"],
            model=data["model"],
            budget=Budget(float(data["budget"]["amount"]), data["budget"]["unit"]),
            settings=_frozen(data["settings"]),
            outcomes=tuple(_read(one) for one in data["outcomes"]),
            tuned=dict(data["tuned"]),
            created=float(data["created"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no comparison of Keel: {type(error).__name__}: {error}") from error


def cells_csv(comparison: Comparison) -> str:
    """A line for each cell: what it is, what it spent, and the mean over prompts of each metric, after and before."""
    after = list(dict.fromkeys(name for o in comparison.outcomes for name in o.values))
    before = list(dict.fromkeys(name for o in comparison.outcomes for name in o.before))
    recipes = {arm.name: arm for arm in comparison.arms}
    rows = []
    for o in comparison.outcomes:
        arm = recipes[o.arm]
        settings = " ".join(f"{key}={value}" for key, value in arm.settings)
        facts = [o.arm, arm.recipe, settings, o.seed, o.status, o.run, o.error, o.tokens, o.seconds, o.steps]
        means = [_mean(o.values.get(name)) for name in after] + [_mean(o.before.get(name)) for name in before]
        rows.append(facts + means)
    return _csv([*_CELL, *after, *(f"before/{name}" for name in before)], rows)


def summary_csv(analysis: Analysis) -> str:
    """A line for each arm and metric: its mean, and what sets it apart from the baseline."""
    parts = ("", "_low", "_high")
    head = ["arm", "metric", "seeds", "prompts", *(f"mean{p}" for p in parts), *(f"iqm{p}" for p in parts)]
    head += [f"difference{p}" for p in parts] + [f"iqm_difference{p}" for p in parts]
    head += [f"probability_of_improvement{p}" for p in parts]
    head += ["p", "p_adjusted", "verdict", "seeds_compared", "prompts_compared", "seeds_needed"]
    rows = []
    for e in analysis.estimates:
        row: list[Any] = [e.arm, e.metric, len(e.seeds), e.prompts, *e.mean.to_json(), *e.iqm.to_json()]
        d = analysis.difference(e.arm, e.metric)
        if d is None:
            rows.append([*row, *[None] * 11, "baseline", None, None, None])
            continue
        row += [*d.mean.to_json(), *d.iqm.to_json(), *d.improvement.to_json(), _known(d.p), _known(d.adjusted)]
        needed = d.needed.seeds if d.needed.seeds is not None else str(d.needed)
        rows.append([*row, d.verdict, len(d.seeds), d.prompts, needed])
    return _csv(head, rows)


def write_json(path: str | Path, comparison: Comparison, analysis: Analysis | None = None) -> Path:
    """Write `to_json`, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    return write(path, json.dumps(to_json(comparison, analysis), allow_nan=False, indent=1) + "\n")


def write_csv(path: str | Path, comparison: Comparison) -> Path:
    """Write `cells_csv`.

    Raises:
        UserError: the file cannot be written.
    """
    return write(path, cells_csv(comparison))


def write_summary(path: str | Path, analysis: Analysis) -> Path:
    """Write `summary_csv`.

    Raises:
        UserError: the file cannot be written.
    """
    return write(path, summary_csv(analysis))


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "arm": outcome.arm,
        "seed": outcome.seed,
        "status": outcome.status,
        "run": outcome.run,
        "error": outcome.error,
        "values": {name: [_known(v) for v in column] for name, column in outcome.values.items()},
        "before": {name: [_known(v) for v in column] for name, column in outcome.before.items()},
        "curves": {name: [[step, _known(v)] for step, v in curve] for name, curve in outcome.curves.items()},
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "steps": outcome.steps,
    }


def _read(data: Mapping[str, Any]) -> Outcome:
    def columns(name: str) -> dict[str, np.ndarray]:
        return {key: np.array([_nan(v) for v in column], dtype=float) for key, column in data[name].items()}

    return Outcome(
        arm=data["arm"],
        seed=data["seed"],
        status=data["status"],
        run=data["run"],
        error=data["error"],
        values=columns("values"),
        before=columns("before"),
        curves={name: [(int(step), _nan(v)) for step, v in curve] for name, curve in data["curves"].items()},
        tokens=data["tokens"],
        seconds=data["seconds"],
        steps=data["steps"],
    )


def _settings(settings: Sequence[tuple[str, Any]]) -> list[list[Any]]:
    return [[key, _plain(value)] for key, value in settings]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return _known(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _frozen(settings: Sequence[Sequence[Any]]) -> tuple[tuple[str, Any], ...]:
    def fixed(value: Any) -> Any:
        return tuple(fixed(inner) for inner in value) if isinstance(value, list) else value

    return tuple((key, fixed(value)) for key, value in settings)


def _mean(column: Any) -> float | None:
    """Over the prompts that have a finite number."""
    finite = [] if column is None else [float(v) for v in column if math.isfinite(v)]
    return float(np.mean(finite)) if finite else None


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(head)
    lines.writerows(["" if value is None else _safe(value) for value in row] for row in rows)
    return file.getvalue()


def _safe(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
