"""Gradients where a log-ratio or a probability is beyond what its type holds, and inverses of tensors with a graph."""

import math

import pytest
import torch

from keel.divergences.family import f_divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_log_ratio_counts_up_to_a_hundred_million(dtype):
    """u log u with log u = ln(1/2) and 1e12, which counts as 1e8: p_1 p_0 (x_1 - x_0), and p_1 x_1 in the value."""
    p = torch.tensor([0.5, 0.5], dtype=dtype).log()
    q = torch.tensor([0.0, -1e12], dtype=dtype)
    d = f_divergence("kl_policy_ref")
    assert d.gradient(p, q).tolist() == pytest.approx([-0.25e8, 0.25e8], rel=1e-6)
    assert float(d.value(p, q)) == pytest.approx(0.5e8, rel=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("neyman", torch.float32), ("neyman", torch.float64)])
def test_what_underflows_under_both_pulls_at_nothing(name, dtype):
    """q = e^-2000 and p = e^-3000 are 0, while u f'(u) = e^-1000 - e^1000 is not finite: as if both were without."""
    p = torch.tensor([0.3, 0.7], dtype=dtype).log()
    q = torch.tensor([0.6, 0.4], dtype=dtype).log()
    p, q = torch.cat([p, p.new_tensor([-3000.0])]), torch.cat([q, q.new_tensor([-2000.0])])
    # p f'(u) = p (1 - q^2 / p^2) = p - q^2 / p: -0.9 and 0.7 - 0.16 / 0.7
    slopes = [0.3 - 0.36 / 0.3, 0.7 - 0.16 / 0.7]
    wanted = [slopes[0] - 0.3 * sum(slopes), slopes[1] - 0.7 * sum(slopes), 0.0]
    assert f_divergence(name).gradient(p, q).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "slope", "log_u"),
    [("jeffreys", math.log(2) + 0.5, math.log(2)), ("kl_chi2", math.log(3) + 2, math.log(3))],
)
def test_inverse_slopes_of_tensors_with_a_graph(name, slope, log_u):
    """log u + 1 - 1 / u and log u + u - 1, through Lambert's W, which is evaluated outside of the graph."""
    t = torch.tensor([slope], dtype=torch.float64, requires_grad=True)
    assert f_divergence(name).f_prime_inverse(t).tolist() == pytest.approx([log_u], rel=1e-12)


@pytest.mark.parametrize("name", ["neyman", "3*neyman", "alpha:-1"])
def test_a_pull_beyond_the_type_is_as_strong_as_the_type_allows(name):
    """p = e^-95 where q = 1/2: q^2 / p = 4.5e40 does not fit fp32; the logit is pulled up, and the other one is not."""
    p = torch.tensor([-95.0, 0.0])
    found = f_divergence(name).gradient(p, torch.tensor([0.5, 0.5]).log())
    assert bool(found.isfinite().all()) and float(found[0]) < -1e37


def test_the_graph_of_a_branch_that_is_not_taken_is_harmless():
    """f -> f(0) = log(2) / 2 and f / u -> log(2) / 2 of the Jensen-Shannon divergence, with slopes u f'(u) -> 0."""
    d = f_divergence("js")
    for of, x in ((d.f, -200.0), (d.f_over_u, 200.0)):
        at = torch.tensor([x], requires_grad=True)
        value = of(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        assert value.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
        assert slope.item() == pytest.approx(0, abs=1e-6)
