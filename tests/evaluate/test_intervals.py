"""Bootstrap intervals: known widths, coverage, seeds, corner cases."""

import math

import numpy as np
import pytest

from keel.evaluate.intervals import Interval, difference_interval, mean_interval


def test_width_is_that_of_the_normal_approximation():
    values = np.array([1.0] * 100 + [0.0] * 300)
    found = mean_interval(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.value == 0.25
    assert found.low == pytest.approx(0.25 - half, abs=0.006)
    assert found.high == pytest.approx(0.25 + half, abs=0.006)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(7)
    held = 0
    for trial in range(200):
        found = mean_interval((rng.random(60) < 0.8).astype(float), seed=trial, resamples=400)
        held += found.low <= 0.8 <= found.high
    assert 180 <= held <= 198


def test_seed_decides_and_global_randomness_is_untouched():
    values = np.arange(20.0) ** 2
    state = np.random.get_state()[1].copy()
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert (np.random.get_state()[1] == state).all()


def test_corner_cases():
    assert mean_interval(np.array([0.5, 0.5, 0.5])) == Interval(0.5, 0.5, 0.5)
    assert mean_interval(np.array([1.0, math.nan, 1.0])) == Interval(1.0, 1.0, 1.0)
    alone = mean_interval(np.array([0.3]))
    assert alone.value == 0.3 and not alone.known
    assert math.isnan(mean_interval(np.array([math.nan])).value)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    before = rng.random(200)
    found = difference_interval(before, before + 0.1 + 0.01 * rng.standard_normal(200))
    # Unpaired, the half-width would be 1.96 * sqrt(2/12/200) = 0.057.
    assert found.value == pytest.approx(0.1, abs=0.003)
    assert found.high - found.low < 0.004
    with pytest.raises(ValueError, match="same prompts"):
        difference_interval(before, before[:-1])


def test_round_trip_and_text():
    assert Interval.from_json(Interval(0.5, 0.25, 0.75).to_json()) == Interval(0.5, 0.25, 0.75)
    unknown = Interval(0.5, math.nan, math.nan)
    assert unknown.to_json() == [0.5, None, None]
    assert math.isnan(Interval.from_json(unknown.to_json()).high)
    assert str(unknown) == "0.500"
