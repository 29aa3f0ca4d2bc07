"""The f-divergences: the tables of the five-outcome example, limits, duals, names, and inequalities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.divergences.five_outcomes import DIGITS, EACH, INF, LOG_U, NAMED, P, Q, U, fp64

from keel.divergences.family import ALIASES, FDivergence, f_divergence

LOG2 = math.log(2)


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
