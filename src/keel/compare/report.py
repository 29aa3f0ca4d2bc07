"""The comparison as a page: the finding in words, the numbers, and what they look like."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keel
from keel.compare.analysis import direction, largest_pass
from keel.compare.courses import Against, learning_curves, trajectory, ways
from keel.compare.figures import forest, frontier, improvement, looks, pass_curves, profiles
from keel.compare.outcomes import Comparison
from keel.compare.results import BETTER, NO_DIFFERENCE, SEEN, WORSE, Analysis, Difference
from keel.compare.sentences import (
    amount,
    brief,
    chance,
    digits,
    duration,
    findings,
    label,
    ranged,
    remarks,
    sign,
    unfinished,
)
from keel.compare.statistics import MOST_SEEDS
from keel.evaluate.intervals import Interval
from keel.report.figures import Figure
from keel.report.page import document, figures, prose, table, text, write

LISTED = 12  # settings that are shown without being asked for
_LEVELS = {BETTER: "good", WORSE: "problem"}
_AGAINST: dict[Against, str] = {"steps": "steps", "tokens": "tokens", "seconds": "time"}
_NEEDED = {"one seed": "unknown", "no difference": "–", "prompts": "more prompts", "many": f"> {MOST_SEEDS}"}
Settings = Mapping[str, Mapping[str, Any]]


def write_report(
    path: str | Path,
    comparison: Comparison,
    analysis: Analysis,
    command: str | None = None,
    compositions: Settings | None = None,
) -> Path:
    """Write the page as one HTML file that asks nothing of any server.

    Args:
        path: the file.
        comparison: with its outcomes.
        analysis: its statistics.
        command: what makes it again.
        compositions: the resolved configuration of each arm, nested, of which what differs is shown.

    Raises:
        UserError: the file cannot be written.
    """
    return write(path, page(comparison, analysis, command, compositions))


def page(
    comparison: Comparison, analysis: Analysis, command: str | None = None, compositions: Settings | None = None
) -> str:
    """The page as HTML."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return document(
        f"{comparison.name} – Keel",
        [
            head(comparison, analysis, command),
            *sections(comparison, analysis, compositions),
            f"<footer>Written by Keel {text(keel.__version__)}, {written}.</footer>",
        ],
    )


def head(comparison: Comparison, analysis: Analysis, command: str | None = None) -> str:
    """Title and facts."""
    cells = [o for o in comparison.outcomes if o.status == "finished"]
    seconds = sum(cell.seconds for cell in cells)
    facts = {
        "arms": len(comparison.arms),
        "seeds": len(comparison.seeds),
        "budget of each": comparison.budget,
        "task": comparison.task,
        "model": comparison.model,
        "cells": f"{len(cells)} of {len(comparison.arms) * len(comparison.seeds)} finished",
        "training in all": duration(seconds),
        "Keel": keel.__version__,
    }
    if comparison.created:
        facts["began"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(comparison.created))
    items = "".join(f"<li>{name} <b>{text(value)}</b></li>" for name, value in facts.items() if value != "")
    again = f'<p class="command">Made by <code>{text(command)}</code></p>' if command else ""
    names = " against ".join([", ".join(analysis.arms[1:]) or "nothing", analysis.baseline])
    return (
        f'<header>\n<h1>{text(comparison.name)}</h1>\n<p class="muted">{text(names)}</p>\n'
        f'<ul class="facts">{items}</ul>\n{again}</header>'
    )


def sections(comparison: Comparison, analysis: Analysis, compositions: Settings | None = None) -> list[str]:
    """All that stands below the title, as HTML: the finding, tables, figures, failures, settings."""
    parts = ["<h2>What was found</h2>", findings_list(analysis)]
    if analysis.metrics:
        parts += [main_table(analysis), *_differences(analysis)]
        parts += _drawn("Abilities on held-out prompts", _abilities(comparison, analysis), "ability")
        parts += _training(comparison)
        parts.append(spent_table(analysis))
        parts += _profiles(comparison, analysis)
        parts += ["<h2>All differences</h2>", all_differences(analysis)]
    parts += [_cells(analysis), _remarks(comparison, analysis), _settings(comparison, compositions)]
    return [part for part in parts if part]


def findings_list(analysis: Analysis) -> str:
    """The finding in words, one entry a sentence; what failed is marked as a warning."""
    first = {d.arm: d for d in analysis.differences if d.metric in analysis.metrics[:1]}
    verdicts = [d.verdict for d in _in_order(first.values())]
    open_ends = unfinished(analysis)
    items = []
    for place, sentence in enumerate(findings(analysis)):
        verdict = verdicts[place] if place < len(verdicts) else ""
        level = "warning" if sentence in open_ends else _LEVELS.get(verdict, "note")
        missing = "Missing" if level == "warning" else "Also"
        word = missing if not verdict else verdict.capitalize() if verdict in SEEN else "Open"
        items.append(f'<li class="{level}"><span class="level">{word}</span><span>{text(_minus(sentence))}</span></li>')
    return '<ul class="findings">\n' + "\n".join(items) + "\n</ul>"


def _in_order(found: Any) -> list[Difference]:
    """As `findings` tells them."""
    told = sorted((d for d in found if d.told), key=lambda d: -d.mean.value)
    return [
        *told,
        *(d for d in found if d.verdict == NO_DIFFERENCE),
        *(d for d in found if not d.told and d.verdict != NO_DIFFERENCE),
    ]


def main_table(analysis: Analysis) -> str:
    """A row for each arm: what decides with its difference and verdict, then the other metrics."""
    metric, others = analysis.metrics[0], analysis.metrics[1:]
    shown = [metric, *others]
    top = ["arm", "seeds", label(metric), f"to {analysis.baseline}", *map(label, others)]
    rows = []
    if any(name in analysis.before for name in shown):
        before = [_cell(analysis.before.get(name)) for name in shown]
        rows.append(['<span class="muted">before training</span>', "", before[0], "", *before[1:]])
    for arm, look in looks(analysis.arms).items():
        first, difference = analysis.estimate(arm, metric), analysis.difference(arm, metric)
        row = [_key(look.colour) + text(arm), str(len(first.seeds)), _cell(first.mean)]
        row.append("baseline" if difference is None else _cell(difference.mean, True) + _verdict(difference))
        rows.append([*row, *(_with_sign(analysis, arm, name) for name in others)])
    caption = (
        "Means over seeds and prompts; below each number its 95% interval. ▲ and ▼: higher or lower than "
        f"{analysis.baseline} after the correction for the number of comparisons."
    )
    return table([text(name) for name in top], rows, caption)


def spent_table(analysis: Analysis) -> str:
    """What training spent, mean over the seeds of an arm."""
    rows = [
        [_key(look.colour) + text(arm), amount(spent.tokens), duration(spent.seconds), amount(spent.steps)]
        for arm, look in looks(analysis.arms).items()
        if math.isfinite((spent := analysis.spent[arm]).steps)
    ]
    caption = "What training spent, mean over seeds."
    return "<h2>Spent</h2>\n" + table(["arm", "tokens", "time", "steps"], rows, caption) if rows else ""


def all_differences(analysis: Analysis) -> str:
    """Every arm and metric against the baseline, with everything that is known."""
    top = ["arm", "difference", "IQM difference", "P(more)", "p", "verdict", "seeds needed"]
    rows = [
        [
            f"{text(d.arm)}<br><small>{text(label(d.metric))}</small>",
            _cell(d.mean, True),
            _cell(d.iqm, True),
            _cell(d.improvement),
            f"{_together(chance(d.p))} <small>({_together(chance(d.adjusted))})</small>",
            _verdict(d),
            text(_NEEDED.get(d.needed.reason, d.needed.seeds)),
        ]
        for d in analysis.differences
    ]
    caption = (
        "Paired by seed and prompt. IQM: mean of the middle half of all (seed, prompt) units. P(more): how often a run "
        f"of the arm scores above one of {analysis.baseline} on a prompt. p: of the difference of means, in "
        "brackets corrected after Holm. Seeds needed: to see a difference of this size in 4 of 5 comparisons, at 5%."
    )
    return table(top, rows, caption) if rows else ""


def views(name: str, shown: Mapping[str, str]) -> str:
    """Groups of figures of which one is shown, chosen by its name; a single one stands without a chooser."""
    if len(shown) < 2:
        return "".join(shown.values())
    options = "".join(f'<option value="{place}">{text(key)}</option>' for place, key in enumerate(shown))
    groups = "\n".join(
        f'<div data-view="{place}"{" hidden" if place else ""}>{content}</div>'
        for place, content in enumerate(shown.values())
    )
    choice = f'<label>{text(name)} <select autocomplete="off">{options}</select></label>'
    return f'<div class="views">\n{choice}\n{groups}\n</div>'


# -- the sections ----------------------------------------------------------------------------------------------------


def _differences(analysis: Analysis) -> list[str]:
    drawn = [forest(analysis, metric) for metric in analysis.metrics]
    drawn.append(improvement(analysis, analysis.metrics[0]))
    return _drawn(f"Against {analysis.baseline}", drawn, "difference")


def _abilities(comparison: Comparison, analysis: Analysis) -> list[Figure | None]:
    rewarded = [metric for metric in ("reward", *analysis.metrics[:1]) if metric in analysis.metrics]
    return [pass_curves(comparison), frontier(comparison, rewarded[0]) if direction(rewarded[0]) else None]


def _training(comparison: Comparison) -> list[str]:
    shown = {
        _AGAINST[way]: figures(drawn, f"course-{way}")
        for way in ways(comparison)
        if (drawn := learning_curves(comparison, way))
    }
    path = figures([trajectory(comparison)], "trajectory")
    if not shown and not path:
        return []
    return ["<h2>Training</h2>", views("Curves against", shown), path]


def _profiles(comparison: Comparison, analysis: Analysis) -> list[str]:
    many = largest_pass(comparison)
    metrics = [m for m in dict.fromkeys((analysis.metrics[0], many, *analysis.metrics)) if m]
    shown = {label(metric): figures([profiles(comparison, metric)], f"profile-{i}") for i, metric in enumerate(metrics)}
    shown = {name: content for name, content in shown.items() if content}
    return ["<h2>Performance profiles</h2>", views("Metric", shown)] if shown else []


def _drawn(title: str, drawn: Sequence[Figure | None], prefix: str) -> list[str]:
    shown = figures(drawn, prefix)
    return [f"<h2>{text(title)}</h2>", shown] if shown else []


def _cells(analysis: Analysis) -> str:
    rows = [
        [text(c.arm), str(c.seed), text(c.run), "failed", text(c.error or "no reason known")] for c in analysis.failed
    ]
    rows += [[text(c.arm), str(c.seed), text(c.run), "not run", ""] for c in analysis.missing]
    if not rows:
        return ""
    caption = "These cells are in no average: the arm has fewer seeds, and its intervals say so."
    return "<h2>Cells without numbers</h2>\n" + table(["arm", "seed", "run", "state", "reason"], rows, caption)


def _remarks(comparison: Comparison, analysis: Analysis) -> str:
    said = remarks(comparison, analysis)
    if any(len(e.seeds) > 1 for e in analysis.estimates):
        said.append(
            "Intervals are 95%: Student's t over the seeds, widened by what the prompts add; those of means hold the "
            "true value in at least 19 of 20 repetitions, with 3 seeds too. Differences are paired: the same seeds, "
            "the same prompts."
        )
    if not said:
        return ""
    return "<h2>Notes</h2>\n<ul>" + "".join(f"<li>{prose(sentence)}</li>" for sentence in said) + "</ul>"


def _settings(comparison: Comparison, compositions: Settings | None) -> str:
    parts = []
    given = {arm.name: dict(arm.settings) for arm in comparison.arms}
    rows = differing(compositions) if compositions else differing(given)
    if rows:
        names = [name for name in given if not compositions or name in compositions]
        top = ["setting", *map(text, names)]
        body = [
            [f"<code>{text(path)}</code>", *(text(row.get(name, "–")) for name in names)] for path, row in rows.items()
        ]
        shown = table(top, body, "Settings in which the arms differ.")
        many = (
            f'<details class="card"><summary>{len(rows)} settings in which the arms differ</summary>{shown}</details>'
        )
        parts.append(many if len(rows) > LISTED else shown)
    if comparison.settings:
        body = [[f"<code>{text(path)}</code>", text(value)] for path, value in comparison.settings]
        parts.append(table(["setting", "all arms"], body, "Settings that were given to all arms."))
    return "<h2>Settings</h2>\n" + "\n".join(parts) if parts else ""


def differing(compositions: Settings) -> dict[str, dict[str, str]]:
    """The paths at which nested settings are not the same in all arms, with the value of each arm that has one.

    >>> differing({"a": {"loss": {"beta": 0.1, "clip": 1}}, "b": {"loss": {"beta": 0.2, "clip": 1}}})
    {'loss.beta': {'a': '0.1', 'b': '0.2'}}
    """
    flat = {name: _flat(settings) for name, settings in compositions.items()}
    paths = dict.fromkeys(path for settings in flat.values() for path in settings)
    rows = {path: {name: settings[path] for name, settings in flat.items() if path in settings} for path in paths}
    return {path: row for path, row in rows.items() if len(row) < len(flat) or len(set(row.values())) > 1}


def _flat(settings: Any, path: str = "") -> dict[str, str]:
    if isinstance(settings, Mapping) and (settings or not path):
        found: dict[str, str] = {}
        for key, value in settings.items():
            found |= _flat(value, f"{path}.{key}" if path else str(key))
        return found
    return {path: f"{settings:g}" if isinstance(settings, float) else str(settings)}


# -- cells of tables -------------------------------------------------------------------------------------------------


def _cell(interval: Interval | None, signed: bool = False) -> str:
    if interval is None or not math.isfinite(interval.value):
        return "–"
    value, low, high = digits(interval, signed)
    below = f" <small>({low} to {high})</small>" if interval.known and interval.low < interval.high else ""
    return _minus(value + below)


def _with_sign(analysis: Analysis, arm: str, metric: str) -> str:
    shown, difference = _cell(analysis.estimate(arm, metric).mean), analysis.difference(arm, metric)
    if difference is None or not difference.told:
        return shown
    title = f"{difference.verdict}: {ranged(difference.mean, signed=True)}"
    return f'<span title="{text(title)}">{sign(difference.verdict)}</span> {shown}'


def _verdict(difference: Difference) -> str:
    said = text(brief(difference.verdict))
    if not difference.told:
        return f"<small>{said}</small>"
    return f'<span class="verdict {_LEVELS.get(difference.verdict, "note")}">{said}</span>'


def _together(said: str) -> str:
    return text(said.replace(" ", "\u00a0"))


def _key(colour: str) -> str:
    return f'<span class="key" style="background: var(--{colour})"></span>'


def _minus(said: str) -> str:
    """Numbers as typesetters have them: with a true minus, and on one line with what they belong to."""
    said = re.sub(r"(?<![\w-])-(?=\d)", "−", said)
    return re.sub(r"p ([=<]) (?=\d)", "p\u00a0\\1\u00a0", said)
