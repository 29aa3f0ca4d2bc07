"""Value and surrogate from samples: that they are kept apart, far from equality and without mass."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from keel.divergences.family import f_divergence
from keel.divergences.sampled import sampled, term

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
MU = torch.tensor([0.25, 0.20, 0.30, 0.15, 0.10], dtype=torch.float64)
DRAWN = {"policy": P, "old": MU, "reference": Q}


@pytest.mark.parametrize("samples", DRAWN)
@pytest.mark.parametrize(("kind", "value"), [("kl_policy_ref", 0.379246), ("js", 0.091813), ("alpha:0.2", 0.391669)])
def test_mean_value_and_mean_gradient(samples, kind, value):
    z = P.log().requires_grad_()
    found, surrogate = sampled(f_divergence(kind), samples, z.log_softmax(-1), Q.log(), MU.log())
    assert not found.requires_grad
    assert float((DRAWN[samples] * found).sum()) == pytest.approx(value, abs=5.1e-7)
    (slope,) = torch.autograd.grad((DRAWN[samples] * surrogate).sum(), z)
    torch.testing.assert_close(slope, f_divergence(kind).gradient(P.log(), Q.log()))


def test_on_samples_of_the_reference_the_value_has_the_right_gradient_itself():
    """autograd through f(u) agrees with the surrogate, sample by sample."""
    for kind in ("kl_policy_ref", "kl_ref_policy", "js", "alpha:0.5", "neyman"):
        log_pi = P.log().requires_grad_()
        (through_value,) = torch.autograd.grad(f_divergence(kind).f(log_pi - Q.log()).sum(), log_pi)
        _, surrogate = sampled(f_divergence(kind), "reference", log_pi, Q.log())
        (through_surrogate,) = torch.autograd.grad(surrogate.sum(), log_pi)
        torch.testing.assert_close(through_value, through_surrogate)


def test_at_equality_value_and_gradient_are_zero():
    """The standard form: -log u alone would have value 0 and the gradient of a likelihood."""
    for samples in DRAWN:
        log_pi = P.log().requires_grad_()
        value, surrogate = sampled(f_divergence("kl_ref_policy"), samples, log_pi, P.log(), MU.log())
        (slope,) = torch.autograd.grad(term(value, surrogate).sum(), log_pi)
        assert not bool(value.any()) and not bool(slope.any())


def test_the_most_divergent_samples_keep_their_gradient():
    """At log u = -50 in fp32 KL(policy || ref) pulls with -50, KL(ref || policy) with 1 - e^50."""
    for kind, pull in (("kl_policy_ref", -50.0), ("kl_ref_policy", -math.expm1(50.0))):
        log_pi = torch.tensor([-60.0]).requires_grad_()
        value, surrogate = sampled(f_divergence(kind), "policy", log_pi, torch.tensor([-10.0]))
        (slope,) = torch.autograd.grad(term(value, surrogate).sum(), log_pi)
        assert slope.item() == pytest.approx(pull, rel=1e-5)
    value, surrogate = sampled(f_divergence("js"), "reference", torch.tensor([0.0]), torch.tensor([-math.inf]))
    assert value.item() == math.inf  # u = inf on a sample that the reference cannot have drawn


def test_samples_of_an_older_policy_need_it():
    with pytest.raises(ValueError, match="need its log-probabilities"):
        sampled(f_divergence("js"), "old", P.log(), Q.log())
    with pytest.raises((ValueError, TypeCheckError), match="samples"):
        sampled(f_divergence("js"), "ref", P.log(), Q.log())
