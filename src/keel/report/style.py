"""How everything that Keel draws looks: one palette for light and dark, readable with any colour vision.

Figures name colours and never hold them: "@plain" is a colour of the theme, "@plain/0.15" the same at 15% opacity. A
page resolves the names when it is shown, so that it follows the reader's theme; `resolve` does so in Python.
"""

from __future__ import annotations

from typing import Any, Literal

Theme = Literal["light", "dark"]

# What draws data has a contrast of at least 3 with the surface, text one of 4.5, and colours that stand together stay
# apart under simulated protanopia, deuteranopia and tritanopia. `weak`, `medium` and `strong` are one hue in three
# steps, for one quantity that grows.
THEMES: dict[Theme, dict[str, str]] = {
    "light": {
        "page": "#f5f6f8",
        "surface": "#ffffff",
        "ink": "#1b1f24",
        "muted": "#565e68",
        "grid": "#e1e5ea",
        "line": "#c5cbd3",
        "base": "#747c87",
        "plain": "#c2500a",
        "weak": "#4f95d6",
        "medium": "#1b64a8",
        "strong": "#0a2f5c",
        "green": "#0b8069",
        "accent": "#5e1a38",
        "violet": "#b05bf2",
        "olive": "#5c5023",
        "rose": "#e7014a",
        "sky": "#089dc7",
        "earth": "#351e00",
        "leaf": "#6a9c78",
        "good": "#0b6e4f",
        "note": "#1b64a8",
        "warning": "#8a5a00",
        "problem": "#b3261e",
    },
    "dark": {
        "page": "#0e1116",
        "surface": "#171b22",
        "ink": "#e8ebef",
        "muted": "#a3acb8",
        "grid": "#2a313b",
        "line": "#465060",
        "base": "#8d96a2",
        "plain": "#f08a4b",
        "weak": "#3f7fc4",
        "medium": "#79b8f5",
        "strong": "#d2e8ff",
        "green": "#2fb597",
        "accent": "#f0de6e",
        "violet": "#8c58a1",
        "olive": "#e0fdb7",
        "rose": "#f3015a",
        "sky": "#15f7f6",
        "earth": "#a55301",
        "leaf": "#0d794a",
        "good": "#5fd0a5",
        "note": "#79b8f5",
        "warning": "#e5b04c",
        "problem": "#ff8a80",
    },
}
BEHIND: dict[Theme, float] = {"light": 1.0, "dark": 0.7}  # text on 70% of a colour, times this, has a contrast of 4.5
SERIES = ("medium", "plain", "green", "accent")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
# For many arms in one figure, beside the grey of their baseline; no two of the ten look alike to anybody.
ARMS = ("medium", "plain", "violet", "leaf", "rose", "sky", "accent", "olive", "earth")
# Backgrounds in terminals, whose own colours are not known: (background, text), from little to much.
MORE = (("#cfe3f7", "#1b1f24"), ("#84b7e8", "#1b1f24"), ("#1b64a8", "#ffffff"))
LESS = (("#fbdcc4", "#1b1f24"), ("#f2a873", "#1b1f24"), ("#c2500a", "#ffffff"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def variables(theme: Theme) -> str:
    """The palette of a theme as custom properties of CSS, and how strong the colours behind its text may be."""
    return " ".join(f"--{name}: {colour};" for name, colour in THEMES[theme].items()) + f" --strength: {BEHIND[theme]};"


def resolve(value: Any, theme: Theme) -> Any:
    """A figure, or any part of one, with the colours of a theme.

    >>> resolve({"color": "@ink", "fill": "@plain/0.5"}, "light")
    {'color': '#1b1f24', 'fill': 'rgba(194, 80, 10, 0.5)'}
    """
    if isinstance(value, dict):
        return {key: resolve(inner, theme) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(inner, theme) for inner in value]
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    name, _, opacity = value[1:].partition("/")
    colour = THEMES[theme][name]
    if not opacity:
        return colour
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def layout(x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The layout of every figure: quiet axes, a legend below, nothing that keeps a finger from scrolling the page."""
    axis = {
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "@line",
        "ticklen": 4,
        "automargin": True,
        "fixedrange": True,
    }
    title = {"standoff": 8, "font": {"size": 13}}
    x, y = dict(x or {}), dict(y or {})
    return {
        "font": {"family": FONT, "size": 13, "color": "@muted"},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "margin": {"l": 8, "r": 18, "t": 10, "b": 8},
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@line", "font": {"color": "@ink", "family": FONT}},
        "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top", "font": {"color": "@ink"}},
        "showlegend": False,
        "xaxis": {**axis, "showgrid": False, **x, "title": {**title, "text": x.get("title", "")}},
        "yaxis": {**axis, **y, "title": {**title, "text": y.get("title", "")}},
        **more,
    }
