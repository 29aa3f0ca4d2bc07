"""Selective prediction: how often answers are wrong among those that a score lets through."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class RiskCoverage:
    """Risk of the best-scored answers, for every share of them.

    Args:
        coverage: k / n, [n].
        risk: share of wrong answers among the k with the highest scores, [n].
        threshold: the k-th highest score, [n].
    """

    coverage: Float[np.ndarray, "n"]
    risk: Float[np.ndarray, "n"]
    threshold: Float[np.ndarray, "n"]

    @property
    def area(self) -> float:
        """AURC, the mean risk over all coverages."""
        return float(self.risk.mean())

    def at(self, coverage: float) -> float:
        """Risk of the smallest share of answers that is at least `coverage`.

        Raises:
            ValueError: coverage outside (0, 1].
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must be in (0, 1], not {coverage}")
        return float(self.risk[np.searchsorted(self.coverage, coverage - 1e-12)])

    def threshold_for(self, risk: float) -> float | None:
        """The lowest threshold at which the risk is at most `risk`; None if even the best-scored answers exceed it.

        Answers of equal scores are let through together.
        """
        whole = np.append(np.diff(self.threshold) < 0, True)  # where no answer of the same score is left behind
        good = np.flatnonzero((self.risk <= risk + 1e-12) & whole)
        return float(self.threshold[good[-1]]) if len(good) else None


def risk_coverage(scores: Numbers, correct: Numbers) -> RiskCoverage:
    """Answers by falling score; those of equal scores count as wrong as they are on average.

        risk_k = (1 / k) sum over the k best-scored of (1 - correct)

    >>> risk_coverage([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 1]).area
    0.14583333333333331

    Args:
        scores: of each answer; NaN for one that got none, which stands last.
        correct: in [0, 1].

    Raises:
        ValueError: no answers, another number of the one than of the other, or correctness outside [0, 1].

    Source: "Selective Classification for Deep Neural Networks", 2017; AURC of "Bias-Reduced Uncertainty Estimation for
    Deep Neural Classifiers", 2019.
    """
    score, right = np.asarray(scores, dtype=float), np.asarray(correct, dtype=float)
    if score.shape != right.shape or score.ndim != 1 or not len(score):
        raise ValueError(f"scores and correct must be lists of one length, not {score.shape} and {right.shape}")
    if not bool(((right >= 0) & (right <= 1)).all()):
        raise ValueError("correct must be in [0, 1]")
    score = np.where(np.isnan(score), -np.inf, score)
    order = np.argsort(-score, kind="stable")
    kept = score[order]
    _, group, count = np.unique(-kept, return_inverse=True, return_counts=True)
    wrong = (np.bincount(group, 1 - right[order]) / count)[group]
    number = np.arange(1, len(kept) + 1)
    return RiskCoverage(number / len(kept), wrong.cumsum() / number, kept)


def abstain(scores: Numbers, threshold: float) -> np.ndarray:
    """Which answers are withheld: those with a score below the threshold, or with none.

    >>> abstain([0.9, 0.1, float("nan")], 0.5).tolist()
    [False, True, True]
    """
    score = np.asarray(scores, dtype=float)
    return ~(score >= threshold)
