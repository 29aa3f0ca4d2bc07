"""Preference strength: what an ensemble of reward models says of each pair, and what the loss makes of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Pairs, Rows
from keel.statistics.stats import Stats

Mode = Literal["flip", "soft", "margin", "flip_soft", "flip_margin"]
MODES = get_args(Mode)


def flipped(pairs: Pairs, which: Bool[Tensor, "N"]) -> Pairs:
    """The pairs with chosen and rejected exchanged, and the margin negated, where `which` says so."""
    return replace(
        pairs,
        chosen=torch.where(which, pairs.rejected, pairs.chosen),
        rejected=torch.where(which, pairs.chosen, pairs.rejected),
        offset=torch.where(which, -pairs.offset, pairs.offset),
    )


@part("preference_strength", paper=199)
@dataclass(frozen=True)
class PreferenceStrength:
    """Uses the strength mu = mean_m (r_m(y_w) - r_m(y_l)) of each pair, by reward models that have not learnt it.

        flip      chosen and rejected exchanged in the `share` of all pairs with the lowest mu, where mu is below 0
        soft      label sigmoid(mu):  L = -alpha ls(D) - (1 - alpha) ls(-D),  least at D = mu
        margin    L = -ls(D - mu)
        flip_soft, flip_margin    first flip, which turns mu into -mu, then the other

    Strengths are measured once, before training: the training pairs fall into `folds` parts, and the pairs of each part
    are scored by `members` reward models that were trained on the other parts, each with an order, a draw of its data
    and a head of its own. Where the data state margins (strengths from elsewhere), those are taken and no model is
    trained. Strengths are in the checkpoint. Of rows that nobody has measured, the margins of the data count and
    nothing is flipped.

    Args:
        mode: what is done.
        share: of the pairs, that flip exchanges at most; the paper has 0.1 to 0.2.
        members: reward models for each part.
        folds: parts.
        steps: of training for each of them; None takes those of the run.

    Raises:
        ValueError: an unknown mode, a share outside [0, 1], no members, fewer than two folds, or no steps.

    Source: "Secrets of RLHF in Large Language Models Part II: Reward Modeling", 2024. The paper scores pairs with
        members that have seen them; those strengths are inflated, hence the parts.
    """

    mode: Mode = "flip_soft"
    share: float = 0.2
    members: int = 2
    folds: int = 2
    steps: int | None = None
    needs = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode '{self.mode}' is not one of {', '.join(MODES)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], not {self.share}")
        if self.members < 1 or self.folds < 2:
            raise ValueError(f"at least one member and two folds, not {self.members} and {self.folds}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def init(self) -> dict[str, Any]:
        """No strengths yet: `known` and the deviation among the members are in the order of the training data."""
        return {"known": torch.zeros(0), "spread": torch.zeros(0), "boundary": -math.inf}

    def measured(self, strengths: Float[Tensor, "n"], spread: Float[Tensor, "n"] | None = None) -> dict[str, Any]:
        """The memory when strengths are known: pairs below the boundary are exchanged by flip.

        Args:
            strengths: mu of each pair; NaN where there is none.
            spread: deviation among the members.
        """
        count = int(self.share * len(strengths))
        finite = strengths[~strengths.isnan()]
        boundary = -math.inf
        if count and len(finite):
            place = min(count, len(finite) - 1)
            boundary = float(min(finite.sort().values[place], torch.zeros(())))
        return {
            "known": strengths.float(),
            "spread": torch.zeros_like(strengths) if spread is None else spread.float(),
            "boundary": boundary,
        }

    def observe(self, rows: Rows, stats: Stats, metrics: Mapping[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Strengths stay."""
        return state

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        pairs = rows.pairs
        if pairs is None:
            return rows
        known = state["known"].to(pairs.offset)
        if len(known):
            strength = known[rows.data_index[pairs.chosen]]
            pairs = replace(pairs, offset=torch.where(strength.isnan(), pairs.offset, strength))
        if self.mode.startswith("flip"):
            pairs = flipped(pairs, pairs.offset < state["boundary"])
        if self.mode.endswith("soft"):
            pairs = replace(pairs, label=pairs.offset.sigmoid())
        if not self.mode.endswith("margin"):
            pairs = replace(pairs, offset=torch.zeros_like(pairs.offset))
        return rows.with_(pairs=pairs)
