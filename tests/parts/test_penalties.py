"""Penalties: their values, and their gradients on samples of the policy, of an older one and of the reference."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.parts.five_outcomes import DIGITS, FIVE, MU, P, Q, reward_kl, step, term
from tests.worlds import from_probs

from keel.divergences.estimators import estimate
from keel.divergences.family import f_divergence
from keel.exact.space import TabularPolicy
from keel.parts.terms.penalties import NegativeLogLikelihood, SampledDivergence, SampledKL, VocabularyDivergence
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

LOG_U = [math.log(p / q) for p, q in zip(P, Q, strict=True)]
REVERSE = [-0.176554, -0.059077, -0.100039, 0.134261, 0.201410]
FORWARD = [-0.3, 0.05, -0.05, 0.15, 0.15]
ZERO = [0.0] * 5


@pytest.fixture
def world():
    return {name: from_probs(probs, space=FIVE) for name, probs in (("p", P), ("q", Q), ("mu", MU))}


K2_UNDER_REF = sum(q * x * x / 2 for q, x in zip(Q, LOG_U, strict=True))
K2_MEAN_SLOPE = sum(q * x for q, x in zip(Q, LOG_U, strict=True))
K2_SLOPE_UNDER_REF = [q * x - p * K2_MEAN_SLOPE for p, q, x in zip(P, Q, LOG_U, strict=True)]  # neither of the KLs'


@dataclass(frozen=True)
class Turned:
    """An estimator of log ref - log pi, as the samples of the reference have it."""

    estimator: str
    needs = (LogProb(), LogProb(of=("ref",)))

    def __call__(self, rows, stats):
        return estimate(self.estimator, stats[LogProb(of=("ref",))] - stats[LogProb()])


LOSSES = {
    "k1 on the policy's samples": ("p", SampledKL("k1"), 0.379246, ZERO),
    "k2 on the policy's samples": ("p", SampledKL("k2"), 0.404414, REVERSE),
    "k3 on the policy's samples": ("p", SampledKL("k3"), 0.379246, FORWARD),
    "ratio k1 on the policy's samples": ("p", SampledKL("k1", ratio="differentiable"), 0.379246, REVERSE),
    "ratio k3 on the policy's samples": ("p", SampledKL("k3", ratio="differentiable"), 0.379246, REVERSE),
    "k1 on old samples": ("mu", SampledKL("k1"), -0.120341, [m - p for m, p in zip(MU, P, strict=True)]),
    "k2 on old samples": ("mu", SampledKL("k2"), 0.415025, [-0.334540, 0.072567, -0.068253, 0.167529, 0.162698]),
    "k3 on old samples": ("mu", SampledKL("k3"), 0.531326, [-0.684833, 0.228833, -0.002250, 0.252917, 0.205333]),
    "ratio k1 on old samples": ("mu", SampledKL("k1", ratio="differentiable"), 0.379246, REVERSE),
    "ratio k2 on old samples": (
        "mu",
        SampledKL("k2", ratio="differentiable"),
        0.404414,
        [-0.120905, -0.175415, -0.154494, 0.138106, 0.312708],
    ),
    "ratio k3 on old samples": ("mu", SampledKL("k3", ratio="differentiable"), 0.379246, REVERSE),
    "weighted k1 on old samples": ("mu", SampledKL("k1", ratio="detached"), 0.379246, ZERO),
    "weighted k2 on old samples": ("mu", SampledKL("k2", ratio="detached"), 0.404414, REVERSE),
    "weighted k3 on old samples": ("mu", SampledKL("k3", ratio="detached"), 0.379246, FORWARD),
    "vocabulary KL(policy || ref)": ("p", VocabularyDivergence("kl_policy_ref"), 0.379246, REVERSE),
    "vocabulary KL(ref || policy)": ("p", VocabularyDivergence("kl_ref_policy"), 0.405530, FORWARD),
    "vocabulary KL(ref || policy), old samples": ("mu", VocabularyDivergence("forward_kl"), 0.405530, FORWARD),
    "likelihood of the reference's samples": ("q", NegativeLogLikelihood(), 1.820553, FORWARD),
    "log(ref / policy) on the reference's samples": ("q", Turned("k1"), 0.405530, FORWARD),
    "u - 1 - log u on the reference's samples": ("q", Turned("k3"), 0.405530, FORWARD),
    "k2 on the reference's samples": ("q", SampledKL("k2"), K2_UNDER_REF, K2_SLOPE_UNDER_REF),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_in_the_loss(name, world):
    sampler, penalty, value, gradient = LOSSES[name]
    rows = world[sampler].weighted(FIVE.rows())
    loss, grad = step(term(penalty), rows, world["p"], old=world[sampler], ref=world["q"])
    assert loss == pytest.approx(value, abs=DIGITS)
    assert grad == pytest.approx(gradient, abs=DIGITS)


# Trace of the covariance of the gradient of one sample
TRACES = {
    "k2": ("p", SampledKL("k2"), 0.580715),
    "ratio k3": ("p", SampledKL("k3", ratio="differentiable"), 0.580715),
    "ratio k1": ("p", SampledKL("k1", ratio="differentiable"), 1.849696),
    "weighted k2, old samples": ("mu", SampledKL("k2", ratio="detached"), 0.878447),
    "ratio k3, old samples": ("mu", SampledKL("k3", ratio="differentiable"), 0.878447),
    "sampled KL": ("p", SampledDivergence("reverse_kl"), 0.580715),
    "sampled KL, old samples": ("mu", SampledDivergence("reverse_kl", "old"), 0.878447),
}


def per_sample(penalty, sampler: str, world) -> torch.Tensor:
    """The gradient of each outcome's own loss."""
    rows = FIVE.rows()
    grads = [
        step(term(penalty), rows.select(torch.tensor([y])), world["p"], old=world[sampler], ref=world["q"])[1]
        for y in range(5)
    ]
    return torch.tensor(grads, dtype=torch.float64)


def trace(grads: torch.Tensor, probs: list[float]) -> float:
    weight = torch.tensor(probs, dtype=torch.float64)[:, None]
    mean = (weight * grads).sum(0)
    return float((weight * (grads - mean).square()).sum())


@pytest.mark.parametrize("name", TRACES)
def test_variance_of_the_gradient(name, world):
    sampler, penalty, wanted = TRACES[name]
    assert trace(per_sample(penalty, sampler, world), {"p": P, "mu": MU}[sampler]) == pytest.approx(wanted, abs=DIGITS)


def test_variance_in_the_reward(world):
    """k1 in the reward is k2 in the loss sample by sample; a baseline of KL takes 0.075874 off the trace."""
    grads = per_sample(SampledKL("k2"), "p", world)
    rows = FIVE.rows().with_(reward=torch.zeros(5, 1, dtype=torch.float64))
    for y in range(5):
        _, grad = step(reward_kl("k1"), rows.select(torch.tensor([y])), world["p"], ref=world["q"])
        assert grad == pytest.approx(grads[y].tolist(), abs=1e-12)
    kl = sum(p * x for p, x in zip(P, LOG_U, strict=True))
    score = torch.eye(5, dtype=torch.float64) - torch.tensor(P, dtype=torch.float64)
    assert trace(grads - kl * score, P) == pytest.approx(0.504841, abs=DIGITS)


def test_a_ratio_of_value_one_turns_the_gradient_round(world):
    """exp(log pi - sg(log pi)): on the policy's own samples k3 has the gradient of KL(ref || policy) without it."""
    rows = world["p"].weighted(FIVE.rows())
    _, without = step(term(SampledKL("k3")), rows, world["p"], ref=world["q"])
    _, with_ratio = step(term(SampledKL("k3", ratio="differentiable")), rows, world["p"], ref=world["q"])
    assert without == pytest.approx(FORWARD, abs=DIGITS) and with_ratio == pytest.approx(REVERSE, abs=DIGITS)


VOCABULARY = {
    "alpha:0.5": (0.379279, 1.0),
    "alpha:2": (0.461250, 1.0),
    "jeffreys": (0.784776, 2.0),
    "pearson": (0.922500, 2.0),
    "neyman": (1.127500, 2.0),
    "hellinger": (0.094820, 0.25),
    "js:0.1": (0.035285, 0.09),
    "js:0.9": (0.033531, 0.09),
    "jensen_shannon": (0.091813, 0.25),
    "4*js": (4 * 0.091813, 1.0),
    "tv": (0.35, None),
}


@pytest.mark.parametrize("kind", VOCABULARY)
def test_every_divergence_over_the_vocabulary(kind, world):
    """Value as tabulated, the gradient by finite differences of the value, and both over f''(1) where calibrated."""
    value, curvature = VOCABULARY[kind]
    rows, z = world["p"].weighted(FIVE.rows()), world["p"].table.detach()[0, 0]
    loss, grad = step(term(VocabularyDivergence(kind)), rows, world["p"], ref=world["q"])
    assert loss == pytest.approx(value, abs=4 * DIGITS)
    log_q = torch.tensor(Q, dtype=torch.float64).log()

    def at(logits):
        return float(f_divergence(kind).value(logits.log_softmax(-1), log_q))

    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    assert grad == pytest.approx([(at(z + e) - at(z - e)) / 2e-6 for e in steps], abs=1e-8)
    if curvature is None:
        with pytest.raises(ValueError, match="no curvature"):
            VocabularyDivergence(kind, calibrated=True)
        return
    calibrated, slope = step(term(VocabularyDivergence(kind, calibrated=True)), rows, world["p"], ref=world["q"])
    assert calibrated == pytest.approx(loss / curvature)
    assert slope == pytest.approx([g / curvature for g in grad])


@pytest.mark.parametrize("kind", ["kl_policy_ref", "kl_ref_policy", "js", "alpha:0.5", "neyman", "tv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtered_and_far_logits(kind, dtype):
    """Outcomes that both models filter out, and logits of +-40, in fp32 and bf16.

    All of p is on the first outcome and all of q on the second, each e^-38 and e^-40 as likely under the other.
    """
    logits = {"p": [40.0, 0.0, -math.inf, 3.0, -40.0], "q": [0.0, 38.0, -math.inf, -4.0, 5.0]}
    models = {name: TabularPolicy(FIVE, torch.tensor(z, dtype=dtype)[None, None]) for name, z in logits.items()}
    rows = FIVE.rows().select(torch.tensor([0, 1, 3]))
    loss, grad = step(term(VocabularyDivergence(kind)), rows, models["p"], ref=models["q"])
    wanted = {
        "kl_policy_ref": 38,
        "kl_ref_policy": 40,
        "js": math.log(2),
        "alpha:0.5": 4,
        "neyman": math.exp(40),
        "tv": 1,
    }
    assert loss == pytest.approx(wanted[kind], rel=1e-5 if dtype == torch.float32 else 0.02)
    assert all(math.isfinite(g) for g in grad) and grad[2] == 0 and any(grad)


def test_jensen_shannon(world):
    """Value as tabulated; the gradient p (h - E h), h = log(p / m) / 2, written out."""
    loss, grad = step(term(VocabularyDivergence("js")), world["p"].weighted(FIVE.rows()), world["p"], ref=world["q"])
    h = [math.log(2 * p / (p + q)) / 2 for p, q in zip(P, Q, strict=True)]
    mean = sum(p * x for p, x in zip(P, h, strict=True))
    assert loss == pytest.approx(0.091813, abs=DIGITS)
    assert grad == pytest.approx([p * (x - mean) for p, x in zip(P, h, strict=True)], abs=1e-12)


REWARDS = {
    "k1": REVERSE,
    "k2": [0.055649, -0.116338, -0.054455, 0.003845, 0.111298],
    "k3": [0.123446, -0.109077, -0.050039, -0.015739, 0.051410],
}


@pytest.mark.parametrize("estimator", REWARDS)
def test_gradient_in_the_reward(estimator, world):
    rows = world["p"].weighted(FIVE.rows()).with_(reward=torch.zeros(5, 1, dtype=torch.float64))
    _, grad = step(reward_kl(estimator), rows, world["p"], ref=world["q"])
    assert grad == pytest.approx(REWARDS[estimator], abs=DIGITS)


def test_ratio_k3_is_per_sample_the_ratio_times_the_log_ratio(world):
    """Its gradient is rho l (e_y - p) for the sample y: the coefficients are known."""
    coefficients = [-0.554518, 0.273482, -0.143841, 1.527151, 2.772589]
    for y, c in enumerate(coefficients):
        rows = FIVE.rows().select(torch.tensor([y]))
        _, grad = step(term(SampledKL("k3", ratio="differentiable")), rows, world["p"], old=world["mu"], ref=world["q"])
        assert grad == pytest.approx([c * ((v == y) - p) for v, p in enumerate(P)], abs=2 * DIGITS)


def test_the_most_divergent_tokens_keep_their_gradient():
    """k3 at log(ref / policy) = 5 is 142.4 and pulls with 1 - e^5: nothing is clamped."""
    live = torch.tensor([[-6.0]], dtype=torch.float64, requires_grad=True)
    stats = Stats({LogProb(): live, LogProb(of=("ref",)): torch.tensor([[-1.0]], dtype=torch.float64)})
    value = SampledKL("k3")(FIVE.rows().select(torch.tensor([0])), stats)
    value.sum().backward()
    assert value.item() == pytest.approx(142.413159, abs=DIGITS)
    assert live.grad.item() == pytest.approx(1 - math.exp(5), rel=1e-12)
