"""Divergences between normal distributions: closed forms, quadrature, where chi-square is infinite."""

import math

import pytest
import torch

from keel.divergences.gaussian import gaussian_chi2, gaussian_kl, gaussian_penalty


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def density(x, mean, std):
    return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def test_numbers():
    """N(.5, .8) against N(0, 1)."""
    assert float(gaussian_chi2(*one(0.5, 0.8, 0.0, 1.0))) == pytest.approx(0.288173, abs=5.1e-7)
    assert float(gaussian_kl(*one(0.5, 0.8, 0.0, 1.0))) == pytest.approx(-math.log(0.8) + 0.445 - 0.5)
    assert float(gaussian_penalty(*one(0.5, 0.8, 0.0, 1.0), root=True)) == pytest.approx(math.sqrt(0.288173), abs=1e-6)


def test_against_quadrature():
    x = torch.linspace(-30, 30, 200001, dtype=torch.float64)
    for numbers in ((0.5, 0.8, 0.0, 1.0), (-1.0, 1.2, 0.3, 1.0), (0.0, 1.3, 0.0, 1.0)):
        p, q = density(x, *numbers[:2]), density(x, *numbers[2:])
        wanted = float(torch.trapezoid((p - q) ** 2 / q.clamp(min=1e-300), x))
        assert float(gaussian_chi2(*one(*numbers))) == pytest.approx(wanted, rel=1e-6)


def test_independent_actions_multiply():
    apart = [gaussian_chi2(*one(0.5, 0.8, 0.0, 1.0)), gaussian_chi2(*one(-0.2, 1.1, 0.1, 0.9))]
    pair = [torch.cat(pieces) for pieces in zip(one(0.5, 0.8, 0.0, 1.0), one(-0.2, 1.1, 0.1, 0.9), strict=True)]
    assert float(1 + gaussian_chi2(*pair)) == pytest.approx(float((1 + apart[0]) * (1 + apart[1])))


@pytest.mark.parametrize("root", [False, True])
def test_where_it_is_infinite_the_kl_stands_in(root):
    """2 s_q^2 <= s_p^2, the boundary included; one such action is enough, and the gradient stays finite."""
    for std in (math.sqrt(2), 2.0):
        assert float(gaussian_chi2(*one(0.1, std, 0.0, 1.0))) == math.inf
    mean, std, ref_mean, ref_std = (
        torch.tensor([[0.1, 0.5], [0.3, 0.5]]),
        torch.tensor([[2.0, 0.8], [1.0, 0.8]]),
        0.0,
        1.0,
    )
    mean, std = mean.double().requires_grad_(), std.double().requires_grad_()
    where = torch.full((2, 2), ref_mean).double(), torch.full((2, 2), ref_std).double()
    found = gaussian_penalty(mean, std, *where, root=root)
    assert float(found[0].detach()) == pytest.approx(float(gaussian_kl(mean, std, *where)[0].detach()))
    grads = torch.autograd.grad(found.sum(), [mean, std])
    assert all(bool(g.isfinite().all()) and bool(g.all()) for g in grads)


def test_the_floor_of_the_root():
    """At equality sqrt(1e-4) = .01, with gradient 0."""
    mean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    found = gaussian_penalty(mean, *one(1.0, 0.0, 1.0), root=True)
    assert float(found) == pytest.approx(0.01) and float(torch.autograd.grad(found, mean)[0]) == 0
    with pytest.raises(ValueError, match="floor"):
        gaussian_penalty(*one(0.0, 1.0, 0.0, 1.0), floor=0.0)
