"""Penalties on sequences, of tokens or of the whole, and any divergence from samples of any source."""

import pytest
import torch
from tests.parts.five_outcomes import DIGITS, FIVE, MU, P, Q, reward_kl, step, term
from tests.worlds import from_probs, table

from keel.core.rows import Rows
from keel.divergences.family import f_divergence
from keel.divergences.own import own_divergence
from keel.exact.space import SequenceSpace
from keel.parts.advantages.stream import RewardToGo
from keel.parts.terms.penalties import SampledDivergence, SampledKL, VocabularyDivergence
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

PAIR = SequenceSpace(2, 2)
KINDS = ("kl_policy_ref", "kl_ref_policy", "jeffreys", "js", "js:0.1", "alpha:0.5", "alpha:2", "neyman", "hellinger")
SOURCES = {"policy": "p", "old": "mu", "reference": "q"}


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


@pytest.fixture
def world():
    return {name: from_probs(probs, space=FIVE) for name, probs in (("p", P), ("q", Q), ("mu", MU))}


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


def test_a_divergence_of_ones_own(world):
    """Registered by name, it serves both penalties; here Pearson's, written anew."""
    own_divergence("written_anew", lambda u: (u - 1) ** 2, replace=True)
    for penalty in (VocabularyDivergence("written_anew"), SampledDivergence("written_anew")):
        loss, grad = step(term(penalty), world["p"].weighted(FIVE.rows()), world["p"], ref=world["q"])
        log_p, log_q = (torch.tensor(x, dtype=torch.float64).log() for x in (P, Q))
        assert loss == pytest.approx(0.9225, abs=DIGITS)
        assert grad == pytest.approx(f_divergence("pearson").gradient(log_p, log_q).tolist(), abs=1e-9)
