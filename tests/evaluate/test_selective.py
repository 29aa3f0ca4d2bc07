"""Risk and coverage: the worked example, ties, thresholds."""

import numpy as np
import pytest

from keel.evaluate.selective import abstain, risk_coverage


def test_the_example():
    """Scores (.9, .8, .3, .1), right (1, 1, 0, 1): risks 0, 0, 1/3, 1/4; their mean is 0.145833."""
    found = risk_coverage([0.3, 0.9, 0.1, 0.8], [0, 1, 1, 1])
    assert found.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.threshold.tolist() == [0.9, 0.8, 0.3, 0.1]
    assert found.area == pytest.approx(0.145833, abs=5e-7)
    assert found.at(0.5) == 0 and found.at(0.6) == pytest.approx(1 / 3) and found.at(1.0) == 0.25


def test_thresholds():
    found = risk_coverage([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 1])
    assert [found.threshold_for(risk) for risk in (0.0, 0.25, 0.3, 0.34)] == [0.8, 0.1, 0.1, 0.1]
    assert risk_coverage([0.9, 0.8], [0, 1]).threshold_for(0.1) is None
    assert abstain([0.9, 0.8, 0.3, 0.1], found.threshold_for(0.0)).tolist() == [False, False, True, True]


def test_answers_of_one_score_stand_together():
    """Of a right and a wrong one with the same score neither is first; no threshold lets through one of the two."""
    for order in ([1, 0], [0, 1]):
        found = risk_coverage([0.5, 0.5], order)
        assert found.risk.tolist() == [0.5, 0.5] and found.threshold_for(0.4) is None
    mixed = risk_coverage([0.9, 0.5, 0.5], [1, 0, 1])
    assert mixed.threshold_for(0.3) == 0.9 and mixed.threshold_for(0.34) == 0.5


def test_a_useful_score_has_less_area_than_a_random_one_and_more_than_an_oracle():
    chance = np.random.default_rng(0)
    right = (chance.random(2000) < 0.6).astype(float)
    areas = [risk_coverage(s, right).area for s in (right, right + chance.standard_normal(2000), chance.random(2000))]
    assert areas[0] < areas[1] < areas[2] == pytest.approx(0.4, abs=0.03)


def test_no_score_stands_last_and_is_withheld():
    found = risk_coverage([float("nan"), 0.2], [0, 1])
    assert found.risk.tolist() == [0.0, 0.5]
    assert abstain([float("nan"), 0.2], 0.1).tolist() == [True, False]


@pytest.mark.parametrize(("scores", "right"), [([], []), ([0.1], [1, 0]), ([0.1], [2])])
def test_bad_input(scores, right):
    with pytest.raises(ValueError, match="correct"):
        risk_coverage(scores, right)
    with pytest.raises(ValueError, match="coverage"):
        risk_coverage([0.1], [1]).at(0.0)
