"""Lagrange multipliers of rewards under constraints, and a search for the thresholds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize

from keel.core.components import component_means
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

CONSTRAINT = "constraints/"
Squash = Literal["sigmoid", "tanh", "identity"]


@part("lagrange", paper=96)
@dataclass(frozen=True)
class Lagrange:
    """One multiplier for each reward, by gradient descent on the dual; each batch is a step.

        v_m = mean reward_m - threshold_m,   g_m = s'(u_m) v_m,   u <- u - learning_rate (g + momentum g_before ...)
        lam_m = s(u_m): sigmoid for r_m >= threshold_m (mu), tanh for r_m = threshold_m, which may push down (xi),
        identity, kept at 0 or above

    lam multiplies a reward that is to be raised, so it falls where the reward is above its threshold. The multipliers
    of the `ConstrainedGAE` named `advantage` follow; metrics `constraints/m` are the mean rewards.

    Args:
        thresholds: of the mean rewards of whole completions, in the order of the reward functions.
        squash: s.
        learning_rate, momentum: of the descent.
        start: u before the first batch; the release draws it from N(0, 0.01^2).
        advantage: name of a `ConstrainedGAE` in the chain.

    Raises:
        ValueError: no threshold, or a learning rate or momentum out of range.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023. The release steps after every
    minibatch, of the same rollout.
    """

    thresholds: tuple[float, ...] = (0.5,)
    squash: Squash = "sigmoid"
    learning_rate: float = 0.1
    momentum: float = 0.1
    start: float = 0.0
    advantage: str = "constrained"

    def __post_init__(self) -> None:
        if not self.thresholds:
            raise ValueError("thresholds: at least one reward needs one")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum}")

    @property
    def owns(self) -> tuple[str, ...]:
        """The multipliers."""
        return (f"advantage.{self.advantage}.multipliers",)

    def init(self) -> dict[str, list[float]]:
        """u, and the velocity of the descent."""
        return {"u": [self.start] * len(self.thresholds), "velocity": [0.0] * len(self.thresholds)}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the mean rewards in the metrics, where `update` finds them."""
        metrics.update({f"{CONSTRAINT}{m}": mean for m, mean in enumerate(component_means(rows))})
        return state

    def update(
        self, metrics: dict[str, float], state: dict[str, Any], step: int
    ) -> tuple[dict[str, tuple[float, ...]], dict]:
        """The multipliers after a batch; a reward that no completion had leaves its own as it is."""
        u, velocity = list(state["u"]), list(state["velocity"])
        for m, threshold in enumerate(self.thresholds):
            mean = metrics.get(f"{CONSTRAINT}{m}", math.nan)
            if math.isnan(mean):
                continue
            velocity[m] = self.momentum * velocity[m] + squashed(self.squash, u[m])[1] * (mean - threshold)
            u[m] -= self.learning_rate * velocity[m]
            u[m] = max(0.0, u[m]) if self.squash == "identity" else u[m]
        values = tuple(squashed(self.squash, value)[0] for value in u)
        return {f"advantage.{self.advantage}.multipliers": values}, {"u": u, "velocity": velocity}


def squashed(squash: Squash, u: float) -> tuple[float, float]:
    """s(u) and its slope.

    >>> squashed("sigmoid", 0.0), squashed("tanh", 0.0)
    ((0.5, 0.25), (0.0, 1.0))
    """
    if squash == "identity":
        return max(0.0, u), 1.0
    if squash == "tanh":
        return math.tanh(u), 1 - math.tanh(u) ** 2
    s = 0.5 * (1 + math.tanh(u / 2))
    return s, s * (1 - s)


def search_thresholds(
    score: Callable[[tuple[float, ...]], float],
    start: Sequence[Sequence[float]],
    evaluations: int = 30,
    digits: int = 6,
) -> tuple[tuple[float, ...], float]:
    """The thresholds with the highest score, by Nelder and Mead's simplex: no gradient, and few evaluations.

    Args:
        score: of thresholds, such as the evaluation of a run under them; a point is asked for only once.
        start: the simplex, M + 1 points of M thresholds.
        evaluations: of the score, at most; the simplex of the start is among them.
        digits: points that agree to so many decimals are one.

    Returns:
        The best point that was evaluated, and its score.

    Raises:
        ValueError: start is no simplex, or it has more points than evaluations.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023 (reflection 1, expansion 2,
    contraction and shrinkage 1/2).
    """
    simplex = np.asarray(start, dtype=float)
    if simplex.ndim != 2 or simplex.shape[0] != simplex.shape[1] + 1:
        raise ValueError("start must be M + 1 points of M thresholds")
    if evaluations < len(simplex):
        raise ValueError(f"evaluations must be at least {len(simplex)}, the points of the start")
    known: dict[tuple[float, ...], float] = {}

    def cost(point: np.ndarray) -> float:
        key = tuple(round(float(x), digits) for x in point)
        if key not in known:
            known[key] = float(score(key))
        return -known[key]

    options = {"initial_simplex": simplex, "maxfev": evaluations, "xatol": 0.0, "fatol": 0.0}
    minimize(cost, simplex[0], method="Nelder-Mead", options=options)
    best = max(known, key=lambda key: known[key])
    return best, known[best]


class _Asked(Exception):
    """A point whose score is not known yet."""

    def __init__(self, point: tuple[float, ...]):
        self.point = point


def next_point(
    start: Sequence[Sequence[float]], known: Sequence[tuple[tuple[float, ...], float]], digits: int = 6
) -> tuple[float, ...]:
    """What Nelder and Mead's simplex asks for next, once these scores are known.

    The search is run again from its start, on the known scores, to where it needs one more: so the scores are all that
    a search in progress has to remember.

    Args:
        start: the simplex, M + 1 points of M thresholds.
        known: points with their scores, larger is better.
        digits: points that agree to so many decimals are one.

    >>> next_point([(0.0,), (1.0,)], [((0.0,), 0.0), ((1.0,), 1.0)])  # beyond the better one: reflection
    (2.0,)
    """
    scores = dict(known)

    def score(point: tuple[float, ...]) -> float:
        if point not in scores:
            raise _Asked(point)
        return scores[point]

    try:
        return search_thresholds(score, start, evaluations=10 * len(scores) + 10 * len(start), digits=digits)[0]
    except _Asked as asked:
        return asked.point


@part("threshold_search", paper=96)
@dataclass(frozen=True)
class ThresholdSearch:
    """Thresholds looked for within one run, by Nelder and Mead's simplex on a score that the policy reaches under them.

    Every `every` batches the mean of `metric` over the batches since is the score of the thresholds in force, and the
    next point of the simplex takes their place; a point that comes again is not tried again. After `evaluations` the
    best one stays. The policy moves on meanwhile, so that early scores are of an earlier policy.

    Args:
        start: thresholds to begin with.
        width: of the first simplex: the start, and the start with this added to each threshold in turn.
        metric: what is to be large, a reward that is not under a constraint, say.
        every: batches for each point.
        evaluations: points at most.
        path: where the thresholds live.

    Raises:
        ValueError: no threshold, width 0, every below 1, or fewer evaluations than the first simplex has points.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023, which evaluates on held-out data.
    """

    start: tuple[float, ...] = (0.5,)
    width: float = 0.1
    metric: str = "reward"
    every: int = 20
    evaluations: int = 30
    path: str = "controllers.multipliers.thresholds"

    def __post_init__(self) -> None:
        if not self.start:
            raise ValueError("start: at least one threshold is looked for")
        if self.width == 0 or not math.isfinite(self.width):
            raise ValueError(f"width must be a number other than 0, not {self.width}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.evaluations <= len(self.start):
            raise ValueError(f"evaluations must be at least {len(self.start) + 1}, the points of the first simplex")

    @property
    def simplex(self) -> list[tuple[float, ...]]:
        """The points to begin with."""
        corners = [tuple(x + self.width * (i == m) for i, x in enumerate(self.start)) for m in range(len(self.start))]
        return [self.start, *corners]

    def init(self) -> dict[str, Any]:
        """The thresholds in force, the metric since, and the scores of earlier points."""
        return {"point": list(self.start), "since": [], "known": []}

    def update(
        self, metrics: dict[str, float], state: dict[str, Any], step: int
    ) -> tuple[dict[str, tuple[float, ...]], dict[str, Any]]:
        """The thresholds for the next batch; a batch without the metric does not count."""
        value = metrics.get(self.metric, math.nan)
        since = state["since"] if math.isnan(value) else [*state["since"], value]
        known = [(tuple(point), score) for point, score in state["known"]]
        point = tuple(state["point"])
        if len(since) >= self.every and len(known) < self.evaluations:
            known, since = [*known, (point, math.fsum(since) / len(since))], []
            best = max(known, key=lambda one: one[1])[0]
            point = next_point(self.simplex, known) if len(known) < self.evaluations else best
        since = since if len(known) < self.evaluations else []
        return {self.path: point}, {"point": list(point), "since": since, "known": [[list(p), x] for p, x in known]}
