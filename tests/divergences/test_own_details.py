"""What wrong generators are refused for, which rounding is forgiven, and what lies far out."""

import math
import warnings

import pytest
import torch

from keel.divergences import family
from keel.divergences.own import own_divergence

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
INF = math.inf


@pytest.fixture(autouse=True)
def _forgotten():
    known = dict(family._OWN)
    yield
    family._OWN.clear()
    family._OWN.update(known)


def xlogx(u):
    return u * torch.log(u) - u + 1


# -- the checks ------------------------------------------------------------------------------------------------------


def test_a_flat_negative_generator_is_convex():
    """max(1 - u, -1) does not fall beyond u = 2; in standard form it is the hockey stick, sum max(p - 2 q, 0)."""
    with pytest.warns(UserWarning, match=r"f'\(1\) = -1"):
        mine = own_divergence("mine", lambda u: torch.maximum(1 - u, torch.full_like(u, -1.0)))
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(0.05 + 0.10, abs=1e-12)  # outcomes 3 and 4
    assert (mine.f_at_zero, mine.f_prime_at_zero, mine.f_prime_at_infinity) == (0.0, 0.0, 1.0)


def test_a_steep_generator_with_its_slope_is_accepted():
    """1000 max(u - 1, -1/2): flat below u = 1/2, where f is large beside u; 1000 sum max(q / 2 - p, 0)."""
    with pytest.warns(UserWarning, match=r"f'\(1\) = 1000"):
        mine = own_divergence(
            "mine",
            lambda u: 1000 * torch.maximum(u - 1, torch.full_like(u, -0.5)),
            lambda u: torch.where(u > 0.5, 1000.0, 0.0).to(u),
        )
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(1000 * (0.2 - 0.1), rel=1e-9)  # outcome 0


@pytest.mark.parametrize(("error", "refused"), [(1e-8, False), (1e-3, True), (-1e-3, True)])
def test_a_slope_is_held_to_a_millionth(error, refused):
    def register():
        return own_divergence("mine", xlogx, lambda u: u.log() + error * (u > 3))

    if refused:
        with pytest.raises(ValueError, match=r"f_prime is 1\.[01]\d* at u = 3\.00"):
            register()
    else:
        assert register().f_prime(torch.tensor([0.5])).item() == 0.5


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_an_inverse_that_is_wrong_in_places(factor):
    """Right for slopes up to 7 only; the first wrong one is log u = 7.05, u = 1152.86."""
    wrong = 1152.8587 * factor
    with pytest.raises(ValueError, match=rf"f_prime_inverse gives u = {wrong:.2f}\d* for the slope of u = 1153"):
        own_divergence("mine", xlogx, f_prime_inverse=lambda t: t.exp() * torch.where(t > 7.01, factor, 1.0))


def test_an_inverse_that_is_no_number_in_places():
    with pytest.raises(ValueError, match="f_prime_inverse gives u = nan for the slope of u = 1153"):
        own_divergence("mine", xlogx, f_prime_inverse=lambda t: torch.where(t > 7.01, math.nan, t.exp()))


@pytest.mark.parametrize(
    ("conjugate", "says"),
    [
        (
            lambda t: torch.expm1(t) + 0.1 * (t > 0.01),
            r"f\*\(0\.05\) is 0\.151271, but .* at u = 1\.051, is 0\.0512711",
        ),
        (lambda t: torch.expm1(t) - 0.1 * (t > 0.01), r"f\*\(0\.05\) is -0\.0487289, but .* is 0\.0512711"),
        (lambda t: torch.expm1(t) - 0.1, r"f\*\(-8\) is -1\.09966, but .* is -0\.999665"),
        (lambda t: torch.where(t > 0.01, math.nan, torch.expm1(t)), r"f\*\(0\.05\) is nan"),
    ],
)
def test_a_conjugate_that_is_wrong_in_places_or_on_one_side(conjugate, says):
    with pytest.raises(ValueError, match=says):
        own_divergence("mine", xlogx, conjugate=conjugate)


@pytest.mark.parametrize(("error", "refused"), [(1e-7, False), (1e-4, True), (-1e-4, True)])
def test_a_conjugate_is_held_to_what_its_terms_can_give(error, refused):
    """t + t^2 / 4 of the chi-square reaches 9e6 on the grid: 1e-7 of that is 0.9, and no fault."""

    def register():
        return own_divergence("mine", lambda u: (u - 1) ** 2, conjugate=lambda t: (t + t**2 / 4) * (1 + error))

    if refused:
        with pytest.raises(ValueError, match=r"but t u - f\(u\) there"):
            register()
    else:
        assert register().conjugate(torch.tensor([2.0], dtype=torch.float64)).item() == pytest.approx(3, rel=2e-7)


def test_one_registration_leaves_nothing_behind_for_the_next():
    """f by way of numpy can be evaluated after another f had its slope from autograd."""
    own_divergence("first", xlogx)
    mine = own_divergence("mine", lambda u: torch.from_numpy((u.numpy() - 1) ** 2), lambda u: 2 * (u - 1))
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(0.9225)


# -- far out ---------------------------------------------------------------------------------------------------------


def test_slopes_at_and_beyond_their_limits():
    """f = (u - 1)^2 / (u + 1), f' = 1 - 4 / (u + 1)^2 from -3 to 1: u is 0 and inf from these slopes on."""
    mine = own_divergence(
        "mine", lambda u: (u - 1) ** 2 / (u + 1), f_prime_at_zero=-3.0, f_prime_at_infinity=1.0, f_at_zero=1.0
    )
    t = torch.tensor([-4.0, -3.0, 0.0, 0.75, 1.0, 2.0], dtype=torch.float64)
    found = mine.f_prime_inverse(t).tolist()
    assert found == [-INF, -INF, pytest.approx(0, abs=1e-9), pytest.approx(math.log(3)), INF, INF]


def test_curvature_far_out_is_zero():
    """f'' = 8 / (u + 1)^3, also where u^2 overflows."""
    mine = own_divergence("mine", lambda u: (u - 1) ** 2 / (u + 1))
    x = torch.tensor([0.0, 1.0, 400.0, 1e4], dtype=torch.float64)
    assert mine.f_second(x).tolist() == pytest.approx([1.0, 8 / (math.e + 1) ** 3, 0.0, 0.0], rel=1e-6, abs=1e-12)


def test_value_of_a_sample_far_out():
    """(u - 1)^4 / (u + 1)^3 over u tends to 1, where its fourth power has long overflowed."""
    mine = own_divergence("mine", lambda u: (u - 1) ** 4 / (u + 1) ** 3)
    x = torch.tensor([math.log(3), 100.0, 200.0, 300.0, 1e4], dtype=torch.float64)
    assert mine.f_over_u(x).tolist() == pytest.approx([1 / 12, 1.0, 1.0, 1.0, 1.0])
    apart = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]], dtype=torch.float64)  # p where q has e^-1000
    assert float(mine.value(apart[0], apart[1])) == pytest.approx(2.0)


def test_log_ratios_count_up_to_three_hundred():
    """u log u with q = e^-1000 where p = 1/2: p_0 p_1 (x_1 - x_0) with x_1 = 300 and x_0 = ln(1/2)."""
    mine = own_divergence("mine", xlogx)
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([0.0, -1000.0], dtype=torch.float64)
    pull = 0.25 * (300 - math.log(0.5))
    assert mine.gradient(p, q).tolist() == pytest.approx([-pull, pull], rel=1e-12)


# -- the standard form -----------------------------------------------------------------------------------------------


def test_a_kink_with_a_flat_tangent_stays_as_it_is():
    """2 (u - 1) above 1 and 1 - u below: 0 is a slope at 1, whichever autograd names; 3 times the total variation."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = own_divergence("mine", lambda u: torch.where(u >= 1, 2 * (u - 1), 1 - u))
    assert (mine.f_at_zero, mine.f_prime_at_zero, mine.f_prime_at_infinity) == (1.0, -1.0, 2.0)
    assert mine.curvature == 0.0
    assert float(mine.value(P.log(), Q.log())) == pytest.approx(3 * 0.35, rel=1e-12)


def test_a_slope_at_one_of_rounding_size_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = own_divergence("mine", xlogx, lambda u: u.log() + 1e-12)
    assert mine.f_at_zero == 1.0
