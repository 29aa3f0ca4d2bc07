"""Success within k tries, and the answer that k tries agree on."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

Counts = int | Sequence[int] | np.ndarray  # one number, or one for each prompt


def avg_at_k(n: Counts, correct: Counts) -> Float[np.ndarray, "*N"]:
    """Share of correct samples, c / n: the expected score of one try, the same for every k.

    The k in `avg@k` says how many samples the average is over.

    Args:
        n: samples of each prompt, any shape that fits `correct`.
        correct: correct ones among them.
    """
    samples, right = _counts(n, correct, 1)
    return np.asarray(right / samples)


def pass_at_k(n: Counts, correct: Counts, k: int) -> Float[np.ndarray, "*N"]:
    """Probability that at least one of k samples drawn without replacement is correct: unbiased for k fresh tries.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j=0}^{k-1} (n - c - j) / (n - j)

    The plug-in 1 - (1 - c/n)^k is biased low.

    Args:
        n: samples of each prompt, any shape that fits `correct`.
        correct: c, correct ones among them.
        k: tries, at most n.

    Raises:
        ValueError: k outside [1, n], or c outside [0, n].

    Source: "Evaluating Large Language Models Trained on Code", 2021.

    >>> float(pass_at_k(10, 3, 5).round(7))
    0.9166667
    """
    samples, right = _counts(n, correct, k)
    none = np.ones(np.broadcast_shapes(samples.shape, right.shape))
    for j in range(k):
        none = none * np.maximum(samples - right - j, 0.0) / (samples - j)
    return np.asarray(1.0 - none)


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence | np.ndarray, k: int) -> float:
    """Expected correctness of the most frequent answer among k of the n samples of one prompt.

    The expectation is over all subsets of size k, without replacement, and over the winner of a tie, each with equal
    probability. None means "no answer": it takes a place in the subset and never wins against an answer; a subset
    without any answer is not correct. An answer judged differently in several samples counts with its mean.

    It is exact. With every sample drawn on its own with probability p = k / n and the size conditioned on, the number
    of votes for an answer given c times is binomial, so that the answer wins with probability

        sum_v P(v votes of c) * int_0^1 [z^(k - v)] prod_rivals E(z^u x^[u = v]; u <= v) dx  /  P(size = k)

    where the integral over x, by Gauss-Legendre of sufficient degree, turns t tied rivals into 1 / (t + 1).

    Args:
        answers: canonical answers of the n samples.
        correct: their correctness, in [0, 1].
        k: votes, at most n.

    Raises:
        ValueError: k outside [1, n], or lengths that differ.

    >>> round(majority_at_k("AAABBC", [1, 1, 1, 0, 0, 0], 4), 12)
    0.7
    """
    judged = np.asarray(correct, dtype=float)
    if len(answers) != len(judged):
        raise ValueError(f"{len(answers)} answers and {len(judged)} judgements: a sample needs one of each")
    if not 1 <= k <= len(answers):
        raise ValueError(f"k must be in [1, {len(answers)}], the number of samples, not {k}")
    count = Counter(answer for answer in answers if answer is not None)
    credit = dict.fromkeys(count, 0.0)
    for answer, credited in zip(answers, judged.tolist(), strict=True):
        if answer is not None:
            credit[answer] += credited
    wins = _win_probabilities(tuple(sorted(count.values())), len(answers) - count.total(), k)
    return float(sum(credit[answer] / votes * wins[votes] for answer, votes in count.items()))


def distinct_answers(answers: Sequence[Hashable | None]) -> int:
    """How many different answers the samples of one prompt gave; "no answer" (None) is none."""
    return len({answer for answer in answers if answer is not None})


@lru_cache(maxsize=65536)
def _win_probabilities(counts: tuple[int, ...], silent: int, k: int) -> dict[int, float]:
    """Probability that one given answer wins, by how often it was given; `silent` samples gave none."""
    n = sum(counts) + silent
    if k == n:
        most = max(counts, default=0)
        return {c: (1.0 / counts.count(c) if c == most else 0.0) for c in set(counts)}
    p = k / n
    return {
        own: sum(
            _binomial(own, p, votes) * _share_of_ties(_without(counts, own), silent, p, votes, k - votes)
            for votes in range(1, min(own, k) + 1)
        )
        / _binomial(n, p, k)
        for own in set(counts)
    }


def _share_of_ties(rivals: list[int], silent: int, p: float, votes: int, left: int) -> float:
    """E[1 / (1 + tied rivals)] where the `left` other places hold no rival with more than `votes`, and 0 elsewhere."""
    nodes, weights = np.polynomial.legendre.leggauss(left // votes // 2 + 1)
    ties = (nodes + 1) / 2
    ways = np.zeros((len(ties), left + 1))
    ways[:, 0] = 1.0
    for rival in rivals:
        grown = np.zeros_like(ways)
        for u in range(min(votes, rival, left) + 1):
            grown[:, u:] += _binomial(rival, p, u) * ways[:, : left + 1 - u] * (ties[:, None] if u == votes else 1.0)
        ways = grown
    total = sum(_binomial(silent, p, u) * ways[:, left - u] for u in range(min(silent, left) + 1))
    return float(weights @ total / 2)


def _without(counts: tuple[int, ...], own: int) -> list[int]:
    rest = list(counts)
    rest.remove(own)
    return rest


@lru_cache(maxsize=65536)
def _binomial(n: int, p: float, u: int) -> float:
    """C(n, u) p^u (1 - p)^(n - u) for p in (0, 1)."""
    ways = math.lgamma(n + 1) - math.lgamma(u + 1) - math.lgamma(n - u + 1)
    return math.exp(ways + u * math.log(p) + (n - u) * math.log1p(-p))


def _counts(n: Counts, correct: Counts, k: int) -> tuple[np.ndarray, np.ndarray]:
    samples, right = np.asarray(n, dtype=float), np.asarray(correct, dtype=float)
    if k < 1 or (samples < k).any():
        raise ValueError(f"k must be at least 1 and at most the number of samples ({samples.min():g}), not {k}")
    if (right < 0).any() or (right > samples).any():
        raise ValueError("the number of correct samples must lie between 0 and the number of samples")
    return samples, right
