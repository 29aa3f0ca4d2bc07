"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keel.core.plain import counted
from keel.evaluate.evaluation import Evaluation, change
from keel.evaluate.intervals import Interval
from keel.report.arms import Arm
from keel.report.demo import table_names, table_values
from keel.report.diagnosis import Finding, Level

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_STYLES = {Level.PROBLEM: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan", Level.GOOD: "green"}


def evaluation_table(before: Evaluation | None, after: Evaluation | None = None, title: str | None = None) -> Table:
    """What a policy can do: one column, or before, after, and the change prompt by prompt.

    Raises:
        ValueError: neither is given.
    """
    sides = [side for side in (before, after) if side is not None]
    if not sides:
        raise ValueError("a table needs at least one evaluation")
    table = _table(title)
    table.add_column("")
    for name in ["value"] if len(sides) == 1 else ["before", "after", "change"]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for side in sides for name in side.metrics):
        row = [_plain(name), *(_number(side.metrics.get(name)) for side in sides)]
        if len(sides) == 2:
            row.append(_difference(change(sides[0], sides[1], name)))
        table.add_row(*row)
    brackets = ", [95% interval]" if len(sides) == 2 else ""
    last = sides[-1]
    sizes = _sizes(last) if last.samples else counted(last.prompts, "comparison")
    table.caption = f"{sizes}; ± half of a 95% interval{brackets}"
    return table


def demo_table(arms: Sequence[Arm], title: str | None = None) -> Table:
    """Policies side by side, one row for each."""
    table = _table(title)
    table.add_column("")
    names = table_names(arms)
    for name in names:
        table.add_column(name.replace("distinct_answers", "answers"), justify="right", no_wrap=True)
    timed = any(arm.seconds is not None for arm in arms)
    if timed:
        table.add_column("time", justify="right", no_wrap=True)
    for arm, values in zip(arms, table_values(arms), strict=True):
        row = [
            _plain(arm.label),
            *(_number(value, name.startswith("pass@")) for name, value in zip(names, values, strict=True)),
        ]
        if timed:
            row.append(_plain("" if arm.seconds is None else f"{arm.seconds:.0f} s"))
        table.add_row(*row)
    if arms:
        sizes = arms[0].evaluation
        table.caption = f"{_sizes(sizes, 'held-out ')}; ± half of a 95% interval"
    return table


def findings_text(findings: Sequence[Finding]) -> Text:
    """A diagnosis, one finding a line."""
    from rich.text import Text

    lines = Text()
    for finding in findings:
        lines.append(f"{finding.level:<8} ", style=_STYLES[finding.level])
        lines.append(f"{finding.sentence}\n")
    return lines


def _table(title: str | None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _sizes(evaluation: Evaluation, which: str = "") -> str:
    return f"{counted(evaluation.prompts, f'{which}prompt')} x {counted(evaluation.samples, 'sample')}"


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)


def _number(interval: Interval | None, uncertain: bool = True) -> Text:
    """Value, and half of its interval where that is wanted."""
    from rich.text import Text

    if interval is None or interval.value != interval.value:
        return Text("-", style="dim")
    text = Text(_digits(interval.value), style="bold")
    if uncertain and interval.known:
        text.append(f" ±{_digits((interval.high - interval.low) / 2).removeprefix('0')}", style="dim not bold")
    return text


def _difference(interval: Interval | None) -> Text:
    """Difference and interval; bold where it is more than chance."""
    from rich.text import Text

    if interval is None or interval.value != interval.value:
        return Text("-", style="dim")
    sure = interval.known and (interval.low > 0 or interval.high < 0)
    text = Text(_digits(interval.value, "+"), style="bold" if sure else "dim")
    if interval.known:
        text.append(f" [{_digits(interval.low, '+')}, {_digits(interval.high, '+')}]", style="dim not bold")
    return text


def _digits(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 1 else f"{value:{sign}.2f}"
