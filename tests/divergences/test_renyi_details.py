"""Corners of the Renyi divergences: gradients, and outcomes that only some rows of a batch have."""

import math

import pytest
import torch

from keel.divergences.renyi import renyi

P = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
Q = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("a", [0.5, 0.95, 1.0, 1.05, 2.0, math.inf])
def test_gradient(a):
    """In log p: a p^a q^(1 - a) / ((a - 1) sum), p log(p / q) at 1, and 1 at the largest ratio at infinity.

    Near 1, where R is log(1 + a (a - 1) D) / (a - 1), D also holds the total mass of p, which is no constant of log p;
    on logits, whose mass is one, all forms agree.
    """
    logits = P.log().clone().requires_grad_()
    renyi(a, logits.log_softmax(-1), Q.log()).sum().backward()
    if a == math.inf:
        free = torch.nn.functional.one_hot((P / Q).argmax(-1), 3).double()
    elif a == 1:
        free = P * (P / Q).log()
    else:
        powers = P**a * Q ** (1 - a)
        free = a / (a - 1) * powers / powers.sum(-1, keepdim=True)
    wanted = free - P * free.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.5, 2.0])
def test_rows_of_a_batch_are_apart(a):
    """The first row has disjoint supports, the second the same row of outcomes as always."""
    p = torch.stack([torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), P[1]])
    q = torch.stack([torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), Q[1]])
    found = renyi(a, p.log(), q.log())
    alone = renyi(a, P[1].log(), Q[1].log())
    assert float(found[0]) == math.inf and float(found[1]) == pytest.approx(float(alone), rel=1e-12)
    wanted = 0.0 if a == 0 else math.log(float((P[1] ** a * Q[1] ** (1 - a)).sum())) / (a - 1)
    assert float(alone) == pytest.approx(wanted, abs=1e-12)
