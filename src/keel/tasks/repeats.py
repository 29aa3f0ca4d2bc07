"""How often each prompt of one's data comes in a pass over them: hard ones more often, solved ones not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keel.core.errors import ConfigError, DataError, nearest
from keel.tasks.data import DataTask
from keel.tasks.task import Example

OPTIONS = ("repeats", "repeats_by")
_NEAR = 1e-9  # a rate that was rounded belongs to the band that it was meant for
_NAMED = 5  # examples that an error names
Bands = Sequence[tuple[float, int]]


def repeated(examples: Sequence[Example], bands: Bands, column: str = "pass_rate") -> list[Example]:
    """Each example as often as the first band whose bound lies above its number says; none where there is no such band.

    A bound of 1 takes a rate of 1 in, too. The copies stand side by side, each with an index of its own: they are
    prompts like any other, drawn once in every pass.

    Args:
        examples: with the column.
        bands: (bound, count) in ascending order of the bounds, which are in (0, 1]; a count of 0 leaves out.
        column: of a number in [0, 1], the share of the prompt's completions that were right, say.

    Raises:
        ValueError: bands that are no such pairs.
        DataError: an example without a number in [0, 1], or nothing that is left.

    Source: "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", 2025 (OREAL), whose bands are
    0.2 six times, 0.6 four times and 0.8 twice.

    >>> data = [Example(f"{i}+1=", {"pass_rate": rate}, i) for i, rate in enumerate((0.1, 0.5, 0.7, 0.9))]
    >>> [e.prompt for e in repeated(data, [(0.2, 3), (0.6, 2), (0.8, 1)])]
    ['0+1=', '0+1=', '0+1=', '1+1=', '1+1=', '2+1=']
    """
    check_bands(bands)
    rates = [_rate(example, column) for example in examples]
    wrong = [example.index for example, rate in zip(examples, rates, strict=True) if rate is None]
    if wrong:
        named = ", ".join(map(str, wrong[:_NAMED])) + (", ..." if len(wrong) > _NAMED else "")
        what = f"{len(wrong)} of {len(rates)} examples have no number in [0, 1] in `{column}`: {named}"
        raise DataError(what, "repeats", f"Give every row a column `{column}`, or name another in repeats_by.")
    counts = [_count(rate, bands) for rate in rates if rate is not None]
    copies = [example for example, count in zip(examples, counts, strict=True) for _ in range(count)]
    if not copies:
        raise DataError(f"every example is left out by its `{column}`", "repeats", "Raise the last bound.")
    return [replace(example, index=index) for index, example in enumerate(copies)]


def check_bands(bands: Any) -> None:
    """Refuse what are no bands.

    Raises:
        ValueError: no pairs of bound and count, bounds outside (0, 1] or not ascending, counts that are no integers
            from 0 on, or all of them 0.
    """
    pairs = isinstance(bands, Sequence) and not isinstance(bands, str) and len(bands) > 0
    if not pairs or not all(isinstance(band, Sequence) and len(band) == 2 for band in bands):
        raise ValueError(f"repeats must be a list of [bound, count], not {bands!r}")
    for bound, count in bands:
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= 1:
            raise ValueError(f"a bound of repeats must be a number in (0, 1], not {bound!r}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"a count of repeats must be an integer from 0 on, not {count!r}")
    bounds = [bound for bound, _ in bands]
    if sorted(set(bounds)) != bounds:
        raise ValueError(f"the bounds of repeats must ascend, not {bounds}")
    if not any(count for _, count in bands):
        raise ValueError("repeats leaves every example out: all counts are 0")


def with_options(task: DataTask, options: Mapping[str, Any]) -> DataTask:
    """Data of one's own under `task.options`: `repeats`, and the column that it reads, `repeats_by`.

    What is held out stays as it is.

    Raises:
        ConfigError: an unknown option, or bands that are none.
        DataError: see `repeated`.
    """
    for key in options:
        if key not in OPTIONS:
            what = f"unknown option of data; allowed: {', '.join(OPTIONS)}.{nearest(key, OPTIONS)}"
            raise ConfigError(what, f"task.options.{key}")
    column = options.get("repeats_by", "pass_rate")
    if not isinstance(column, str) or ("repeats_by" in options and options.get("repeats") is None):
        raise ConfigError("names the column for repeats, which are not given", "task.options.repeats_by")
    if options.get("repeats") is None:
        return task
    try:
        train = repeated(task.train, options["repeats"], column)
    except ValueError as error:
        raise ConfigError(str(error), "task.options.repeats", "For example [[0.2, 6], [0.6, 4], [0.8, 2]].") from None
    return DataTask(task.name, train, task.held_out)


def _rate(example: Example, column: str) -> float | None:
    value = example.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # nan is none, either
        return None
    return float(value)


def _count(rate: float, bands: Bands) -> int:
    """That of the first band above the rate."""
    return next((n for bound, n in bands if rate + _NEAR < bound or bound == 1), 0)
