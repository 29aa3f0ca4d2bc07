"""The f-divergences far from one and near it, in every precision, and where one of the two lacks an outcome."""

import math

import pytest
import torch
from tests.divergences.five_outcomes import EACH, INF, Q, fp64
from tests.worlds import noise

from keel.divergences.family import f_divergence


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generators_far_from_one(name, dtype):
    """No NaN, infinite only where the number does not fit the type, and right where it does."""
    d = f_divergence(name)
    x = torch.tensor([-300, -100, -40, -5, 5, 40, 100, 300], dtype=dtype)
    largest = torch.finfo(dtype).max
    for function in (d.f, d.f_over_u, d.f_prime, d.u_f_prime):
        found, wanted = function(x).double(), function(x.double())
        fits = wanted.abs() < largest / 10
        assert not bool(found.isnan().any())
        torch.testing.assert_close(found[fits], wanted[fits], rtol=1e-4, atol=1e-6)
        assert bool((found[~fits].abs() > largest / 100).all())


@EACH
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5])
def test_no_cancellation_near_one(name, size):
    """In fp32 f is f''(1) x^2 / 2 to a few digits, where u log u - u + 1 computed plainly is all rounding."""
    d = f_divergence(name)
    x = torch.tensor([-size, size])
    wanted = d.f(x.double())
    torch.testing.assert_close(d.f(x).double(), wanted, rtol=2e-3 if name.startswith("js") else 2e-5, atol=0)
    assert bool((d.f(x) >= 0).all())


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtered_outcomes(name, dtype):
    """Outcomes that both lack change nothing, in value and gradient."""
    z, w = noise("z", shape=(4, 6)).to(dtype), noise("w", shape=(4, 6)).to(dtype)
    d = f_divergence(name)
    plain = d.value(z.log_softmax(-1), w.log_softmax(-1))
    gradient = d.gradient(z.log_softmax(-1), w.log_softmax(-1))
    hole = torch.full((4, 2), -INF, dtype=dtype)
    z, w = torch.cat([z, hole], 1), torch.cat([w, hole], 1)
    torch.testing.assert_close(d.value(z.log_softmax(-1), w.log_softmax(-1)), plain)
    found = d.gradient(z.log_softmax(-1), w.log_softmax(-1))
    torch.testing.assert_close(found[:, :6], gradient)
    assert not bool(found[:, 6:].any())
    assert found.dtype == plain.dtype == torch.float32


@EACH
def test_outcomes_that_one_of_the_two_lacks(name):
    """f(0) per mass of the reference that is lost, f'(inf) per mass outside its support; never a NaN."""
    d = f_divergence(name)
    p, q = fp64(0.5, 0.5, 0.0, 0.0).log(), fp64(0.25, 0.5, 0.25, 0.0).log()
    for a, b, edge in ((p, q, d.f_at_zero), (q, p, d.f_prime_at_infinity)):
        rest = float((b.exp() * d.f((a - b)[:2].nan_to_num()).new_tensor([*d.f((a - b)[:2]).tolist(), 0, 0])).sum())
        assert float(d.value(a, b)) == pytest.approx(rest + 0.25 * edge, abs=1e-12)
        assert bool(d.gradient(a, b).isfinite().all())


@pytest.mark.parametrize("name", ["js", "hellinger", "tv", "alpha:0.5", "js:0.1"])
def test_gradient_outside_the_reference(name):
    """Where f'(inf) is finite an outcome that the reference lacks still pushes: against autograd with q = 1e-300."""
    d = f_divergence(name)
    z = fp64(0.3, -0.2, 0.5).requires_grad_()
    almost = fp64(0.4, 0.6, 1e-300).log()
    (wanted,) = torch.autograd.grad(d.value(z.log_softmax(-1), almost), z)
    found = d.gradient(z.detach().log_softmax(-1), fp64(0.4, 0.6, 0.0).log())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_different_distributions(name, dtype):
    """Logits of +-60 that point at different outcomes: the gradient is finite, and sums to 0 where it is moderate."""
    z = torch.tensor([[60.0, 0.0, -60.0, 3.0], [-60.0, 60.0, 0.0, 0.0]], dtype=dtype)
    log_p, log_q = z.log_softmax(-1), z.flip(1).log_softmax(-1)
    d = f_divergence(name)
    value, gradient = d.value(log_p, log_q), d.gradient(log_p, log_q)
    assert bool(gradient.isfinite().all()) and not bool(value.isnan().any())
    exact = d.value(log_p.double(), log_q.double())
    torch.testing.assert_close(value.double(), exact.where(exact < 1e38, INF), rtol=1e-4, atol=1e-5)
    wanted = d.gradient(log_p.double(), log_q.double())
    if float(wanted.abs().max()) < 1e3:
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_nan_is_not_hidden():
    p = fp64(math.nan, 0.5)
    assert math.isnan(float(f_divergence("alpha:0.5").value(p, Q[:2].log())))
    assert math.isnan(float(f_divergence("kl_policy_ref").value(p, Q[:2].log())))
