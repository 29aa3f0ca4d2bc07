"""How sure a comparison is: intervals over seeds and prompts, bootstrap, probability of improvement, corrections.

All functions are pure and take scores of shape [S, P]: a row for each seed (a run of training), a column for each
prompt. Every seed answers every prompt, so that both are resampled as wholes: the answers of one run share its luck,
the runs that answer one prompt share its difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float

from keel.evaluate.intervals import LEVEL, Interval

DRAWS = 400  # resamples; the spread of 400 is known to 4%
POWER = 0.8
MOST_SEEDS = 1000  # nobody runs more
SMALLEST = 1e-12  # p-values below are this one

Statistic = Callable[[Float[np.ndarray, "R S"], Float[np.ndarray, "R P"]], Float[np.ndarray, "R"]]
Reason = Literal["", "one seed", "no difference", "prompts", "many"]


@dataclass(frozen=True, eq=False)
class Spread:
    """Where the variance of an estimate over S seeds and P prompts comes from; each field may be an array of many.

    Args:
        seeds: variance of the estimate when seeds are drawn anew, 0 with one seed.
        prompts: variance when prompts are drawn anew, 0 with one prompt.
        rest: the part of both that is neither seed nor prompt alone (draws of completions, seed x prompt).
        num_seeds: S.
        num_prompts: P.
    """

    seeds: Float[np.ndarray, "*R"]
    prompts: Float[np.ndarray, "*R"]
    rest: Float[np.ndarray, "*R"]
    num_seeds: int
    num_prompts: int

    @property
    def shared(self) -> Float[np.ndarray, "*R"]:
        """What prompts add to the seeds' variance: more seeds do not lessen it."""
        return np.asarray(np.maximum(0.0, self.prompts - self.rest))

    def half(self, level: float = LEVEL) -> Float[np.ndarray, "*R"]:
        """Half the width of an interval: Student's t over the seeds, widened by what the prompts add.

            half^2 = t(S-1)^2 seeds + t(P-1)^2 max(0, prompts - rest),   at least   t(P-1)^2 prompts

        Few seeds know little of their own variance, which is why they get the quantile of S - 1 degrees of freedom
        (4.30 for 3 seeds) and prompts theirs.

        Args:
            level: confidence.

        Source: Zou and Donner, "Construction of confidence limits about effect measures", 2008: variances are recovered
        from the limits of each part, and add up.
        """
        over_seeds, over_prompts = _quantile(self.num_seeds, level), _quantile(self.num_prompts, level)
        both = over_seeds**2 * self.seeds + over_prompts**2 * self.shared
        return np.asarray(np.sqrt(np.maximum(both, over_prompts**2 * self.prompts)))


def _quantile(count: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, (1 + level) / 2)) if count > 1 else 0.0


def spread(tables: Float[np.ndarray, "*R S P"]) -> Spread:
    """The spread of the means of tables of seeds x prompts: what an endless bootstrap of them gives, corrected.

    Mean squares of the two-way analysis of variance over S P. The bootstrap of seeds has (S - 1) / S of the variance,
    that of prompts (P - 1) / P; this has all of it.

    Args:
        tables: finite numbers.
    """
    count, size = tables.shape[-2:]
    mean = tables.mean((-2, -1), keepdims=True)
    rows, columns = tables.mean(-1, keepdims=True), tables.mean(-2, keepdims=True)
    nothing = np.zeros(tables.shape[:-2])
    seeds = np.asarray(rows.var((-2, -1), ddof=1) / count) if count > 1 else nothing
    prompts = np.asarray(columns.var((-2, -1), ddof=1) / size) if size > 1 else nothing
    if count == 1 or size == 1:
        return Spread(seeds, prompts, nothing, count, size)
    left = ((tables - rows - columns + mean) ** 2).sum((-2, -1)) / ((count - 1) * (size - 1))
    return Spread(seeds, prompts, np.asarray(left / (count * size)), count, size)


def p_value(estimate: float, found: Spread) -> float:
    """Smallest 1 - level at which the interval leaves out 0; two-sided. 1 for an estimate of 0.

    Args:
        estimate: a difference.
        found: its spread, scalars.
    """
    if abs(estimate) <= float(found.half(SMALLEST)):
        return 1.0
    if float(found.half(1 - SMALLEST)) < abs(estimate):
        return SMALLEST
    from scipy.optimize import brentq

    def short(exponent: float) -> float:
        return float(found.half(1 - math.exp(exponent))) - abs(estimate)

    return float(math.exp(brentq(short, math.log(SMALLEST), math.log1p(-SMALLEST))))


def holm(p: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """p-values adjusted for their number: those of at most 5% hold a false one in at most one of twenty comparisons.

    In growing order of p / w, p_i (sum of the weights of this and all later ones) / w_i, never falling, at most 1.

    Args:
        p: NaN is passed on and counts for nothing.
        weights: of each, above 0: what matters more is charged less. Equal if not given.

    Raises:
        ValueError: a weight that is not above 0, or another number of them.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979, with its weights.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    weights = [1.0] * len(p) if weights is None else list(weights)
    if len(weights) != len(p) or any(not weight > 0 for weight in weights):
        raise ValueError(f"holm needs a weight above 0 for each of {len(p)} p-values")
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i] / weights[i])
    found, left, least = [math.nan] * len(p), sum(weights[i] for i in order), 0.0
    for i in order:
        least = max(least, min(1.0, p[i] * left / weights[i]))
        found[i] = least
        left -= weights[i]
    return found


# -- the bootstrap ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def resamples(num_seeds: int, num_prompts: int, seed: int = 0, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each prompt is drawn, as shares: shapes [R, S] and [R, P]; the same for every arm.

    Args:
        num_seeds: S.
        num_prompts: P.
        seed: equal seeds give equal draws.
        draws: R.
    """
    from keel.core.choice import counter_seed

    rng = np.random.default_rng(counter_seed(seed, "resamples"))
    found = tuple(rng.multinomial(count, [1 / count] * count, draws) / count for count in (num_seeds, num_prompts))
    for weights in found:
        weights.flags.writeable = False
    return found[0], found[1]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A statistic on resamples: of seeds alone, of prompts alone, and of both jointly.

    Args:
        seeds, prompts, jointly: its values, the same draws in each.
        num_seeds: S.
        num_prompts: P.
    """

    seeds: Float[np.ndarray, "R"]
    prompts: Float[np.ndarray, "R"]
    jointly: Float[np.ndarray, "R"]
    num_seeds: int
    num_prompts: int

    def __sub__(self, other: Drawn) -> Drawn:
        """The paired difference: both on the same seeds and prompts, draw by draw."""
        seeds, prompts, jointly = self.seeds - other.seeds, self.prompts - other.prompts, self.jointly - other.jointly
        return Drawn(seeds, prompts, jointly, self.num_seeds, self.num_prompts)

    def spread(self) -> Spread:
        """The variance of each part, corrected for their number.

        Three seeds drawn from three know two thirds of the variance between seeds: it is multiplied by S / (S - 1), and
        the interval takes Student's t. Without the two, intervals over 3 seeds hold the truth in 4 of 5 cases where
        seeds differ much, not in 19 of 20.
        """
        s, p = (count / max(1, count - 1) * (count > 1) for count in (self.num_seeds, self.num_prompts))
        left = (self.jointly - self.seeds - self.prompts).var() * s * p
        seeds, prompts = np.asarray(self.seeds.var() * s), np.asarray(self.prompts.var() * p)
        return Spread(seeds, prompts, np.asarray(left), self.num_seeds, self.num_prompts)


def bootstrap(statistic: Statistic, num_seeds: int, num_prompts: int, seed: int = 0, draws: int = DRAWS) -> Drawn:
    """A statistic on resamples of seeds and prompts.

    Args:
        statistic: its values for weights of seeds [R, S] and of prompts [R, P], rows of sum 1.
        num_seeds, num_prompts, seed, draws: see `resamples`.
    """
    seeds, prompts = resamples(num_seeds, num_prompts, seed, draws)
    all_seeds, all_prompts = np.full_like(seeds, 1 / num_seeds), np.full_like(prompts, 1 / num_prompts)
    by_seeds, by_prompts = statistic(seeds, all_prompts), statistic(all_seeds, prompts)
    return Drawn(by_seeds, by_prompts, statistic(seeds, prompts), num_seeds, num_prompts)


def interquartile_mean(scores: Float[np.ndarray, "S P"]) -> float:
    """Mean of the middle half of all (seed, prompt) units: a quarter is cut off at either end.

    Args:
        scores: finite numbers.

    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021.
    """
    from scipy.stats import trim_mean

    return float(trim_mean(scores, proportiontocut=0.25, axis=None))


def interquartile_draws(scores: Float[np.ndarray, "S P"]) -> Statistic:
    """The interquartile mean as a function of how often seeds and prompts are drawn."""
    order = np.argsort(scores, axis=None, kind="stable")
    rows, columns = np.unravel_index(order, scores.shape)
    values = scores.ravel()[order]

    def draws(seeds: Float[np.ndarray, "R S"], prompts: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R"]:
        # Units by rows: neighbours in memory are then draws of one unit, which is several times as fast.
        reached = seeds.T[rows]
        reached *= prompts.T[columns]
        np.cumsum(reached, axis=0, out=reached)
        np.clip(reached, 0.25, 0.75, out=reached)
        # The mass of a unit between the quartiles is how far it moves `reached`; summed by parts.
        return (values[-1] * 0.75 - values[0] * 0.25 - np.diff(values) @ reached[:-1]) / 0.5

    return draws


def probability_of_improvement(x: Float[np.ndarray, "S P"], y: Float[np.ndarray, "Z P"]) -> float:
    """P(X > Y): of a run of X and a run of Y on one prompt, how often X has the higher score; a tie is half.

    Averaged over all pairs of runs, then over prompts. For a single prompt it is Mann and Whitney's U / (S Z).

    Args:
        x, y: finite numbers on the same prompts.

    Source: Agarwal et al., 2021.
    """
    return float(_wins(x, y).mean())


def improvement_draws(x: Float[np.ndarray, "S P"], y: Float[np.ndarray, "S P"]) -> Statistic:
    """P(X > Y) as a function of how often seeds and prompts are drawn, the same ones of both."""
    wins = _wins(x, y)
    flat = wins.reshape(-1, wins.shape[-1])

    def draws(seeds: Float[np.ndarray, "R S"], prompts: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R"]:
        pairs = (seeds[:, :, None] * seeds[:, None, :]).reshape(len(seeds), -1)
        return ((prompts @ flat.T) * pairs).sum(1)

    return draws


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    above, below = x[:, None] > y[None], x[:, None] < y[None]
    return 0.5 + 0.5 * above - 0.5 * below


def profile(
    scores: Float[np.ndarray, "S P"], thresholds: Float[np.ndarray, "L"]
) -> tuple[Float[np.ndarray, "L"], Float[np.ndarray, "L"]]:
    """Performance profile: share of (seed, prompt) units above each threshold, and half of its 95% band there.

    Args:
        scores: finite numbers.
        thresholds: where to look.

    Source: Agarwal et al., 2021; Dolan and Moré, 2002.
    """
    above = (scores[None] > thresholds[:, None, None]).astype(float)
    return above.mean((1, 2)), spread(above).half()


# -- how many seeds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """How many seeds it takes to see a difference as large as the one observed, in 4 of 5 comparisons.

    Args:
        seeds: of each arm; None where `reason` says why there is no number.
        reason: "one seed" (their variance cannot be known), "no difference" (0 was observed), "prompts" (too few
            of them for any number of seeds), "many" (more than 1000), or empty.
    """

    seeds: int | None
    reason: Reason = ""

    def __str__(self) -> str:
        """
        >>> print(Needed(12), "|", Needed(None, "prompts"))
        about 12 seeds | more prompts, whatever the seeds
        """
        if self.seeds is not None:
            return f"about {self.seeds} seeds"
        said = {
            "one seed": "cannot be known from one seed",
            "no difference": "no difference to be seen",
            "prompts": "more prompts, whatever the seeds",
            "many": f"more than {MOST_SEEDS} seeds",
        }
        return said[self.reason]


def seeds_needed(difference: float, found: Spread, power: float = POWER) -> Needed:
    """Seeds with which a difference of this size is seen with probability `power`, two-sided at 5%.

    The smallest n for which, with v = S seeds the variance of the paired difference between seeds,

        difference^2 >= (t(n-1, 97.5%) + t(n-1, power))^2 v / n + (z(97.5%) + z(power))^2 shared

    The second part stays whatever n is: it falls with more prompts alone.

    Args:
        difference: as observed.
        found: its spread, scalars.
        power: in (0.5, 1).
    """
    if found.num_seeds < 2:
        return Needed(None, "one seed")
    if difference == 0:
        return Needed(None, "no difference")
    normal, over_count = _factors(power)
    left = difference**2 - normal * float(found.shared)
    if left <= 0:
        return Needed(None, "prompts")
    enough = over_count * float(found.seeds) * found.num_seeds <= left
    return Needed(2 + int(enough.argmax())) if enough.any() else Needed(None, "many")


@lru_cache
def _factors(power: float) -> tuple[float, np.ndarray]:
    """(z(97.5%) + z(power))^2, and (t(n-1, 97.5%) + t(n-1, power))^2 / n for n from 2."""
    from scipy.special import ndtri, stdtrit

    counts = np.arange(2, MOST_SEEDS + 1)
    over_count = (stdtrit(counts - 1, (1 + LEVEL) / 2) + stdtrit(counts - 1, power)) ** 2 / counts
    return float((ndtri((1 + LEVEL) / 2) + ndtri(power)) ** 2), over_count


def interval(value: float, found: Spread, low: float = -math.inf, high: float = math.inf) -> Interval:
    """The 95% interval of an estimate within the range that it can have; unknown with one seed and one prompt."""
    if found.num_seeds == 1 and found.num_prompts == 1:
        return Interval(value, math.nan, math.nan)
    half = float(found.half())
    return Interval(value, max(low, value - half), min(high, value + half))
