"""Penalties: their values, and their gradients on samples of the policy, of an older one and of the reference.

The example: five outcomes, reference q, policy p, an older policy mu; all expectations enumerated.
"""

import math

import pytest
import torch
from tests.worlds import from_probs, penalties

from keel.core.aggregate import Aggregation
from keel.core.errors import MethodError
from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.method import Method
from keel.models.heads import ValueHead
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.advantages.stream import RewardToGo
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import (
    NegativeEntropy,
    NegativeLogLikelihood,
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


LOSSES = {
    "k1 on the policy's samples": ("p", SampledKL("k1"), 0.379246, ZERO),
    "k2 on the policy's samples": ("p", SampledKL("k2"), 0.404414, REVERSE),
    "k3 on the policy's samples": ("p", SampledKL("k3"), 0.379246, FORWARD),
    "ratio k1 on the policy's samples": ("p", SampledKL("k1", with_ratio=True), 0.379246, REVERSE),
    "ratio k3 on the policy's samples": ("p", SampledKL("k3", with_ratio=True), 0.379246, REVERSE),
    "k1 on old samples": ("mu", SampledKL("k1"), -0.120341, [m - p for m, p in zip(MU, P, strict=True)]),
    "k2 on old samples": ("mu", SampledKL("k2"), 0.415025, [-0.334540, 0.072567, -0.068253, 0.167529, 0.162698]),
    "k3 on old samples": ("mu", SampledKL("k3"), 0.531326, [-0.684833, 0.228833, -0.002250, 0.252917, 0.205333]),
    "ratio k1 on old samples": ("mu", SampledKL("k1", with_ratio=True), 0.379246, REVERSE),
    "ratio k2 on old samples": (
        "mu",
        SampledKL("k2", with_ratio=True),
        0.404414,
        [-0.120905, -0.175415, -0.154494, 0.138106, 0.312708],
    ),
    "ratio k3 on old samples": ("mu", SampledKL("k3", with_ratio=True), 0.379246, REVERSE),
    "vocabulary KL(policy || ref)": ("p", VocabularyDivergence("kl_policy_ref"), 0.379246, REVERSE),
    "vocabulary KL(ref || policy)": ("p", VocabularyDivergence("kl_ref_policy"), 0.405530, FORWARD),
    "vocabulary KL(ref || policy), old samples": ("mu", VocabularyDivergence("forward_kl"), 0.405530, FORWARD),
    "likelihood of the reference's samples": ("q", NegativeLogLikelihood(), 1.820553, FORWARD),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_in_the_loss(name, world):
    sampler, penalty, value, gradient = LOSSES[name]
    rows = world[sampler].weighted(FIVE.rows())
    loss, grad = step(term(penalty), rows, world["p"], old=world[sampler], ref=world["q"])
    assert loss == pytest.approx(value, abs=DIGITS)
    assert grad == pytest.approx(gradient, abs=DIGITS)


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
        _, grad = step(term(SampledKL("k3", with_ratio=True)), rows, world["p"], old=world["mu"], ref=world["q"])
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
        (term(SampledKL("k3", with_ratio=True)), 0.177933),
        (reward_kl("k1"), 0.233250),
        (reward_kl("k1", RewardToGo()), 0.233250),
    ],
    ids=["k2", "vocabulary", "ratio k3", "reward", "reward to go"],
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
    ],
)
def test_value_of_a_sequence(penalty, sampler, value, sequences):
    policy, ref = sequences
    rows = sequences[sampler].weighted(PAIR.rows())
    loss, _ = step(term(penalty), rows, policy, ref=ref)
    assert loss == pytest.approx(value, abs=DIGITS)


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


@pytest.mark.parametrize("name", sorted(penalties()))
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
    rows = FIVE.rows().with_(columns={"returns": torch.ones(5, 1), "values": torch.zeros(5, 1)})
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
    assert SampledKL("k3", "teacher", with_ratio=True).needs == (
        LogProb(),
        LogProb(of=("teacher",)),
        LogProb(of=("old",)),
    )
    assert NegativeEntropy().needs == (Entropy(),)
    assert NegativeEntropy(0.9).needs == (TopPEntropy(0.9),)


@pytest.mark.parametrize(
    "make", [lambda: SampledKL("k4"), lambda: VocabularyDivergence("chi2"), lambda: KLInReward(1.0, "k")]
)
def test_unknown_kinds(make):
    with pytest.raises(ValueError, match="is not one of"):
        make()
