"""How far a model that has unlearnt is from one that never learnt: the KL divergence of margins (KLoM).

    phi = log p_y - log(1 - p_y) = z_y - logsumexp_{k != y} z_k

Of each point, over ensembles of models, the histograms of phi of those that were made to forget it and of those that
were trained without it (the oracles) are compared. Ensembles of one and the same kind are not at 0: with 100 models a
side the mean is near 0.35, so that the floor, two halves of the oracles, is reported beside.

Source: "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", 2024; bins and smoothing as in the authors'
benchmark, RoyRin/data-unlearning-bench.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BINS, SMOOTHING, LARGEST = 20, 1e-5, 100.0
FEWEST = 100  # models of an ensemble, below which the histograms say little
QUANTILES = (0.5, 0.9, 0.95, 0.99)


def margin(log_prob: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """log p - log(1 - p) of log-probabilities, of a token or of a whole completion; within [-100, 100].

    >>> margin(np.log(np.array([0.5, 0.9]))).round(6)
    array([0.      , 2.197225])

    Raises:
        ValueError: a log-probability above 0.
    """
    value = np.asarray(log_prob, dtype=float)
    if (value > 0).any():
        raise ValueError("log-probabilities are at most 0")
    with np.errstate(divide="ignore"):
        rest = np.where(value > -0.5, np.log(-np.expm1(value)), np.log1p(-np.exp(value)))
    return np.clip(value - rest, -LARGEST, LARGEST)


def margin_of_logits(logits: Float[np.ndarray, "*n V"], label: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """z_y - logsumexp over all others; within [-100, 100].

    >>> margin_of_logits(np.log(np.array([[0.7, 0.2, 0.1]])), np.array([0])).round(6)
    array([0.847298])
    """
    z = np.asarray(logits, dtype=float)
    own = np.take_along_axis(z, np.asarray(label)[..., None], -1)[..., 0]
    others = z.copy()
    np.put_along_axis(others, np.asarray(label)[..., None], -np.inf, -1)
    return np.clip(own - np.logaddexp.reduce(others, -1), -LARGEST, LARGEST)


@dataclass(frozen=True)
class KLoM:
    """KL(unlearnt || oracle) in nats between histograms of margins, point by point.

    Both sides of a point share their bins, of equal width between the least and the largest margin of either. Where the
    unlearnt side has mass and the oracle none, the oracle's share is taken to be `smoothing`.

    Args:
        bins: of a histogram.
        smoothing: the least share of a bin.

    Raises:
        ValueError: fewer than two bins, or a smoothing outside (0, 1).
    """

    bins: int = BINS
    smoothing: float = SMOOTHING

    def __post_init__(self) -> None:
        if self.bins < 2 or not 0 < self.smoothing < 1:
            raise ValueError(f"bins must be at least 2, smoothing in (0, 1), not {self.bins} and {self.smoothing}")

    def __call__(self, unlearnt: Float[np.ndarray, "N P"], oracle: Float[np.ndarray, "M P"]) -> Float[np.ndarray, "P"]:
        """Of margins of P points under N and M models.

        Raises:
            ValueError: no models, or other points on either side, or a margin that is no number.
        """
        first, second = np.asarray(unlearnt, dtype=float), np.asarray(oracle, dtype=float)
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) * len(second):
            raise ValueError(f"margins are [models, points] of the same points, not {first.shape} and {second.shape}")
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("a margin is no finite number")
        low, high = np.minimum(first.min(0), second.min(0)), np.maximum(first.max(0), second.max(0))
        width = np.where(high > low, (high - low) / self.bins, 1.0)
        p, q = (self._shares(side, low, width) for side in (first, second))
        q = np.maximum(q, self.smoothing)
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0).sum(1)

    def _shares(self, margins: np.ndarray, low: np.ndarray, width: np.ndarray) -> Float[np.ndarray, "P b"]:
        place = np.minimum(((margins - low) / width).astype(int), self.bins - 1)
        points = margins.shape[1]
        flat = place + self.bins * np.arange(points)
        counts = np.bincount(flat.ravel(), minlength=self.bins * points).reshape(points, self.bins)
        return counts / len(margins)

    def floor(self, oracle: Float[np.ndarray, "M P"]) -> Float[np.ndarray, "P"]:
        """What oracles come to against oracles: their first half against the second.

        Raises:
            ValueError: fewer than two of them.
        """
        half = len(oracle) // 2
        if not half:
            raise ValueError("two oracles at least have a floor")
        return self(np.asarray(oracle)[:half], np.asarray(oracle)[half : 2 * half])


@dataclass(frozen=True)
class Forgotten:
    """KLoM over one set of points.

    Args:
        mean: over the points.
        quantiles: upper ones, by their level.
        floor: mean of the floor, to which two halves of the oracles come.
        points, models, oracles: numbers of each.
        few: whether an ensemble is smaller than the 100 models that the metric is made for.
    """

    mean: float
    quantiles: Mapping[float, float]
    floor: float
    points: int
    models: int
    oracles: int
    few: bool


def forgetting(
    unlearnt: Mapping[str, Float[np.ndarray, "N P"]],
    oracle: Mapping[str, Float[np.ndarray, "M P"]],
    metric: KLoM = KLoM(),
    quantiles: Sequence[float] = QUANTILES,
) -> dict[str, Forgotten]:
    """KLoM of each set of points by itself: those to forget, those to retain, those for validation.

    Args:
        unlearnt, oracle: margins [models, points] of each set, by name.
        metric: bins and smoothing.
        quantiles: levels in [0, 1].

    Raises:
        ValueError: sets of other names, or what the metric refuses.
    """
    if unlearnt.keys() != oracle.keys():
        raise ValueError(f"sets {sorted(unlearnt)} and {sorted(oracle)} are not the same")
    found = {}
    for name, margins in unlearnt.items():
        values, models, oracles = metric(margins, oracle[name]), len(margins), len(oracle[name])
        levels = {level: float(np.quantile(values, level)) for level in quantiles}
        floor = float(metric.floor(oracle[name]).mean())
        few = min(models, oracles) < FEWEST
        found[name] = Forgotten(float(values.mean()), levels, floor, len(values), models, oracles, few)
    return found
