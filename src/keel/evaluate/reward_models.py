"""What a reward model is worth: accuracy and calibration on comparisons, and where optimising it stops to pay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from keel.core.choice import counter_seed
from keel.evaluate.evaluation import Completion, Evaluation
from keel.evaluate.intervals import Interval, mean_interval

BINS = 10
RESAMPLES = 400
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Bin:
    """Pairs whose order is predicted with a confidence in one range.

    Args:
        low, high: of the confidence.
        count: pairs in the range.
        confidence: their mean confidence.
        accuracy: the share of them whose order is predicted right; a tie counts one half.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """A reliability table, and the expected calibration error sum_b n_b / N |accuracy_b - confidence_b|."""

    bins: tuple[Bin, ...]
    error: float


def calibration(margin: Float[np.ndarray, "N"], bins: int = BINS) -> Calibration:
    """How far the confidence of a Bradley-Terry model, sigmoid |R_w - R_l|, is from the share that it gets right.

    Args:
        margin: R_w - R_l of each pair; the prediction is right where it is above 0.
        bins: ranges of equal width between one half and one; empty ones are left out.

    Raises:
        ValueError: no pairs, or fewer than one bin.

    >>> table = calibration(np.array([2.0, 2.0, 2.0, -2.0]))
    >>> round(table.bins[0].confidence, 6), table.bins[0].accuracy, round(table.error, 6)
    (0.880797, 0.75, 0.130797)
    """
    if not len(margin) or bins < 1:
        raise ValueError(f"a reliability table needs pairs and bins, not {len(margin)} and {bins}")
    margin = np.asarray(margin, dtype=float)
    confidence, right = _confidence(margin), _right(margin)
    place = np.minimum((2 * (confidence - 0.5) * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        own = place == b
        if own.any():
            ends = 0.5 + 0.5 * b / bins, 0.5 + 0.5 * (b + 1) / bins
            found.append(Bin(*ends, int(own.sum()), float(confidence[own].mean()), float(right[own].mean())))
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in found) / len(margin)
    return Calibration(tuple(found), error)


def comparison_evaluation(
    chosen: Float[np.ndarray, "N"],
    rejected: Float[np.ndarray, "N"],
    index: Sequence[int] = (),
    completions: Sequence[Completion] = (),
    seed: int = 0,
    domains: Sequence[str] = (),
) -> Evaluation:
    """A reward model on held-out pairs: `accuracy`, `log_loss`, `margin`, `calibration_error` and the mean `reward`.

    Where the pairs are of several domains, `accuracy/NAME` is that of each.

    Args:
        chosen, rejected: scores of both sides.
        index: number of each pair.
        completions: a few to look at.
        seed: of the resampling.
        domains: of each pair.

    Raises:
        ValueError: no pairs, or domains of another number.
    """
    margin = np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)
    if not len(margin):
        raise ValueError("there are no pairs to measure with")
    values = {
        "accuracy": _right(margin),
        "log_loss": np.logaddexp(0.0, -margin),
        "margin": margin,
        "reward": (np.asarray(chosen, dtype=float) + np.asarray(rejected, dtype=float)) / 2,
    }
    values |= by_domain("accuracy", values["accuracy"], domains)
    metrics = {name: mean_interval(column, seed=seed) for name, column in values.items()}
    metrics["calibration_error"] = _error_interval(margin, seed)
    return Evaluation(
        metrics=metrics,
        values={name: tuple(column.tolist()) for name, column in values.items()},
        samples=2,
        seed=seed,
        index=tuple(index),
        completions=tuple(completions),
    )


def by_domain(metric: str, values: Float[np.ndarray, "N"], domains: Sequence[str]) -> dict[str, Float[np.ndarray, "N"]]:
    """The values of each domain as a column `METRIC/NAME`, NaN elsewhere; none where all are of one domain.

    Pairs without a domain, beside others that have one, are those of the domain "other".

    >>> by_domain("accuracy", np.array([1.0, 0.0, 1.0]), ["maths", "", "maths"])
    {'accuracy/maths': array([ 1., nan,  1.]), 'accuracy/other': array([nan,  0., nan])}

    Raises:
        ValueError: domains of another number.
    """
    if domains and len(domains) != len(values):
        raise ValueError(f"{len(domains)} domains for {len(values)} values")
    named = np.array([name or "other" for name in domains])
    known = sorted(set(named.tolist()))
    if len(known) < 2:
        return {}
    return {f"{metric}/{name}": np.where(named == name, values, math.nan) for name in known}


def _error_interval(margin: Float[np.ndarray, "N"], seed: int) -> Interval:
    """The expected calibration error with its percentile bootstrap interval over pairs."""
    value = calibration(margin).error
    if len(margin) < 2:
        return Interval(value, math.nan, math.nan)
    chance = np.random.default_rng(counter_seed(seed, "calibration"))
    drawn = [calibration(margin[chance.integers(len(margin), size=len(margin))]).error for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(min(low, value)), float(max(high, value)))


def _confidence(margin: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.abs(margin)))


def _right(margin: np.ndarray) -> np.ndarray:
    return np.where(margin == 0, 0.5, margin > 0).astype(float)


# -- over-optimisation -------------------------------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, the KL of best-of-n to what it draws from; a bound where rewards can tie.

    >>> [round(best_of_n_kl(n), 6) for n in (4, 16, 64)]
    [0.636294, 1.835089, 3.174508]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_value(proxy: Float[np.ndarray, "P N"], gold: Float[np.ndarray, "P N"], n: int) -> Float[np.ndarray, "P"]:
    """The gold reward of the best of n by the proxy, unbiased, from N >= n samples of each prompt.

        sum_i gold_(i) C(i - 1, n - 1) / C(N, n),    (1) <= ... <= (N) by the proxy

    Samples whose proxies tie share their places evenly.

    Raises:
        ValueError: other shapes, or n outside 1 ... N.

    Source: "WebGPT", 2021, as used by "Scaling Laws for Reward Model Overoptimization", 2022.

    >>> best_of_n_value(np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, 1.0, 5.0]]), 2).round(6)
    array([3.666667])
    """
    proxy, gold = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    count = proxy.shape[-1]
    if proxy.shape != gold.shape or proxy.ndim != 2:
        raise ValueError(f"proxy and gold must be [P, N] alike, not {proxy.shape} and {gold.shape}")
    if not 1 <= n <= count:
        raise ValueError(f"n must lie between 1 and the {count} samples of a prompt, not {n}")
    every = math.comb(count, n)
    weight = np.array([math.comb(i, n - 1) / every for i in range(count)])  # whole numbers too large for a float
    order = np.argsort(proxy, 1, kind="stable")
    out = np.zeros(len(proxy))
    for p, places in enumerate(order):
        _, same = np.unique(proxy[p, places], return_inverse=True)
        shared = np.bincount(same, weight) / np.bincount(same)
        out[p] = (shared[same] * gold[p, places]).sum()
    return out


@dataclass(frozen=True)
class Overoptimisation:
    """Proxy and gold reward of a policy in training, against how far it is from where it began.

    Args:
        distance: of each point, KL in nats a completion, or the step where no KL was measured.
        measured: whether it is the KL.
        proxy, gold: rewards at each point.
        steps: of each point.
    """

    distance: tuple[float, ...]
    measured: bool
    proxy: tuple[float, ...]
    gold: tuple[float, ...]
    steps: tuple[int, ...]


def overoptimisation(metrics: Mapping[str, Curve], proxy: str, gold: str) -> Overoptimisation | None:
    """The rewards of a run's steps by growing step; None if proxy and gold were not both logged.

    The KL of a completion is `kl` (nats a token, mean over tokens) times `completions/mean_length`.
    """
    ours, theirs = dict(metrics.get(proxy, ())), dict(metrics.get(gold, ()))
    steps = [s for s in ours if s in theirs and math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    if not steps:
        return None
    kl, length = dict(metrics.get("kl", ())), dict(metrics.get("completions/mean_length", ()))
    measured = all(s in kl and s in length and math.isfinite(kl[s]) for s in steps)
    distance = [kl[s] * length[s] if measured else float(s) for s in steps]
    return Overoptimisation(
        tuple(distance),
        measured,
        tuple(ours[s] for s in steps),
        tuple(theirs[s] for s in steps),
        tuple(steps),
    )
