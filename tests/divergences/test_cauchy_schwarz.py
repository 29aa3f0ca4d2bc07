"""The Cauchy-Schwarz divergence of distributions, of Gaussians on a grid, and of samples."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from tests.worlds import noise

from keel.divergences.cauchy_schwarz import (
    cauchy_schwarz,
    cauchy_schwarz_information,
    conditional_cauchy_schwarz,
    log_gram,
)

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
X = torch.tensor([[0.0], [1.0], [2.0], [4.0]], dtype=torch.float64)
Y = torch.tensor([[0.0], [1.0], [1.5], [3.0]], dtype=torch.float64)
GUESS = torch.tensor([[0.2], [0.8], [2.0], [2.5]], dtype=torch.float64)
DIGITS = 5.1e-7


def test_vector():
    value = float(cauchy_schwarz(P.log(), Q.log()))
    assert value == pytest.approx(0.646958, abs=DIGITS)
    assert value / math.log(2) == pytest.approx(0.933363, abs=DIGITS)
    assert float(cauchy_schwarz(Q.log(), P.log())) == pytest.approx(value, abs=1e-14)
    assert float(cauchy_schwarz(P.log() + 7, Q.log() - 30)) == pytest.approx(value, abs=1e-12)
    assert float(cauchy_schwarz(P.log(), P.log() - 2)) == pytest.approx(0, abs=1e-14)


def test_supports():
    """Finite while they overlap: p = (1/2, 1/2, 0) and q = (0, 1/2, 1/2) give 2 log 2; inf if they do not."""
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert float(cauchy_schwarz(p, p.flip(0))) == pytest.approx(2 * math.log(2))
    assert float(cauchy_schwarz(p, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).log())) == math.inf


@pytest.mark.parametrize(
    ("mean", "deviation", "value"), [(1.0, 1.0, 0.5), (1.0, 2.0, 0.423144), (0.0, 2.0, 0.223144), (0.0, 1.0, 0.0)]
)
def test_gaussians(mean, deviation, value):
    """N(0, 1) against another, on a fine grid: the sums converge faster than any power of its width."""
    x = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    found = cauchy_schwarz(-(x**2) / 2, -(((x - mean) / deviation) ** 2) / 2)
    assert float(found) == pytest.approx(value, abs=DIGITS)


def test_gradient():
    z = noise("z", shape=(3, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cauchy_schwarz(z.log_softmax(-1), Q.log().expand(3, 5)), z)


# -- from samples ----------------------------------------------------------------------------------------------------


def test_conditional():
    assert float(conditional_cauchy_schwarz(X, Y, GUESS)) == pytest.approx(0.125484, abs=DIGITS)
    assert float(conditional_cauchy_schwarz(X, Y, Y)) == pytest.approx(0, abs=1e-14)


def test_the_normaliser_is_the_square_of_a_sum():
    """With a sum of squares in its place the same numbers give 0.102527, written out with plain matrices."""

    def divergence(w):
        k = log_gram(X, X).exp()
        total = [(w * (k * log_gram(a, b).exp()).sum(1)).sum().log() for a, b in ((Y, Y), (GUESS, GUESS), (GUESS, Y))]
        return float(total[0] + total[1] - 2 * total[2])

    k = log_gram(X, X).exp()
    assert divergence(1 / k.sum(1) ** 2) == pytest.approx(0.125484, abs=DIGITS)
    assert divergence(1 / (k**2).sum(1)) == pytest.approx(0.102527, abs=DIGITS)


def test_information():
    assert float(cauchy_schwarz_information(X, Y)) == pytest.approx(0.379712, abs=DIGITS)
    assert float(cauchy_schwarz_information(X, Y, normalised=True)) == pytest.approx(0.992466, abs=DIGITS)
    assert float(cauchy_schwarz_information(X, X, normalised=True)) == pytest.approx(1.0)
    constant = torch.full_like(X, 3.0)
    assert float(cauchy_schwarz_information(X, constant)) == pytest.approx(0, abs=1e-14)
    assert float(cauchy_schwarz_information(X, constant, normalised=True)) == 0


def test_information_is_the_divergence_of_joint_and_product():
    """On a sample that is a whole grid, x and z are independent: 0."""
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0)).double()
    assert float(cauchy_schwarz_information(grid[:, :1], grid[:, 1:])) == pytest.approx(0, abs=1e-12)


def test_widths_are_units():
    scaled = conditional_cauchy_schwarz(2 * X, 3 * Y, 3 * GUESS, width_x=2.0, width_y=3.0)
    assert float(scaled) == pytest.approx(0.125484, abs=DIGITS)
    assert float(cauchy_schwarz_information(2 * X, 5 * Y, 2.0, 5.0)) == pytest.approx(0.379712, abs=DIGITS)


def test_gradients_flow_through_the_samples():
    guess, z = GUESS.clone().requires_grad_(), Y.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: conditional_cauchy_schwarz(X, Y, g), guess)
    assert torch.autograd.gradcheck(lambda z: cauchy_schwarz_information(X, z, normalised=True), z)


def test_far_predictions_keep_their_gradient():
    """In fp32 the kernels of samples 100 widths apart are 0; their logarithms are not."""
    guess = (Y + 100).float().requires_grad_()
    found = conditional_cauchy_schwarz(X.float(), Y.float(), guess)
    assert float(found.detach()) > 5000
    (slope,) = torch.autograd.grad(found, guess)
    assert bool(slope.isfinite().all()) and float(slope.sum()) > 100


def test_what_is_refused():
    """[N] - [N, 1] would broadcast to a matrix that is constant along one side; checked types see that, too."""
    with pytest.raises((ValueError, TypeCheckError), match=r"scalars are \[N, 1\]|N d"):
        log_gram(X[:, 0], X)
    with pytest.raises(ValueError, match="must be positive"):
        log_gram(X, X, 0.0)
    with pytest.raises((ValueError, TypeCheckError), match=r"as many x|N=4"):
        cauchy_schwarz_information(X, Y[:3])
