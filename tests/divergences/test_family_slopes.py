"""The f-divergences: slopes, their inverses, conjugates, scaling, and gradients in the logits."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from tests.divergences.five_outcomes import DIGITS, EACH, INF, LOG_U, NAMED, P, Q, fp64
from tests.worlds import noise

from keel.divergences.family import f_divergence

# -- slopes, inverses, conjugates ------------------------------------------------------------------------------------


@EACH
def test_derivatives_by_finite_differences(name):
    d, step = f_divergence(name), 1e-5
    u = fp64(0.05, 0.3, 0.9, 1.1, 2.0, 7.0)
    slope = (d.f((u + step).log()) - d.f((u - step).log())) / (2 * step)
    torch.testing.assert_close(d.f_prime(u.log()), slope, rtol=1e-6, atol=1e-8)
    second = (d.f_prime((u + step).log()) - d.f_prime((u - step).log())) / (2 * step)
    torch.testing.assert_close(d.f_second(u.log()), second, rtol=1e-5, atol=1e-8)
    assert d.f(fp64(0.0)).item() == 0 and d.f_prime(fp64(0.0)).item() == 0


@EACH
def test_autograd_through_the_generator(name):
    """f and f / u are differentiable in log u, at 0 and far away, too."""
    d = f_divergence(name)
    x = fp64(-30.0, -2.0, -1e-5, 0.0, 1e-5, 2.0, 30.0).requires_grad_()
    (slope,) = torch.autograd.grad(d.f(x).sum(), x)
    torch.testing.assert_close(slope, d.u_f_prime(x.detach()), rtol=1e-7, atol=1e-11)
    (slope,) = torch.autograd.grad(d.f_over_u(x).sum(), x)
    torch.testing.assert_close(slope, d.f_prime(x.detach()) - d.f_over_u(x.detach()), rtol=1e-7, atol=1e-10)


INVERSES = {
    "kl_policy_ref": (lambda t: math.exp(t), (-2.0, 0.0, 1.5)),
    "kl_ref_policy": (lambda t: 1 / (1 - t), (-2.0, 0.0, 0.9)),
    "js": (lambda t: math.exp(2 * t) / (2 - math.exp(2 * t)), (-1.0, 0.0, 0.3)),
    "alpha:0.5": (lambda t: (1 - t / 2) ** -2, (-3.0, 0.0, 1.9)),
    "alpha:3": (lambda t: math.sqrt(1 + 2 * t), (-0.49, 0.0, 4.0)),
    "chi2_policy_ref": (lambda t: 1 + t / 2, (-1.9, 0.0, 5.0)),
    "chi2_ref_policy": (lambda t: (1 - t) ** -0.5, (-8.0, 0.0, 0.9)),
    "hellinger": (lambda t: (1 - 2 * t) ** -2, (-3.0, 0.0, 0.4)),
}


@pytest.mark.parametrize("name", INVERSES)
def test_inverse_slope(name):
    inverse, at = INVERSES[name]
    found = f_divergence(name).f_prime_inverse(fp64(*at)).exp()
    assert found.tolist() == pytest.approx([inverse(t) for t in at], rel=1e-12)


@EACH
def test_inverse_slope_beyond_its_range(name):
    """0 from f'(0+) down, inf from f'(inf) up."""
    d = f_divergence(name)
    if name == "tv":
        assert d.f_prime_inverse(fp64(-0.51, -0.5, 0.2, 0.5, 0.51)).tolist() == [-INF, 0, 0, 0, INF]
        return
    torch.testing.assert_close(d.f_prime_inverse(d.f_prime(LOG_U)), LOG_U, rtol=1e-9, atol=1e-12)
    if math.isfinite(d.f_prime_at_zero):
        assert d.f_prime_inverse(fp64(d.f_prime_at_zero - 0.1, d.f_prime_at_zero - 50)).tolist() == [-INF] * 2
    if math.isfinite(d.f_prime_at_infinity):
        assert d.f_prime_inverse(fp64(d.f_prime_at_infinity, d.f_prime_at_infinity + 50)).tolist() == [INF] * 2


def _jeffreys(t):
    from scipy.special import lambertw

    w = float(lambertw(math.exp(1 - t)).real)
    return 1 / w + w + t - 2


CONJUGATES = {
    "kl_policy_ref": ((-2.0, 0.0, 1.5, 3.0), lambda t: math.expm1(t)),
    "kl_ref_policy": ((-5.0, 0.0, 0.5, 0.99), lambda t: -math.log(1 - t)),
    "jeffreys": ((-4.0, 0.0, 2.0), _jeffreys),
    "js": ((-3.0, 0.0, 0.34), lambda t: -0.5 * math.log(2 - math.exp(2 * t))),
    "alpha:0.5": ((-9.0, 0.0, 1.9), lambda t: ((1 - t / 2) ** -1 - 1) / 0.5),
    "alpha:0.2": ((-9.0, 0.0, 1.2), lambda t: ((1 - 0.8 * t) ** -0.25 - 1) / 0.2),
    "alpha:-1": ((-9.0, 0.0, 0.4), lambda t: 1 - math.sqrt(1 - 2 * t)),
    "alpha:3": ((-0.5, -0.4, 0.0, 4.0), lambda t: ((1 + 2 * t) ** 1.5 - 1) / 3),
    "chi2_policy_ref": ((-2.0, -1.0, 0.0, 3.0), lambda t: t + t * t / 4),
    "chi2_ref_policy": ((-3.0, 0.0, 0.96), lambda t: 2 - 2 * math.sqrt(1 - t)),
    "tv": ((-0.5, -0.2, 0.0, 0.5), lambda t: t),
    "hellinger": ((-3.0, 0.0, 0.45), lambda t: t / (1 - 2 * t)),
}


@pytest.mark.parametrize("name", CONJUGATES)
def test_conjugate(name):
    at, conjugate = CONJUGATES[name]
    found = f_divergence(name).conjugate(fp64(*at))
    assert found.tolist() == pytest.approx([conjugate(t) for t in at], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "t", "value"),
    [
        ("chi2_policy_ref", -2.5, -1.0),
        ("alpha:3", -0.6, -1 / 3),
        ("alpha:2", -1.5, -0.5),
        ("tv", -0.7, -0.5),
        ("tv", 0.6, INF),
        ("kl_ref_policy", 1.1, INF),
        ("js", 0.4, INF),
        ("chi2_ref_policy", 1.1, INF),
        ("hellinger", 0.6, INF),
        ("alpha:0.5", 2.1, INF),
        ("alpha:-1", 0.6, INF),
    ],
)
def test_conjugate_beyond_the_slopes(name, t, value):
    assert f_divergence(name).conjugate(fp64(t)).item() == pytest.approx(value, abs=1e-12)


@EACH
@pytest.mark.parametrize("t", [-1.3, -0.4, 0.05, 0.3])
def test_conjugate_is_a_supremum(name, t):
    """Against a numerical maximum of t u - f(u) over u = e^x."""
    d = f_divergence(name)
    if t > d.f_prime_at_infinity:  # t u outgrows f
        assert d.conjugate(fp64(t)).item() == INF
        return
    found = minimize_scalar(lambda x: float(d.f(fp64(x))) - t * math.exp(x), bounds=(-16, 12), options={"xatol": 1e-12})
    best = max(-float(found.fun), -d.f_at_zero)
    assert d.conjugate(fp64(t)).item() == pytest.approx(best, abs=1e-8)


@EACH
def test_variational_form(name):
    """E_p[T] - E_q[f*(T)] is at most D, and D at T = f'(u)."""
    d = f_divergence(name)
    value = float(d.value(P.log(), Q.log()))
    best = d.f_prime(LOG_U)
    assert float((P * best).sum() - (Q * d.conjugate(best)).sum()) == pytest.approx(value, abs=1e-12)
    for scale in (0.5, 0.9):
        assert float((P * scale * best).sum() - (Q * d.conjugate(scale * best)).sum()) < value + 1e-12


@EACH
def test_scaling(name):
    """k f has k f', f*(t) -> k f*(t / k); per curvature f''(1) is 1."""
    d, k = f_divergence(name), 2.5
    scaled, t = d.scaled(k), fp64(-1.0, 0.1, 0.3)
    torch.testing.assert_close(scaled.f(LOG_U), k * d.f(LOG_U))
    torch.testing.assert_close(scaled.f_prime(LOG_U), k * d.f_prime(LOG_U))
    torch.testing.assert_close(scaled.conjugate(t), k * d.conjugate(t / k))
    assert float(scaled.value(P.log(), Q.log())) == pytest.approx(k * float(d.value(P.log(), Q.log())))
    torch.testing.assert_close(scaled.gradient(P.log(), Q.log()), k * d.gradient(P.log(), Q.log()))
    if name == "tv":
        with pytest.raises(ValueError, match="no curvature"):
            d.per_curvature()
    else:
        assert scaled.per_curvature().curvature == pytest.approx(1.0)


@pytest.mark.parametrize("name", [n for n in NAMED if n != "tv"])
def test_local_calibration(name):
    """Near equality D is f''(1) / 2 times Pearson's chi-square."""
    p = Q * (1 + 1e-4 * fp64(1.0, -1.0, 1.0, -1.0, -1.0))
    p = p / p.sum()
    chi2 = float(((p - Q) ** 2 / Q).sum())
    d = f_divergence(name)
    assert float(d.value(p.log(), Q.log())) == pytest.approx(d.curvature / 2 * chi2, rel=1e-3)


# -- gradients -------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "kl_policy_ref": [-0.176554, -0.059077, -0.100039, 0.134261, 0.201410],
    "kl_ref_policy": [-0.3, 0.05, -0.05, 0.15, 0.15],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    assert f_divergence(name).gradient(P.log(), Q.log()).tolist() == pytest.approx(GRADIENTS[name], abs=DIGITS)


def test_the_two_kls_pull_almost_alike():
    """Their cosine is 0.8763: confusing them does not show at once."""
    a, b = (torch.tensor(g) for g in GRADIENTS.values())
    assert float(torch.cosine_similarity(a, b, dim=0)) == pytest.approx(0.8763, abs=5e-5)


@EACH
def test_gradients_against_autograd(name):
    d = f_divergence(name)
    z, reference = noise("z", shape=(6, 9)).requires_grad_(), noise("ref", shape=(6, 9)).log_softmax(-1)
    (wanted,) = torch.autograd.grad(d.value(z.log_softmax(-1), reference).sum(), z)
    found = d.gradient(z.detach().log_softmax(-1), reference)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    step, place = 1e-6, (2, 3)
    moved = []
    for sign in (1, -1):
        there = z.detach().clone()
        there[place] += sign * step
        moved.append(float(d.value(there.log_softmax(-1), reference).sum()))
    assert float(found[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-7)


LOST = {
    "kl_policy_ref": (-0.044024, -0.000907, -0.000014),
    "kl_ref_policy": (-0.390000, -0.399900, -0.399999),
    "js": (-0.016186, -0.000393, -0.000006),
    "hellinger": (-0.027679, -0.003126, -0.000316),
    "alpha:0.8": (-0.060502, -0.002193, -0.000062),
}


@pytest.mark.parametrize("name", LOST)
def test_pull_on_a_lost_mode(name):
    """Only KL(ref || policy) keeps pulling, with q = 0.4, on an outcome that the policy has lost."""
    for eps, pull in zip((1e-2, 1e-4, 1e-6), LOST[name], strict=True):
        p = fp64(eps, 0.30, 0.15, 0.25, 0.30 - eps)
        assert float(f_divergence(name).gradient(p.log(), Q.log())[0]) == pytest.approx(pull, abs=DIGITS)


def test_the_pull_of_jeffreys_stays_and_that_of_neyman_grows():
    p = fp64(1e-6, 0.30, 0.15, 0.25, 0.30 - 1e-6)
    assert float(f_divergence("jeffreys").gradient(p.log(), Q.log())[0]) == pytest.approx(-0.4, abs=1e-4)
    assert float(f_divergence("neyman").gradient(p.log(), Q.log())[0]) < -1e4
