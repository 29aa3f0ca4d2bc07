"""What entropy regularisers remember: where the entropy began, what it was in each turn, and how far training is."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from keel.core.aggregate import token_weight, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.entropy import check_peaks, nucleus_entropy, peaks, row_mean, turns
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats

PEAK = "entropy/peak"
TURN = "entropy/turn/"


@part("entropy_anchor", paper=52)
@dataclass(frozen=True)
class EntropyAnchor:
    """Sets the anchor of the term named `term` to the mean peak entropy of the first batch, and keeps it.

    It costs a pass over each batch, for the metric `entropy/peak`; an anchor given to the term costs none.

    Args:
        term: name of an `AnchoredEntropy` among the terms.
        quantile, top_p, top_k: of the peak tokens, as in `PeakEntropy`.

    Raises:
        ValueError: quantile outside [0, 1), top_p outside (0, 1], or top_k below 1.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", 2025 (SIREN).
    """

    term: str = "entropy"
    quantile: float = 0.8
    top_p: float = 0.8
    top_k: int | None = 10000

    def __post_init__(self) -> None:
        check_peaks(self.quantile, self.top_p, self.top_k)

    @property
    def needs(self) -> tuple[Entropy, ...]:
        """The entropy of the policy that sampled."""
        return (nucleus_entropy(self.top_p, self.top_k, "old"),)

    @property
    def owns(self) -> tuple[str, ...]:
        """The anchor."""
        return (f"terms.{self.term}.anchor",)

    def init(self) -> dict[str, Any]:
        """No anchor yet."""
        return {"anchor": None}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the batch's mean in the metrics, where `update` finds it."""
        value = stats[self.needs[0]]
        metrics[PEAK] = float(row_mean(value, rows, peaks(value, rows.mask, self.quantile)))
        return state

    def update(self, metrics: dict[str, float], state: dict[str, Any], step: int) -> tuple[dict[str, float], dict]:
        """The anchor, once there is one."""
        anchor = metrics.get(PEAK) if state["anchor"] is None else state["anchor"]
        return {} if anchor is None else {f"terms.{self.term}.anchor": anchor}, {"anchor": anchor}


@part("turn_entropy", paper=100)
@dataclass(frozen=True)
class TurnEntropy:
    """Sets the history of the `EntropyBand` named `term`: the mean over past batches of each turn's token entropy.

    A batch without a turn says nothing of it, where the release pads with zeros, which drags its mean down.

    Args:
        term: name of a summand among the terms, whose penalty is an `EntropyBand`.

    Source: "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning", 2025.
    """

    term: str = "band"
    needs = (Entropy(of=("old",)),)

    @property
    def owns(self) -> tuple[str, ...]:
        """The history."""
        return (f"terms.{self.term}.penalty.history",)

    def init(self) -> dict[str, list[float]]:
        """Sums and counts, turn by turn."""
        return {"sum": [], "count": []}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the mean entropy of each turn of the batch in the metrics."""
        turn, weight, entropy = turns(rows), token_weight(rows), stats[self.needs[0]]
        for k in turn[weight > 0].unique().tolist():
            metrics[f"{TURN}{k}"] = float(weighted_mean(entropy, torch.where(turn == k, weight, 0.0)))
        return state

    def update(
        self, metrics: dict[str, float], state: dict[str, Any], step: int
    ) -> tuple[dict[str, tuple[float, ...]], dict]:
        """The means so far; turns after the first that was never seen have none."""
        found = {int(name.removeprefix(TURN)): value for name, value in metrics.items() if name.startswith(TURN)}
        size = max([len(state["sum"]), *(k + 1 for k in found)])
        total, count = ([*state[key], *[0.0] * (size - len(state[key]))] for key in ("sum", "count"))
        for k, value in found.items():
            total[k] += value
            count[k] += 1
        seen = count.index(0.0) if 0.0 in count else size
        history = tuple(t / n for t, n in zip(total[:seen], count[:seen], strict=True))
        return {f"terms.{self.term}.penalty.history": history}, {"sum": total, "count": count}


@part("phase_weight", paper=100)
@dataclass(frozen=True)
class PhaseWeight:
    """The value at `path` is scale w(e): nearly constant in the first half of training, fading in the second.

        w(e) = 1 - 0.2 (1 - exp(-2 e / h)) for e <= h,   0.8 exp(-3 (e - h) / (E - h)) afterwards,   h = E // 2

    Args:
        path: where the value lives, `terms.band.coef`.
        scale: the value at the start.
        steps: E, in batches.

    Raises:
        ValueError: steps below 2.

    Source: "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning", 2025; as released, w
    falls by 0.027067 where the halves meet.
    """

    path: str
    scale: float = 1e-4
    steps: int = 150

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, not {self.steps}")

    def init(self) -> dict[str, float]:
        """Nothing to remember: the step decides."""
        return {}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The value for batch `step`, counted from 0."""
        return {self.path: self.scale * phase_weight(step, self.steps)}, state


def phase_weight(step: int, steps: int) -> float:
    """w(e) of `PhaseWeight`.

    >>> [round(phase_weight(e, 150), 6) for e in (0, 37, 75, 76, 150)]
    [1.0, 0.874563, 0.827067, 0.768632, 0.03983]
    """
    half = steps // 2
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (step - half) / (steps - half))
