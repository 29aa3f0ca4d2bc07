"""Targets on five outcomes, against numbers worked out beforehand, and their identities."""

import itertools
import math

import pytest
import torch
from tests.targets.example import BETA, MU, PHI, SIX, TEACHER, TIES, TILT, P, Q, R, kl, tensor
from torch.testing import assert_close

from keel.divergences.family import FDivergence
from keel.targets.budget import beta_for_reward, budget, frontier_gap
from keel.targets.curated import curated, curated_fixed_point
from keel.targets.target import (
    Target,
    best_of_n,
    exponential_likelihood,
    log_linear,
    mixture,
    moments,
    pointwise,
    posterior,
    sigmoid_likelihood,
    teacher,
    tilt,
    uniform_over_good,
)

LQ = Q.log()
P2 = tensor(0.1, 0.2, 0.2, 0.3, 0.2)

TABLE = {
    "tilt": (lambda: tilt(LQ, R, BETA), TILT),
    "posterior r/gamma": (lambda: posterior(LQ, exponential_likelihood(R, BETA)), TILT),
    "moments": (
        lambda: moments(LQ, PHI, tensor(0.263748, 1.230859)),
        tensor(0.259333, 0.211000, 0.129667, 0.289000, 0.111000),
    ),
    "pointwise": (lambda: pointwise(LQ, PHI[:, 0] > 0), tensor(0, 0.714286, 0, 0.285714, 0)),
    "teacher": (lambda: teacher(TEACHER.log()), TEACHER),
    "powers 0.5": (lambda: _power(0.5), tensor(0.163878, 0.388670, 0.163878, 0.183221, 0.100354)),
    "powers 1": (lambda: _power(1.0), TEACHER),
    "powers 1.25": (lambda: _power(1.25), tensor(0.025924, 0.454501, 0.073324, 0.274113, 0.172138)),
    "powers 2": (lambda: _power(2.0), tensor(0.003220, 0.417257, 0.025757, 0.321958, 0.231809)),
    "soup": (
        lambda: log_linear([LQ, P2.log()], [0.5, 0.5]),
        tensor(0.223012, 0.249335, 0.223012, 0.193134, 0.111506),
    ),
    "soup, tilted": (
        lambda: tilt(log_linear([LQ, P2.log()], [0.5, 0.5]).log_prob(), R, BETA),
        tensor(0.014429, 0.119200, 0.039222, 0.682244, 0.144905),
    ),
    "mixture": (lambda: mixture([Target(LQ), Target(P2.log() + 3)], [1, 1]), tensor(0.25, 0.225, 0.2, 0.2, 0.125)),
    "uniform over good": (lambda: uniform_over_good(R, 1.0), tensor(0, 1 / 3, 0, 1 / 3, 1 / 3)),
    "best of 1": (lambda: best_of_n(LQ, R, 1), Q),
    "best of 2": (lambda: best_of_n(LQ, R, 2), tensor(0.16, 0.3625, 0.2, 0.19, 0.0875)),
    "best of 4": (lambda: best_of_n(LQ, R, 4), tensor(0.025600, 0.392406, 0.104000, 0.343900, 0.134094)),
    "best of 8": (lambda: best_of_n(LQ, R, 8), tensor(0.000655, 0.255694, 0.016141, 0.569533, 0.157977)),
    "best of 16": (lambda: best_of_n(LQ, R, 16), tensor(0, 0.073969, 0.000282, 0.814698, 0.111051)),
    "best of 4, ties": (lambda: best_of_n(LQ, TIES, 4), tensor(0.0256, 0.275781, 0.220625, 0.3186625, 0.15933125)),
    "curated 2": (lambda: curated(LQ, R, 2), tensor(0.291028, 0.293843, 0.190023, 0.155944, 0.069161)),
    "curated 4": (lambda: curated(LQ, R, 4), tensor(0.228297, 0.305015, 0.170489, 0.213252, 0.082948)),
    "curated inf": (lambda: curated(LQ, R, math.inf), tensor(0.168612, 0.286460, 0.138997, 0.311472, 0.094459)),
    "curated with data": (
        lambda: curated_fixed_point(LQ, R, 2, 0.5),
        tensor(0.346066, 0.267288, 0.190971, 0.135422, 0.060254),
    ),
}


def _power(lam: float) -> Target:
    return log_linear([LQ, TEACHER.log()], [1 - lam, lam])


@pytest.mark.parametrize("name", TABLE)
def test_the_distribution(name):
    build, expected = TABLE[name]
    assert_close(build().prob(), expected, **SIX)


def test_numbers_of_the_tilt():
    target = tilt(LQ, R, BETA)
    assert_close(target.log_partition, tensor(2.225165)[0], **SIX)
    assert_close(target.expectation(R), tensor(1.571596)[0], **SIX)
    assert_close(target.entropy(), tensor(1.176253)[0], **SIX)
    assert_close(kl(target.prob(), Q), tensor(0.918026)[0], **SIX)
    assert_close(target.gap(P.log()), tensor(0.254412)[0], **SIX)


@pytest.mark.parametrize("policy", [P, Q, MU, TEACHER])
def test_the_objective_is_the_evidence_less_the_gap(policy):
    target = tilt(LQ, R, BETA)
    objective = (policy * R).sum() - BETA * kl(policy, Q)
    assert_close(objective, BETA * target.log_partition - BETA * target.gap(policy.log()), rtol=0, atol=1e-14)


def test_shift_and_scale_of_the_reward():
    target = tilt(LQ, R, BETA)
    assert_close(tilt(LQ, 3 * R, 3 * BETA).prob(), target.prob())
    shifted = tilt(LQ, R + 5, BETA)
    assert_close(shifted.prob(), target.prob())
    assert_close(shifted.log_partition, target.log_partition + 5 / BETA)


def test_extrapolation_past_a_teacher():
    target = _power(1.25)
    assert_close(target.log_partition, tensor(0.136994)[0], **SIX)
    assert_close(kl(target.prob(), Q), tensor(0.616378)[0], **SIX)
    # the same as the tilt whose reward is the log-ratio of teacher and base
    assert_close(tilt(LQ, TEACHER.log() - LQ, 1 / 1.25).prob(), target.prob())


def test_soup_as_reference():
    soup = log_linear([LQ, P2.log()], [0.5, 0.5]).prob()
    optimum = tilt(soup.log(), R, BETA)
    assert_close(optimum.expectation(R), tensor(1.720657)[0], **SIX)
    assert_close(kl(optimum.prob(), Q), tensor(1.264127)[0], **SIX)
    assert_close(kl(Q, soup), tensor(0.106655)[0], **SIX)


def test_sigmoid_likelihood():
    expected = Q * torch.sigmoid((R - 1) / 0.3)
    assert_close(posterior(LQ, sigmoid_likelihood(R, 0.3, 1.0)).prob(), expected / expected.sum())


def test_operations():
    a, b = Target(Q.log() + 1), Target(P.log())
    assert_close((a * b).prob(), Q * P / (Q * P).sum())
    assert_close((a**2).prob(), Q**2 / (Q**2).sum())
    assert_close((a + b).prob(), (math.e * Q + P) / (math.e + 1))
    assert (Target(tensor(0.0, -math.inf)) ** 0).prob().tolist() == [1.0, 0.0]
    known = Target(LQ[:2], torch.zeros((), dtype=torch.float64))  # a part of the outcomes, Z known
    assert_close(known.prob(), Q[:2])


def test_leading_dimensions_are_independent():
    log_q, reward = torch.stack([LQ, P.log()])[None], torch.stack([R, R.flip(0)])[None]
    for build in (lambda a, b: tilt(a, b, 0.3), lambda a, b: best_of_n(a, b, 5), lambda a, b: curated(a, b, 3)):
        both = build(log_q, reward)
        assert_close(both.prob()[0, 1], build(P.log(), R.flip(0)).prob())
        assert_close(both.log_partition[0, 1], build(P.log(), R.flip(0)).log_partition, rtol=0, atol=1e-12)
    per_prompt = tilt(log_q[0], reward[0], tensor(0.3, 0.7))
    assert_close(per_prompt.prob()[1], tilt(P.log(), R.flip(0), 0.7).prob())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    log_q, reward = LQ.to(dtype), R.to(dtype)
    assert_close(tilt(log_q, reward, BETA).prob().double(), TILT, rtol=0, atol=tolerance)
    assert_close(best_of_n(log_q, reward, 4).prob().double(), TABLE["best of 4"][1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Target(tensor(math.nan, 0)),
        lambda: Target(tensor(math.inf, 0)),
        lambda: Target(tensor(-math.inf, -math.inf)),
        lambda: pointwise(LQ, R > 5),
        lambda: tilt(LQ, R, 0.0),
        lambda: tilt(LQ, R, -1.0),
        lambda: best_of_n(LQ, R, 0.5),
        lambda: log_linear([LQ], [0.5, 0.5]),
        lambda: log_linear([LQ, tensor(-math.inf, 0, 0, 0, 0)], [2.0, -1.0]),
        lambda: mixture([Target(LQ)], [-1.0]),
        lambda: curated(LQ, R, 0),
        lambda: uniform_over_good(R, 3.0),
        lambda: budget(LQ, R, -0.1),
        lambda: beta_for_reward(LQ, R, 2.5),
        lambda: beta_for_reward(LQ, R, 0.1),
    ],
)
def test_what_has_no_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        wrong()


# -- best of n -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "reward", "divergence", "win_rate", "tilted"),
    [
        (1, 0.625000, 0.000000, 0.500000, 0.625000),
        (2, 0.973750, 0.159004, 0.651875, 1.011578),
        (4, 1.333347, 0.595596, 0.785652, 1.388567),
        (8, 1.639795, 1.133455, 0.872866, 1.671601),
        (16, 1.870082, 1.705628, 0.924901, 1.875871),
    ],
)
def test_best_of_n(n, reward, divergence, win_rate, tilted):
    target = best_of_n(LQ, R, n)
    p = target.prob()
    assert_close(target.expectation(R), tensor(reward)[0], **SIX)
    assert_close(kl(p, Q), tensor(divergence)[0], **SIX)
    wins = (R[:, None] > R).double() + 0.5 * (R[:, None] == R).double()
    assert_close(p @ wins @ Q, tensor(win_rate)[0], **SIX)
    assert kl(p, Q) <= math.log(n) - (n - 1) / n + 1e-12
    assert_close(budget(LQ, R, kl(p, Q)).reward, tensor(tilted)[0], **SIX)


def test_best_of_n_by_enumeration_of_draws():
    for reward in (R, TIES):
        expected = torch.zeros(5, dtype=torch.float64)
        for draws in itertools.product(range(5), repeat=3):
            best = max(float(reward[x]) for x in draws)
            winners = [x for x in draws if float(reward[x]) == best]
            for x in winners:
                expected[x] += Q[list(draws)].prod() / len(winners)
        assert_close(best_of_n(LQ, reward, 3).prob(), expected, rtol=0, atol=1e-14)


def test_best_of_very_many():
    log_q = torch.stack([tensor(1.0), tensor(math.exp(-200.0))]).log()[:, 0]
    half = best_of_n(log_q, tensor(0.0, 1.0), math.log(2) * math.exp(200.0))
    assert_close(half.prob(), tensor(0.5, 0.5))


# -- the frontier ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "inverse", "reward"),
    [(0.1, 0.635718, 0.929010), (0.25, 0.987083, 1.113818), (0.5, 1.402697, 1.323627), (1.0, 2.119017, 1.611414)],
)
def test_budget(allowed, inverse, reward):
    found = budget(LQ, R, allowed)
    assert_close(found.inverse_beta, tensor(inverse)[0], **SIX)
    assert_close(found.reward, tensor(reward)[0], **SIX)
    assert_close(found.kl, tensor(allowed)[0], rtol=0, atol=1e-12)
    assert_close(beta_for_reward(LQ, R, found.reward).beta, found.beta, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("reward", "limit", "best"), [(R, -math.log(0.1), [3]), (TIES, -math.log(0.15), [3, 4])])
def test_a_budget_beyond_the_best_outcomes(reward, limit, best):
    found = budget(LQ, reward, limit + 0.01)
    assert float(found.beta) == 0
    expected = torch.zeros(5, dtype=torch.float64)
    expected[best] = Q[best] / Q[best].sum()
    assert_close(found.target.prob(), expected)
    assert float(budget(LQ, reward, limit - 0.01).beta) > 0


def test_ends_of_the_frontier():
    nothing = budget(LQ, R, 0.0)
    assert float(nothing.beta) == math.inf
    assert_close(nothing.target.prob(), Q)
    constant = budget(LQ, torch.ones_like(R), 0.3)
    assert_close(constant.target.prob(), Q)


def test_budgets_for_several_prompts():
    log_q, reward = torch.stack([LQ, P.log()]), torch.stack([R, 2 * R])
    each = budget(log_q, reward, tensor(0.1, 0.5))
    assert_close(each.kl, tensor(0.1, 0.5), rtol=0, atol=1e-12)
    one = budget(log_q, reward, 0.3, shared=True)
    assert_close(one.kl.mean(), tensor(0.3)[0], rtol=0, atol=1e-12)
    assert float(one.beta[0]) == float(one.beta[1])
    assert_close(one.target.prob()[1], tilt(P.log(), 2 * R, float(one.beta[0])).prob())


@pytest.mark.parametrize("policy", [P, TEACHER, MU])
def test_distance_from_the_frontier(policy):
    gap = frontier_gap(policy.log(), LQ, R)
    point = budget(LQ, R, kl(policy, Q))
    assert float(gap) > 0
    assert_close(gap, point.inverse_beta * (point.reward - (policy * R).sum()), rtol=0, atol=1e-12)
    assert_close(frontier_gap(tilt(LQ, R, BETA).log_prob(), LQ, R), tensor(0.0)[0], rtol=0, atol=1e-10)


def test_stability_identity():
    phi = tilt(LQ, R, 1 / 2.0)
    left = phi.gap(P.log())
    right = (kl(P, Q) - kl(phi.prob(), Q)) - 2.0 * ((P * R).sum() - phi.expectation(R))
    assert_close(left, tensor(0.254412)[0], **SIX)
    assert_close(left, right, rtol=0, atol=1e-14)


def test_cumulants_and_renyi_divergence():
    lam, rho = 2.0, 0.7
    phi = tilt(LQ, R, 1 / lam)
    cumulant = (phi.prob() * (rho * R).exp()).sum().log()
    assert_close(cumulant, tensor(1.172758)[0], **SIX)
    assert_close(cumulant, tilt(LQ, R, 1 / (lam + rho)).log_partition - phi.log_partition)
    implicit = phi.log_prob() - LQ
    renyi = (phi.prob() ** (1 + rho) * Q**-rho).sum().log() / rho
    assert_close((phi.prob() * (rho * implicit).exp()).sum().log() / rho, renyi)
    assert_close(renyi, tensor(1.271118)[0], **SIX)


@pytest.mark.parametrize(
    ("letters", "reward", "divergence"),
    [
        (1, 0.743783, 0.019681),
        (10, 0.975551, 0.157276),
        (40, 1.064443, 0.224611),
        (160, 1.097440, 0.243634),
        (320, 1.104572, 0.246815),
    ],
)
def test_best_of_n_approaches_the_tilt_for_sequences(letters, reward, divergence):
    """Letters drawn independently, rewards that add up, n = e^{0.25 m}: the law of the sum by convolution."""
    letter = torch.zeros(5, dtype=torch.float64)
    letter[(2 * R).long()] = Q  # rewards are multiples of a half
    law = tensor(1.0)
    for _ in range(letters):
        law = torch.nn.functional.conv1d(law.flip(0)[None, None], letter[None, None], padding=4)[0, 0].flip(0)
    levels = torch.arange(len(law)).double() / 2
    target = best_of_n(law.log(), levels, math.exp(0.25 * letters))
    assert_close(target.expectation(levels) / letters, tensor(reward)[0], **SIX)
    assert_close(kl(target.prob(), law) / letters, tensor(divergence)[0], **SIX)


# -- curated retraining ----------------------------------------------------------------------------------------------


def test_rounds_of_curation():
    p = LQ
    seen = []
    for _ in range(4):
        p = curated(p, R, 2).log_prob()
        seen.append(float((p.exp() * R).sum()))
    assert_close(tensor(*seen), tensor(0.804485, 1.005209, 1.212154, 1.407007), **SIX)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_curation_by_enumeration(k):
    expected = torch.zeros(5, dtype=torch.float64)
    for draws in itertools.product(range(5), repeat=k):
        chosen = R[list(draws)].softmax(0) * Q[list(draws)].prod()
        expected.scatter_add_(0, torch.tensor(draws), chosen)
    found = curated(LQ, R, k)
    assert_close(found.prob(), expected, rtol=0, atol=1e-13)
    assert_close(found.log_partition, tensor(0.0)[0], rtol=0, atol=1e-12)  # the map keeps total mass


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_curation_with_rewards_far_apart(scale):
    """k = 2 needs no integral: H = 2 E[sigmoid(r - r')]."""
    expected = Q * 2 * (torch.sigmoid(scale * (R[:, None] - R)) @ Q)
    assert_close(curated(LQ, scale * R, 2).prob(), expected, rtol=0, atol=1e-12)


def test_bounds_of_curation():
    weights = R.exp()
    before = (Q * weights).sum()
    after = (curated(LQ, R, 2).prob() * weights).sum()
    bound = before + 0.5 * (Q * (weights - before) ** 2).sum() / weights.max()
    assert_close(torch.stack([before, after, bound]), tensor(2.372305, 2.865312, 2.617748), **SIX)
    assert after > bound
    p = curated_fixed_point(LQ, R, 2, 0.5)
    assert_close(p.expectation(R), tensor(0.723997)[0], **SIX)
    assert_close(kl(p.prob(), Q), tensor(0.011230)[0], **SIX)
    assert float((p.prob() / Q).max()) <= 1 / (1 - 0.5)
    assert_close(curated_fixed_point(LQ, R, 2, 0.0).prob(), Q)


def test_curation_ends_on_the_best_at_reference_odds():
    p, reward = LQ, tensor(0, 1, 2, 2, 0.5)
    for _ in range(200):
        p = curated(p, reward, 2).log_prob()
    assert_close(p.exp(), tensor(0, 0, 2 / 3, 1 / 3, 0), rtol=0, atol=1e-6)


def test_gap_is_the_divergence_of_the_family():
    target = tilt(LQ, R, BETA)
    assert_close(target.gap(P.log()), FDivergence("kl_policy_ref").value(P.log(), target.log_prob()))
