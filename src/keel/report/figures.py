"""Figures as plain data for plotly: curves of a run, pass@k against k, one ability against another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from keel.evaluate.intervals import Interval
from keel.report.arms import Arm, Look, largest_common, looks
from keel.report.style import MARKERS, SERIES, layout

POINTS = 600  # points of a curve at most; longer ones are averaged in blocks
SMOOTH = 30  # the thick line averages over one part in so many


@dataclass(frozen=True)
class Figure:
    """A figure that a page can show.

    Args:
        title: what is drawn, a few words.
        caption: what to look at, one line.
        description: what is drawn, with its numbers, for those who do not see it.
        data, layout: for plotly; colours are names, see `style`.
    """

    title: str
    caption: str
    description: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What plotly wants."""
        return {"data": self.data, "layout": self.layout}


def curves(
    title: str,
    metrics: Mapping[str, Sequence[tuple[int, float]]],
    names: Mapping[str, str],
    *,
    unit: str = "",
    percent: bool = False,
    floor: float | None = None,
) -> Figure | None:
    """Metrics over the steps of a run: every value thin, a running mean thick; None if none of them was logged.

    Args:
        names: label by name of metric; the first few that exist are drawn.
        unit: of the vertical axis.
        percent: show shares as percentages.
        floor: lowest end of the vertical axis.
    """
    drawn = [(name, label) for name, label in names.items() if metrics.get(name)][: len(SERIES)]
    if not drawn:
        return None
    data: list[dict[str, Any]] = []
    said = []
    for (name, label), colour in zip(drawn, SERIES, strict=False):
        curve = thin(metrics[name])
        smooth = running_mean([value for _, value in curve])
        steps = [step for step, _ in curve]
        form = ".2%" if percent else ".4~g"
        line = {"x": steps, "type": "scatter", "mode": "lines", "name": label, "legendgroup": label, "meta": name}
        hover = f"step %{{x}}: %{{y:{form}}}<extra>{label}</extra>"
        if len(curve) > SMOOTH:
            faint = {"color": f"@{colour}/0.3", "width": 1}
            data.append(
                {**line, "y": _finite(v for _, v in curve), "line": faint, "hoverinfo": "skip", "showlegend": False}
            )
        data.append(
            {**line, "y": _finite(smooth), "line": {"color": f"@{colour}", "width": 2.5}, "hovertemplate": hover}
        )
        said.append(_from_to(label, [value for _, value in curve], percent))
    y: dict[str, Any] = {"title": unit, "tickformat": ".2~%" if percent else "", "exponentformat": "e"}
    if floor is not None:
        highest = max((v for trace in data for v in trace["y"] if v is not None), default=floor)
        room = 1.06 * (highest - floor) or (0.01 if percent else 1.0)
        y |= {"range": [floor, floor + room]}
    told = "; ".join(said)
    return Figure(title, told, told, data, layout({"title": "step"}, y, showlegend=len(drawn) > 1, height=280))


def pass_curves(arms: Sequence[Arm]) -> Figure | None:
    """pass@k against k, with 95% bands."""
    data: list[dict[str, Any]] = []
    for arm, look in zip(arms, looks(arms), strict=True):
        points = arm.evaluation.pass_curve()
        if len(points) < 2:
            continue
        ks = [k for k, _ in points]
        values = [interval for _, interval in points]
        known = all(interval.known for interval in values)
        shared = {"type": "scatter", "name": arm.label, "legendgroup": arm.name}
        if known:
            data.append(
                {
                    **shared,
                    "x": ks + ks[::-1],
                    "y": [v.high for v in values] + [v.low for v in values][::-1],
                    "fill": "toself",
                    "fillcolor": f"@{look.colour}/0.13",
                    "line": {"width": 0},
                    "mode": "lines",
                    "hoverinfo": "skip",
                    "showlegend": False,
                }
            )
        data.append(
            {
                **shared,
                "x": ks,
                "y": [v.value for v in values],
                "customdata": [[v.low, v.high] for v in values] if known else None,
                "mode": "lines+markers",
                "line": {"color": f"@{look.colour}", "width": 2.5, "dash": look.dash},
                "marker": _marker(look),
                "hovertemplate": f"pass@%{{x}}: %{{y:.3f}}{_BETWEEN if known else ''}<extra>{arm.label}</extra>",
            }
        )
    if not data:
        return None
    ticks = sorted({k for trace in data for k in trace["x"]})
    x = {"title": "k, tries", "type": "log", "tickvals": ticks, "ticktext": [str(k) for k in ticks]}
    return Figure(
        "Solved within k tries",
        "Share of prompts with at least one correct answer among k; 95% bands.",
        " ".join(_pass_sentence(arm) for arm in arms if len(arm.evaluation.pass_curve()) > 1),
        data,
        layout(x, {"title": "pass@k", "tickformat": ".0%"}, showlegend=True, height=420),
    )


def frontier(arms: Sequence[Arm]) -> Figure | None:
    """pass@1 against pass@k of the largest k, with 95% intervals both ways; arms of one regulariser are joined."""
    many = largest_common(arms, "pass")
    if many is None or many == "pass@1":
        return None
    data: list[dict[str, Any]] = []
    joined = sorted((arm for arm in arms if arm.beta is not None), key=lambda arm: arm.beta or 0.0)
    if len(joined) > 2:
        data.append(
            {
                "x": [arm.evaluation.metrics["pass@1"].value for arm in joined],
                "y": [arm.evaluation.metrics[many].value for arm in joined],
                "type": "scatter",
                "mode": "lines",
                "line": {"color": "@line", "width": 1.5, "dash": "dot"},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    for arm, look in zip(arms, looks(arms), strict=True):
        one, best = arm.evaluation.metrics["pass@1"], arm.evaluation.metrics[many]
        data.append(
            {
                "x": [one.value],
                "y": [best.value],
                "error_x": _error(one, look),
                "error_y": _error(best, look),
                "type": "scatter",
                "mode": "markers",
                "name": arm.label,
                "marker": _marker(look, 12),
                "hovertemplate": f"pass@1 {one}<br>{many} {best}<extra>{arm.label}</extra>",
            }
        )
    axis = {"tickformat": ".0%"}
    return Figure(
        f"One try against {many.split('@')[1]}",
        "Further right: better with one try. Further up: more prompts within reach. 95% intervals.",
        " ".join(
            f"{arm.label}: pass@1 {arm.evaluation.metrics['pass@1']}, {many} {arm.evaluation.metrics[many]}."
            for arm in arms
        ),
        data,
        layout({"title": "pass@1", "showgrid": True, **axis}, {"title": many, **axis}, showlegend=True, height=420),
    )


def evaluations_over_steps(points: Sequence[tuple[int, Mapping[str, Interval]]], names: Sequence[str]) -> Figure | None:
    """Held-out metrics of several evaluations of one run against the step, with 95% intervals."""
    data: list[dict[str, Any]] = []
    said = []
    for name, colour, marker in zip(names, SERIES, MARKERS, strict=False):
        found = [(step, metrics[name]) for step, metrics in points if name in metrics]
        if len(found) < 2:
            continue
        look = Look(colour, "solid", marker)
        data.append(
            {
                "x": [step for step, _ in found],
                "y": [interval.value for _, interval in found],
                "error_y": error_bars([interval for _, interval in found], look),
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "line": {"color": f"@{colour}", "width": 2.5},
                "marker": _marker(look),
                "hovertemplate": f"step %{{x}}: %{{y:.3f}}<extra>{name}</extra>",
            }
        )
        said.append(f"{name} {found[0][1]} at step {found[0][0]}, {found[-1][1]} at step {found[-1][0]}")
    if not data:
        return None
    told = "; ".join(said)
    caption = "Evaluations during training; 95% intervals."
    y = {"tickformat": ".0%"}
    return Figure("Held-out success", caption, told, data, layout({"title": "step"}, y, showlegend=True, height=420))


def thin(curve: Sequence[tuple[int, float]], points: int = POINTS) -> list[tuple[int, float]]:
    """At most `points` points, each the mean of a block of neighbours, at the block's last step.

    >>> thin([(1, 0.0), (2, 1.0), (3, 4.0), (4, 6.0)], points=2)
    [(2, 0.5), (4, 5.0)]
    """
    size = math.ceil(len(curve) / points)
    if size <= 1:
        return list(curve)
    blocks = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(block[-1][0], _mean([value for _, value in block])) for block in blocks]


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of one part in `SMOOTH` of the course; NaN is skipped, a short course stays."""
    half = len(values) // SMOOTH // 2
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


_BETWEEN = " [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _finite(values) -> list[float | None]:
    """JSON knows neither NaN nor infinity: a gap."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _from_to(label: str, values: Sequence[float], percent: bool) -> str:
    """The means of the first and of the last tenth."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return f"{label}: no finite value"
    tenth = max(1, len(known) // 10)
    ends = fmean(known[:tenth]), fmean(known[-tenth:])
    first, last = (f"{100 * value:.3g}%" if percent else f"{value:.3g}" for value in ends)
    return f"{label} {first} → {last}"


def _pass_sentence(arm: Arm) -> str:
    points = arm.evaluation.pass_curve()
    first, last = points[0], points[-1]
    return f"{arm.label}: {first[1].value:.0%} with {_tries(first[0])}, {last[1].value:.0%} with {_tries(last[0])}."


def _tries(k: int) -> str:
    return "one try" if k == 1 else f"{k} tries"


def _marker(look: Look, size: int = 8) -> dict[str, Any]:
    return {"color": f"@{look.colour}", "symbol": look.marker, "size": size, "line": {"color": "@surface", "width": 1}}


def _error(interval: Interval, look: Look) -> dict[str, Any]:
    return error_bars([interval], look)


def error_bars(intervals: Sequence[Interval], look: Look) -> dict[str, Any]:
    """The ends of intervals, for plotly; nothing to be seen where one of them is not known."""
    if not all(interval.known for interval in intervals):
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.value for interval in intervals],
        "arrayminus": [interval.value - interval.low for interval in intervals],
        "color": f"@{look.colour}",
        "thickness": 1.5,
        "width": 4,
    }
