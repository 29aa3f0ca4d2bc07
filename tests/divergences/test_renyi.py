"""Renyi divergences: vectors, limits, additivity."""

import math

import pytest
import torch
from tests.worlds import noise

from keel.divergences.family import f_divergence
from keel.divergences.renyi import renyi

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
INF = math.inf


@pytest.mark.parametrize(
    ("a", "value"),
    [(0.5, 0.199242), (1.0, 0.379246), (2.0, 0.653626), (3.0, 0.832448), (INF, 1.386294), (0.0, 0.0)],
)
def test_vectors(a, value):
    assert float(renyi(a, P.log(), Q.log())) == pytest.approx(value, abs=5.1e-7)


@pytest.mark.parametrize(
    ("a", "limit"), [(1e-9, 0.0), (1 - 1e-6, 1.0), (1 + 1e-6, 1.0), (1 + 1e-12, 1.0), (500.0, INF)]
)
def test_limits_are_approached(a, limit):
    near = 5e-3 if limit == INF else 1e-6
    assert float(renyi(a, P.log(), Q.log())) == pytest.approx(float(renyi(limit, P.log(), Q.log())), abs=near)


@pytest.mark.parametrize("a", [0.3, 0.9001, 0.95, 1.0999, 1.1001, 2.0])
def test_is_a_function_of_alpha(a):
    """log(1 + a (a - 1) D_a) / (a - 1), on both sides of where the computation changes; 2 is log(1 + chi-square)."""
    d = float(f_divergence(f"alpha:{a}").value(P.log(), Q.log()))
    assert float(renyi(a, P.log(), Q.log())) == pytest.approx(math.log1p(a * (a - 1) * d) / (a - 1), abs=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.4, 0.999, 1.0, 2.5, INF])
def test_adds_up_over_independent_tokens(a):
    p, q = noise("p", shape=(3,)).log_softmax(-1), noise("q", shape=(3,)).log_softmax(-1)
    joint_p, joint_q = (P.log()[:, None] + p).flatten(), (Q.log()[:, None] + q).flatten()
    apart = renyi(a, P.log(), Q.log()) + renyi(a, p, q)
    torch.testing.assert_close(renyi(a, joint_p, joint_q), apart, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "lost", "outside", "disjoint"),
    [
        (0.0, -math.log(0.75), 0.0, INF),
        (0.5, -2 * math.log(math.sqrt(0.125) + math.sqrt(0.25)), -2 * math.log(math.sqrt(0.125) + 0.5), INF),
        (1.0, 0.5 * math.log(2), INF, INF),
        (2.0, math.log(1 + 0.5), INF, INF),
        (INF, math.log(2), INF, INF),
    ],
)
def test_supports_that_differ(a, lost, outside, disjoint):
    """p = (1/2, 1/2, 0), q = (1/4, 1/2, 1/4), turned round, and disjoint; the gradient is never NaN."""
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    other = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).log()
    found = renyi(a, p, q)
    assert float(found.detach()) == pytest.approx(lost, abs=1e-12)
    if found.requires_grad:
        (slope,) = torch.autograd.grad(found, p)
        assert not bool(slope[:2].isnan().any())
    assert float(renyi(a, q, p.detach())) == pytest.approx(outside, abs=1e-12)
    assert float(renyi(a, p.detach(), other)) == disjoint


def test_near_one_in_fp32():
    """log of a sum that is nearly 1, over a - 1, would be all rounding."""
    for a in (0.9999, 1.0001):
        found = float(renyi(a, P.log().float(), Q.log().float()))
        assert found == pytest.approx(float(renyi(a, P.log(), Q.log())), abs=1e-5)


def test_refuses_negative_orders():
    for a in (-0.5, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            renyi(a, P.log(), Q.log())
