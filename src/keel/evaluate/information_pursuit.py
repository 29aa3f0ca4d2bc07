"""Which question to ask next, by the expected size of conformal prediction sets instead of by entropies.

    scores       s_i = 1 - f(y_i | H_i) on n calibration histories of the same round
    threshold    q = the ceil((n + 1)(1 - alpha))-th smallest score, 1 (all labels) where n is too small
    set          C(H) = { y : 1 - f(y | H) <= q };   P(y in C) in [1 - alpha, 1 - alpha + 1 / (n + 1)]
    query        argmin_q log E_answer max(|C(H + (q, answer))|, 1);   stop where |C| <= 1, or no query makes it smaller
    bound        H(Y | X) <= h_b(alpha) + alpha log |Y| + log E|C|, for alpha <= 1/2

The coverage holds for histories that are exchangeable with those of the calibration: queries that are chosen by looking
at the answers break that, so calibrate on histories of random queries, or on a part of the data that was pursued in the
same way; and every round has a threshold of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


def conformal_threshold(scores: Float[np.ndarray, "n"], alpha: float) -> float:
    """The split-conformal quantile of scores in [0, 1].

    >>> conformal_threshold(np.arange(1, 10) / 10, 0.1), conformal_threshold(np.arange(1, 9) / 10, 0.1)
    (0.9, 1.0)

    Raises:
        ValueError: alpha outside (0, 1), or no scores.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")
    if not len(scores):
        raise ValueError("scores must hold at least one example")
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else 1.0


def calibrate(probs: Sequence[Float[np.ndarray, "n Y"]], labels: Int[np.ndarray, "n"], alpha: float) -> list[float]:
    """A threshold for each round, from the model's probabilities after so many queries on the same examples.

    Args:
        probs: of each round, first the one before any query.
        labels: y of each example.
        alpha: share of sets that may miss.

    Raises:
        ValueError: alpha outside (0, 1), or no examples.
    """
    place = np.arange(len(labels))
    return [conformal_threshold(1 - found[place, labels], alpha) for found in probs]


def prediction_sets(probs: Float[np.ndarray, "*n Y"], threshold: float) -> Bool[np.ndarray, "*n Y"]:
    """Labels with 1 - f <= q, up to rounding."""
    return 1 - probs <= threshold + 1e-12


def set_sizes(probs: Float[np.ndarray, "*n Y"], threshold: float) -> Float[np.ndarray, "*n"]:
    """|C|, an empty set counted as 1."""
    return np.asarray(np.maximum(prediction_sets(probs, threshold).sum(-1), 1), dtype=float)


def expected_log_size(
    probs: Float[np.ndarray, "Q A Y"], answers: Float[np.ndarray, "Q A"], threshold: float
) -> Float[np.ndarray, "Q"]:
    """log E|C| after each query.

    Args:
        probs: f(y | H + (q, a)) for each query and answer.
        answers: probability of each answer, or shares of sampled answers; rows sum to one.
        threshold: of the round after the query.
    """
    return np.log((answers * set_sizes(probs, threshold)).sum(-1))


def expected_entropy(probs: Float[np.ndarray, "Q A Y"], answers: Float[np.ndarray, "Q A"]) -> Float[np.ndarray, "Q"]:
    """H(Y | answer) of each query, as the model's probabilities have it: what information pursuit minimises."""
    safe = np.where(probs > 0, probs, 1.0)
    return (answers * -(probs * np.log(safe)).sum(-1)).sum(-1)


def entropy_bound(alpha: float, labels: int, size: float) -> float:
    """h_b(alpha) + alpha log |Y| + log E|C|, above the entropy that is left; in nats.

    >>> round(entropy_bound(0.1, 20, 3.0), 6)
    1.723268

    Args:
        alpha: probability that a set misses, at most.
        labels: |Y|.
        size: E|C|.

    Raises:
        ValueError: alpha outside [0, 1/2], where the bound holds, or a size below 1.
    """
    if not 0 <= alpha <= 0.5:
        raise ValueError(f"alpha must be in [0, 0.5], not {alpha}")
    if labels < 1 or size < 1:
        raise ValueError(f"labels and size must be at least 1, not {labels} and {size}")
    binary = sum(-p * math.log(p) for p in (alpha, 1 - alpha) if p > 0)
    return binary + alpha * math.log(labels) + math.log(size)


@dataclass(frozen=True)
class Query:
    """What to do next.

    Args:
        index: the query with the smallest value; -1 where it is time to answer.
        value: its expected log set size, or the present one.
        size: |C| now.
    """

    index: int
    value: float
    size: float


def choose_query(
    now: Float[np.ndarray, "Y"],
    probs: Float[np.ndarray, "Q A Y"],
    answers: Float[np.ndarray, "Q A"],
    thresholds: tuple[float, float],
    patient: bool = True,
) -> Query:
    """The query with the smallest expected set, or none if the set is a single label.

    Args:
        now: f(y | H).
        probs, answers: see `expected_log_size`.
        thresholds: of this round and of the next.
        patient: go on where no query is expected to make the set smaller. Sizes are coarse and every round has another
            threshold, so that this is often so for one round only.
    """
    size = float(set_sizes(now, thresholds[0]))
    if size <= 1 or not len(probs):
        return Query(-1, math.log(size), size)
    value = expected_log_size(probs, answers, thresholds[1])
    best = int(value.argmin())
    if not patient and value[best] >= math.log(size) - 1e-12:
        return Query(-1, math.log(size), size)
    return Query(best, float(value[best]), size)


@dataclass(frozen=True)
class Pursuit:
    """How one example went: queries in their order, the label that was named, and the set at the end."""

    queries: tuple[int, ...]
    label: int
    labels: frozenset[int]


Now = Float[np.ndarray, "Y"]  # f(y | H)
After = Float[np.ndarray, "Q A Y"]  # f(y | H + (q, a)) for the queries that are left
Chances = Float[np.ndarray, "Q A"]  # of their answers
Belief = Callable[[Sequence[tuple[int, int]]], Now]  # from a history of (query, answer)
Answers = Callable[[Sequence[tuple[int, int]], int], Float[np.ndarray, "A"]]  # chances of the answers to one query
Rule = Callable[[Now, After, Chances, int], int]  # and the number of queries so far


@dataclass(frozen=True)
class SetSize:
    """The rule of the conformal pursuit: smallest expected set, with a threshold for each round.

    Args:
        thresholds: see `calibrate`; the last one holds for all rounds that follow.
        patient: see `choose_query`.
    """

    thresholds: tuple[float, ...]
    patient: bool = True

    def __call__(
        self,
        now: Float[np.ndarray, "Y"],
        probs: Float[np.ndarray, "Q A Y"],
        answers: Float[np.ndarray, "Q A"],
        done: int,
    ) -> int:
        """Place of the next query among those that are left, -1 to stop."""
        return choose_query(now, probs, answers, (self.at(done), self.at(done + 1)), self.patient).index

    def at(self, done: int) -> float:
        """The threshold after so many queries."""
        return self.thresholds[min(done, len(self.thresholds) - 1)]


@dataclass(frozen=True)
class Confidence:
    """The rule of plain information pursuit: smallest expected entropy, until one label has enough probability.

    Args:
        enough: probability at which to stop.
    """

    enough: float

    def __call__(
        self,
        now: Float[np.ndarray, "Y"],
        probs: Float[np.ndarray, "Q A Y"],
        answers: Float[np.ndarray, "Q A"],
        done: int,
    ) -> int:
        """Place of the next query among those that are left, -1 to stop."""
        return -1 if now.max() >= self.enough else int(expected_entropy(probs, answers).argmin())


def pursue(
    belief: Belief,
    simulated: Answers,
    answer: Callable[[int], int],
    queries: int,
    rule: Rule,
    limit: int | None = None,
    threshold: float | None = None,
) -> Pursuit:
    """Ask until the rule has enough, then name the likeliest label.

    Args:
        belief: the model's f(y | H).
        simulated: probabilities of the answers to a query, as far as they are known.
        answer: the real answer.
        queries: Q, each asked once at most.
        rule: chooses or stops.
        limit: queries at most; all without it.
        threshold: of the set at the end; the named label alone without it.
    """
    history: list[tuple[int, int]] = []
    left = list(range(queries))
    while left and (limit is None or len(history) < limit):
        answers = np.stack([simulated(history, q) for q in left])
        probs = np.stack([[belief([*history, (q, a)]) for a in range(answers.shape[1])] for q in left])
        chosen = rule(belief(history), probs, answers, len(history))
        if chosen < 0:
            break
        asked = left.pop(chosen)
        history.append((asked, answer(asked)))
    now = belief(history)
    label = int(now.argmax())
    kept = {label} if threshold is None else set(prediction_sets(now, threshold).nonzero()[0].tolist())
    return Pursuit(tuple(q for q, _ in history), label, frozenset(kept))
