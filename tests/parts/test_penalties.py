"""Penalties: their values, and their gradients on samples of the policy, of an older one and of the reference.

The example: five outcomes, reference q, policy p, an older policy mu; all expectations enumerated.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.cases import penalties
from tests.worlds import from_probs, table

from keel.core.aggregate import Aggregation
from keel.core.config import build
from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.divergences.family import f_divergence
from keel.divergences.own import own_divergence
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.heads import ValueHead
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.advantages.stream import RewardToGo
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import (
    NegativeEntropy,
    NegativeLogLikelihood,
    SampledDivergence,
    SampledKL,
    Summand,
    ValueLoss,
    VocabularyDivergence,
)
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.rollouts.rollout import Rollout
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopPEntropy, Value
from keel.statistics.stats import Stats

FIVE = SequenceSpace(5, 1)
P = [0.10, 0.30, 0.15, 0.25, 0.20]
Q = [0.40, 0.25, 0.20, 0.10, 0.05]
MU = [0.25, 0.20, 0.30, 0.15, 0.10]
LOG_U = [math.log(p / q) for p, q in zip(P, Q, strict=True)]
REVERSE = [-0.176554, -0.059077, -0.100039, 0.134261, 0.201410]
FORWARD = [-0.3, 0.05, -0.05, 0.15, 0.15]
ZERO = [0.0] * 5
DIGITS = 5.1e-7
TOKEN_SUM = Aggregation("sequence_mean_token_sum")


def step(method: Method, rows: Rows, policy, old=None, ref=None) -> tuple[float, list[float]]:
    """Loss and gradient of the first distribution's logits."""
    models = {"policy": policy, "old": policy if old is None else old, "ref": policy if ref is None else ref}
    before = Engine({**models, "policy": models["old"]})
    frozen = before.measure(method.frozen_needs(several_updates=True), rows, alias={"old": "policy"})
    if method.kind == "online":
        rows = method.prepare(rows, frozen, {})
    policy.zero_grad()
    loss, _ = Engine(models).step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    grad = torch.zeros_like(policy.table) if policy.table.grad is None else policy.table.grad
    return float(loss), grad[0, 0].tolist()


def term(penalty) -> Method:
    return Method(
        kind="supervised", aggregation=TOKEN_SUM, terms={"kl": Summand(penalty, 1.0)}, models={"ref": Initial()}
    )


def reward_kl(estimator: str, advantage=None) -> Method:
    return Method(
        rollout=Rollout(),
        aggregation=TOKEN_SUM,
        transforms={"kl": KLInReward(1.0, estimator)},
        advantage={"returns": Returns() if advantage is None else advantage},
        surrogate=Surrogate(LogLikelihood()),
        models={"ref": Initial()},
    )


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
    """Outcomes that both models filter out, and logits of +-40: value and gradient are finite, in fp32 and bf16."""
    logits = {"p": [40.0, 0.0, -math.inf, 3.0, -40.0], "q": [0.0, 38.0, -math.inf, -4.0, 5.0]}
    models = {name: TabularPolicy(FIVE, torch.tensor(z, dtype=dtype)[None, None]) for name, z in logits.items()}
    rows = FIVE.rows().select(torch.tensor([0, 1, 3]))
    loss, grad = step(term(VocabularyDivergence(kind)), rows, models["p"], ref=models["q"])
    assert math.isfinite(loss) and loss > 0.5
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


# -- sequences -------------------------------------------------------------------------------------------------------

PAIR = SequenceSpace(2, 2)


@pytest.fixture
def sequences():
    policy = from_probs([0.7, 0.3], [0.9, 0.1], [0.4, 0.6], space=PAIR)
    ref = from_probs([0.5, 0.5], [0.5, 0.5], [0.2, 0.8], space=PAIR)
    return policy, ref


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        (term(SampledKL("k2")), 0.177933),
        (term(VocabularyDivergence("kl_policy_ref")), 0.177933),
        (term(SampledKL("k3", ratio="differentiable")), 0.177933),
        (reward_kl("k1"), 0.233250),
        (reward_kl("k1", RewardToGo()), 0.233250),
        (term(SampledKL("k2", level="sequence")), 0.233250),
        (term(SampledKL("k3", level="sequence", ratio="differentiable")), 0.233250),
        (term(SampledDivergence("reverse_kl")), 0.177933),
        (term(SampledDivergence("reverse_kl", level="sequence")), 0.233250),
    ],
    ids=[
        "k2",
        "vocabulary",
        "ratio k3",
        "reward",
        "reward to go",
        "k2 of sequences",
        "ratio k3 of sequences",
        "sampled",
        "sampled sequences",
    ],
)
def test_gradient_of_a_sequence(method, gradient, sequences):
    """0.233250 is that of the sequence; per-token losses miss 0.055317, what the first token does to the second."""
    policy, ref = sequences
    rows = policy.weighted(PAIR.rows()).with_(reward=torch.zeros(4, 1, dtype=torch.float64))
    _, grad = step(method, rows, policy, ref=ref)
    assert grad == pytest.approx([gradient, -gradient], abs=DIGITS)


@pytest.mark.parametrize(
    ("penalty", "sampler", "value"),
    [
        (SampledKL("k1"), 0, 0.371323),
        (SampledKL("k3"), 0, 0.371323),
        (VocabularyDivergence("kl_policy_ref"), 0, 0.371323),
        (VocabularyDivergence("kl_ref_policy"), 1, 0.388348),
        (VocabularyDivergence("js"), 1, 0.083959),
        (SampledKL("k1", level="sequence"), 0, 0.371323),
        (SampledKL("k3", level="sequence"), 0, 0.371323),
        (SampledDivergence("reverse_kl"), 0, 0.371323),
        (SampledDivergence("forward_kl", "reference"), 1, 0.388348),
        (SampledDivergence("js", "reference"), 1, 0.083959),
        (SampledDivergence("js", "reference", "sequence"), 1, 0.091104),
        (SampledDivergence("js", "policy", "sequence"), 0, 0.091104),
    ],
)
def test_value_of_a_sequence(penalty, sampler, value, sequences):
    policy, ref = sequences
    rows = sequences[sampler].weighted(PAIR.rows())
    loss, _ = step(term(penalty), rows, policy, ref=ref)
    assert loss == pytest.approx(value, abs=DIGITS)


# -- any divergence, from samples ------------------------------------------------------------------------------------

KINDS = ("kl_policy_ref", "kl_ref_policy", "jeffreys", "js", "js:0.1", "alpha:0.5", "alpha:2", "neyman", "hellinger")
SOURCES = {"policy": "p", "old": "mu", "reference": "q"}


@pytest.mark.parametrize("samples", SOURCES)
@pytest.mark.parametrize("kind", [*KINDS, "tv", "kl_chi2"])
def test_three_sources_of_samples(kind, samples, world):
    """One divergence and one gradient, whoever drew the outcomes; against the whole vocabulary."""
    rows = world[SOURCES[samples]].weighted(FIVE.rows())
    loss, grad = step(term(SampledDivergence(kind, samples)), rows, world["p"], old=world["mu"], ref=world["q"])
    log_p, log_q = (torch.tensor(x, dtype=torch.float64).log() for x in (P, Q))
    assert loss == pytest.approx(float(f_divergence(kind).value(log_p, log_q)), abs=1e-12)
    assert grad == pytest.approx(f_divergence(kind).gradient(log_p, log_q).tolist(), abs=1e-12)


@pytest.mark.parametrize("samples", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_sequences(kind, samples):
    """Value and gradient of the divergence of whole sequences, of unequal length, by enumeration and autograd."""
    space = SequenceSpace(3, 2, eos=2)
    policy, old, ref = (table(name, space=space) for name in ("policy", "old", "ref"))
    sampler = {"policy": policy, "old": old, "reference": ref}[samples]
    rows = sampler.weighted(space.rows())
    loss, _ = step(term(SampledDivergence(kind, samples, "sequence")), rows, policy, old=old, ref=ref)
    found = policy.table.grad.clone()
    value = f_divergence(kind).value(policy.log_prob(rows), ref.log_prob(rows).detach())
    (wanted,) = torch.autograd.grad(value, policy.table)
    assert loss == pytest.approx(float(value.detach()), abs=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [SampledKL("k2", level="sequence"), SampledDivergence("js", level="sequence")])
def test_the_loss_of_a_sequence_lies_on_its_tokens(penalty):
    """In equal shares, whatever stands on padding and on tool output between."""
    mask = torch.tensor([[True, False, True, False]])
    tokens = torch.zeros(1, 4, dtype=torch.long)
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask)
    live = torch.tensor([[-1.0, 9.0, -0.5, 7.0]], dtype=torch.float64, requires_grad=True)
    stats = Stats({LogProb(): live, LogProb(of=("ref",)): torch.tensor([[-2.0, 1.0, -1.0, 3.0]], dtype=torch.float64)})
    value = penalty(rows, stats)
    whole = 1.5**2 / 2 if isinstance(penalty, SampledKL) else float(f_divergence("js").f_over_u(torch.tensor(1.5)))
    assert value[0].tolist() == pytest.approx([whole / 2, 0, whole / 2, 0], rel=1e-6)
    value.sum().backward()
    slope = 1.5 if isinstance(penalty, SampledKL) else float(f_divergence("js").f_prime(torch.tensor(1.5)))
    assert live.grad[0].tolist() == pytest.approx([slope, 0, slope, 0], rel=1e-6)


def test_what_sampled_divergences_need():
    assert SampledDivergence("js", "policy").needs == (LogProb(), LogProb(of=("ref",)))
    assert SampledDivergence("js", "old", against="teacher").needs == (
        LogProb(),
        LogProb(of=("teacher",)),
        LogProb(of=("old",)),
    )
    assert SampledDivergence("reverse_kl").divergence == "kl_policy_ref"


# -- entropy and value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "probs", "value"),
    [
        (NegativeEntropy(), [0.2] * 5, -math.log(5)),
        (NegativeEntropy(), [0.5, 0.125, 0.125, 0.125, 0.125], -2 * math.log(2)),
        (NegativeEntropy(0.7), [0.5, 0.3, 0.1, 0.06, 0.04], 0.625 * math.log(0.625) + 0.375 * math.log(0.375)),
        (NegativeEntropy(0.45), [0.5, 0.3, 0.1, 0.06, 0.04], 0.0),
    ],
)
def test_entropy(penalty, probs, value):
    policy = from_probs(probs, space=FIVE)
    loss, _ = step(term(penalty), policy.weighted(FIVE.rows()), policy)
    assert loss == pytest.approx(value, abs=1e-12)


def test_value_loss():
    """Targets 1, old values 0.5, clip 0.2: V = 0.9 is judged at 0.7, V = 0.6 as it is, V = -0.5 unclipped is worse."""
    rows = Rows.build(*(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3) > 0) * 2)
    rows = rows.with_(columns={"returns": torch.ones(1, 3), "values": torch.full((1, 3), 0.5)})
    value = torch.tensor([[0.9, 0.6, -0.5]], requires_grad=True)
    stats = Stats({Value("value"): value})
    found = ValueLoss(0.2)(rows, stats)
    assert found[0].tolist() == pytest.approx([0.5 * 0.09, 0.5 * 0.16, 0.5 * 2.25], abs=1e-6)
    found.sum().backward()
    assert value.grad[0].tolist() == pytest.approx([0.0, -0.4, -1.5], abs=1e-6)
    assert ValueLoss(None)(rows, stats)[0].tolist() == pytest.approx([0.5 * 0.01, 0.5 * 0.16, 0.5 * 2.25], abs=1e-6)
    with pytest.raises(ValueError, match="GAE"):
        ValueLoss()(rows.with_(columns={}), stats)


# -- every penalty ---------------------------------------------------------------------------------------------------


PER_TOKEN = [name for name, item in penalties().items() if type(item).__module__.endswith(".penalties")]


@pytest.mark.parametrize("name", PER_TOKEN)
def test_every_penalty_moves_a_parameter(name):
    """A penalty computed from plain numbers would leave all gradients at zero."""
    penalty = penalties()[name]
    policy = from_probs(P, space=FIVE)
    heads = {head: ValueHead(5) for head in getattr(penalty, "heads_read", ())}
    method = Method(
        kind="supervised",
        terms={"part": Summand(penalty, 1.0)},
        heads=heads,
        models={"ref": Initial()},
    )
    rows = FIVE.rows().with_(
        columns={"returns": torch.ones(5, 1), "values": torch.zeros(5, 1)},
    )
    models = {"policy": policy, "old": from_probs(MU, space=FIVE), "ref": from_probs(Q, space=FIVE)}
    engine = Engine(models, heads)
    frozen = engine.measure(method.frozen_needs(several_updates=True), rows)
    engine.step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    parameters = [policy.table, *(p for head in heads.values() for p in head.parameters())]
    assert max(float(p.grad.abs().max()) for p in parameters if p.grad is not None) > 1e-3


# -- the summand -----------------------------------------------------------------------------------------------------


def confined(per, coef=1.0, mode="token_mean") -> Method:
    return Method(
        kind="supervised",
        aggregation=Aggregation(mode),
        terms={"nll": Summand(NegativeLogLikelihood(), coef, where="nll", per=per)},
    )


def test_the_two_denominators():
    """Losses 1, 2, 3 | 4 with the mask on 2 and 3: the same sum over four tokens, two rows, or over two, one."""
    tokens = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    where = torch.tensor([[False, True, True], [False, False, False]])
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, masks={"nll": where})
    stats = Stats({LogProb(): -torch.tensor([[1.0, 2.0, 3.0], [4.0, 7.0, 7.0]])})

    def found(per, mode):
        return float(confined(per, mode=mode).loss(rows, stats, {}))

    assert found("batch", "token_mean") == pytest.approx(5 / 4)
    assert found("where", "token_mean") == pytest.approx(5 / 2)
    assert found("batch", "sequence_mean_token_mean") == pytest.approx(5 / 3 / 2)
    assert found("where", "sequence_mean_token_mean") == pytest.approx(5 / 2)
    assert found("batch", "sequence_mean_token_sum") == pytest.approx(5 / 2)
    assert found("where", "sequence_mean_token_sum") == pytest.approx(5)
    nothing = rows.with_(masks={"nll": torch.zeros_like(where)})
    assert float(confined("where").loss(nothing, stats, {})) == 0


def test_a_confined_summand_names_its_denominator():
    with pytest.raises(MethodError, match="per='batch' or per='where'"):
        Summand(NegativeLogLikelihood(), 1.0, where="nll")


def test_a_coefficient_of_zero_drops_the_summand():
    method = term(VocabularyDivergence()).set("terms.kl.coef", 0.0)
    assert method.update_needs() == () and method.frozen_needs(True) == ()
    assert method.contributions(FIVE.rows(), Stats(), {}) == {}
    assert term(VocabularyDivergence()).update_needs() == (Divergence("kl_policy_ref", "ref"),)


def test_needs():
    assert SampledKL().needs == (LogProb(), LogProb(of=("ref",)))
    assert SampledKL("k3", "teacher", ratio="differentiable").needs == (
        LogProb(),
        LogProb(of=("teacher",)),
        LogProb(of=("old",)),
    )
    assert NegativeEntropy().needs == (Entropy(),)
    assert NegativeEntropy(0.9).needs == (TopPEntropy(0.9),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampledKL("k4"), "is not one of k1, k2, k3"),
        (lambda: KLInReward(1.0, "k"), "is not one of"),
        (lambda: VocabularyDivergence("chi"), "there is no divergence 'chi'.*Did you mean 'chi2'"),
        (lambda: SampledDivergence("alpha"), "needs its parameter"),
        (lambda: VocabularyDivergence("js", against="policy"), "put the policy first"),
    ],
)
def test_unknown_kinds(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("part", "data", "message"),
    [
        (SampledKL, {"ratio": "detach"}, "'detached'"),
        (SampledKL, {"level": "row"}, "'sequence'"),
        (SampledDivergence, {"samples": "ref"}, "'reference'"),
    ],
)
def test_unknown_choices_in_a_configuration(part, data, message):
    with pytest.raises(ConfigError, match=message):
        build(part, data)


def test_names_are_canonical():
    """Two spellings are one functional, measured once."""
    assert Divergence("alpha:0.50") == Divergence("alpha:0.5") and Divergence("js:0.5") == Divergence("jensen_shannon")
    assert Divergence("neyman", first="old").name == "divergence(chi2_ref_policy, old, ref)"
    assert VocabularyDivergence("cressie_read:2").needs == (Divergence("alpha:2"),)


def test_a_divergence_of_ones_own(world):
    """Registered by name, it serves both penalties; here Pearson's, written anew."""
    own_divergence("written_anew", lambda u: (u - 1) ** 2, replace=True)
    for penalty in (VocabularyDivergence("written_anew"), SampledDivergence("written_anew")):
        loss, grad = step(term(penalty), world["p"].weighted(FIVE.rows()), world["p"], ref=world["q"])
        log_p, log_q = (torch.tensor(x, dtype=torch.float64).log() for x in (P, Q))
        assert loss == pytest.approx(0.9225, abs=DIGITS)
        assert grad == pytest.approx(f_divergence("pearson").gradient(log_p, log_q).tolist(), abs=1e-9)
