"""Divergences of one's own: what is derived from f, what is refused, and where it says the fault is."""

import math

import numpy as np
import pytest
import torch

from keel.divergences import family
from keel.divergences.family import f_divergence
from keel.divergences.own import own_divergence

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LOG_U = (P / Q).log()
INF = math.inf


@pytest.fixture(autouse=True)
def _forgotten():
    known = dict(family._OWN)
    yield
    family._OWN.clear()
    family._OWN.update(known)


def xlogx(u):
    return u * torch.log(u) - u + 1


# the built-in one, and f as one would write it
AGAIN = {
    "kl_policy_ref": xlogx,
    "kl_ref_policy": lambda u: -torch.log(u) + u - 1,
    "jeffreys": lambda u: (u - 1) * torch.log(u),
    "js": lambda u: (u * torch.log(u) - (1 + u) * torch.log((1 + u) / 2)) / 2,
    "alpha:0.5": lambda u: (u**0.5 - 0.5 * u - 0.5) / -0.25,
    "alpha:0.01": lambda u: (u**0.01 - 0.01 * u - 0.99) / (0.01 * -0.99),
    "alpha:3": lambda u: (u**3 - 3 * u + 2) / 6,
    "alpha:-1": lambda u: (1 / u + u - 2) / 2,
    "chi2_policy_ref": lambda u: (u - 1) ** 2,
    "chi2_ref_policy": lambda u: (1 - u) ** 2 / u,
    "tv": lambda u: (u - 1).abs() / 2,
    "hellinger": lambda u: (u.sqrt() - 1) ** 2 / 2,
    "kl_chi2": lambda u: xlogx(u) + (u - 1) ** 2 / 2,
}


@pytest.mark.parametrize("name", AGAIN)
def test_all_that_is_derived_from_f(name):
    """Value, gradient, slopes, limits, conjugate and inverse of f alone are those of the closed forms."""
    known, mine = f_divergence(name), own_divergence("mine", AGAIN[name])
    assert f_divergence("mine") == mine and str(mine.scaled(2.0)) == "2*mine"
    for one, other in ((P, Q), (Q, P)):
        assert float(mine.value(one.log(), other.log())) == pytest.approx(float(known.value(one.log(), other.log())))
        torch.testing.assert_close(mine.gradient(one.log(), other.log()), known.gradient(one.log(), other.log()))
    x = torch.linspace(-6, 6, 13, dtype=torch.float64)
    for what in ("f", "f_over_u", "f_prime", "u_f_prime", "f_second"):
        if (name, what) == ("tv", "f_second"):
            continue  # at the kink
        found, wanted = getattr(mine, what)(x), getattr(known, what)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    for limit in ("f_at_zero", "f_prime_at_zero", "f_prime_at_infinity", "curvature"):
        assert getattr(mine, limit) == pytest.approx(getattr(known, limit), rel=1e-6, abs=1e-7)
    t = torch.tensor([-3.0, -1.0, -0.4, 0.1, 0.3, 0.45], dtype=torch.float64)
    torch.testing.assert_close(mine.conjugate(t), known.conjugate(t), rtol=1e-7, atol=1e-9)
    if name != "tv":
        torch.testing.assert_close(mine.f_prime_inverse(t), known.f_prime_inverse(t), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_one(dtype):
    """A quotient of squares, which overflows far out, still has its limits 1."""
    mine = own_divergence("triangular", lambda u: (u - 1) ** 2 / (u + 1))
    assert (mine.f_at_zero, mine.f_prime_at_infinity, mine.f_prime_at_zero) == pytest.approx((1.0, 1.0, -3.0))
    x = torch.tensor([-1e4, -300, 300, 1e4], dtype=dtype)
    assert mine.f(x)[:2].tolist() == pytest.approx([1.0, 1.0])
    assert mine.f_prime(x).tolist() == pytest.approx([-3.0, -3.0, 1.0, 1.0])
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=dtype)
    assert float(mine.value(apart[0], apart[1])) == pytest.approx(2.0)
    assert bool(mine.gradient(apart[0], apart[1]).isfinite().all())


def test_in_log_space():
    mine = own_divergence("mine", lambda x: x.exp() * x - torch.expm1(x), lambda x: x, argument="log_u")
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(0.379246, abs=5e-7)
    assert mine.f_prime(torch.tensor([-40.0])).item() == -40.0


def test_standard_form():
    """u log u has f'(1) = 1: u - 1 is subtracted, and everything that was given moves along."""
    known = f_divergence("kl_policy_ref")
    with pytest.warns(UserWarning, match=r"f'\(1\) = 1, so 1 \(u - 1\) is subtracted"):
        mine = own_divergence(
            "mine",
            lambda u: u * u.log(),
            lambda u: u.log() + 1,
            f_prime_inverse=lambda t: (t - 1).exp(),
            conjugate=lambda t: (t - 1).exp(),
            f_at_zero=0.0,
            f_prime_at_zero=-INF,
            f_prime_at_infinity=INF,
        )
    t = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    assert mine.f_at_zero == 1.0
    torch.testing.assert_close(mine.f(LOG_U), known.f(LOG_U))
    torch.testing.assert_close(mine.f_prime(LOG_U), known.f_prime(LOG_U))
    torch.testing.assert_close(mine.conjugate(t), torch.expm1(t))
    torch.testing.assert_close(mine.f_prime_inverse(t), t)


def test_a_slope_that_autograd_cannot_find():
    """f through numpy is fine with its derivative."""

    def f(u):
        return torch.from_numpy((u.detach().numpy() - 1) ** 2)

    with pytest.raises(ValueError, match="autograd finds no derivative of f; give f_prime"):
        own_divergence("mine", f)
    mine = own_divergence("mine", f, lambda u: 2 * (u - 1))
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(0.9225)
    assert mine.curvature == pytest.approx(2.0)
    assert np.isfinite(mine.f_prime_inverse(torch.tensor([0.5])).item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": lambda u: (u - 1) ** 2 + 0.3}, r"f\(1\) is 0.3 and must be 0"),
        ({"f": lambda u: -((u - 1) ** 2)}, r"not convex at u = 0\.0003"),
        ({"f": lambda u: torch.where(u < 2, (u - 1) ** 2, u - 1)}, r"not convex at u = (1\.9|2)"),
        ({"f": lambda u: torch.log(u - 0.5) + 0.7}, r"f is nan at u = 0\.0003"),
        ({"f": lambda u: 2 * u - 2}, "straight line"),
        ({"f": lambda u: (u - 1).square().sum()}, "one of the same shape"),
        ({"f": xlogx, "f_prime": lambda u: u.log() + 0.1}, r"f_prime is -7\.9 at u = 0\.0003\d*, where f rises by -8"),
        ({"f": xlogx, "f_prime": lambda u: torch.where(u > 3, 9.0, u.log())}, r"f_prime is 9 at u = 3\.00"),
        ({"f": xlogx, "f_prime_inverse": lambda t: t.exp() + 0.1}, "f_prime_inverse gives u = 0.1003"),
        ({"f": xlogx, "conjugate": lambda t: t.exp()}, r"f\*\(-8\) is 0.000335463, but t u - f\(u\)"),
        ({"f": xlogx, "name": "js"}, "one of Keel's own"),
        ({"f": xlogx, "name": "reverse_kl"}, "one of Keel's own"),
        ({"f": xlogx, "name": "mine:2"}, "letters, digits and underscores"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        own_divergence(**{"name": "mine", **arguments})
    assert "mine" not in family._OWN


def test_a_limit_that_cannot_be_told():
    """A root of log u near 0 grows, but by ever less."""

    def f(u):
        below = (1 - u.log().clamp(max=0)).sqrt() - 1
        return below * 0.2 + (u - 1) ** 2

    with pytest.raises(ValueError, match="give f_at_zero="):
        own_divergence("mine", f)
    assert own_divergence("mine", f, f_at_zero=INF).f_at_zero == INF


def test_names_are_taken_once():
    own_divergence("mine", xlogx)
    with pytest.raises(ValueError, match="'mine' already"):
        own_divergence("mine", AGAIN["js"])
    own_divergence("mine", AGAIN["js"], replace=True)
    assert float(f_divergence("mine").value(P.log(), Q.log())) == pytest.approx(0.091813, abs=5e-7)
    with pytest.raises(ValueError, match="Did you mean 'mine'"):
        f_divergence("mime")
