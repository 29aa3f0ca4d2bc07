"""The optimum under every divergence: the table of five outcomes, an independent optimiser, conditions and limits."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tests.targets.example import BETA, SIX, TIES, P, Q, R, tensor
from torch.testing import assert_close

from keel.divergences.family import FDivergence, f_divergence
from keel.targets.tilt import f_tilt

LQ = Q.log()
# beta = 0.5: lambda, optimum, E[r], D(optimum || ref), value
TABLE = {
    "kl_policy_ref": (1.112583, (0.043220, 0.199596, 0.058742, 0.589931, 0.108512), 1.571596, 0.918026, 1.112583),
    "kl_ref_policy": (1.573533, (0.096454, 0.116438, 0.063551, 0.679968, 0.043589), 1.573533, 0.804453, 1.171306),
    "jeffreys": (1.006076, (0.180480, 0.248488, 0.127832, 0.355719, 0.087481), 1.155063, 0.552481, 0.878822),
    "js": (1.850812, (0.000122, 0.004228, 0.000451, 0.988192, 0.007006), 1.991348, 0.502629, 1.740034),
    "alpha:0.5": (1.383848, (0.070389, 0.130546, 0.056356, 0.678705, 0.064005), 1.612141, 0.913170, 1.155556),
    "alpha:0.2": (1.508943, (0.086185, 0.118727, 0.060164, 0.685804, 0.049120), 1.594097, 0.851543, 1.168326),
    "alpha:2": (0.708333, (0.000000, 0.395833, 0.116667, 0.358333, 0.129167), 1.364583, 0.656250, 1.036458),
    "alpha:-1": (1.756554, (0.141190, 0.124592, 0.081472, 0.617620, 0.035126), 1.453256, 0.606595, 1.149959),
    "pearson": (0.625000, (0.150000, 0.343750, 0.175000, 0.237500, 0.093750), 1.046875, 0.421875, 0.835938),
    "neyman": (1.523329, (0.198844, 0.174750, 0.114582, 0.462951, 0.048873), 1.231253, 0.584153, 0.939176),
    "hellinger": (1.830413, (0.005776, 0.013386, 0.005005, 0.966557, 0.009276), 1.962917, 0.530016, 1.697909),
}
# the same strength near the reference: beta / f''(1)
PER_CURVATURE = {
    "kl_ref_policy": (0.096454, 0.116438, 0.063551, 0.679968, 0.043589),
    "jeffreys": (0.084235, 0.143020, 0.063353, 0.636392, 0.073000),
    "js": (0.053953, 0.119315, 0.048742, 0.721004, 0.056987),
    "alpha:0.5": (0.070389, 0.130546, 0.056356, 0.678705, 0.064005),
    "pearson": (0.000000, 0.395833, 0.116667, 0.358333, 0.129167),
    "neyman": (0.141190, 0.124592, 0.081472, 0.617620, 0.035126),
    "hellinger": (0.070389, 0.130546, 0.056356, 0.678705, 0.064005),
}
SMOOTH = [*TABLE, "kl_chi2", "alpha:1.3", "js:0.2"]


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    multiplier, prob, reward, divergence, value = TABLE[name]
    found = f_tilt(LQ, R, BETA, name)
    assert_close(found.log_prob.exp(), tensor(*prob), **SIX)
    numbers = torch.stack([found.multiplier, found.reward, found.divergence, found.value])
    assert_close(numbers, tensor(multiplier, reward, divergence, value), **SIX)


@pytest.mark.parametrize("name", PER_CURVATURE)
def test_the_table_per_curvature(name):
    found = f_tilt(LQ, R, BETA, f_divergence(name).per_curvature())
    assert_close(found.log_prob.exp(), tensor(*PER_CURVATURE[name]), **SIX)


@pytest.mark.parametrize(
    ("name", "beta", "multiplier", "prob"),
    [
        ("pearson", 0.2, 0.775, (0, 0.390625, 0.0625, 0.40625, 0.140625)),
        ("pearson", 0.1, 1.0125, (0, 0.234375, 0, 0.59375, 0.171875)),
        ("kl_chi2", 0.5, 0.728819, (0.166804, 0.322179, 0.156950, 0.259051, 0.095017)),
    ],
)
def test_clipping_solves_again(name, beta, multiplier, prob):
    found = f_tilt(LQ, R, beta, name)
    assert_close(found.log_prob.exp(), tensor(*prob), **SIX)
    assert_close(found.multiplier, tensor(multiplier)[0], **SIX)


@pytest.mark.parametrize(
    ("beta", "prob", "value"),
    [(0.6, (0, 0, 0, 0.95, 0.05), 1.465), (1.2, (0, 0.25, 0, 0.70, 0.05), 1.005), (2.5, tuple(Q), 0.625)],
)
def test_total_variation(beta, prob, value):
    found = f_tilt(LQ, R, beta, "tv")
    assert_close(found.log_prob.exp(), tensor(*prob), rtol=0, atol=1e-12)
    # its linear programme: |p - q| = a + b with p - q = a - b
    eye = np.eye(5)
    cost = np.concatenate([-R.numpy(), np.full(10, beta / 2)])
    equal = np.block([[eye, -eye, eye], [np.ones((1, 5)), np.zeros((1, 10))]])
    solved = linprog(cost, A_eq=equal, b_eq=np.append(Q.numpy(), 1))
    assert_close(found.value, tensor(value)[0])
    assert_close(float(found.value), -solved.fun)


@pytest.mark.parametrize("name", ["kl_policy_ref", "js", "kl_ref_policy", "alpha:1.3", "kl_chi2"])
def test_an_optimiser_that_knows_no_formula_agrees(name):
    d = f_divergence(name)

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        logits = torch.tensor(z, requires_grad=True)
        log_p = logits.log_softmax(-1)
        value = BETA * d.value(log_p, LQ) - (log_p.exp() * R).sum()
        (slope,) = torch.autograd.grad(value, logits)
        return float(value.detach()), slope.numpy()

    solved = minimize(loss, LQ.numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert_close(f_tilt(LQ, R, BETA, name).log_prob.exp(), torch.tensor(solved.x).softmax(-1), rtol=0, atol=1e-6)
    assert_close(float(f_tilt(LQ, R, BETA, name).value), -solved.fun, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_stationarity_and_duality(name, beta):
    d = f_divergence(name)
    found = f_tilt(LQ, R, beta, name)
    inside = found.log_prob > -torch.inf
    log_u = (found.log_prob - LQ)[inside]
    assert_close(beta * d.f_prime(log_u) + found.multiplier, R[inside], rtol=0, atol=1e-9)
    assert bool(((R[~inside] - found.multiplier) / beta <= d.f_prime_at_zero + 1e-12).all())
    dual = found.multiplier + beta * (Q * d.conjugate((R - found.multiplier) / beta)).sum()
    assert_close(found.value, dual, rtol=0, atol=1e-9)
    assert_close(found.log_prob.exp().sum(), tensor(1.0)[0])


@pytest.mark.parametrize("name", [*SMOOTH, "tv"])
@pytest.mark.parametrize("beta", [0.01, 0.5, 20.0])
def test_equal_rewards_keep_their_reference_odds(name, beta):
    log_p = f_tilt(LQ, TIES, beta, name).log_prob
    for i, j in ((1, 2), (3, 4)):
        if log_p[i] > -torch.inf:
            assert_close(log_p[i] - log_p[j], LQ[i] - LQ[j], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_limits_of_beta(name):
    assert_close(f_tilt(LQ, R, 1e7, name).log_prob.exp(), Q, rtol=0, atol=1e-6)
    almost = f_tilt(LQ, R, 1e-7, name)
    assert_close(almost.reward, tensor(2.0)[0], rtol=0, atol=1e-3)
    assert bool(torch.isfinite(torch.stack([almost.value, almost.divergence, almost.multiplier])).all())


def test_handy_identities():
    forward = f_tilt(LQ, R, BETA, "kl_ref_policy")
    assert_close(forward.multiplier, forward.reward)
    assert_close(f_tilt(LQ, R, BETA, "pearson").multiplier, (Q * R).sum())
    squared = (f_tilt(LQ, R, BETA, "alpha:0.5").log_prob, f_tilt(LQ, R, 4 * BETA, "hellinger").log_prob)
    assert_close(*squared)


def test_a_constant_reward_asks_for_the_reference():
    for name in (*SMOOTH, "tv"):
        found = f_tilt(LQ, torch.full_like(R, 3.0), 0.01, name)
        assert_close(found.log_prob, LQ)
        assert_close(found.value, tensor(3.0)[0])


def test_prompts_are_independent_and_lost_outcomes_stay_lost():
    log_q = torch.stack([LQ, tensor(0.5, 0, 0.2, 0.2, 0.1).log()])
    reward = torch.stack([R, tensor(0, 9, 1, 1, 2)])
    for name in (*SMOOTH, "tv"):
        both = f_tilt(log_q, reward, tensor(0.5, 0.3), name)
        one = f_tilt(log_q[1], reward[1], 0.3, name)
        assert_close(both.log_prob[1], one.log_prob)
        assert_close(both.value[1], one.value)
        assert one.log_prob[1] == -torch.inf
        without = f_tilt(log_q[1][[0, 2, 3, 4]], reward[1][[0, 2, 3, 4]], 0.3, name)
        assert_close(one.log_prob[[0, 2, 3, 4]], without.log_prob)


def test_an_outcome_that_is_all_but_impossible():
    """One part in e^200: the ratio is exact where fp64 differences of probabilities would be 0."""
    log_q = tensor(0.0, -200.0)
    forward = f_tilt(log_q, tensor(0.0, 1.0), 0.5, "kl_ref_policy")
    # the first outcome has p = beta / lambda, and lambda = E[r] = 1 - p
    assert_close(forward.log_prob.exp(), tensor(0.5, 0.5))
    reverse = f_tilt(log_q, tensor(0.0, 1.0), 1 / 200, "kl_policy_ref")
    assert_close(reverse.log_prob.exp(), tensor(0.5, 0.5))


def test_dtype_and_normalisation():
    found = f_tilt((LQ + 3).float(), R.float(), BETA, "js")
    assert found.log_prob.dtype == torch.float32
    assert_close(found.log_prob.exp().double(), tensor(*TABLE["js"][1]), rtol=0, atol=2e-6)
    assert f_tilt(LQ.bfloat16(), R.bfloat16(), BETA).log_prob.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        f_tilt(LQ, R, beta)


def test_rewards_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        f_tilt(LQ, tensor(0, 1, 2, float("-inf"), 0), BETA)


# D(p || optimum of the tilt) at p, and its gradient with respect to the logits of p
GRADIENTS = {
    "kl_policy_ref": (0.254412, (0.058446, 0.045923, 0.102461, -0.278239, 0.071410)),
    "kl_ref_policy": (0.267473, (0.056780, 0.100404, 0.091258, -0.339931, 0.091488)),
    "js": (0.063469, (0.013447, 0.017720, 0.022326, -0.072964, 0.019471)),
    "tv": (0.339931, (0.025000, 0.075000, 0.037500, -0.187500, 0.050000)),
    "pearson": (0.539887, (0.154773, -0.022111, 0.304098, -0.558054, 0.121293)),
    "neyman": (0.625425, (0.143863, 0.354832, 0.220810, -0.985716, 0.266211)),
    "hellinger": (0.064337, (0.013912, 0.017999, 0.023241, -0.075059, 0.019908)),
    "jeffreys": (0.521884, (0.115226, 0.146327, 0.193719, -0.618169, 0.162898)),
    "alpha:0.2": (0.262526, (0.055856, 0.088569, 0.091054, -0.321694, 0.086215)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_divergences_to_the_tilt(name):
    value, gradient = GRADIENTS[name]
    target = f_tilt(LQ, R, BETA).target.log_prob()
    d = FDivergence(name) if ":" not in name else f_divergence(name)
    assert_close(d.value(P.log(), target), tensor(value)[0], **SIX)
    assert_close(d.gradient(P.log(), target), tensor(*gradient), **SIX)
