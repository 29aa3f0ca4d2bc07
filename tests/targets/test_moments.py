"""Multipliers of prescribed moments: known numbers, an optimiser, geometry, refusals, and what samples cost."""

import math

import pytest
import torch
from scipy.optimize import minimize
from tests.targets.example import PHI, SIX, P, Q, R, kl, tensor
from torch.testing import assert_close

from keel.core.choice import generator
from keel.targets.moments import fit_multipliers, projection_risk
from keel.targets.target import moments

LQ = Q.log()


def test_two_features():
    fit = fit_multipliers(PHI, tensor(0.5, 0.4), LQ)
    assert_close(fit.multipliers, tensor(0.263748, 1.230859), **SIX)
    assert_close(fit.log_z.exp(), tensor(1.542417)[0], **SIX)
    assert_close(fit.kl, 0.190867, **SIX)
    p = moments(LQ, PHI, fit.multipliers).prob()
    assert_close(p, tensor(0.259333, 0.211000, 0.129667, 0.289000, 0.111000), **SIX)
    assert_close(p @ PHI, tensor(0.5, 0.4), rtol=0, atol=1e-12)
    feasible = tensor(0.15, 0.25, 0.20, 0.25, 0.15)
    assert_close(kl(feasible, Q), kl(feasible, p) + kl(p, Q))
    assert_close(kl(feasible, Q), tensor(0.246740)[0], **SIX)


def test_one_binary_feature():
    fit = fit_multipliers(PHI[:, :1], tensor(0.7), LQ)
    assert_close(fit.multipliers, tensor(math.log(0.7 / 0.3) - math.log(0.35 / 0.65)))
    assert_close(fit.multipliers, tensor(1.466337), **SIX)
    p = moments(LQ, PHI[:, :1], fit.multipliers).prob()
    assert_close(p, tensor(0.184615, 0.5, 0.092308, 0.2, 0.023077), **SIX)


def test_the_reward_as_feature():
    fit = fit_multipliers(R[:, None], (P @ R)[None], LQ)
    assert_close(fit.multipliers, tensor(1.104543), **SIX)
    p = moments(LQ, R[:, None], fit.multipliers).prob()
    assert_close(p, tensor(0.149546, 0.282066, 0.129895, 0.340493, 0.098001), **SIX)
    assert_close(kl(P, p), tensor(0.065271)[0], **SIX)
    risk = projection_risk(R[:, None], p.log(), P.log(), samples=1)
    assert_close(risk, 0.393963, **SIX)
    assert_close(projection_risk(R[:, None], p.log(), None, samples=50), 1 / 100)


def test_an_optimiser_agrees_on_several_prompts():
    """One vector of multipliers for prompts with different references; the moments hold on average."""
    drawing = generator("moments", 0)
    phi = torch.randn(3, 6, 2, generator=drawing, dtype=torch.float64)
    log_a = torch.randn(3, 6, generator=drawing, dtype=torch.float64).log_softmax(-1)
    wanted = tensor(0.4, -0.3)
    fit = fit_multipliers(phi, wanted, log_a)

    def dual(lam):
        return float((log_a + phi @ torch.tensor(lam)).logsumexp(-1).mean() - torch.tensor(lam) @ wanted)

    solved = minimize(dual, [0.0, 0.0], method="BFGS", options={"gtol": 1e-8})
    assert_close(fit.multipliers, torch.tensor(solved.x), rtol=0, atol=1e-5)
    assert_close(fit.kl, -solved.fun, rtol=0, atol=1e-10)
    p = (log_a + phi @ fit.multipliers).softmax(-1)
    assert_close(torch.einsum("ns,nsk->k", p, phi) / 3, wanted, rtol=0, atol=1e-12)
    assert_close(fit.log_z, (log_a + phi @ fit.multipliers).logsumexp(-1))


def test_weights_need_no_normalisation_and_units_do_not_matter():
    fit = fit_multipliers(PHI, tensor(0.5, 0.4), LQ + 7)
    assert_close(fit.multipliers, tensor(0.263748, 1.230859), **SIX)
    large = fit_multipliers(PHI * tensor(1e6, 1e-6), tensor(0.5e6, 0.4e-6), LQ)
    assert_close(large.multipliers * tensor(1e6, 1e-6), fit.multipliers, rtol=1e-8, atol=0)


def test_moments_that_hold_already_need_no_multiplier():
    fit = fit_multipliers(PHI, Q @ PHI, LQ)
    assert_close(fit.multipliers, tensor(0, 0), rtol=0, atol=1e-12)
    assert fit.kl == pytest.approx(0, abs=1e-12)


def test_features_that_say_the_same():
    both = torch.cat([PHI, 1 - PHI[:, :1]], -1)
    fit = fit_multipliers(both, tensor(0.5, 0.4, 0.5), LQ)
    p = moments(LQ, both, fit.multipliers).prob()
    assert_close(p, tensor(0.259333, 0.211000, 0.129667, 0.289000, 0.111000), **SIX)


def test_far_from_the_reference():
    fit = fit_multipliers(PHI, tensor(0.99999, 0.99999), LQ)
    assert_close(fit.moments, tensor(0.99999, 0.99999), rtol=0, atol=1e-11)


TRIANGLE = torch.stack([tensor(0, 1, 0), tensor(0, 0, 1)], -1)


@pytest.mark.parametrize(
    ("features", "wanted", "says"),
    [
        (PHI, (1.2, 0.4), "between 0 and 1"),
        (PHI, (0.5, -0.1), "moment 1 = -0.1"),
        (PHI, (1.0, 0.4), "pointwise"),
        (torch.ones(4, 1, dtype=torch.float64), (0.5,), "between 1 and 1"),
        (TRIANGLE, (0.6, 0.6), "at most 0.7071, and they ask for 0.8485"),
        (TRIANGLE, (0.5, 0.5), "cannot be reached together"),
        (torch.cat([PHI, 1 - PHI[:, :1]], -1), (0.5, 0.4, 0.6), "not reached together|cannot be reached together"),
    ],
)
def test_moments_out_of_reach(features, wanted, says):
    with pytest.raises(ValueError, match=says):
        fit_multipliers(features, tensor(*wanted))


def test_all_samples_on_one_side():
    samples = torch.zeros(64, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="strictly between 0 and 0"):
        fit_multipliers(samples, tensor(0.3))


def test_error_of_a_fit_to_samples():
    """400 fits to 200 samples each: their spread and their cost in KL are what each of them states."""
    drawing = generator("samples", 1)
    true = fit_multipliers(R[:, None], tensor(1.0), LQ)
    projection = moments(LQ, R[:, None], true.multipliers).prob()
    found, errors, risks, costs = [], [], [], []
    for _ in range(400):
        x = torch.multinomial(Q, 200, replacement=True, generator=drawing)
        fit = fit_multipliers(R[x][:, None], tensor(1.0), sampled=True)
        found.append(float(fit.multipliers))
        errors.append(float(fit.standard_error))
        risks.append(fit.risk)
        costs.append(float(kl(projection, moments(LQ, R[:, None], fit.multipliers).prob())))
    assert torch.tensor(found).mean() == pytest.approx(float(true.multipliers), abs=0.03)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(found).std()), rel=0.12)
    assert torch.tensor(risks).mean() == pytest.approx(float(torch.tensor(costs).mean()), rel=0.2)


def test_risk_of_moments_that_are_means_of_samples():
    """n KL(projection || fit), exact over all means of n = 50 draws of a two-valued feature."""
    n, share = 50, 0.4
    phi = tensor(0.0, 1.0)[:, None]
    exact = 0.0
    chances = torch.distributions.Binomial(n, torch.tensor(share, dtype=torch.float64))
    for count in range(1, n):
        fit = tensor(1 - count / n, count / n)
        exact += float(chances.log_prob(torch.tensor(float(count))).exp() * kl(tensor(1 - share, share), fit))
    stated = projection_risk(phi, tensor(1 - share, share).log(), None, n)
    assert stated == pytest.approx(1 / (2 * n))
    assert exact == pytest.approx(stated, rel=0.05)


def test_concentration():
    fit = fit_multipliers(PHI, tensor(0.5, 0.4), LQ)
    p = tensor(0.259333, 0.211000, 0.129667, 0.289000, 0.111000)
    assert_close(fit.effective_samples, 1 / p.square().sum(), rtol=1e-5, atol=0)
    assert_close(fit.largest_weight, tensor(0.289)[0], **SIX)
    assert fit.standard_error is None
