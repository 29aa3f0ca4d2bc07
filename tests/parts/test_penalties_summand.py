"""Entropy and value as penalties, what holds for every penalty, and the summand that puts one into the loss."""

import math

import pytest
import torch
from tests.cases import penalties
from tests.parts.five_outcomes import FIVE, MU, P, Q, step, term
from tests.worlds import from_probs

from keel.core.aggregate import Aggregation
from keel.core.config import build
from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Rows
from keel.method import Method
from keel.models.heads import ValueHead
from keel.models.sources import Initial
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
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopPEntropy, Value
from keel.statistics.stats import Stats

PER_TOKEN = [name for name, item in penalties().items() if type(item).__module__.endswith(".penalties")]


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
