"""The comparison's two figures as one static SVG: for a README, where no script runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from keel.report.arms import Arm, Look, largest_common, looks
from keel.report.style import FONT, THEMES, Theme

WIDTH = 920
_TOP, _BOTTOM = 66, 300  # of both panels
_LEFT, _RIGHT = (66.0, 440.0), (546.0, 896.0)
_DASH = {"solid": "", "dash": ' stroke-dasharray="6 4"', "dot": ' stroke-dasharray="2 4"'}


@dataclass(frozen=True)
class Panel:
    """A rectangle with a scale on each side."""

    left: float
    right: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_of: Callable[[float], float] = float
    top: float = _TOP
    bottom: float = _BOTTOM

    def x(self, value: float) -> float:
        low, high = (self.x_of(end) for end in self.x_range)
        return self.left + (self.x_of(value) - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def picture(arms: Sequence[Arm], theme: Theme = "light") -> str:
    """pass@k against k, and pass@1 against pass@k of the largest k, with 95% intervals, as SVG.

    Raises:
        ValueError: no arms, or arms without pass@k for several k.
    """
    many = largest_common(arms, "pass")
    if many is None or many == "pass@1":
        raise ValueError("the picture needs arms with pass@k for at least two k in common")
    colours = THEMES[theme]
    seen = looks(arms)
    said = "; ".join(
        f"{arm.label}: " + ", ".join(f"{name} {arm.evaluation.metrics[name].value:.2f}" for name in ("pass@1", many))
        for arm in arms
    )
    keys, height = _legend(arms, seen, colours)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-labelledby="title description" font-family="{escape(FONT)}" font-size="13">',
        '<title id="title">Success of each policy with one and with several tries</title>',
        f'<desc id="description">{escape(said)}</desc>',
        f'<rect width="{WIDTH}" height="{height:g}" rx="12" fill="{colours["surface"]}"/>',
        *_curves_panel(arms, seen, colours),
        *_frontier_panel(arms, seen, many, colours),
        *keys,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curves_panel(arms: Sequence[Arm], seen: Sequence[Look], colours: dict[str, str]) -> list[str]:
    curves = [[(float(k), value) for k, value in arm.evaluation.pass_curve()] for arm in arms]
    ks = sorted({k for curve in curves for k, _ in curve})
    ends = [end for curve in curves for _, v in curve for end in (v.value, v.low, v.high) if math.isfinite(end)]
    panel = Panel(*_LEFT, (ks[0], ks[-1]), _padded(ends, top=1.0), math.log)
    parts = frame(panel, "Solved within k tries", "k, tries", "pass@k", [(k, f"{k:g}") for k in ks], colours)
    for curve, look in zip(curves, seen, strict=True):
        colour = colours[look.colour]
        if all(v.known for _, v in curve):
            edge = [(k, v.high) for k, v in curve] + [(k, v.low) for k, v in reversed(curve)]
            points = " ".join(f"{panel.x(k):.1f},{panel.y(y):.1f}" for k, y in edge)
            parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.12"/>')
    for curve, look in zip(curves, seen, strict=True):
        colour = colours[look.colour]
        points = " ".join(f"{panel.x(k):.1f},{panel.y(v.value):.1f}" for k, v in curve)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.2"{_DASH[look.dash]}/>'
        )
        parts += [mark(panel.x(k), panel.y(v.value), look, colours, 3.6) for k, v in curve]
    return parts


def _frontier_panel(arms: Sequence[Arm], seen: Sequence[Look], many: str, colours: dict[str, str]) -> list[str]:
    ones = [arm.evaluation.metrics["pass@1"] for arm in arms]
    bests = [arm.evaluation.metrics[many] for arm in arms]
    across = [end for v in ones for end in (v.value, v.low, v.high) if math.isfinite(end)]
    up = [end for v in bests for end in (v.value, v.low, v.high) if math.isfinite(end)]
    panel = Panel(*_RIGHT, _padded(across), _padded(up, top=1.0))
    ticks = [(value, f"{value:.0%}") for value in _ticks(*panel.x_range)]
    title = f"One try against {many.split('@')[1]}"
    parts = frame(panel, title, "pass@1", many, ticks, colours)
    joined = sorted((arm for arm in arms if arm.beta is not None), key=lambda arm: arm.beta or 0.0)
    if len(joined) > 2:
        pairs = [(arm.evaluation.metrics["pass@1"].value, arm.evaluation.metrics[many].value) for arm in joined]
        points = " ".join(f"{panel.x(x):.1f},{panel.y(y):.1f}" for x, y in pairs)
        line = colours["line"]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line}" stroke-width="1.5"{_DASH["dot"]}/>')
    for one, best, look in zip(ones, bests, seen, strict=True):
        colour = colours[look.colour]
        x, y = panel.x(one.value), panel.y(best.value)
        bars = ""
        if one.known:
            bars += f"M{panel.x(one.low):.1f} {y:.1f}H{panel.x(one.high):.1f}"
        if best.known:
            bars += f"M{x:.1f} {panel.y(best.low):.1f}V{panel.y(best.high):.1f}"
        parts.append(f'<path d="{bars}" stroke="{colour}" stroke-width="1.6" stroke-opacity="0.75"/>' if bars else "")
    for one, best, look in zip(ones, bests, seen, strict=True):
        parts.append(mark(panel.x(one.value), panel.y(best.value), look, colours, 6.0))
    return parts


def frame(
    panel: Panel, title: str, x_title: str, y_title: str, ticks: Sequence[tuple[float, str]], colours: dict[str, str]
) -> list[str]:
    """Title, grid, ticks and the names of both axes; the vertical one shows shares."""
    ink, muted, grid, line = (colours[name] for name in ("ink", "muted", "grid", "line"))
    middle = (panel.left + panel.right) / 2
    at = f'x="{panel.left:g}" y="{panel.top - 32:g}"'
    parts = [f'<text {at} fill="{ink}" font-size="16" font-weight="600">{escape(title)}</text>']
    for value in _ticks(*panel.y_range):
        y = panel.y(value)
        parts.append(f'<path d="M{panel.left:g} {y:.1f}H{panel.right:g}" stroke="{grid}"/>')
        parts.append(
            f'<text x="{panel.left - 8:g}" y="{y + 4:.1f}" fill="{muted}" text-anchor="end">{value:.0%}</text>'
        )
    parts.append(f'<path d="M{panel.left:g} {panel.bottom:g}H{panel.right:g}" stroke="{line}"/>')
    for value, label in ticks:
        x = panel.x(value)
        parts.append(f'<path d="M{x:.1f} {panel.bottom:g}v4" stroke="{line}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{panel.bottom + 20:g}" fill="{muted}" text-anchor="middle">{escape(label)}</text>'
        )
    middle_y = (panel.top + panel.bottom) / 2
    parts.append(
        f'<text x="{middle:g}" y="{panel.bottom + 42:g}" fill="{muted}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text transform="translate({panel.left - 48:g} {middle_y:g}) rotate(-90)" fill="{muted}" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    return parts


def _legend(arms: Sequence[Arm], seen: Sequence[Look], colours: dict[str, str]) -> tuple[list[str], float]:
    """Keys below the panels, as many in a line as fit, and the height of the picture with them."""
    parts: list[str] = []
    x, y = 66.0, 376.0
    for arm, look in zip(arms, seen, strict=True):
        width = 44 + 7.2 * len(arm.label)
        if x + width > WIDTH - 16 and x > 66:
            x, y = 66.0, y + 24
        colour = colours[look.colour]
        parts.append(f'<path d="M{x:g} {y:g}h26" stroke="{colour}" stroke-width="2.2"{_DASH[look.dash]}/>')
        parts.append(mark(x + 13, y, look, colours, 4.5))
        parts.append(f'<text x="{x + 34:g}" y="{y + 4.5:g}" fill="{colours["ink"]}">{escape(arm.label)}</text>')
        x += width + 18
    return parts, y + 26


def dashes(dash: str) -> str:
    """The attribute of a line's dash."""
    return _DASH[dash]


def mark(x: float, y: float, look: Look, colours: dict[str, str], size: float) -> str:
    """A marker."""
    style = f'fill="{colours[look.colour]}" stroke="{colours["surface"]}" stroke-width="1"'
    if look.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {style}/>'
    if look.marker == "square":
        side = 1.8 * size
        return f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:g}" height="{side:g}" {style}/>'
    if look.marker == "cross":
        w, s = 0.42 * size, 1.25 * size
        path = (
            f"M{-w:g} {-s:g}h{2 * w:g}v{s - w:g}h{s - w:g}v{2 * w:g}h{w - s:g}v{s - w:g}h{-2 * w:g}v{w - s:g}h{w - s:g}"
        )
        path += f"v{-2 * w:g}h{s - w:g}z"
        return f'<path transform="translate({x:.1f} {y:.1f})" d="{path}" {style}/>'
    s = 1.35 * size
    path = {
        "diamond": f"M0 {-s:g}L{s:g} 0L0 {s:g}L{-s:g} 0z",
        "triangle-up": f"M0 {-s:g}L{s:g} {0.8 * s:g}H{-s:g}z",
        "triangle-down": f"M0 {s:g}L{s:g} {-0.8 * s:g}H{-s:g}z",
    }[look.marker]
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{path}" {style}/>'


def _padded(values: Sequence[float], top: float | None = None) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * max(high - low, 0.02)
    return low - room, min(high + room, top) if top is not None and high <= top else high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round values within a range, about five.

    >>> _ticks(0.31, 0.72)
    [0.4, 0.5, 0.6, 0.7]
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]
