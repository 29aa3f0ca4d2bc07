"""What finished cells say of a method: means and differences over seeds and prompts, with 95% intervals."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.cells import Cell
from benchmarks.plan import MAIN
from benchmarks.results import Result
from keel.evaluate.intervals import LEVEL, Interval, mean_interval

Numbers = Mapping[str, Any]
Scalar = Callable[[Numbers], float | None]
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Arm:
    """A method on a task.

    Args:
        recipe: its name.
        task: its name.
        arguments: of the recipe, where they are not those that the plan gives.
    """

    recipe: str
    task: str = MAIN
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """For people."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.recipe}({given})" if given else self.recipe


@dataclass
class Evidence:
    """The numbers of all arms by seed.

    Args:
        numbers: of each arm and seed.
        times: seconds, the same way.
        failed: what went wrong, the same way.
    """

    numbers: dict[Arm, dict[int, Numbers]] = field(default_factory=dict)
    times: dict[Arm, dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    failed: dict[Arm, str] = field(default_factory=dict)

    @staticmethod
    def of(results: Sequence[Result], plain: Callable[[Cell], bool] = lambda cell: True) -> "Evidence":
        """From results; those of other settings than the plan's are left out by `plain`."""
        found = Evidence()
        for one in results:
            if not plain(one.cell):
                continue
            arm = Arm(one.cell.recipe, one.cell.task, one.cell.arguments)
            if one.error:
                found.failed[arm] = one.error
            else:
                found.numbers.setdefault(arm, {})[one.cell.seed] = one.numbers
                found.times.setdefault(arm, {})[one.cell.seed] = one.times
        return found

    def on(self, seeds: Collection[int]) -> "Evidence":
        """Of some seeds alone."""
        parts = (
            {arm: {seed: one for seed, one in by_seed.items() if seed in seeds} for arm, by_seed in table.items()}
            for table in (self.numbers, self.times)
        )
        return Evidence(*parts)  # type: ignore[arg-type]

    def has(self, arm: Arm) -> bool:
        """Whether there is a finished cell."""
        return bool(self.numbers.get(arm))

    def seeds(self, *arms: Arm) -> list[int]:
        """Those that all arms have."""
        return sorted(set.intersection(*(set(self.numbers.get(arm, {})) for arm in arms)))

    def measure(self, arm: Arm, name: str | Scalar, seeds: int | None = None) -> Interval:
        """Mean over seeds and prompts."""
        return _interval([self._read(arm, seed, name) for seed in self.seeds(arm)[:seeds]])

    def difference(self, arm: Arm, other: Arm, name: str | Scalar) -> Interval:
        """arm - other, paired by seed and by prompt."""
        pairs = []
        for seed in self.seeds(arm, other):
            one, two = self._read(arm, seed, name), self._read(other, seed, name)
            if one is not None and two is not None and one.shape == two.shape:
                pairs.append(one - two)
        return _interval(pairs)

    def time_ratio(self, arm: Arm, other: Arm) -> float:
        """Processor time of a step over that of the other's; NaN if it is not known."""
        found = [[t["step_cpu"] for t in self.times.get(a, {}).values() if t.get("step_cpu")] for a in (arm, other)]
        return float(np.median(found[0]) / np.median(found[1])) if all(found) else math.nan

    def _read(self, arm: Arm, seed: int, name: str | Scalar) -> np.ndarray | None:
        numbers = self.numbers[arm][seed]
        if isinstance(name, str):
            values = numbers["values"].get(name)
            return None if values is None else np.asarray(values, dtype=float)
        value = name(numbers)
        return None if value is None or not math.isfinite(value) else np.array([value])


def at(*path: str | int) -> Scalar:
    """Reads one number of a cell: `at("probe_after", "zero_groups")`, `at("curves", "reward", 0)`.

    >>> at("a", "b")({"a": {"b": 2.0}}), at("a", "c")({"a": {}})
    (2.0, None)
    """

    def read(numbers: Numbers) -> float | None:
        found: Any = numbers
        for step in path:
            try:
                found = found[step]
            except (KeyError, IndexError, TypeError):
                return None
        return None if found is None else float(found)

    return read


def minus(one: Scalar, other: Scalar) -> Scalar:
    """The difference of two numbers of a cell."""

    def read(numbers: Numbers) -> float | None:
        a, b = one(numbers), other(numbers)
        return None if a is None or b is None else a - b

    return read


def over(one: Scalar, other: Scalar) -> Scalar:
    """The ratio of two numbers of a cell."""

    def read(numbers: Numbers) -> float | None:
        a, b = one(numbers), other(numbers)
        return None if a is None or not b else a / b

    return read


def _interval(rows: Sequence[np.ndarray | None]) -> Interval:
    known = [row for row in rows if row is not None]
    if not known or len({len(row) for row in known}) > 1:
        return UNKNOWN
    return two_way(np.stack(known))


def two_way(table: np.ndarray) -> Interval:
    """Mean of a table of seeds x prompts, both of them drawn from many, with its 95% interval.

    The variance of the mean is (MS_seeds + MS_prompts - MS_rest) / (S P), of Student's t with Satterthwaite's degrees
    of freedom; it is never taken below what the seeds alone, or the prompts alone, give. One seed leaves the prompts,
    resampled; one column leaves the seeds; a single number has no interval.

    Args:
        table: numbers, shape [S, P]; columns with a NaN are left out.

    Source: Searle, Casella and McCulloch, "Variance Components", 1992, the two-way model without interaction.

    >>> two_way(np.array([[1.0], [3.0]])).value
    2.0
    """
    table = table[:, ~np.isnan(table).any(0)]
    if not table.size:
        return UNKNOWN
    count, size = table.shape
    mean = float(table.mean())
    if count == 1:
        return mean_interval(table[0])
    from scipy.stats import t

    seeds = size * table.mean(1).var(ddof=1)
    if size == 1:
        variance, freedom = seeds / count, count - 1.0
    else:
        prompts = count * table.mean(0).var(ddof=1)
        rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + mean
        left = float((rest**2).sum()) / ((count - 1) * (size - 1))
        both = seeds + prompts - left
        if both > max(seeds, prompts):
            parts = seeds**2 / (count - 1) + prompts**2 / (size - 1) + left**2 / ((count - 1) * (size - 1))
            variance, freedom = both / (count * size), both**2 / parts
        elif seeds > prompts:
            variance, freedom = seeds / (count * size), count - 1.0
        else:
            variance, freedom = prompts / (count * size), size - 1.0
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)
