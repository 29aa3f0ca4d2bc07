"""Figures of reward models: how right and how sure they are, and what their reward is worth as a policy follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.evaluate.evaluation import Completion, Evaluation
from keel.evaluate.reward_models import Calibration, Overoptimisation, calibration, overoptimisation
from keel.report.figures import Figure, curves
from keel.report.page import table, text
from keel.report.style import layout

GOLD = "gold"
Curves = Mapping[str, Sequence[tuple[int, float]]]


def compares(evaluation: Evaluation | None) -> bool:
    """Whether an evaluation is that of a reward model on pairs."""
    return evaluation is not None and "margin" in evaluation.values and "accuracy" in evaluation.metrics


def reliability(before: Evaluation | None, after: Evaluation | None) -> Figure | None:
    """Accuracy of the predicted order against its confidence, before and after training; the diagonal is calibrated."""
    ends = [0.5, 1.0]
    data: list[dict[str, Any]] = [
        {
            "x": ends,
            "y": ends,
            "type": "scatter",
            "mode": "lines",
            "name": "calibrated",
            "line": {"color": "@line", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    said = []
    sides = ((before, "before training", "base", "circle"), (after, "after training", "plain", "square"))
    for evaluation, label, colour, marker in sides:
        if evaluation is None or not compares(evaluation):
            continue
        found = _calibration(evaluation)
        most = max(b.count for b in found.bins)
        data.append(
            {
                "x": [b.confidence for b in found.bins],
                "y": [b.accuracy for b in found.bins],
                "customdata": [b.count for b in found.bins],
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "line": {"color": f"@{colour}/0.5", "width": 1.5},
                "marker": {
                    "color": f"@{colour}",
                    "symbol": marker,
                    "size": [7 + 11 * math.sqrt(b.count / most) for b in found.bins],
                    "line": {"color": "@surface", "width": 1},
                },
                "hovertemplate": f"sure %{{x:.3f}}, right %{{y:.1%}}, %{{customdata}} pairs<extra>{label}</extra>",
            }
        )
        said.append(f"{label} the expected calibration error is {found.error:.3f}")
    if not said:
        return None
    told = "; ".join(said).capitalize() + "."
    return Figure(
        "Calibration",
        f"Share of pairs in the predicted order, by confidence; larger marks hold more pairs. {told}",
        told,
        data,
        layout(
            {"title": "confidence, sigmoid |margin|", "range": [0.49, 1.01], "tickformat": ".0%"},
            {"title": "right", "tickformat": ".0%", "range": [-0.03, 1.04]},
            showlegend=True,
            height=420,
        ),
    )


def reliability_table(evaluation: Evaluation | None) -> str:
    """The numbers of the last evaluation's calibration as HTML; nothing where there are none."""
    if evaluation is None or not compares(evaluation):
        return ""
    found = _calibration(evaluation)
    rows = [
        [f"{b.low:.0%} to {b.high:.0%}", str(b.count), f"{b.confidence:.3f}", f"{b.accuracy:.3f}"] for b in found.bins
    ]
    caption = (
        f"Pairs by the confidence of the predicted order; the expected calibration error is {found.error:.3f}, "
        f"the mean distance of the last two columns."
    )
    return table(["confidence", "pairs", "mean", "right"], rows, caption)


def comparison_figures(metrics: Curves) -> list[Figure | None]:
    """Curves of a method that compares completions."""
    sides = {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    return [
        curves("Loss", metrics, {"loss": "loss"}),
        curves("Pairs in the right order", metrics, {"rewards/accuracies": "accuracy"}, percent=True, floor=0.0),
        curves("Margin", metrics, {"rewards/margins": "margin"}),
        curves("Rewards", metrics, sides),
    ]


def gold_figures(metrics: Curves, hidden: Sequence[str] = ()) -> list[Figure | None]:
    """Trained and measured reward against the KL to the reference, one figure for each reward that is only measured.

    Args:
        metrics: of the run.
        hidden: names of functions that are measured only, besides `gold` and those that begin with it.
    """
    names = [name.removeprefix("rewards/").removesuffix("/mean") for name in metrics if name.endswith("/mean")]
    golds = [name for name in names if name in hidden or name == GOLD or name.startswith(f"{GOLD}_")]
    found = ((name, overoptimisation(metrics, "reward", f"rewards/{name}/mean")) for name in golds)
    return [gold_figure(name, points) for name, points in found if points is not None]


def gold_figure(name: str, points: Overoptimisation) -> Figure:
    """The two rewards one above the other, since their units differ: a mark for each step, and a running mean."""
    order = np.argsort(points.distance, kind="stable")
    distance = [points.distance[i] for i in order]
    x = "KL to the reference, nats a completion" if points.measured else "step (no KL was measured)"
    data: list[dict[str, Any]] = []
    for axis, label, colour, values in (("y", "trained", "plain", points.proxy), ("y2", name, "medium", points.gold)):
        shared = {"x": distance, "yaxis": axis, "type": "scatter", "legendgroup": label}
        ordered = [values[i] for i in order]
        data.append(
            {
                **shared,
                "y": ordered,
                "customdata": [points.steps[i] for i in order],
                "mode": "markers",
                "marker": {"color": f"@{colour}/0.35", "size": 5},
                "showlegend": False,
                "hovertemplate": f"step %{{customdata}}: %{{y:.4~g}} at %{{x:.3~g}}<extra>{label}</extra>",
            }
        )
        smooth = _smoothed(ordered)
        line = {"color": f"@{colour}", "width": 2.5, "dash": "dash" if axis == "y" else "solid"}
        data.append({**shared, "y": smooth, "mode": "lines", "name": label, "line": line, "hoverinfo": "skip"})
    told = _gold_sentence(name, points)
    shape = layout({"title": x, "anchor": "y2"}, {"title": "trained reward", "domain": [0.54, 1]}, height=460)
    shape["yaxis2"] = {**shape["yaxis"], "domain": [0, 0.46]}
    shape["yaxis2"]["title"] = {**shape["yaxis"]["title"], "text": f"{name}, only measured"}
    caption = "The reward that is trained on, and the one that is only measured. Over-optimised where they part."
    return Figure("Trained and measured reward", f"{caption} {told}", told, data, shape)


def _gold_sentence(name: str, points: Overoptimisation) -> str:
    tenth = max(1, len(points.steps) // 10)
    known = _smoothed(points.gold)
    best = int(np.argmax(known))
    first, last = (float(np.mean(part)) for part in (points.gold[:tenth], points.gold[-tenth:]))
    ours, theirs = (float(np.mean(part)) for part in (points.proxy[:tenth], points.proxy[-tenth:]))
    peak = f"; {name} was highest ({known[best]:.3g}) at step {points.steps[best]}"
    return f"Trained {ours:.3g} → {theirs:.3g}, {name} {first:.3g} → {last:.3g}{peak}."


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a tenth of the points."""
    half = len(values) // 20
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _calibration(evaluation: Evaluation) -> Calibration:
    return calibration(np.asarray(evaluation.values["margin"], dtype=float))


def pair_blocks(evaluation: Evaluation | None) -> str:
    """Held-out pairs with their scores, the preferred completion first, as HTML."""
    if evaluation is None or not evaluation.completions:
        return ""
    kept, blocks = evaluation.completions, []
    for chosen, rejected in zip(kept[::2], kept[1::2], strict=False):
        right = chosen.reward > rejected.reward
        margin = f"{chosen.reward - rejected.reward:+.3f}".replace("-", "−")
        level, word = ("good", "right") if right else ("problem", "wrong")
        sides = _side("preferred", chosen) + _side("rejected", rejected)
        verdict = f'<span class="verdict {level}">{word}</span>, margin {margin}'
        prompt = f'<div class="prompt"><pre>{text(chosen.prompt)}</pre><small>{verdict}</small></div>'
        blocks.append(f'<article class="card pair">{prompt}{sides}</article>')
    return "<h2>Pairs</h2>\n" + "\n".join(blocks)


def _side(label: str, kept: Completion) -> str:
    score = f"{kept.reward:.3f}".replace("-", "−")
    shown = f'<div class="completion"><pre>{text(kept.text)}</pre><small>score {score}</small></div>'
    return f'<div><span class="muted">{label}</span>{shown}</div>'
