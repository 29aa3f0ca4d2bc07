"""The estimators k1, k2, k3: values, stability, moments."""

import pytest
import torch

from keel.divergences.estimators import estimate

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
DIGITS = 5.1e-7


@pytest.mark.parametrize(
    ("kind", "d", "value"),
    [
        ("k1", 0.3, 0.3),
        ("k2", 0.3, 0.045),
        ("k3", 0.3, 0.040818),
        ("k1", -0.5, -0.5),
        ("k2", -0.5, 0.125),
        ("k3", -0.5, 0.148721),
        ("k3", -5.0, 142.413159),
        ("k3", 0.0, 0.0),
    ],
)
def test_estimators(kind, d, value):
    assert float(estimate(kind, torch.tensor([d], dtype=torch.float64))) == pytest.approx(value, abs=DIGITS)


def test_k3_near_zero_has_no_cancellation():
    """d^2 / 2 - d^3 / 6 in fp32, where exp(-d) - 1 + d computed plainly is all rounding."""
    d = torch.tensor([1e-3])
    assert float(estimate("k3", d)) == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)


def test_moments_of_the_estimators():
    """On the policy's samples: k1 and k3 have mean KL, variances 0.665000, 0.222947, k2 0.157848."""
    d = (P / Q).log()
    for kind, mean, variance in (("k1", 0.379246, 0.665), ("k2", 0.404414, 0.157848), ("k3", 0.379246, 0.222947)):
        k = estimate(kind, d)
        found = float((P * k).sum())
        assert found == pytest.approx(mean, abs=DIGITS)
        assert float((P * k**2).sum()) - found**2 == pytest.approx(variance, abs=DIGITS)
