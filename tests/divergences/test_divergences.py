"""Divergences of the five-outcome example, their gradients, and the inequalities that hold between them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worlds import noise

from keel.divergences.estimators import estimate
from keel.divergences.vocabulary import ALIASES, divergence, divergence_backward

P = torch.tensor([[0.10, 0.30, 0.15, 0.25, 0.20]], dtype=torch.float64)
Q = torch.tensor([[0.40, 0.25, 0.20, 0.10, 0.05]], dtype=torch.float64)
DIGITS = 5.1e-7
VALUES = {"kl_policy_ref": (0.379246, 0.405530), "kl_ref_policy": (0.405530, 0.379246), "js": (0.091813, 0.091813)}


@pytest.mark.parametrize("kind", VALUES)
def test_values(kind):
    forward, turned = VALUES[kind]
    assert float(divergence(kind, P.log(), Q.log())) == pytest.approx(forward, abs=DIGITS)
    assert float(divergence(kind, Q.log(), P.log())) == pytest.approx(turned, abs=DIGITS)
    assert float(divergence(kind, P.log(), P.log())) == 0


GRADIENTS = {
    "kl_policy_ref": [-0.176554, -0.059077, -0.100039, 0.134261, 0.201410],
    "kl_ref_policy": [-0.3, 0.05, -0.05, 0.15, 0.15],
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients(kind):
    assert divergence_backward(kind, P.log(), Q.log())[0].tolist() == pytest.approx(GRADIENTS[kind], abs=DIGITS)


LOST = {
    "kl_policy_ref": {1e-2: -0.044024, 1e-4: -0.000907, 1e-6: -0.000014},
    "kl_ref_policy": {1e-2: -0.390000, 1e-4: -0.399900, 1e-6: -0.399999},
    "js": {1e-2: -0.016186, 1e-4: -0.000393, 1e-6: -0.000006},
}


@pytest.mark.parametrize("kind", LOST)
def test_pull_on_a_lost_mode(kind):
    """Only KL(ref || policy) keeps pulling on an outcome that the policy has lost."""
    for eps, pull in LOST[kind].items():
        p = torch.tensor([[eps, 0.30, 0.15, 0.25, 0.30 - eps]], dtype=torch.float64)
        assert float(divergence_backward(kind, p.log(), Q.log())[0, 0]) == pytest.approx(pull, abs=DIGITS)


@pytest.mark.parametrize("kind", VALUES)
def test_gradients_against_autograd(kind):
    z, reference = noise("z", shape=(6, 9)).requires_grad_(), noise("ref", shape=(6, 9)).log_softmax(-1)
    value = divergence(kind, z.log_softmax(-1), reference)
    (wanted,) = torch.autograd.grad(value.sum(), z)
    found = divergence_backward(kind, z.detach().log_softmax(-1), reference)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", VALUES)
def test_outcomes_of_probability_zero(kind):
    """0 log 0 is 0; one that only the policy can reach costs log 2 of its mass at most in Jensen-Shannon."""
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    two = divergence(kind, p[:, :2], q[:, :2])
    assert torch.equal(divergence(kind, p, q), two)
    slope = divergence_backward(kind, p, q)
    assert bool(torch.isfinite(slope).all()) and float(slope[0, 2]) == 0
    apart = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log()
    assert float(divergence(kind, p, apart)) == pytest.approx(math.log(2) if kind == "js" else math.inf)


distributions = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5)


@given(distributions, distributions)
def test_inequalities(a, b):
    p, q = (torch.tensor([x], dtype=torch.float64) / sum(x) for x in (a, b))
    kl = float(divergence("kl_policy_ref", p.log(), q.log()))
    js = float(divergence("js", p.log(), q.log()))
    tv = 0.5 * float((p - q).abs().sum())
    chi2 = float(((p - q) ** 2 / q).sum())
    tiny = 1e-9
    assert kl >= -tiny and tv <= math.sqrt(kl / 2 + tiny) + tiny
    assert kl <= math.log1p(chi2) + tiny
    assert -tiny <= js <= math.log(2) and js <= tv * math.log(2) + tiny
    assert kl == pytest.approx(float(divergence("kl_ref_policy", q.log(), p.log())), abs=1e-12)


def test_local_calibration():
    """Near equality D is f''(1) / 2 times chi-squared: 1 / 2 for both KLs, 1 / 8 for Jensen-Shannon."""
    p = Q * (1 + 1e-3 * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64))
    p = p / p.sum()
    chi2 = float(((p - Q) ** 2 / Q).sum())
    for kind, factor in (("kl_policy_ref", 0.5), ("kl_ref_policy", 0.5), ("js", 0.125)):
        assert float(divergence(kind, p.log(), Q.log())) == pytest.approx(factor * chi2, rel=2e-3)


def test_names():
    assert set(ALIASES.values()) == set(VALUES)


@pytest.mark.parametrize(
    ("kind", "d", "value"),
    [
        ("k1", 0.3, 0.3),
        ("k2", 0.3, 0.045),
        ("k3", 0.3, 0.040818),
        ("k1", -0.5, -0.5),
        ("k2", -0.5, 0.125),
        ("k3", -0.5, 0.148721),
        ("k3", -5.0, 142.413159),
        ("k3", 0.0, 0.0),
    ],
)
def test_estimators(kind, d, value):
    assert float(estimate(kind, torch.tensor([d], dtype=torch.float64))) == pytest.approx(value, abs=DIGITS)


def test_k3_near_zero_has_no_cancellation():
    """d^2 / 2 - d^3 / 6 in fp32, where exp(-d) - 1 + d computed plainly is all rounding."""
    d = torch.tensor([1e-3])
    assert float(estimate("k3", d)) == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)


def test_moments_of_the_estimators():
    """On the policy's samples: k1 and k3 have mean KL, variances 0.665000, 0.222947, k2 0.157848."""
    d = (P / Q).log()
    for kind, mean, variance in (("k1", 0.379246, 0.665), ("k2", 0.404414, 0.157848), ("k3", 0.379246, 0.222947)):
        k = estimate(kind, d)
        found = float((P * k).sum())
        assert found == pytest.approx(mean, abs=DIGITS)
        assert float((P * k**2).sum()) - found**2 == pytest.approx(variance, abs=DIGITS)
