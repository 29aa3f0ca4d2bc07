"""What finished cells say of a method: means and differences over seeds and prompts, with 95% intervals."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
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

    Another processor rounds otherwise and so trains another base. What began with one of these is compared with its
    baselines on the same, which were run for that alone.

    Args:
        numbers: of each arm and seed.
        times: seconds, the same way.
        failed: what went wrong, the same way.
        bases: checksums of what each began with, the same way.
        processors: where each was run, the same way.
        elsewhere: by base, the baselines of arms that began with it, as few have.
    """

    numbers: dict[Arm, dict[int, Numbers]] = field(default_factory=dict)
    times: dict[Arm, dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    failed: dict[Arm, str] = field(default_factory=dict)
    bases: dict[Arm, dict[int, str]] = field(default_factory=dict)
    processors: dict[Arm, dict[int, str]] = field(default_factory=dict)
    elsewhere: dict[str, "Evidence"] = field(default_factory=dict)

    @staticmethod
    def of(
        results: Sequence[Result],
        plain: Callable[[Cell], bool] = lambda cell: True,
        elsewhere: Mapping[str, Sequence[Result]] = MappingProxyType({}),
    ) -> "Evidence":
        """From results; those of other settings than the plan's are left out by `plain`."""
        found = Evidence(elsewhere={base: Evidence.of(some, plain) for base, some in elsewhere.items()})
        for one in results:
            if not plain(one.cell):
                continue
            arm = Arm(one.cell.recipe, one.cell.task, one.cell.arguments)
            if one.error:
                found.failed[arm] = one.error
            else:
                found.numbers.setdefault(arm, {})[one.cell.seed] = one.numbers
                found.times.setdefault(arm, {})[one.cell.seed] = one.times
                found.bases.setdefault(arm, {})[one.cell.seed] = one.base
                found.processors.setdefault(arm, {})[one.cell.seed] = one.machine.get("processor", "")
        return found

    def on(self, seeds: Collection[int]) -> "Evidence":
        """Of some seeds alone."""

        def some(table: Mapping[Arm, Mapping[int, Any]]) -> dict[Arm, dict[int, Any]]:
            return {arm: {seed: one for seed, one in known.items() if seed in seeds} for arm, known in table.items()}

        elsewhere = {base: one.on(seeds) for base, one in self.elsewhere.items()}
        return Evidence(some(self.numbers), some(self.times), {}, some(self.bases), some(self.processors), elsewhere)

    def base(self, arm: Arm, seed: int) -> str:
        """What it began with."""
        return self.bases.get(arm, {}).get(seed, "")

    def usual(self, task: str) -> str:
        """The base that most began with."""
        bases = [base for arm, known in self.bases.items() if arm.task == task for base in known.values()]
        return max(dict.fromkeys(bases), key=bases.count, default="")

    def processor(self, *arms: Arm) -> str:
        """Where most of the runs of some arms were made; without any, of all arms."""
        names = [name for arm in arms or self.processors for name in self.processors.get(arm, {}).values()]
        return max(dict.fromkeys(names), key=names.count, default="")

    def apart(self, arm: Arm) -> bool:
        """Whether some of its runs began with another base than most."""
        usual = self.usual(arm.task)
        return any(base != usual for base in self.bases.get(arm, {}).values())

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
        """arm - other, paired by seed and by prompt, of runs that began with one base; NaN if there are none."""
        pairs = []
        for seed, one_in, two_in in self._paired(arm, other):
            one, two = one_in._read(arm, seed, name), two_in._read(other, seed, name)
            if one is not None and two is not None and one.shape == two.shape:
                pairs.append(one - two)
        return _interval(pairs)

    def time_ratio(self, arm: Arm, other: Arm) -> float:
        """Processor time of a step over that of the other's, on the same processor; NaN if it is not known."""
        for base in dict.fromkeys(self.base(arm, seed) for seed in self.times.get(arm, {})):
            one, two = self._steps(arm, base), self._steps(other, base)
            two = two or self.elsewhere.get(base, Evidence())._steps(other, base)
            if one and two:
                return float(np.median(one) / np.median(two))
        return math.nan

    def _steps(self, arm: Arm, base: str) -> list[float]:
        known = [t.get("step_cpu") for seed, t in self.times.get(arm, {}).items() if self.base(arm, seed) == base]
        return [seconds for seconds in known if seconds]

    def _paired(self, arm: Arm, other: Arm) -> list[tuple[int, "Evidence", "Evidence"]]:
        """Seeds, and where each of two has a run of it that began with the same base."""
        found = []
        for seed in sorted({*self.numbers.get(arm, {}), *self.numbers.get(other, {})}):
            one, two = (self.base(a, seed) if seed in self.numbers.get(a, {}) else None for a in (arm, other))
            for base in dict.fromkeys(b for b in (one, two) if b is not None):
                there = self.elsewhere.get(base, Evidence())
                places = [
                    self if own == base else there if seed in there.numbers.get(a, {}) else None
                    for own, a in ((one, arm), (two, other))
                ]
                if None not in places:
                    found.append((seed, *places))
                    break
        return found

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
