"""The comparison in the terminal: tables of 80 columns, and the finding in words below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keel.compare.outcomes import Comparison
from keel.compare.results import BETTER, NO_DIFFERENCE, WORSE, Analysis, Difference
from keel.compare.sentences import amount, brief, duration, findings, label, number, ranged, remarks, sign
from keel.evaluate.intervals import Interval

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

ACROSS = 4  # metrics beside each other in 80 columns, with what was spent
_STYLES = {BETTER: "bold green", WORSE: "bold red", NO_DIFFERENCE: "dim"}


def terminal(comparison: Comparison, analysis: Analysis) -> Group:
    """All that a terminal shows of a comparison, for `rich.console.Console.print`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Table | Text] = []
    if analysis.metrics:
        parts += [deciding(analysis), Text()]
        rest = analysis.metrics[1:]
        for start in range(0, max(1, len(rest)), ACROSS):
            parts += [describing(analysis, rest[start : start + ACROSS], spent=start + ACROSS >= len(rest)), Text()]
    parts += [Text(f"- {sentence}") for sentence in [*findings(analysis), *remarks(comparison, analysis)]]
    return Group(*parts)


def deciding(analysis: Analysis) -> Table:
    """The metric that decides: each arm, its difference to the baseline, and the verdict."""
    from rich.text import Text

    metric = analysis.metrics[0]
    table = _table()
    table.add_column("", overflow="fold", max_width=22)
    for name in ("seeds", label(metric), "to the baseline", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    if metric in analysis.before:
        table.add_row(Text("before training", style="dim"), "", _value(analysis.before[metric]), "", "")
    for arm in analysis.arms:
        found, difference = analysis.estimate(arm, metric), analysis.difference(arm, metric)
        apart = Text("baseline", style="dim") if difference is None else _apart(difference)
        table.add_row(Text(arm), str(len(found.seeds)), _value(found.mean), apart, _verdict(difference))
    table.caption = "± half of a 95% interval; ▲ better, ▼ worse, = none seen, ? untold"
    return table


def describing(analysis: Analysis, metrics: tuple[str, ...], spent: bool = True) -> Table:
    """Other metrics of each arm, and what training spent."""
    from rich.text import Text

    table = _table()
    table.add_column("", overflow="fold", max_width=22)
    for name in (*map(label, metrics), *(("tokens", "time", "steps") if spent else ())):
        table.add_column(name, justify="right", no_wrap=True)
    if any(metric in analysis.before for metric in metrics):
        numbers = [number(analysis.before[m].value) + "  " if m in analysis.before else "" for m in metrics]
        table.add_row(Text("before training", style="dim"), *numbers, *([""] * 3 * spent))
    for arm in analysis.arms:
        cells = [_marked(analysis, arm, metric) for metric in metrics]
        if spent:
            cost = analysis.spent[arm]
            cells += [Text(amount(cost.tokens)), Text(duration(cost.seconds)), Text(amount(cost.steps))]
        table.add_row(Text(arm), *cells)
    if metrics:
        table.caption = "▲ higher, ▼ lower than the baseline; no sign: no difference seen"
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, caption_justify="left")


def _value(interval: Interval) -> Text:
    from rich.text import Text

    text = Text(number(interval.value), style="bold")
    if interval.known:
        text.append(f" ±{number((interval.high - interval.low) / 2)}".replace("±0.", "±."), style="dim not bold")
    return text


def _apart(difference: Difference) -> Text:
    from rich.text import Text

    return Text(ranged(difference.mean, signed=True), style="bold" if difference.told else "dim")


def _verdict(difference: Difference | None) -> Text:
    from rich.text import Text

    if difference is None:
        return Text()
    return Text(brief(difference.verdict), style=_STYLES.get(difference.verdict, ""))


def _marked(analysis: Analysis, arm: str, metric: str) -> Text:
    from rich.text import Text

    difference = analysis.difference(arm, metric)
    mark = sign(difference.verdict) if difference is not None and difference.told else " "
    return Text(f"{number(analysis.estimate(arm, metric).mean.value)} {mark}", style="bold" if mark != " " else "")
