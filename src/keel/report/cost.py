"""Accuracy against tokens, drawn: one figure for a page, and small panels as a static picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from keel.evaluate.cost import Curve, Point
from keel.report.arms import Look
from keel.report.figures import Figure
from keel.report.page import document, figures, table, text, write
from keel.report.picture import Panel, dashes, frame, mark
from keel.report.style import FONT, MARKERS, SERIES, THEMES, Theme, layout

INTRODUCTION = (
    "Every sampler draws from the same frozen policy with the same reward. Accuracy is the share of prompts whose "
    "output is correct; tokens are those that went through a model for one prompt, generated and scored together."
)
_LINES = ("solid", "dash", "dot")
_PANEL_WIDTH, _PANEL_HEIGHT, _MARGIN = 268.0, 226.0, 62.0


def write_cost(path: str | Path, curves: Sequence[Curve], command: str | None = None) -> Path:
    """Write the page as one HTML file.

    Raises:
        UserError: the file cannot be written.
    """
    return write(path, cost_page(curves, command))


def cost_page(curves: Sequence[Curve], command: str | None = None) -> str:
    """The figure and the table of all numbers, as HTML."""
    head, rows = cost_table(curves)
    made = f"<p>Made by <code>{text(command)}</code>.</p>" if command else ""
    first = curves[0].points[0]
    caption = f"{first.prompts} prompts, {first.seeds} runs of each; 95% bootstrap intervals over prompts."
    body = [
        "<h1>Accuracy against tokens</h1>",
        f"<p>{text(INTRODUCTION)}</p>{made}",
        figures([cost_figure(curves)], "cost"),
        table(head, rows, caption),
    ]
    return document("Accuracy against tokens", body)


def cost_table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of all numbers, for pages and the terminal."""
    sent = any(point.numbers.get("read") for curve in curves for point in curve.points)
    head = ["sampler", "size", "accuracy", "generated", "scored", *["read"][:sent], "ESS", "log Z", "KL", "ms"]
    rows = []
    for curve in curves:
        for point in curve.points:
            n = point.numbers
            error = "" if math.isnan(n["log_z_error"]) else f" ± {n['log_z_error']:.2f}"
            log_z = "" if math.isnan(n["log_z"]) else f"{n['log_z']:.2f}{error}"
            kl = "" if math.isnan(n["kl"]) else f"{'≤ ' if point.kl_is_bound else ''}{n['kl']:.2f}"
            tokens = [f"{n[name]:.0f}" for name in ("generated", "scored", *["read"][:sent])]
            spent = [f"{n['ess']:.1f}", log_z, kl, f"{1000 * n['seconds']:.1f}"]
            rows.append([curve.name, str(point.size), str(point.accuracy), *tokens, *spent])
    return head, rows


def cost_figure(curves: Sequence[Curve]) -> Figure:
    """All samplers in one figure, tokens on a logarithmic scale, with 95% intervals."""
    data: list[dict[str, Any]] = []
    for curve, look in zip(curves, curve_looks(curves), strict=True):
        data.append(
            {
                "type": "scatter",
                "name": curve.name,
                "x": [p.tokens for p in curve.points],
                "y": [p.accuracy.value for p in curve.points],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_above(p) for p in curve.points],
                    "arrayminus": [_below(p) for p in curve.points],
                    "color": f"@{look.colour}/0.5",
                    "thickness": 1,
                    "width": 2,
                },
                "customdata": [[p.size, p.numbers["generated"], p.numbers["scored"]] for p in curve.points],
                "mode": "lines+markers",
                "line": {"color": f"@{look.colour}", "width": 2, "dash": look.dash},
                "marker": {"symbol": look.marker, "size": 7, "color": f"@{look.colour}"},
                "hovertemplate": "size %{customdata[0]}: %{y:.1%}, %{customdata[1]:.0f} generated, "
                f"%{{customdata[2]:.0f}} scored<extra>{curve.name}</extra>",
            }
        )
    said = "; ".join(
        f"{c.name}: " + ", ".join(f"{p.accuracy.value:.2f} at {p.tokens:.0f} tokens" for p in c.points) for c in curves
    )
    ticks = [factor * 10**power for power in range(7) for factor in (1, 2, 5)]
    x = {"title": "tokens through a model, for one prompt", "type": "log", "tickvals": ticks, "ticktext": ticks}
    height = 420 + 20 * math.ceil(len(curves) / 4)
    y = {"title": "accuracy", "tickformat": ".0%"}
    return Figure(
        "Accuracy against tokens",
        "95% intervals over prompts.",
        said,
        data,
        layout(x, y, showlegend=True, height=height),
    )


def curve_looks(curves: Sequence[Curve]) -> list[Look]:
    """Colour, dash and marker, so that no two of a family look alike; the first one is the grey baseline."""
    found = []
    for place in range(len(curves)):
        if place == 0:
            found.append(Look("base", "dash", MARKERS[0]))
            continue
        colour = SERIES[(place - 1) % len(SERIES)]
        turn = (place - 1) // len(SERIES)
        found.append(Look(colour, _LINES[turn % len(_LINES)], MARKERS[(place - 1) % len(MARKERS)]))
    return found


def write_cost_picture(path: str | Path, curves: Sequence[Curve], dark: bool = False) -> Path:
    """Write a panel for each family, with the first curve in grey in all of them, as one static SVG.

    Raises:
        ValueError: no curve besides the baseline.
        UserError: the file cannot be written.
    """
    return write(path, cost_picture(curves, "dark" if dark else "light"))


def cost_picture(curves: Sequence[Curve], theme: Theme = "light") -> str:
    """See `write_cost_picture`."""
    baseline, *rest = curves
    families = list(dict.fromkeys(curve.family for curve in rest))
    if not families:
        raise ValueError("the picture needs a curve besides the baseline")
    colours = THEMES[theme]
    across = min(3, len(families))
    points = [point for curve in curves for point in curve.points]
    x_range = min(p.tokens for p in points) / 1.15, max(p.tokens for p in points) * 1.15
    low = min(min(p.accuracy.low, p.accuracy.value) if p.accuracy.known else p.accuracy.value for p in points)
    longest = max(sum(curve.family == family for curve in rest) for family in families)
    cell = _PANEL_HEIGHT + 126 + 20 * (longest + 1)
    width = across * (_PANEL_WIDTH + _MARGIN) + 20
    height = math.ceil(len(families) / across) * cell + 8
    parts = []
    for place, family in enumerate(families):
        left = (place % across) * (_PANEL_WIDTH + _MARGIN) + _MARGIN
        top = (place // across) * cell + 54
        panel = Panel(
            left, left + _PANEL_WIDTH - 6, x_range, (max(0.0, low - 0.03), 1.0), math.log10, top, top + _PANEL_HEIGHT
        )
        parts += _panel(panel, family, baseline, [c for c in rest if c.family == family], colours)
    said = "; ".join(f"{c.name}: {c.points[-1].accuracy.value:.2f} at {c.points[-1].tokens:.0f} tokens" for c in curves)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-labelledby="title description" font-family="{escape(FONT)}" '
        'font-size="13"><title id="title">Accuracy of samplers against tokens</title>'
        f'<desc id="description">{escape(said)}</desc>'
        f'<rect width="{width:g}" height="{height:g}" rx="12" fill="{colours["surface"]}"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _panel(panel: Panel, family: str, baseline: Curve, curves: Sequence[Curve], colours: dict[str, str]) -> list[str]:
    ticks = [
        (10.0**power, f"{10**power:g}") for power in range(7) if panel.x_range[0] <= 10.0**power <= panel.x_range[1]
    ]
    parts = frame(panel, family, "tokens a prompt", "accuracy", ticks, colours)
    y = panel.bottom + 62.0
    for curve, look in zip([baseline, *curves], curve_looks([baseline, *curves]), strict=True):
        colour = colours[look.colour]
        places = [(panel.x(p.tokens), panel.y(p.accuracy.value)) for p in curve.points]
        bars = "".join(
            f"M{x:.1f} {panel.y(p.accuracy.low):.1f}V{panel.y(p.accuracy.high):.1f}"
            for (x, _), p in zip(places, curve.points, strict=True)
            if p.accuracy.known
        )
        joined = " ".join(f"{x:.1f},{height:.1f}" for x, height in places)
        parts.append(f'<path d="{bars}" stroke="{colour}" stroke-width="1.2" stroke-opacity="0.55"/>')
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"{dashes(look.dash)}/>')
        parts += [mark(x, height, look, colours, 3.4) for x, height in places]
        parts.append(f'<path d="M{panel.left:g} {y:g}h26" stroke="{colour}" stroke-width="2"{dashes(look.dash)}/>')
        parts.append(mark(panel.left + 13, y, look, colours, 4))
        parts.append(
            f'<text x="{panel.left + 34:g}" y="{y + 4.5:g}" fill="{colours["ink"]}">{escape(curve.name)}</text>'
        )
        y += 20
    return parts


def _above(point: Point) -> float:
    return point.accuracy.high - point.accuracy.value if point.accuracy.known else 0.0


def _below(point: Point) -> float:
    return point.accuracy.value - point.accuracy.low if point.accuracy.known else 0.0
