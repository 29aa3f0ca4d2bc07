"""Figures of what arms can do after training: differences, pass@k, rewards against KL, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.compare.analysis import mean_of, table_of
from keel.compare.outcomes import Comparison
from keel.compare.results import Analysis, Difference
from keel.compare.sentences import chance, label, number, ranged
from keel.compare.statistics import profile
from keel.evaluate.intervals import Interval, mean_interval
from keel.report.arms import Look
from keel.report.figures import Figure, error_bars
from keel.report.style import ARMS, layout

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "hexagon", "x", "pentagon")
BEFORE = Look("ink", "dot", "circle-open")
THRESHOLDS = 41  # of a performance profile
FEW = 5  # bands that can lie over each other and still be told apart
_LONGEST = 26  # letters of an arm beside an axis


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Colour, dash and marker of each arm: grey for the baseline; no two alike in all three among 45."""
    first = {name: Look("base", "solid", SYMBOLS[0]) for name in arms[:1]}
    return first | {
        name: Look(ARMS[place % len(ARMS)], DASHES[(place + 1) % len(DASHES)], SYMBOLS[(place + 1) % len(SYMBOLS)])
        for place, name in enumerate(arms[1:])
    }


def forest(analysis: Analysis, metric: str) -> Figure | None:
    """The paired difference of every arm to the baseline with its interval, one row each."""
    found = [d for d in analysis.differences if d.metric == metric and math.isfinite(d.mean.value)]
    said = [f"{d.arm} {ranged(d.mean, signed=True)}, {d.verdict}" for d in found]
    caption = f"Right of the line: more than {analysis.baseline}. Differences on the same seeds and prompts."
    ends = [0.0, *(end for d in found for end in (d.mean.value, d.mean.low, d.mean.high) if math.isfinite(end))]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    x = {"zeroline": True, "zerolinecolor": "@muted", "zerolinewidth": 1.5}
    x |= {"range": [min(ends) - room, max(ends) + room]}
    rows = [(d, d.mean, f"{d.verdict}, p {chance(d.adjusted)}") for d in found]
    return _rows(f"{label(metric)}, less {analysis.baseline}'s", caption, "; ".join(said), rows, analysis.arms, x)


def improvement(analysis: Analysis, metric: str) -> Figure | None:
    """P(arm > baseline) for a run on a prompt, with intervals: 0.5 where neither is ahead."""
    found = [d for d in analysis.differences if d.metric == metric and math.isfinite(d.improvement.value)]
    said = [f"{d.arm} {ranged(d.improvement)}" for d in found]
    caption = "How often a run of the arm has the higher score on a prompt; a tie counts half. Line: no difference."
    x = {"range": [0, 1], "tickformat": ".0%", "zeroline": False}
    rows = [(d, d.improvement, f"on {d.prompts} prompts") for d in found]
    title = f"{label(metric)}: probability of more than {analysis.baseline}"
    drawn = _rows(title, caption, "; ".join(said), rows, analysis.arms, x)
    if drawn is not None:
        line = {"type": "line", "x0": 0.5, "x1": 0.5, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        drawn.layout["shapes"] = [{**line, "line": {"color": "@muted", "width": 1.5}}]
    return drawn


def _rows(
    title: str,
    caption: str,
    description: str,
    rows: Sequence[tuple[Difference, Interval, str]],
    arms: Sequence[str],
    x: Mapping[str, Any],
) -> Figure | None:
    if not rows:
        return None
    seen, data, signed = looks(arms), [], x["zeroline"]
    for place, (difference, interval, remark) in enumerate(rows):
        look = seen[difference.arm]
        data.append(
            {
                "x": [interval.value],
                "y": [place],
                "error_x": error_bars([interval], look),
                "type": "scatter",
                "mode": "markers",
                "name": difference.arm,
                "marker": _marker(look, 11),
                "hovertemplate": f"{ranged(interval, signed)}<br>{remark}<extra>{difference.arm}</extra>",
            }
        )
    names = [_short(difference.arm) for difference, _, _ in rows]
    y = {"tickvals": list(range(len(rows))), "ticktext": names, "range": [len(rows) - 0.4, -0.6]}
    height = 62 + 34 * len(rows)
    return Figure(title, caption, description, data, layout({"title": "", **x}, y, height=height))


def pass_curves(comparison: Comparison) -> Figure | None:
    """pass@k against k over seeds and prompts, with bands, and before training."""
    before = {
        metric: mean_interval(np.asarray(column, dtype=float))
        for metric, column in next((o.before for o in comparison.outcomes if o.before), {}).items()
    }
    sides = [("before training", BEFORE, before)] if _tries(before) else []
    for arm, look in looks([arm.name for arm in comparison.arms]).items():
        metrics = {m for o in comparison.of(arm) for m in o.values if m.startswith("pass@")}
        sides.append((arm, look, {m: mean_of(table_of(comparison.scores(arm, m)), m) for m in metrics}))
    data: list[dict[str, Any]] = []
    said = []
    for name, look, found in sides:
        ks = [k for k in _tries(found) if math.isfinite(found[f"pass@{k}"].value)]
        if len(ks) < 2:
            continue
        values = [found[f"pass@{k}"] for k in ks]
        if all(v.known for v in values) and look is not BEFORE:
            data.append(band(ks, [v.low for v in values], [v.high for v in values], look, name, len(sides)))
        ends = [f" [{number(v.low)}, {number(v.high)}]" if v.known else "" for v in values]
        data.append(
            {
                **_line(name, look),
                "x": ks,
                "y": [v.value for v in values],
                "text": ends,
                "mode": "lines+markers",
                "marker": _marker(look),
                "hovertemplate": f"pass@%{{x}}: %{{y:.3f}}%{{text}}<extra>{name}</extra>",
            }
        )
        said.append(f"{name}: {values[0].value:.0%} with {ks[0]} try, {values[-1].value:.0%} with {ks[-1]}")
    if not data:
        return None
    ticks = sorted({k for trace in data for k in trace["x"]})
    x = {"title": "k, tries", "type": "log", "tickvals": ticks, "ticktext": [str(k) for k in ticks]}
    y = {"title": "pass@k", "tickformat": ".0%"}
    caption = "Share of prompts with at least one correct answer among k; 95% bands over seeds and prompts."
    return Figure("Solved within k tries", caption, "; ".join(said), data, tall(x, y, len(sides)))


def _tries(metrics: Mapping[str, Any]) -> list[int]:
    return sorted(int(name.removeprefix("pass@")) for name in metrics if name.startswith("pass@"))


def frontier(comparison: Comparison, reward: str) -> Figure | None:
    """Reward against the KL to the reference on held-out prompts: a small mark for each seed, a large one for all."""
    data: list[dict[str, Any]] = []
    said = []
    for arm, look in looks([arm.name for arm in comparison.arms]).items():
        mine, far = comparison.scores(arm, reward), comparison.scores(arm, "kl")
        common = sorted(set(mine) & set(far))
        across, up = (mean_of(table_of(found), name) for found, name in ((far, "kl"), (mine, reward)))
        if not common or not (math.isfinite(across.value) and math.isfinite(up.value)):
            continue
        shared = {"type": "scatter", "mode": "markers", "name": arm, "legendgroup": arm}
        data.append(
            {
                **shared,
                "x": [_mean(far[seed]) for seed in common],
                "y": [_mean(mine[seed]) for seed in common],
                "text": [f"seed {seed}" for seed in common],
                "marker": {**_marker(look, 6), "opacity": 0.55},
                "hovertemplate": f"%{{text}}: KL %{{x:.3~g}}, %{{y:.3f}}<extra>{arm}</extra>",
                "showlegend": False,
            }
        )
        data.append(
            {
                **shared,
                "x": [across.value],
                "y": [up.value],
                "error_x": error_bars([across], look),
                "error_y": error_bars([up], look),
                "marker": _marker(look, 13),
                "hovertemplate": f"KL {ranged(across)}<br>{label(reward)} {ranged(up)}<extra>{arm}</extra>",
            }
        )
        said.append(f"{arm}: {label(reward)} {ranged(up)} at KL {ranged(across)}")
    if not data:
        return None
    base = next((o.before for o in comparison.outcomes if reward in o.before), None)
    if base is not None:
        start = _mean(base[reward])
        far_off = _mean(base["kl"]) if "kl" in base else 0.0
        data.append(
            {
                "x": [far_off],
                "y": [start],
                "type": "scatter",
                "mode": "markers",
                "name": "before training",
                "marker": _marker(BEFORE, 11),
                "hovertemplate": "%{y:.3f}<extra>before training</extra>",
            }
        )
        said.append(f"before training: {label(reward)} {number(start)}")
    x = {"title": "KL to the reference, nats a token", "showgrid": True}
    caption = "Up: more reward. Left: less distance for it. Small marks are seeds, large ones means; 95% intervals."
    figure = tall(x, {"title": label(reward)}, len(said))
    return Figure("Reward against KL", caption, "; ".join(said), data, figure)


def profiles(comparison: Comparison, metric: str) -> Figure | None:
    """Share of (seed, prompt) units that score above each threshold, with 95% bands."""
    tables = {arm.name: table_of(comparison.scores(arm.name, metric)) for arm in comparison.arms}
    known = {name: table for name, table in tables.items() if table.size}
    if not known:
        return None
    low, high = min(float(t.min()) for t in known.values()), max(float(t.max()) for t in known.values())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if low == high:
        return None
    thresholds = np.linspace(low, high, THRESHOLDS)
    middle = thresholds[THRESHOLDS // 2]
    data: list[dict[str, Any]] = []
    said = []
    for name, look in looks(list(tables)).items():
        if name not in known:
            continue
        shares, half = profile(known[name], thresholds)
        x, ends = _rounded(thresholds), (np.clip(shares - half, 0, 1), np.clip(shares + half, 0, 1))
        data.append(band(x, _rounded(ends[0]), _rounded(ends[1]), look, name, len(known)))
        hover = f"above %{{x:.3~g}}: %{{y:.0%}}<extra>{name}</extra>"
        data.append({**_line(name, look), "x": x, "y": _rounded(shares), "mode": "lines", "hovertemplate": hover})
        said.append(f"{name}: {shares[THRESHOLDS // 2]:.0%} above {number(middle)}")
    x_axis, y_axis = {"title": f"{label(metric)} of a prompt"}, {"title": "share above", "tickformat": ".0%"}
    caption = "Share of runs and prompts above each value: a higher line is ahead. 95% bands, point by point."
    figure = tall(x_axis, y_axis, len(said))
    return Figure(f"Performance profile, {label(metric)}", caption, "; ".join(said), data, figure)


# -- what figures are made of ----------------------------------------------------------------------------------------


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], look: Look, name: str, of: int = 1
) -> dict[str, Any]:
    """An area between two lines; the more arms there are (`of`), the fainter."""
    return {
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "fillcolor": f"@{look.colour}/{0.12 if of <= FEW else 0.06}",
        "line": {"width": 0},
        "name": name,
        "legendgroup": name,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def tall(x: dict[str, Any], y: dict[str, Any], entries: int) -> dict[str, Any]:
    """A layout with room for the legend: about three names a row on a phone."""
    rows = math.ceil(entries / 3)
    plotted, below = 320, 62 + 21 * rows
    shown = layout(x, y, showlegend=True, height=plotted + below)
    shown["legend"] = {**shown["legend"], "y": -62 / plotted}
    shown["margin"] = {**shown["margin"], "b": below}
    return shown


def _line(name: str, look: Look) -> dict[str, Any]:
    style = {"color": f"@{look.colour}", "width": 2.5, "dash": look.dash}
    return {"type": "scatter", "name": name, "legendgroup": name, "line": style}


def _marker(look: Look, size: int = 8) -> dict[str, Any]:
    edge = {"color": f"@{look.colour}" if look.marker.endswith("-open") else "@surface", "width": 1}
    return {"color": f"@{look.colour}", "symbol": look.marker, "size": size, "line": edge}


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _mean(column: np.ndarray) -> float:
    """Over prompts that have a number; None where there is none would break a figure, NaN does not reach one."""
    column = np.asarray(column, dtype=float)
    return float(column[np.isfinite(column)].mean())
