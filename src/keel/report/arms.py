"""Policies side by side: what is compared, and how each is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel.evaluate.evaluation import Evaluation
from keel.report.style import MARKERS

_RAMP = ("weak", "medium", "strong")


@dataclass(frozen=True, eq=False)
class Arm:
    """One policy of a comparison.

    Args:
        name: short, for programs and labels within figures.
        label: for people.
        evaluation: what it can do.
        beta: strength of its regulariser: None for the policy before training, 0 for training without one.
        seconds: how long training took, if it is to be told.
    """

    name: str
    label: str
    evaluation: Evaluation
    beta: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Look:
    """Colour (a name of the palette), dash and marker of an arm: no arm is told from another by colour alone."""

    colour: str
    dash: str
    marker: str


def looks(arms: Sequence[Arm]) -> list[Look]:
    """Grey and dashed before training; one hue without a regulariser; one other hue, by strength, with one."""
    betas = sorted({arm.beta for arm in arms if arm.beta})
    found = []
    for place, arm in enumerate(arms):
        marker = MARKERS[place % len(MARKERS)]
        if arm.beta is None:
            found.append(Look("base", "dash", marker))
        elif arm.beta == 0:
            found.append(Look("plain", "solid", marker))
        else:
            rank = betas.index(arm.beta)
            step = 1 if len(betas) == 1 else round(rank * (len(_RAMP) - 1) / (len(betas) - 1))
            found.append(Look(_RAMP[step], "solid", marker))
    return found


def before_and_after(before: Evaluation | None, after: Evaluation | None) -> list[Arm]:
    """The two arms of one run; those that are missing are left out."""
    arms = []
    if before is not None:
        arms.append(Arm("before", "before training", before, None))
    if after is not None:
        arms.append(Arm("after", "after training", after, 0.0))
    return arms


def largest_common(arms: Sequence[Arm], kind: str) -> str | None:
    """Name of the metric of a kind ("pass", "maj", "avg") with the largest k that all arms have, or None."""
    names = [{name for name in arm.evaluation.metrics if name.startswith(f"{kind}@")} for arm in arms]
    common = set.intersection(*names) if names else set()
    return max(common, key=lambda name: int(name.split("@")[1]), default=None)
