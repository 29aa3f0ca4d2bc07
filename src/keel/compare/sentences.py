"""A comparison in words: what was found, what failed, and what remains open."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keel.compare.outcomes import Comparison
from keel.compare.results import BETTER, HIGHER, LOWER, NO_DIFFERENCE, SEEN, UNTOLD, WORSE, Analysis, Cell, Difference
from keel.evaluate.intervals import Interval

LISTED = 4  # cells that are named one by one
_LABELS = {"kl": "KL", "completions/mean_length": "length", "completions/clipped_ratio": "cut off"}
_SIGNS = {BETTER: "▲", HIGHER: "▲", WORSE: "▼", LOWER: "▼", NO_DIFFERENCE: "="}


def findings(analysis: Analysis) -> list[str]:
    """What the comparison found, sentences with the numbers, what decides first."""
    if not analysis.metrics:
        return ["No cell has numbers: there is nothing to compare.", *unfinished(analysis)]
    if len(analysis.arms) == 1:
        return ["There is one arm: nothing to hold it against.", *unfinished(analysis)]
    first = [d for d in analysis.differences if d.metric == analysis.metrics[0]]
    told = sorted((d for d in first if d.told), key=lambda d: -d.mean.value)
    said = [_seen(d, analysis) for d in told]
    said += [_not_seen(d, analysis) for d in first if d.verdict == NO_DIFFERENCE]
    said += [_untold(d, analysis) for d in first if d.verdict.startswith(UNTOLD)]
    return [*said, *_beside(analysis), *unfinished(analysis)]


def unfinished(analysis: Analysis) -> list[str]:
    """Cells that failed, and those that have not run."""
    said = []
    if analysis.failed:
        named = [f"{cell.arm} seed {cell.seed}{f' ({cell.error})' if cell.error else ''}" for cell in analysis.failed]
        verb = "failed and is in no average" if len(named) == 1 else "failed and are in no average"
        said.append(f"{_counted(named)} {verb}: {_listed(named)}.")
    if analysis.missing:
        named = [f"{cell.arm} seed {cell.seed}" for cell in analysis.missing]
        said.append(f"{_counted(named)} {'has' if len(named) == 1 else 'have'} not run: {_listed(named)}.")
    return said


def remarks(comparison: Comparison, analysis: Analysis) -> list[str]:
    """What a reader should know beside the findings: tuned strengths, seeds and prompts that were left out."""
    return [*(f"Tuned: {name}: {words}." for name, words in _whole(comparison)), *analysis.notes]


def number(value: float, signed: bool = False, scale: float | None = None) -> str:
    """A number with as many digits as help where numbers are as large as `scale`, or as itself.

    >>> [number(value) for value in (0.51234, 41.237, 123456.0, 0.00042, float("nan"))], number(-0.5, signed=True)
    (['0.512', '41.2', '123,456', '0.00042', '-'], '-0.500')
    """
    sign = "+" if signed else ""
    if not math.isfinite(value):
        return "-"
    size = abs(value) if scale is None else scale
    if 0 < size < 0.001:
        return f"{value:{sign}.2g}"
    return f"{value:{sign}.3f}" if size < 10 else f"{value:{sign}.1f}" if size < 1000 else f"{value:{sign},.0f}"


def ranged(interval: Interval, signed: bool = False) -> str:
    """A number with its interval.

    >>> ranged(Interval(0.1, 0.05, 0.15), signed=True)
    '+0.100 [+0.050, +0.150]'
    """
    value, low, high = digits(interval, signed)
    return f"{value} [{low}, {high}]" if interval.known else value


def digits(interval: Interval, signed: bool = False) -> tuple[str, str, str]:
    """A number and the ends of its interval, all with the digits that the largest of them has.

    >>> digits(Interval(12.34, 9.876, 15.0)), digits(Interval(0.02, 0.0001, 0.04), signed=True)
    (('12.3', '9.9', '15.0'), ('+0.020', '+0.000', '+0.040'))
    """
    numbers = (interval.value, interval.low, interval.high)
    scale = max((abs(n) for n in numbers if math.isfinite(n)), default=0.0)
    value, low, high = (number(n, signed, scale) for n in numbers)
    return value, low, high


def label(metric: str) -> str:
    """A metric as tables name it."""
    return _LABELS.get(metric, metric)


def sign(verdict: str) -> str:
    """A verdict as one character: it is never told by colour alone."""
    return _SIGNS.get(verdict, "?")


def brief(verdict: str) -> str:
    """A verdict for a cell of a table, with its sign.

    >>> brief("better"), brief("no difference seen"), brief("cannot be told: 1 seed")
    ('▲ better', '= none seen', '? 1 seed')
    """
    words = "none seen" if verdict == NO_DIFFERENCE else verdict.removeprefix(f"{UNTOLD}: ")
    return f"{sign(verdict)} {words}"


def amount(value: float) -> str:
    """A count of tokens, short.

    >>> amount(950.0), amount(204800.0), amount(1.5e7), amount(float("nan"))
    ('950', '205k', '15M', '-')
    """
    if not math.isfinite(value):
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """
    >>> duration(42.0), duration(150.0), duration(5400.0)
    ('42 s', '2.5 min', '1.5 h')
    """
    if not math.isfinite(seconds):
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def chance(p: float) -> str:
    """A p-value.

    >>> chance(0.0312), chance(1e-9), chance(float("nan"))
    ('0.031', '< 0.001', '-')
    """
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def places(difference: Difference) -> str:
    """On how many seeds and prompts."""
    seeds, prompts = len(difference.seeds), difference.prompts
    return f"{seeds} seed{'s' * (seeds != 1)} and {prompts} prompt{'s' * (prompts != 1)}"


def _seen(difference: Difference, analysis: Analysis) -> str:
    arm, metric = difference.arm, difference.metric
    mine, others = (analysis.estimate(name, metric).mean.value for name in (arm, analysis.baseline))
    return (
        f"{arm} is {difference.verdict} than {analysis.baseline}: {label(metric)} {number(mine)} against "
        f"{number(others)}, {ranged(difference.mean, signed=True)} over {places(difference)} "
        f"({_corrected(difference, analysis)})."
    )


def _corrected(difference: Difference, analysis: Analysis) -> str:
    p, tests = chance(difference.adjusted), sum(not math.isnan(d.p) for d in analysis.differences)
    said = f"p {p}" if p.startswith("<") else f"p = {p}"
    return f"{said}, corrected for {tests} comparisons" if tests > 1 else said


def _not_seen(difference: Difference, analysis: Analysis) -> str:
    metric, needed = label(difference.metric), difference.needed
    what = f"{difference.arm}: no difference from {analysis.baseline} was seen in {metric}"
    if difference.mean.value == 0 and difference.mean.low == difference.mean.high:
        return f"{what}: both have the same numbers in every cell."
    found = f"{ranged(difference.mean, signed=True)} over {places(difference)}"
    if difference.mean.low > 0 or difference.mean.high < 0:
        return (
            f"{difference.arm}: {metric} {found} leaves out 0, but where so much is compared that happens by chance "
            f"({_corrected(difference, analysis)}): it does not count as a difference from {analysis.baseline}."
        )
    if needed.reason == "prompts":
        more = f"One of that size needs more than {difference.prompts} prompts, whatever the number of seeds."
    elif needed.reason:
        more = f"To see one of that size: {needed}."
    else:
        more = f"To see one of that size would take {needed} for each arm."
    return f"{what}, {found}. {more}"


def _untold(difference: Difference, analysis: Analysis) -> str:
    if len(difference.seeds) != 1:
        reason = difference.verdict.removeprefix(f"{UNTOLD}: ")
        return f"{difference.arm} cannot be held against {analysis.baseline}: {reason}."
    return (
        f"{difference.arm}: {label(difference.metric)} {ranged(difference.mean, signed=True)} against "
        f"{analysis.baseline} with one seed: of the methods nothing can be told, and how many seeds would be needed "
        "cannot be known."
    )


def _beside(analysis: Analysis) -> list[str]:
    """The other metrics, a sentence for each in which some arm differs."""
    said = []
    for metric in analysis.metrics[1:]:
        for verdict in SEEN:
            found = [d for d in analysis.differences if (d.metric, d.verdict) == (metric, verdict)]
            named = [f"{d.arm} ({number(d.mean.value, signed=True)})" for d in found]
            if named:
                said.append(f"{label(metric)} is {verdict} than {analysis.baseline}'s for {_and(named)}.")
    return said


def _whole(comparison: Comparison) -> list[tuple[str, str]]:
    return [(name, words.rstrip(".")) for name, words in comparison.tuned.items()]


def _counted(named: Sequence[str] | Sequence[Cell]) -> str:
    return "1 cell" if len(named) == 1 else f"{len(named)} cells"


def _listed(named: Sequence[str]) -> str:
    more = len(named) - LISTED
    return "; ".join(named[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
