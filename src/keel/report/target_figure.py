"""Masses of answers under a reference and its targets, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keel.report.figures import Figure
from keel.report.style import SERIES, layout

BARS = 12  # answers drawn


@dataclass(frozen=True)
class Group:
    """Outcomes of one prompt with the same mode and reward, counted together.

    Args:
        name: the mode.
        reward: of each of them.
        good: whether they are good.
        outcomes: how many they are.
        masses: under the reference, and under each target, of what is listed.
    """

    name: str
    reward: float
    good: bool
    outcomes: int
    masses: tuple[float, ...]


def masses(prompt: str, labels: Sequence[str], groups: Sequence[Group]) -> Figure:
    """Mass of the answers of one prompt under the reference and under the first few targets.

    Args:
        prompt: the title.
        labels: of the distributions, the reference first.
        groups: the answers, in the order in which they stand.
    """
    shown = groups[:BARS][::-1]  # plotly draws from below
    names = [f"{'✓ ' if group.good else ''}{_short(group.name)}" for group in shown]
    data = [
        _bars(label, names, [group.masses[k] for group in shown], colour)
        for k, (label, colour) in enumerate(zip(labels, ("base", *SERIES), strict=False))
    ]
    caption = "Probability of each answer; ✓ is good."
    if len(groups) > len(shown):
        caption += f" {len(groups) - len(shown)} further answers are not drawn."
    if len(labels) > len(data):
        caption += f" The first {len(data) - 1} targets of {len(labels) - 1} are drawn."
    said = "; ".join(f"{trace['name']}: " + ", ".join(f"{x:.1%}" for x in trace["x"][::-1]) for trace in data)
    return Figure(
        _short(prompt, 60) or "Answers",
        caption,
        f"{', '.join(names[::-1])}. {said}.",
        data[::-1],
        layout(
            {"title": "probability", "tickformat": ".0~%", "rangemode": "tozero", "showgrid": True},
            {"type": "category", "showgrid": False},
            showlegend=True,
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "reversed"},
            barmode="group",
            bargap=0.25,
            height=120 + (14 + 13 * len(data)) * len(shown) + 20 * len(data),
        ),
    )


def _bars(name: str, names: Sequence[str], mass: Sequence[float], colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(names),
        "x": list(mass),
        "marker": {"color": f"@{colour}"},
        "hovertemplate": f"%{{y}}: %{{x:.2%}}<extra>{name}</extra>",
    }


def _short(name: str, limit: int = 28) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"
