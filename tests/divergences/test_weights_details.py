"""The threshold of one draw's share at exactly a tenth, and weights that carry a graph."""

import warnings

import pytest
import torch

from keel.divergences.weights import concentration


def test_a_tenth_is_not_more_than_a_tenth():
    """1 and eighteen halves: a share of 1 / 10 in exact arithmetic, 100 / 5.5 effective draws."""
    found = concentration(torch.tensor([1.0] + [0.5] * 18, dtype=torch.float64).log())
    assert found.largest == 0.1
    assert (found.ess, found.warning) == (pytest.approx(100 / 5.5), None)


@pytest.mark.parametrize(
    ("weights", "nats"), [([1.0] * 8, "0.0"), ([3.0, 1.0], "0.1"), ([97.0, 1.0, 1.0, 1.0], "1.2"), ([1.0, 0.0], "0.7")]
)
def test_the_divergence_that_a_warning_states(weights, nats):
    """sum w log(n w), for (3, 1) / 4: 0.75 log 1.5 + 0.25 log 0.5 = 0.131."""
    found = concentration(torch.tensor(weights, dtype=torch.float64).log())
    assert found.warning is not None and f"at least {nats} nats away" in found.warning


def test_weights_of_a_live_policy():
    """Numbers are read without a graph, and without the warning that torch gives for reading one through it."""
    log_w = torch.tensor([3.0, 1.0], dtype=torch.float64).log().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = concentration(log_w)
    assert (found.ess, found.largest) == (pytest.approx(1.6), pytest.approx(0.75))
