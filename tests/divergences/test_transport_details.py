"""Couplings of unnormalised and unfinished problems: what `error` says of them."""

import math

import pytest
import torch

from keel.divergences.transport import sinkhorn, transport, wasserstein1

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
PLACES = torch.arange(5, dtype=torch.float64)
COST = (PLACES[:, None] - PLACES).abs()


def test_probabilities_that_rounding_left_unnormalised():
    """Sums of 1.001 and 0.9976, as bf16 leaves them: the coupling is of the two as they would be if normalised."""
    log_p, log_q = P.log().bfloat16().double(), Q.log().bfloat16().double()
    assert abs(float(log_p.exp().sum()) - 1) > 5e-4 and abs(float(log_q.exp().sum()) - 1) > 5e-4
    found = transport(log_p, log_q, COST)
    wanted = float(wasserstein1(log_p.log_softmax(0), log_q.log_softmax(0)))
    assert float(found.value) == pytest.approx(wanted, abs=1e-9)
    torch.testing.assert_close(found.plan.sum(0), log_q.softmax(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [0.01, -0.01])
def test_the_error_of_a_programme_is_its_largest_deviation(shift):
    """p is e^shift times as large as the coupling's sums: the largest of five deviations is that of 0.3."""
    found = transport(P.log() + shift, Q.log(), COST)
    assert found.error == pytest.approx(0.3 * abs(math.expm1(shift)), abs=1e-9)


def test_the_error_of_updates_that_have_not_begun():
    """Without an update the potentials are 0 and P = p q e^-C / eps, whose sums fall short of p."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.25, 0.75], [0.5, 0.5]))
    found = sinkhorn(p.log(), q.log(), math.log(2) * (1 - torch.eye(2, dtype=torch.float64)), 1.0, iterations=0)
    # rows sum to p (1 + 1/2) / 2
    assert found.plan.flatten().tolist() == pytest.approx([1 / 8, 1 / 16, 3 / 16, 3 / 8])
    assert found.error == pytest.approx(3 / 16, rel=1e-12)


@pytest.mark.parametrize("how", [transport, lambda *given: sinkhorn(*given, 0.5)], ids=["programme", "sinkhorn"])
def test_only_the_value_carries_a_gradient(how):
    log_p, log_q, cost = (x.clone().requires_grad_() for x in (P.log(), Q.log(), COST))
    found = how(log_p, log_q, cost)
    assert found.value.requires_grad and not found.cost.requires_grad and not found.plan.requires_grad
