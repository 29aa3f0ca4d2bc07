"""Figures of training: curves of each arm with bands over its seeds, and entropy against reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from keel.compare.figures import band, looks, tall
from keel.compare.outcomes import Comparison, Outcome
from keel.compare.sentences import amount, duration, number
from keel.report.figures import Figure, running_mean

Against = Literal["steps", "tokens", "seconds"]
POINTS = 120  # of a curve
BLOCKS = 16  # of a trajectory, each the mean of its steps: two noisy curves against each other are a tangle
# Metrics of training that a comparison draws, with the unit of each.
DRAWN = {
    "reward": ("Reward", ""),
    "entropy": ("Entropy", "nats a token"),
    "kl": ("KL to the reference", "nats a token"),
    "completions/mean_length": ("Completion length", "tokens"),
    "rewards/accuracies": ("Pairs in the right order", ""),
    "rewards/margins": ("Margin of the rewards", ""),
    "loss": ("Loss", ""),
}
SHOWN = 4  # of these at most
_CUMULATIVE = {"tokens": "num_tokens", "seconds": "seconds"}


@dataclass(frozen=True, eq=False)
class Course:
    """A metric of an arm during training: its mean over seeds, and the lowest and highest seed.

    Args:
        at: steps, tokens or seconds.
        mean, low, high: there.
        seeds: how many.
    """

    at: Float[np.ndarray, "n"]
    mean: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]
    seeds: int


def course(cells: Sequence[Outcome], metric: str, against: Against = "steps") -> Course | None:
    """The course of a metric over the cells of an arm, as far as all of them went; None if none logged it.

    Each curve is smoothed a little, and read off between its points where seeds have spent different amounts.
    """
    found = [curve for cell in cells if len((curve := _curve(cell, metric, against))[0]) > 1]
    if not found:
        return None
    begin, end = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
    if not end > begin:
        return None
    at = np.linspace(begin, end, min(POINTS, max(len(x) for x, _ in found)))
    at = np.unique(np.round(at)) if against == "steps" else at
    rows = np.stack([np.interp(at, x, y) for x, y in found])
    return Course(at, rows.mean(0), rows.min(0), rows.max(0), len(found))


def learning_curves(comparison: Comparison, against: Against = "steps") -> list[Figure]:
    """A figure for each metric of training that some arm logged."""
    found = [_drawn(comparison, metric, against) for metric in DRAWN]
    return [figure for figure in found if figure is not None][:SHOWN]


def ways(comparison: Comparison) -> list[Against]:
    """What curves can be drawn against."""
    curves = {name for o in comparison.outcomes if o.status == "finished" for name in o.curves}
    every: list[Against] = ["steps", "tokens", "seconds"]
    return [way for way in every if way == "steps" or _CUMULATIVE[way] in curves]


def trajectory(comparison: Comparison) -> Figure | None:
    """Entropy against reward during training, mean over seeds: what an arm pays in entropy for its reward."""
    data: list[dict[str, Any]] = []
    said = []
    for arm, look in looks([arm.name for arm in comparison.arms]).items():
        cells = comparison.of(arm)
        reward, entropy = course(cells, "reward"), course(cells, "entropy")
        if reward is None or entropy is None:
            continue
        blocks = [
            [float(part.mean()) for part in np.array_split(values, min(BLOCKS, len(values)))]
            for values in (reward.at, np.interp(reward.at, entropy.at, entropy.mean), reward.mean)
        ]
        x, y = _rounded(np.array(blocks[1])), _rounded(np.array(blocks[2]))
        hover = f"step %{{text}}: entropy %{{x:.3f}}, reward %{{y:.3f}}<extra>{arm}</extra>"
        data.append(
            {
                "x": x,
                "y": y,
                "text": [f"{step:.0f}" for step in blocks[0]],
                "type": "scatter",
                "mode": "lines+markers",
                "name": arm,
                "line": {"color": f"@{look.colour}", "width": 2.2, "dash": look.dash},
                "marker": {
                    "color": f"@{look.colour}",
                    "symbol": look.marker,
                    "size": [0] * (len(x) - 1) + [12],
                    "line": {"color": "@surface", "width": 1},
                },
                "hovertemplate": hover,
            }
        )
        said.append(f"{arm}: entropy {number(x[0])} → {number(x[-1])}, reward {number(y[0])} → {number(y[-1])}")
    if not data:
        return None
    caption = "From the first step to the mark at the last. Up: more reward; left: less entropy left to explore with."
    shown = tall({"title": "entropy, nats a token", "showgrid": True}, {"title": "reward"}, len(said))
    return Figure("Entropy against reward", caption, "; ".join(said), data, shown)


def _drawn(comparison: Comparison, metric: str, against: Against) -> Figure | None:
    data: list[dict[str, Any]] = []
    said, most = [], 0
    for arm, look in looks([arm.name for arm in comparison.arms]).items():
        found = course(comparison.of(arm), metric, against)
        if found is None:
            continue
        most = max(most, found.seeds)
        x = _rounded(found.at)
        if found.seeds > 1:
            data.append(band(x, _rounded(found.low), _rounded(found.high), look, arm, len(comparison.arms)))
        data.append(
            {
                "x": x,
                "y": _rounded(found.mean),
                "type": "scatter",
                "mode": "lines",
                "name": arm,
                "legendgroup": arm,
                "line": {"color": f"@{look.colour}", "width": 2.2, "dash": look.dash},
                "hovertemplate": f"{_at(against)}: %{{y:.4~g}}<extra>{arm}</extra>",
            }
        )
        last = f" (seeds {number(found.low[-1])} to {number(found.high[-1])})" if found.seeds > 1 else ""
        said.append(f"{arm} {number(found.mean[0])} → {number(found.mean[-1])}{last}")
    if not data:
        return None
    title, unit = DRAWN[metric]
    end = max(trace["x"][-1] for trace in data if trace["mode"] == "lines" and "fill" not in trace)
    until = {"steps": f"{end:.0f} steps", "tokens": f"{amount(end)} tokens", "seconds": duration(end)}[against]
    bands = "Mean of the seeds; the band reaches from the lowest seed to the highest." if most > 1 else "One seed each."
    axis = {"steps": "step", "tokens": "tokens through training", "seconds": "seconds of training"}[against]
    figure = tall({"title": axis}, {"title": unit, "exponentformat": "e"}, len(said))
    return Figure(title, bands, f"over {until}: {'; '.join(said)}", data, figure)


def _curve(cell: Outcome, metric: str, against: Against) -> tuple[np.ndarray, np.ndarray]:
    """Where and what, finite, by growing place, smoothed."""
    spent = dict(cell.curves.get(_CUMULATIVE.get(against, ""), ()))
    points = [
        (float(step) if against == "steps" else spent[step], value)
        for step, value in cell.curves.get(metric, ())
        if math.isfinite(value) and (against == "steps" or math.isfinite(spent.get(step, math.nan)))
    ]
    x, y = np.array([place for place, _ in points]), running_mean([value for _, value in points])
    return x, np.array(y)


def _at(against: Against) -> str:
    return {"steps": "step %{x}", "tokens": "%{x:.3s} tokens", "seconds": "%{x:.0f} s"}[against]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
