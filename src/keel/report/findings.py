"""What a finding is, and the few questions that a diagnosis asks of the curves and the configuration of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from keel.report.entropy_tokens import Fall

Curve = Sequence[tuple[int, float]]

FEW = 5  # steps below which nothing is said about a course


class Level(StrEnum):
    """How much a finding matters."""

    PROBLEM = "problem"  # the run is unlikely to be worth anything as it is
    WARNING = "warning"  # something was lost
    NOTE = "note"  # worth knowing
    GOOD = "good"  # as it should be


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Args:
        level: how much it matters.
        sentence: what was seen, with the number, and what would change it.
        setting: path for `--set` of what would change it, or "".
        kind: name of the check that found it; with `setting` it tells whether two findings are about the same thing.
    """

    level: Level
    sentence: str
    setting: str = ""
    kind: str = ""


class Run:
    """Curves and configuration, with the few questions that the checks ask of them."""

    def __init__(self, metrics: Mapping[str, Curve], config: Mapping[str, Any], fallen: Sequence[Fall] = ()):
        self.metrics, self.config, self.fallen = metrics, config, fallen

    def finite(self, name: str) -> list[float]:
        return [value for _, value in self.metrics.get(name, ()) if math.isfinite(value)]

    def early(self, name: str) -> float | None:
        """Mean over the first tenth, of at least FEW steps; None where there are fewer than that."""
        values = self.finite(name)
        return fmean(values[: max(FEW, len(values) // 10)]) if len(values) >= FEW else None

    def late(self, name: str) -> float | None:
        """Mean over the last tenth, of at least FEW steps; None where there are fewer than that."""
        values = self.finite(name)
        return fmean(values[-max(FEW, len(values) // 10) :]) if len(values) >= FEW else None

    def course(self, name: str) -> tuple[float, float] | None:
        """Both, where they do not overlap."""
        early, late = self.early(name), self.late(name)
        return (early, late) if early is not None and late is not None and len(self.finite(name)) >= 2 * FEW else None

    def window(self, name: str) -> int:
        return max(FEW, len(self.finite(name)) // 10)

    def setting(self, *keys: str) -> tuple[str, str]:
        """Path for `--set` of the first of `keys` that the configuration has, and the text with its value."""
        for key in keys:
            for path, value in entries(self.config):
                if value is not None and (path.split(".")[-1] == key or path == key):
                    return path, f"`{path}` (now {short(value)})"
        return keys[0], f"`{keys[0]}`"


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path for `--set`, value) of all that a configuration holds, the recipe's arguments and the slots first."""
    recipe, method = config.get("recipe"), config.get("method")
    if isinstance(recipe, Mapping):
        yield from _leaves(recipe.get("arguments") or {})
    if isinstance(method, Mapping):
        yield from _leaves({slot: part for slot, part in method.items() if slot != "claim"})
    yield from _leaves({name: part for name, part in config.items() if name not in ("recipe", "method")})


def _leaves(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for name, inner in part.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif path:
        yield path, part


def above(value: float | None, limits: tuple[float, float]) -> Level | None:
    if value is None or value <= limits[0]:
        return None
    return Level.PROBLEM if value > limits[1] else Level.WARNING


def below(value: float | None, limits: tuple[float, float]) -> Level | None:
    if value is None or value >= limits[0]:
        return None
    return Level.PROBLEM if value < limits[1] else Level.WARNING


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
