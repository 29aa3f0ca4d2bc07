"""Self-normalised importance weights and their concentration."""

import math

import pytest
import torch
from tests.worlds import noise

from keel.divergences.weights import concentration, self_normalised

INF = math.inf


def test_self_normalised():
    log_w = torch.tensor([[1000.0, 1000.0 + math.log(3)], [-2000.0, -INF], [-INF, -INF]], dtype=torch.float64)
    assert self_normalised(log_w).flatten().tolist() == pytest.approx([0.25, 0.75, 1.0, 0.0, 0.0, 0.0])
    assert self_normalised(log_w[:2], dim=0)[:, 1].tolist() == pytest.approx([1.0, 0.0])
    z = log_w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(self_normalised(z)[:, 0].sum(), z)
    assert slope[0].tolist() == pytest.approx([0.1875, -0.1875]) and not bool(slope.isnan().any())


def test_equal_weights():
    found = concentration(torch.full((1000,), -77.0))
    assert (found.ess, found.largest, found.n, found.warning) == (pytest.approx(1000), pytest.approx(0.001), 1000, None)


@pytest.mark.parametrize(
    ("weights", "ess", "largest", "words"),
    [
        ([3.0, 1.0], 1.6, 0.75, "one of 2 draws has 75% of the weight"),
        ([1.0] * 8, 8.0, 0.125, "about 8.0 of them count"),
        ([1.0] + [0.0] * 99, 1.0, 1.0, "at least 4.6 nats away"),
        ([0.0] * 4, 0.0, 0.0, "no draw has any weight"),
        ([math.nan, 1.0], 0.0, 0.0, "not numbers"),
    ],
)
def test_few_draws_decide(weights, ess, largest, words):
    found = concentration(torch.tensor(weights, dtype=torch.float64).log())
    assert (found.ess, found.largest) == (pytest.approx(ess), pytest.approx(largest))
    assert words in found.warning


def test_the_two_thresholds():
    """Eleven draws, one with a little less or more than a tenth; and nine beside ninety that count for nothing."""
    rest = torch.zeros(11).double()
    for share, warns in ((0.0999, False), (0.1001, True)):
        rest[0] = math.log(share / (1 - share) * 10)
        assert (concentration(rest).warning is not None) == warns
    assert concentration(torch.cat([torch.zeros(100), torch.full((9,), 1.0)])).warning is None


@pytest.mark.parametrize(
    ("dimension", "width", "ess", "largest"),
    [(2, 1.0, 1160.7, 0.002), (10, 1.0, 104.9, 0.055), (20, 1.0, 15.4, 0.226), (20, 0.3, 1.0, 0.910)],
)
def test_kernel_densities_in_many_dimensions(dimension, width, ess, largest):
    """2000 Gaussian points seen from fresh ones: median effective number and mean largest weight, as published."""
    points, seen_from = (
        noise("points", dimension, shape=(2000, dimension)),
        noise("x", dimension, shape=(300, dimension)),
    )
    log_w = -torch.cdist(seen_from, points).square() / (2 * width**2)
    found = [concentration(row) for row in log_w]
    median = float(torch.tensor([c.ess for c in found]).median())
    assert median == pytest.approx(ess, rel=0.2)
    assert sum(c.largest for c in found) / len(found) == pytest.approx(largest, rel=0.2)
    assert (sum(c.warning is not None for c in found) > 150) == (dimension == 20)
