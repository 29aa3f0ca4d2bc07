"""Numbers with what is known about them: bootstrap intervals over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with the stated confidence (95% unless said otherwise).

    Args:
        value: the estimate.
        low, high: the ends; NaN where they cannot be known (one prompt).
    """

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the ends are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        """
        >>> print(Interval(0.25, 0.2, 0.3))
        0.250 [0.200, 0.300]
        """
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.known else f"{self.value:.3f}"

    def to_json(self) -> list[float | None]:
        """`[value, low, high]`, null for NaN."""
        return [number if math.isfinite(number) else None for number in (self.value, self.low, self.high)]

    @staticmethod
    def from_json(numbers: Sequence[float | None]) -> "Interval":
        """The inverse of `to_json`."""
        value, low, high = (math.nan if number is None else float(number) for number in numbers)
        return Interval(value, low, high)


def mean_interval(
    values: Float[np.ndarray, "N"], *, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Mean over prompts with its BCa bootstrap interval; prompts are what is resampled.

    Samples of one prompt resemble each other, so resampling completions would give intervals that are too narrow. Where
    all prompts agree (every one solved, say) the bootstrap knows no spread and the interval has no width.

    Args:
        values: one number for each prompt; NaN where there is none (left out).
        seed: of the resampling; equal seeds give equal intervals.
        level: confidence.
        resamples: bootstrap resamples.

    Source: Efron, "Better bootstrap confidence intervals", 1987, as implemented in scipy.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    # Late, so that pages which only show intervals do not wait seconds for imports.
    from scipy.stats import bootstrap

    from keel.core.choice import counter_seed

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(values)),
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(counter_seed(seed, "bootstrap")),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def difference_interval(
    before: Float[np.ndarray, "N"],
    after: Float[np.ndarray, "M"],
    *,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean of after - before over the same N = M prompts, with its interval: tighter than two intervals side by side.

    Raises:
        ValueError: the numbers of prompts differ.
    """
    if len(before) != len(after):
        raise ValueError(f"a difference needs the same prompts on both sides, not {len(before)} and {len(after)}")
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return mean_interval(change, seed=seed, level=level, resamples=resamples)
