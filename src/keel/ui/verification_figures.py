"""Gradient errors as verification measured them, drawn: by recipe, and by where the KL stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log10
from typing import Any

from keel.report.figures import Figure
from keel.report.style import MARKERS, SERIES, layout
from keel.verify.measured import Measured, PlacementError, Row

EXACT = 1e-6  # an error below it is none
FLOOR = 1e-7  # where those are drawn
APART = 0.5  # factor between those of one kind and of the next, so that none hides another
NAMED = 24  # recipes up to which each is named on the axis

KINDS: Mapping[str, Callable[[Row], float | None]] = {
    "on-policy": lambda row: row.gradient_relative_error,
    "off-policy": lambda row: row.off_policy_relative_error,
    "in groups": lambda row: row.group_error,
}


def errors(rows: Sequence[Row]) -> Figure | None:
    """Relative error of every recipe on a logarithmic axis, the smallest first; None where none was measured."""
    shown = in_order(rows)
    if not shown:
        return None
    names = [row.label for row in shown]
    data, said = [], []
    for place, (kind, read) in enumerate(KINDS.items()):
        known = [(row.label, value) for row in shown if (value := read(row)) is not None]
        if not known:
            continue
        data.append(_dots(kind, [name for name, _ in known], [value for _, value in known], place))
        exact = sum(value < EXACT for _, value in known)
        largest = max(known, key=lambda item: item[1])
        said.append(f"{kind}: {exact} of {len(known)} exact, the largest {largest[1]:.2g} ({largest[0]})")
    highest = max(1.0, max(value for trace in data for value in trace["y"]))
    told = "; ".join(said)
    return Figure(
        "Error of the expected gradient",
        f"|c g − g*| / |g*| at the best step size c; {told}.",
        told,
        data,
        layout(_names(names), _log_axis(highest), showlegend=True, height=440, legend=_above()),
    )


def cosines(rows: Sequence[Row]) -> Figure | None:
    """Cosine of the angle between the expected update and the gradient of the objective, in the order of `errors`."""
    shown = [row for row in in_order(rows) if row.cosine is not None]
    if not shown:
        return None
    worst = min(shown, key=lambda row: row.cosine or 0.0)
    values = [row.cosine or 0.0 for row in shown]
    aligned = sum(value > 0.999 for value in values)
    lowest = f"{min(values):.2f}".replace("-", "−")
    told = f"{aligned} of {len(values)} above 0.999; lowest {lowest}, {worst.label}"
    trace = _dots("on-policy", [row.label for row in shown], values)
    trace |= {"y": values, "hovertemplate": "%{x}: %{y:.4f}<extra></extra>"}
    y = {"title": "cosine", "range": [min(0.0, min(values)) - 0.05, 1.05]}
    names = _names([row.label for row in shown])
    caption = f"1: the update points where the gradient of the objective does; {told}."
    return Figure("Direction of the update", caption, told, [trace], layout(names, y, height=440))


def placements(table: Measured) -> list[Figure]:
    """Error against the distance from the reference, a line for each place of the KL; on- and off-policy."""
    found = []
    for on_policy, title in ((True, "Where the KL stands, on-policy"), (False, "Where the KL stands, off-policy")):
        points = [point for point in table.placements if point.on_policy is on_policy]
        if points:
            found.append(_placement_figure(title, points))
    return found


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Those with a gradient error, the smallest first."""
    known = [row for row in rows if row.gradient_relative_error is not None]
    return sorted(known, key=lambda row: (_drawn(row.gradient_relative_error or 0.0), row.label))


def _placement_figure(title: str, points: Sequence[PlacementError]) -> Figure:
    names = list(dict.fromkeys(point.placement for point in points))
    dashes = ("solid", "dash", "dot", "dashdot")
    data, said = [], []
    for place, name in enumerate(names):
        line = [point for point in points if point.placement == name]
        colour = SERIES[place % len(SERIES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [point.distance for point in line],
                "y": [_drawn(point.error) for point in line],
                "customdata": [_told(point.error) for point in line],
                "line": {"color": f"@{colour}", "width": 2, "dash": dashes[place // len(SERIES) % len(dashes)]},
                "marker": {"color": f"@{colour}", "symbol": MARKERS[place % len(MARKERS)], "size": 7},
                "hovertemplate": "distance %{x}: %{customdata}<extra>" + name + "</extra>",
            }
        )
        said.append(f"{name} {_told(line[0].error)} to {_told(line[-1].error)}")
    ticks = {"tickvals": [0.01, 0.1, 1.0], "ticktext": ["0.01", "0.1", "1"]}
    x = {"title": "distance from the reference (deviation of the logits)", "type": "log", "showgrid": True, **ticks}
    told = "; ".join(said)
    return Figure(title, f"From the nearest to the farthest: {told}.", told, data, _with_legend(x, len(names)))


def _with_legend(x: dict[str, Any], lines: int) -> dict[str, Any]:
    return layout(x, _log_axis(1.0), showlegend=True, height=420 + 10 * lines)


def _dots(name: str, x: Sequence[str], y: Sequence[float], place: int = 0) -> dict[str, Any]:
    colour, marker = SERIES[place], MARKERS[place]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": [_drawn(value, place) for value in y],
        "customdata": [_told(value) for value in y],
        "marker": {"color": f"@{colour}", "symbol": marker, "size": 8, "line": {"color": "@surface", "width": 1}},
        "hovertemplate": "%{x}: %{customdata}<extra>" + name + "</extra>",
    }


def _names(names: Sequence[str]) -> dict[str, Any]:
    few = len(names) <= NAMED
    return {
        "title": "" if few else f"{len(names)} recipes, by their error on-policy",
        "type": "category",
        "categoryorder": "array",
        "categoryarray": list(names),
        "showticklabels": few,
        "tickangle": -60 if few else 0,
        "ticks": "outside" if few else "",
    }


def _log_axis(highest: float) -> dict[str, Any]:
    powers = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    shown = [power for power in powers if power <= max(1.0, highest)]
    return {
        "title": "relative error",
        "type": "log",
        "range": [log10(FLOOR * APART ** len(KINDS)), log10(highest) + 0.2],
        "tickvals": [FLOOR, *shown],
        "ticktext": ["exact", *(f"{power:g}" for power in shown)],
    }


def _above() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "@ink"}}


def _drawn(value: float, place: int = 0) -> float:
    return FLOOR * APART**place if value < EXACT else value


def _told(value: float) -> str:
    return "exact" if value < EXACT else f"{value:.2g}"
