"""The f-divergences: the tables of the five-outcome example, limits, rules, inequalities, and stability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from tests.worlds import noise

from keel.divergences.family import ALIASES, NAMES, FDivergence, f_divergence

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LOG_U = (P / Q).log()
U = (0.25, 1.2, 0.75, 2.5, 4.0)
DIGITS = 5.1e-7
INF = math.inf
LOG2 = math.log(2)
NAMED = (*(n for n in NAMES if n != "alpha"), "alpha:0.5", "alpha:0.2", "alpha:2", "alpha:-1", "js:0.1", "js:0.9")
EACH = pytest.mark.parametrize("name", NAMED)


def fp64(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# name: D(p||q), D(q||p), f(u) per outcome, f'(u) per outcome
TABLE = {
    "kl_policy_ref": (
        0.379246,
        0.405530,
        (0.403426, 0.018786, 0.034238, 0.790727, 2.545177),
        (-1.386294, 0.182322, -0.287682, 0.916291, 1.386294),
    ),
    "kl_ref_policy": (
        0.405530,
        0.379246,
        (0.636294, 0.017678, 0.037682, 0.583709, 1.613706),
        (-3.000000, 0.166667, -0.333333, 0.600000, 0.750000),
    ),
    "jeffreys": (
        0.784776,
        0.784776,
        (1.039721, 0.036464, 0.071921, 1.374436, 4.158883),
        (-4.386294, 0.348988, -0.621015, 1.516291, 2.136294),
    ),
    "js": (
        0.091813,
        0.091813,
        (0.120465, 0.004552, 0.008959, 0.166036, 0.481862),
        (-0.458145, 0.043506, -0.077075, 0.178337, 0.235002),
    ),
    "alpha:0.5": (
        0.379279,
        0.379279,
        (0.500000, 0.018220, 0.035898, 0.675445, 2.000000),
        (-2.000000, 0.174258, -0.309401, 0.735089, 1.000000),
    ),
    "alpha:0.2": (
        0.391669,
        0.376237,
        (0.575886, 0.017892, 0.036953, 0.617972, 1.753076),
        (-2.539291, 0.169649, -0.323479, 0.649438, 0.837654),
    ),
    "alpha:2": (
        0.461250,
        0.563750,
        (0.281250, 0.020000, 0.031250, 1.125000, 4.500000),
        (-0.750000, 0.200000, -0.250000, 1.500000, 3.000000),
    ),
    "alpha:-1": (
        0.563750,
        0.461250,
        (1.125000, 0.016667, 0.041667, 0.450000, 1.125000),
        (-7.500000, 0.152778, -0.388889, 0.420000, 0.468750),
    ),
    "chi2_policy_ref": (
        0.922500,
        1.127500,
        (0.562500, 0.040000, 0.062500, 2.250000, 9.000000),
        (-1.500000, 0.400000, -0.500000, 3.000000, 6.000000),
    ),
    "chi2_ref_policy": (
        1.127500,
        0.922500,
        (2.250000, 0.033333, 0.083333, 0.900000, 2.250000),
        (-15.000000, 0.305556, -0.777778, 0.840000, 0.937500),
    ),
    "tv": (
        0.350000,
        0.350000,
        (0.375000, 0.100000, 0.125000, 0.750000, 1.500000),
        (-0.500000, 0.500000, -0.500000, 0.500000, 0.500000),
    ),
    "hellinger": (
        0.094820,
        0.094820,
        (0.125000, 0.004555, 0.008975, 0.168861, 0.500000),
        (-0.500000, 0.043565, -0.077350, 0.183772, 0.250000),
    ),
    # KL(p||q) + Pearson / 2, which has no name in the table: the sum of two of its rows
    "kl_chi2": (
        0.379246 + 0.922500 / 2,
        0.405530 + 1.127500 / 2,
        (0.403426 + 0.28125, 0.038786, 0.034238 + 0.03125, 0.790727 + 1.125, 2.545177 + 4.5),
        (-1.386294 - 0.75, 0.382322, -0.537682, 0.916291 + 1.5, 1.386294 + 3),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    d = f_divergence(name)
    value, turned, f, slope = TABLE[name]
    assert float(d.value(P.log(), Q.log())) == pytest.approx(value, abs=DIGITS)
    assert float(d.value(Q.log(), P.log())) == pytest.approx(turned, abs=DIGITS)
    assert d.f(LOG_U).tolist() == pytest.approx(f, abs=DIGITS)
    assert d.f_over_u(LOG_U).tolist() == pytest.approx([y / u for y, u in zip(f, U, strict=True)], abs=4 * DIGITS)
    assert d.f_prime(LOG_U).tolist() == pytest.approx(slope, abs=DIGITS)
    assert d.u_f_prime(LOG_U).tolist() == pytest.approx([y * u for y, u in zip(slope, U, strict=True)], abs=4 * DIGITS)
    assert float(d.value(P.log(), P.log())) == 0
    assert float((Q * d.f(LOG_U)).sum()) == pytest.approx(value, abs=DIGITS)
    assert float((P * d.f_over_u(LOG_U)).sum()) == pytest.approx(value, abs=DIGITS)


@pytest.mark.parametrize(("b", "value"), [(0.1, 0.035285), (0.5, 0.091813), (0.9, 0.033531)])
def test_generalised_jensen_shannon(b, value):
    """The reference's weight is b; f' = (1 - b) (log u - log(b + (1 - b) u))."""
    d = FDivergence("js", b)
    assert float(d.value(P.log(), Q.log())) == pytest.approx(value, abs=DIGITS)
    wanted = [(1 - b) * (math.log(u) - math.log(b + (1 - b) * u)) for u in U]
    assert d.f_prime(LOG_U).tolist() == pytest.approx(wanted, abs=1e-14)
    f = [(1 - b) * u * math.log(u) - (b + (1 - b) * u) * math.log(b + (1 - b) * u) for u in U]
    assert d.f(LOG_U).tolist() == pytest.approx(f, abs=1e-14)


def test_jensen_shannon_becomes_the_two_kls_after_division():
    small = float(FDivergence("js", 1e-4).value(P.log(), Q.log())) / 1e-4
    assert small == pytest.approx(0.405474, abs=DIGITS)
    assert float(FDivergence("js", 1e-9).value(P.log(), Q.log())) / 1e-9 == pytest.approx(0.405530, abs=1e-6)
    assert float(FDivergence("js", 1 - 1e-9).value(P.log(), Q.log())) / 1e-9 == pytest.approx(0.379246, abs=1e-6)


# name: f''(u) for u = 1/2, 1, 3; f(0), f'(inf), f'(0+), f''(1)
CONSTANTS = {
    "kl_policy_ref": (lambda u: 1 / u, 1, INF, -INF, 1),
    "kl_ref_policy": (lambda u: u**-2, INF, 1, -INF, 1),
    "jeffreys": (lambda u: 1 / u + u**-2, INF, INF, -INF, 2),
    "js": (lambda u: 1 / (2 * u * (1 + u)), LOG2 / 2, LOG2 / 2, -INF, 0.25),
    "js:0.1": (lambda u: 0.09 / (u * (0.1 + 0.9 * u)), -0.1 * math.log(0.1), -0.9 * math.log(0.9), -INF, 0.09),
    "alpha:0.5": (lambda u: u**-1.5, 2, 2, -INF, 1),
    "alpha:0.2": (lambda u: u**-1.8, 5, 1.25, -INF, 1),
    "alpha:1": (lambda u: 1 / u, 1, INF, -INF, 1),
    "alpha:0": (lambda u: u**-2, INF, 1, -INF, 1),
    "alpha:2": (lambda u: 1.0, 0.5, INF, -1, 1),
    "alpha:3": (lambda u: u, 1 / 3, INF, -0.5, 1),
    "alpha:-1": (lambda u: u**-3, INF, 0.5, -INF, 1),
    "chi2_policy_ref": (lambda u: 2.0, 1, INF, -2, 2),
    "chi2_ref_policy": (lambda u: 2 * u**-3, INF, 1, -INF, 2),
    "tv": (lambda u: 0.0, 0.5, 0.5, -0.5, 0),
    "hellinger": (lambda u: u**-1.5 / 4, 0.5, 0.5, -INF, 0.25),
    "kl_chi2": (lambda u: 1 / u + 1, 1.5, INF, -INF, 2),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    d = f_divergence(name)
    second, at_zero, at_infinity, slope_at_zero, curvature = CONSTANTS[name]
    u = (0.5, 1.0, 3.0)
    assert d.f_second(fp64(*u).log()).tolist() == pytest.approx([second(x) for x in u], abs=1e-12)
    assert (d.f_at_zero, d.f_prime_at_infinity) == pytest.approx((at_zero, at_infinity), abs=1e-12)
    assert (d.f_prime_at_zero, d.curvature) == pytest.approx((slope_at_zero, curvature), abs=1e-12)
    edges = fp64(-INF, INF)
    assert d.f(edges).tolist() == pytest.approx([at_zero, INF], abs=1e-12)
    assert d.f_over_u(edges).tolist() == pytest.approx([INF, at_infinity], abs=1e-12)
    assert d.f_prime(edges).tolist() == pytest.approx([slope_at_zero, at_infinity], abs=1e-12)
    assert d.maximum == pytest.approx(at_zero + at_infinity)


@pytest.mark.parametrize(
    ("name", "largest"),
    [("js", LOG2), ("tv", 1), ("hellinger", 1), ("alpha:0.5", 4), ("alpha:0.2", 6.25), ("kl_policy_ref", INF)],
)
def test_disjoint_supports(name, largest):
    p, q = fp64(0.5, 0.5, 0.0).log(), fp64(0.0, 0.0, 1.0).log()
    d = f_divergence(name)
    assert d.maximum == pytest.approx(largest)
    assert float(d.value(p, q)) == pytest.approx(largest)
    assert bool(d.gradient(p, q).isfinite().all())


@EACH
def test_limits_are_approached(name):
    """f(0), f'(inf) and f'(0+) are where the functions go."""
    d = f_divergence(name)
    far = fp64(-300.0, 300.0)
    for found, limit in (
        (d.f(far)[0], d.f_at_zero),
        (d.f_prime(far)[1], d.f_prime_at_infinity),
        (d.f_over_u(far)[1], d.f_prime_at_infinity),
        (-d.f_prime(far)[0], -d.f_prime_at_zero),
    ):
        assert float(found) > 20 if limit == INF else float(found) == pytest.approx(limit, rel=1e-6)


# -- duals and names -------------------------------------------------------------------------------------------------


@EACH
def test_dual(name):
    """D_dual(p || q) = D(q || p): its generator is u f(1 / u)."""
    d = f_divergence(name).scaled(3.0)
    if name == "kl_chi2":
        with pytest.raises(ValueError, match="exchange the arguments"):
            _ = d.dual
        return
    assert float(d.dual.value(P.log(), Q.log())) == pytest.approx(float(d.value(Q.log(), P.log())), abs=1e-14)
    torch.testing.assert_close(d.dual.f(LOG_U), d.f_over_u(-LOG_U))
    assert d.dual.dual.name == d.name and d.dual.dual.parameter == pytest.approx(d.parameter)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("alpha:0.5", "4*hellinger"),
        ("2*alpha:2", "chi2_policy_ref"),
        ("2*alpha:-1", "chi2_ref_policy"),
        ("alpha:1", "kl_policy_ref"),
        ("alpha:0", "kl_ref_policy"),
        ("alpha:1.00001", "kl_policy_ref"),
        ("alpha:-0.00001", "kl_ref_policy"),
        ("js:0.5", "js"),
    ],
)
def test_equal_divergences(one, other):
    a, b = f_divergence(one), f_divergence(other)
    near = 1e-4 if "00001" in one else 1e-12
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(a.f(x), b.f(x), rtol=near, atol=1e-15)
    torch.testing.assert_close(a.f_prime(x), b.f_prime(x), rtol=near, atol=1e-15)
    assert float(a.value(P.log(), Q.log())) == pytest.approx(float(b.value(P.log(), Q.log())), rel=near)
    torch.testing.assert_close(a.gradient(P.log(), Q.log()), b.gradient(P.log(), Q.log()), rtol=near, atol=1e-15)


def test_generators_as_other_papers_write_them():
    """t log t - (1 + t) log((1 + t) / 2) is twice Jensen-Shannon; DPH-RL's alpha is 1 - a of this family."""
    twice = sum(q * (u * math.log(u) - (1 + u) * math.log((1 + u) / 2)) for q, u in zip(Q.tolist(), U, strict=True))
    assert float(f_divergence("2*js").value(P.log(), Q.log())) == pytest.approx(twice, abs=1e-14)
    assert twice == pytest.approx(0.183625, abs=DIGITS)
    a = 0.2
    theirs = sum(q * (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)) for q, u in zip(Q.tolist(), U, strict=True))
    assert theirs == pytest.approx(0.376237, abs=DIGITS)
    assert float(f_divergence("alpha:0.8").value(P.log(), Q.log())) == pytest.approx(theirs, abs=1e-14)


@pytest.mark.parametrize("text", [*NAMED, *(a for a in ALIASES if ALIASES[a] != "alpha"), "0.3*js:0.123456789"])
def test_names_read_back(text):
    d = f_divergence(text)
    assert f_divergence(str(d)) == d and f_divergence(d) is d


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reverse_k", "Did you mean 'reverse_kl'"),
        ("alpha", "needs its parameter, such as 'alpha:0.5'"),
        ("alpha:half", "'half' in 'alpha:half' is not a number"),
        ("alpha:nan", "must be finite"),
        ("tv:2", "has no parameter"),
        ("js:1", "strictly between 0 and 1"),
        ("js:0", "strictly between 0 and 1"),
        ("-1*js", "must be positive"),
        ("x*js", "'x' in"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        f_divergence(text)


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


# -- inequalities ----------------------------------------------------------------------------------------------------

distributions = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5)


@settings(max_examples=15)
@given(distributions, distributions)
def test_inequalities(a, b):
    p, q = (fp64(*x) / sum(x) for x in (a, b))

    def d(name: str) -> float:
        return float(f_divergence(name).value(p.log(), q.log()))

    tiny = 1e-9
    kl, tv, h2, js = d("kl_policy_ref"), d("tv"), d("hellinger"), d("js")
    assert min(d(name) for name in NAMED) >= -1e-15
    assert tv == pytest.approx(0.5 * float((p - q).abs().sum()), abs=1e-12)
    assert h2 == pytest.approx(1 - float((p * q).sqrt().sum()), abs=1e-12)
    assert tv <= math.sqrt(kl / 2) + tiny and tv**2 <= -math.expm1(-kl) + tiny
    assert h2 - tiny <= tv <= math.sqrt(2 * h2 - h2**2) + tiny
    assert kl <= math.log1p(d("chi2_policy_ref")) + tiny
    assert js <= tv * LOG2 + tiny
    assert d("jeffreys") == pytest.approx(kl + d("kl_ref_policy"), abs=1e-10)


# -- stability -------------------------------------------------------------------------------------------------------


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
