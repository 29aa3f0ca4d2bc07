"""Weights of objectives from how fast, and how steadily, each has moved of late."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keel.core.components import component_means
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

OBJECTIVE = "objectives/"


@part("objective_weights", paper=13)
@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the summed rewards: more for an objective that no longer improves, and for one that is volatile.

        l_k = 1 - mean reward_k of a batch,  c_k = mean of the newer half of the window / mean of the older half,
        i_k = std / mean over the window,    s_k = c_k i_k,    weight_k = K e^(s_k / temperature) / sum_j e^(s_j / ...)

    The weights sum to K; until the window is full they are 1. An objective that stands at its best has c = 1 and i = 0.
    Rewards are taken to lie in [0, 1]; one whose mean over the window is 1 or more counts as at its best. The loss of a
    term on rehearsed rows may be one more objective, l its mean without the coefficient.

    Args:
        window: batches that are looked back on, an even number.
        temperature: of the softmax; large is static weights.
        combine: product c i, or sum c + i.
        cap: largest weight, for an objective that is noisy and cannot improve; None is none. What is cut is not given
            to the others.
        transform: name of the `WeightedSum` among the transforms that the weights are for.
        term: name of such a term, whose coefficient becomes `coef` times its weight; None is none.
        coef: at weight 1.

    Raises:
        ValueError: a window that is odd or below 2, a temperature, cap or coef that is not positive.

    Source: "Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models", 2025
    (RECAP); formulas and constants are reconstructed from its summary.
    """

    window: int = 8
    temperature: float = 1.0
    combine: Literal["product", "sum"] = "product"
    cap: float | None = None
    transform: str = "sum"
    term: str | None = None
    coef: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 2 or self.window % 2:
            raise ValueError(f"window must be an even number from 2 on, not {self.window}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap must be positive, not {self.cap}")
        if not self.coef > 0:
            raise ValueError(f"coef must be positive, not {self.coef}")

    @property
    def owns(self) -> tuple[str, ...]:
        """The weights, and the coefficient of the term."""
        weights = f"transforms.{self.transform}.weights"
        return (weights,) if self.term is None else (weights, f"terms.{self.term}.coef")

    def init(self) -> dict[str, list]:
        """The last numbers of each objective."""
        return {"history": []}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves 1 - mean of each reward, and the term's loss, in the metrics for `update`; nan where none applied."""
        found = [1 - mean for mean in component_means(rows)]
        if self.term is not None:
            found.append(metrics.get(f"rehearsal/{self.term}", math.nan))
        metrics.update({f"{OBJECTIVE}{k}": value for k, value in enumerate(found)})
        return state

    def update(self, metrics: dict[str, float], state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict]:
        """The weights after a batch; nothing before the window is full."""
        history = [list(past) for past in state["history"]]
        k = 0
        while f"{OBJECTIVE}{k}" in metrics:
            history += [[]] if k == len(history) else []
            if not math.isnan(metrics[f"{OBJECTIVE}{k}"]):
                history[k] = [*history[k], metrics[f"{OBJECTIVE}{k}"]][-self.window :]
            k += 1
        state = {"history": history}
        if not history or min(map(len, history)) < self.window:
            return {}, state
        weights, values = self.weights(history), {}
        if self.term is not None:
            values[f"terms.{self.term}.coef"] = self.coef * weights[-1]
            weights = weights[:-1]
        return {f"transforms.{self.transform}.weights": weights, **values}, state

    def weights(self, history: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """lam_k from full windows."""
        scores = [self._score(past) / self.temperature for past in history]
        top = max(scores)
        shares = [math.exp(score - top) for score in scores]
        found = [len(shares) * share / math.fsum(shares) for share in shares]
        return tuple(found if self.cap is None else [min(self.cap, weight) for weight in found])

    def _score(self, past: Sequence[float]) -> float:
        convergence, instability = signals(past)
        return convergence * instability if self.combine == "product" else convergence + instability


def signals(past: Sequence[float]) -> tuple[float, float]:
    """Convergence and instability of a window; (1, 0) for one that stands at 0.

    >>> [round(x, 6) for x in signals((0.50, 0.48, 0.45, 0.40))]
    [0.867347, 0.082331]
    """
    half = len(past) // 2
    older, newer = math.fsum(past[:half]) / half, math.fsum(past[half:]) / (len(past) - half)
    mean = math.fsum(past) / len(past)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
    return (newer / older if older > 0 else 1.0), (spread / mean if mean > 0 else 0.0)
