"""KLoM and datamodel targets: numbers that were known, and the floor that two ensembles of one kind come to."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from keel.evaluate.klom import KLoM, forgetting, margin, margin_of_logits


def test_margins_from_either_side():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 300.0, 0.0], [-300.0, 0.0, 0.0]])
    label = np.array([1, 1, 0])
    log_p = logits[np.arange(3), label] - np.logaddexp.reduce(logits, 1)
    found = margin_of_logits(logits, label)
    p = math.exp(1) / (math.exp(2) + math.exp(1) + 1)
    assert found[0] == pytest.approx(math.log(p / (1 - p))) and found[1:].tolist() == [100.0, -100.0]
    assert margin(log_p[:1]) == pytest.approx(found[:1])
    assert margin(np.array([-1e-12]))[0] == pytest.approx(-math.log(1e-12), rel=1e-6)  # no digits are lost
    assert margin(np.array([0.0, -np.inf])).tolist() == [100.0, -100.0]
    with pytest.raises(ValueError, match="at most 0"):
        margin(np.array([0.1]))


def test_by_hand():
    """Two bins over [0, 4]: shares (3/4, 1/4) against (1/2, 1/2); and one where the oracle has no mass."""
    found = KLoM(bins=2)(np.array([[0.0, 3.0], [1.0, 3.0], [1.5, 3.0], [4.0, 4.0]]), np.array([[0.0, 0.0], [3.0, 1.0]]))
    assert found[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found[1] == pytest.approx(math.log(1 / 1e-5))
    same = np.full((5, 1), 2.0)
    assert KLoM()(same, same).tolist() == [0.0]


def test_gaussians_and_their_floor():
    """N(1, 1) against N(0, 1), huge ensembles: 0.489 with 20 bins, 0.5 in theory; 100 of one kind against 100: 0.35."""
    levels = (np.arange(500_000) + 0.5) / 500_000
    grid = norm.ppf(levels)[:, None]
    assert KLoM()(grid + 1, grid)[0] == pytest.approx(0.489, abs=2e-3)
    assert KLoM(bins=400)(grid + 1, grid)[0] == pytest.approx(0.5, abs=5e-3)
    chance = np.random.default_rng(0)
    drawn = chance.normal(size=(200, 3000))
    floor = KLoM().floor(drawn)
    assert floor.mean() == pytest.approx(0.35, abs=0.01)
    assert np.array_equal(floor, KLoM()(drawn[:100], drawn[100:]))


def test_sets_by_themselves():
    chance = np.random.default_rng(1)
    oracle = {name: chance.normal(size=(120, 50)) for name in ("forget", "retain")}
    unlearnt = {"forget": chance.normal(size=(110, 50)) + 2, "retain": chance.normal(size=(110, 50))}
    found = forgetting(unlearnt, oracle)
    assert found["forget"].mean > 3 * found["retain"].mean and not found["forget"].few
    # 60 oracles a side have a higher floor than 110 against 120
    assert found["retain"].mean < found["retain"].floor < found["forget"].mean
    assert found["forget"].quantiles[0.5] <= found["forget"].quantiles[0.95]
    assert (found["retain"].points, found["retain"].models, found["retain"].oracles) == (50, 110, 120)
    assert forgetting({"a": np.zeros((3, 1))}, {"a": np.zeros((3, 1))})["a"].few
    with pytest.raises(ValueError, match="not the same"):
        forgetting({"a": np.zeros((3, 1))}, {"b": np.zeros((3, 1))})


def test_bad_settings_and_margins():
    for wrong in ({"bins": 1}, {"smoothing": 0.0}):
        with pytest.raises(ValueError, match="bins must be at least 2, smoothing in"):
            KLoM(**wrong)
    with pytest.raises(ValueError, match="same points"):
        KLoM()(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="finite"):
        KLoM()(np.full((2, 1), np.nan), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="two oracles"):
        KLoM().floor(np.zeros((1, 1)))
