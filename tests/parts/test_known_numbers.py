"""Numbers that the papers' methods stand on, apart from any one part: exact rates, optima, filtered copies."""

import pytest
import torch

from keel.divergences.estimators import estimate
from keel.divergences.family import f_divergence
from keel.exact.optima import optimum
from keel.recipes.registry import recipe_named
from keel.statistics.transforms import KeepMinP

DIGITS = 5.1e-7


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rate_of_the_entropy_along_one_token():
    """(.5, .3, .15, .05), a step along grad log p_a: what STEER's estimate -p (1 - p) (ln p + H) leaves out."""
    p = double(0.5, 0.3, 0.15, 0.05)
    logits = p.log().requires_grad_()
    q = logits.softmax(0)
    (slope,) = torch.autograd.grad(-(q * q.log()).sum(), logits)
    found = (torch.eye(4).double() - p) @ slope
    assert found.tolist() == pytest.approx([-0.139431, 0.103611, 0.198305, 0.177736], abs=DIGITS)
    by_hand = -(p * (p.log() - (p * p.log()).sum())) + (p.square() * (p.log() - (p * p.log()).sum())).sum()
    torch.testing.assert_close(found, by_hand)
    entropy = -(p * p.log()).sum()
    assert float(entropy) == pytest.approx(1.142120, abs=DIGITS)


@pytest.mark.parametrize(
    ("reward", "natural", "rate"), [([1, 0, 0, 0.5], True, -0.178159), ([1, 0, 0, 0.5], False, -0.065274),
                                    ([0, 0, 0, 1], True, 0.092682)],
)  # fmt: skip
def test_rate_of_the_entropy_along_a_step(reward, natural, rate):
    """By a step of 1e-4, for the natural and for the policy gradient; the covariance agrees to 1e-5."""
    p = double(0.5, 0.3, 0.15, 0.05)
    gain = double(*reward) - (p * double(*reward)).sum()
    moved = (p.log() + 1e-4 * (gain if natural else p * gain)).softmax(0)
    found = (-(moved * moved.log()).sum() + (p * p.log()).sum()) / 1e-4
    assert float(found) == pytest.approx(rate, abs=DIGITS)


def test_forward_and_reverse_optimum():
    """beta = .5, ref (.6, .3, .1), r (0, 0, 1): nu = 1.085410 where the KL is forward; the reverse one is a tilt."""
    ref, worth = double(0.6, 0.3, 0.1), double(0, 0, 1)
    forward = optimum(worth, ref.log(), 0.5, "kl_ref_policy").prob
    reverse = optimum(worth, ref.log(), 0.5, "kl_policy_ref").prob
    assert forward.tolist() == pytest.approx([0.276393, 0.138197, 0.585410], abs=DIGITS)
    assert (0.5 * ref / forward + worth).tolist() == pytest.approx([1.085410] * 3, abs=DIGITS)
    assert reverse.tolist() == pytest.approx([0.366098, 0.183049, 0.450853], abs=DIGITS)


def test_what_lies_outside_the_support():
    """r of an outcome that the reference never shows: half of the mass, at a value of .153426."""
    ref, worth, best = double(0.6, 0.3, 0.1, 0.0), double(0, 0, 0, 1), double(0.3, 0.15, 0.05, 0.5)
    value = (best * worth).sum() - 0.5 * f_divergence("kl_ref_policy").value(best.log(), ref.log())
    assert float(value) == pytest.approx(0.153426, abs=DIGITS)


def test_estimators_of_the_forward_kl():
    """p (.5, .3, .2), ref (.2, .3, .5): E_p[rho ln rho] = E_p[rho ln rho - rho + 1] = KL(ref || p) = .274887."""
    p, ref = double(0.5, 0.3, 0.2), double(0.2, 0.3, 0.5)
    rho = ref / p
    for value in (rho * rho.log(), rho * rho.log() - rho + 1):
        assert float((p * value).sum()) == pytest.approx(0.274887, abs=DIGITS)
    assert float(f_divergence("kl_ref_policy").value(p.log(), ref.log())) == pytest.approx(0.274887, abs=DIGITS)


def test_a_filtered_copy():
    """Min-p .2 of (.55, .25, .12, .06, .02): three tokens stay, each log(1 / .92) = .083382 more likely."""
    p = double(0.55, 0.25, 0.12, 0.06, 0.02)
    found = KeepMinP(0.2)(p.log()[None]).softmax(-1)[0]
    assert found.tolist() == pytest.approx([0.597826, 0.271739, 0.130435, 0, 0], abs=DIGITS)
    assert (found[:3].log() - p[:3].log()).tolist() == pytest.approx([0.083382] * 3, abs=DIGITS)


def test_a_sequence_of_the_band():
    assert recipe_named("epo")(level="sequence").terms["band"].penalty.level == "sequence"


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("k1", [0.0, 0.0, 0.0]),
        ("k2", [0.131286, -0.206921, 0.075635]),
        ("k3", [0.137585, -0.249911, 0.112327]),
    ],
)
def test_what_an_estimator_in_the_loss_pulls_towards(estimator, wanted):
    """Logits (.2, -.1, .4), ref (.2, .5, .3): k2 is the gradient of KL(pi || ref), k3 of KL(ref || pi), k1 none."""
    logits, ref = double(0.2, -0.1, 0.4).requires_grad_(), double(0.2, 0.5, 0.3)
    p = logits.softmax(0)
    loss = (p.detach() * estimate(estimator, p.log() - ref.log())).sum()
    (found,) = torch.autograd.grad(loss, logits)
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)
    if estimator == "k2":
        live = logits.softmax(0)
        (exact,) = torch.autograd.grad((live * (live / ref).log()).sum(), logits)
        torch.testing.assert_close(found, exact)
