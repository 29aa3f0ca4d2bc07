"""The engine against autograd on whole logits, against itself on other paths, and against finite differences."""

import copy

import pytest
import torch
from tests.statistics.whole_logits import (
    FUNCTIONALS,
    ROWS,
    assert_gradients,
    by_autograd,
    critic_of,
    entropy,
    gradients,
    kl,
    last,
    log_prob,
    logits,
    masked,
    mixture,
)
from tests.worlds import EVERYTHING, Network
from torch import Tensor

from keel.core.rows import Pairs, Rows
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK, TopPEntropy, Value
from keel.statistics.stats import Stats

PATHS = {
    "one pass": dict(max_tokens=EVERYTHING),
    "one pass, a position a chunk": dict(max_tokens=EVERYTHING, chunk_bytes=1),
    "two passes": dict(max_tokens=20),
    "two passes, a row each, two positions a chunk": dict(max_tokens=1, chunk_bytes=2 * 4 * 11),
}


@pytest.mark.parametrize("functional", FUNCTIONALS, ids=str)
def test_each_functional(functional):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    wanted, values = by_autograd([functional], policy, ref, ROWS, 0.8)
    grads = gradients(policy)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3
    engine = Engine({"policy": policy, "ref": ref}, temperature=0.8, max_tokens=20, chunk_bytes=3 * 4 * 11)
    loss, stats = engine.step([functional], ROWS, Stats(), lambda rows, stats: mixture([stats[functional]]))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats[functional], values[0].detach(), rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    torch.testing.assert_close(engine.measure([functional], ROWS)[functional], stats[functional], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "temperature"), [({}, 1.0), ({"scale": 0.5, "softcap": 3.0}, 0.6)], ids=["plain", "scaled and capped"]
)
def test_all_functionals_at_once_on_every_path(path, shape, temperature):
    policy, ref = Network(seed="policy", **shape), Network(seed="ref", **shape)
    functionals = list(FUNCTIONALS)
    wanted, _ = by_autograd(functionals, policy, ref, ROWS, temperature)
    grads = gradients(policy)
    engine = Engine({"policy": policy, "ref": ref}, temperature=temperature, **PATHS[path])
    loss, _ = engine.step(functionals, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in functionals]))
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    assert all(p.grad is None for p in ref.parameters())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["head", "model"])
def test_values(kind, path):
    """A head on the policy's states, or a critic with a body of its own, beside a functional of the policy."""
    policy = Network(seed="policy")
    critic = critic_of(policy, kind)
    rows = ROWS
    value = critic(critic.hidden(rows) if kind == "model" else policy.hidden(rows)) * rows.mask
    z = logits(policy, rows, 1.0)
    wanted = mixture([value, masked(log_prob(z, rows), LogProb(), rows), last(value, rows)])
    wanted.backward()
    grads, critic_grads = gradients(policy), gradients(critic)
    assert float(critic_grads["weight" if kind == "head" else "head.weight"].abs().max()) > 1e-3
    needs = [Value("value"), LogProb(), Value("value", where="last")]
    engine = Engine({"policy": policy}, {"value": critic}, **PATHS[path])
    loss, _ = engine.step(needs, rows, Stats(), lambda rows, stats: mixture([stats[f] for f in needs]))
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-10, atol=1e-10)
    assert_gradients(gradients(policy), grads)
    assert_gradients(gradients(critic), critic_grads)


def test_a_head_learns_though_the_policy_is_held():
    policy = Network(seed="policy")
    critic = critic_of(policy, "head")
    held = Value("value", stop=("policy",))
    Engine({"policy": policy}, {"value": critic}).step(
        [held], ROWS, Stats(), lambda rows, stats: mixture([stats[held]])
    )
    assert not any(bool(g.any()) for g in gradients(policy).values())
    found = gradients(critic)
    mixture([critic(policy.hidden(ROWS).detach()) * ROWS.mask]).backward()
    assert_gradients(found, gradients(critic))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_held_gets_no_gradient(path):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    held, free = Divergence("kl_policy_ref", stop=("policy",)), LogProb()
    z, q = logits(policy, ROWS, 1.0), logits(ref, ROWS, 1.0)
    constant = masked(kl(z, q), held, ROWS).detach()
    mixture([constant, masked(log_prob(z, ROWS), free, ROWS)]).backward()
    wanted = gradients(policy)
    engine = Engine({"policy": policy, "ref": ref}, **PATHS[path])
    engine.step([held, free], ROWS, Stats(), lambda rows, stats: mixture([stats[held], stats[free]]))
    assert_gradients(gradients(policy), wanted)


def test_finite_differences():
    """The engine's gradient against its own values at moved parameters."""
    policy, ref = Network(seed="policy"), Network(seed="ref")
    functionals = [f for f in FUNCTIONALS if getattr(f, "transform", None) is None]  # filters jump
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=20)
    engine.step(functionals, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in functionals]))
    grads = gradients(policy)

    def loss() -> float:
        stats = engine.measure(functionals, ROWS)
        return float(mixture([stats[f] for f in functionals]))

    for name, parameter in policy.named_parameters():
        for index in {0, parameter.numel() // 2, parameter.numel() - 1}:
            with torch.no_grad():
                flat = parameter.view(-1)
                flat[index] += 1e-6
                up = loss()
                flat[index] -= 2e-6
                down = loss()
                flat[index] += 1e-6
            assert (up - down) / 2e-6 == pytest.approx(float(grads[name].view(-1)[index]), rel=1e-5, abs=1e-6)


def test_the_policy_is_left_as_it_was():
    policy = Network(seed="policy")
    before = copy.deepcopy(policy.state_dict())
    Engine({"policy": policy}, max_tokens=20).step(
        [LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].sum()
    )
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


# -- one gradient path, several ways ---------------------------------------------------------------------------------


def additive_loss(rows: Rows, stats: Stats) -> Tensor:
    """A weighted mean, whose denominator a slice takes from the step."""
    weight = rows.loss_mask * rows.weight[:, None]
    whole = float(weight.sum()) if rows.totals is None else rows.totals.tokens
    total = (weight * stats[LogProb()] * stats[LogProb(of=("ref",))].exp()).sum()
    return (
        total + (stats[Entropy(where="last")] * rows.weight).sum() + stats[TopPEntropy(0.7, where="nll")].sum()
    ) / whole


@pytest.mark.parametrize("dropout", [False, True])
def test_the_additive_path(dropout):
    """Frozen and live statistics of every shape; with dropout, the same noise in the same micro-batches."""
    policy, ref = Network(seed="policy", dropout=0.5), Network(seed="ref")
    live = [LogProb(), Entropy(where="last"), TopPEntropy(0.7, where="nll")]
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=10, dropout=dropout)
    assert len(engine.split(ROWS)) > 2
    frozen = engine.measure([LogProb(of=("ref",)), LogProb(of=("ref",), where="nll")], ROWS)
    two_loss, two = engine.step(live, ROWS, frozen, additive_loss)
    two_grads = gradients(policy)
    one_loss, one = engine.step(live, ROWS, frozen, additive_loss, additive=True)
    torch.testing.assert_close(one_loss, two_loss, rtol=1e-12, atol=1e-12)
    assert_gradients(gradients(policy), two_grads)
    assert set(one) == set(two) == {*live, *frozen}
    for functional in one:
        torch.testing.assert_close(one[functional], two[functional], rtol=1e-12, atol=1e-12)


def test_dropout_is_replayed():
    """The second pass repeats the noise of the first: the gradient is that of the statistics that the loss saw."""
    policy = Network(seed="policy", dropout=0.5)
    engine = Engine({"policy": policy}, max_tokens=20, dropout=True)
    state = torch.random.get_rng_state()
    _, noisy = engine.step(
        [LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].square().sum(), counter=(3,)
    )
    grads = gradients(policy)
    assert torch.equal(torch.random.get_rng_state(), state) and not policy.training
    wanted = torch.zeros((), dtype=torch.float64)
    for i, index in enumerate(engine.split(ROWS)):
        part = ROWS.select(index).trim()
        with engine._dropout("policy", (3, i)):
            value = masked(log_prob(logits(policy, part, 1.0), part), LogProb(), part)
        torch.testing.assert_close(value.detach(), noisy[LogProb()][index, : value.shape[1]])
        wanted = wanted + value.square().sum()
    wanted.backward()
    assert_gradients(grads, gradients(policy))


def test_dropout_differs_between_steps_and_is_off_elsewhere():
    policy = Network(seed="policy", dropout=0.5)
    engine = Engine({"policy": policy}, dropout=True)
    loss = lambda rows, stats: stats[LogProb()].sum()  # noqa: E731
    runs = [engine.step([LogProb()], ROWS, Stats(), loss, counter=c)[1][LogProb()] for c in ((0, 1), (0, 1), (0, 2))]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    plain = Engine({"policy": policy}).measure([LogProb()], ROWS)[LogProb()]
    assert torch.equal(engine.measure([LogProb()], ROWS)[LogProb()], plain)
    assert not torch.allclose(runs[0], plain)


@pytest.mark.parametrize("max_tokens", [EVERYTHING, 20])
def test_bf16_head(max_tokens):
    """Gradients agree with autograd up to bf16, whose products depend on the batch; the softmax itself is in fp32."""
    policy = Network(seed="policy", dtype=torch.bfloat16)
    z = policy.output(policy.hidden(ROWS)).float()
    values = [masked(log_prob(z, ROWS), LogProb(), ROWS), masked(entropy(z), Entropy(), ROWS)]
    wanted = values[0].mean() + values[1].square().mean()
    wanted.backward()
    grads = gradients(policy)
    engine = Engine({"policy": policy}, max_tokens=max_tokens, chunk_bytes=4 * 4 * 11)

    def loss(rows, stats):
        return stats[LogProb()].mean() + stats[Entropy()].square().mean()

    found, stats = engine.step([LogProb(), Entropy()], ROWS, Stats(), loss)
    assert stats[LogProb()].dtype == torch.float32
    torch.testing.assert_close(stats[LogProb()], values[0].detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found, wanted.detach(), rtol=0.02, atol=0.02)
    for name, grad in gradients(policy).items():
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, grads[name], rtol=0.05, atol=0.03 * float(grads[name].abs().max()))
    whole = engine.measure([TopK(11)], ROWS)[TopK(11)][ROWS.mask]
    assert float((whole.exp().sum(-1) - 1).abs().max()) < 1e-6


def test_a_loss_over_pairs_may_be_split():
    """Chosen and rejected rows fall into different micro-batches."""
    ones = torch.ones(2, dtype=torch.float64)
    rows = ROWS.with_(pairs=Pairs(torch.tensor([0, 3]), torch.tensor([1, 2]), ones, ones, ones, 0 * ones))

    def loss(rows, stats):
        score = stats[LogProb()].sum(1)
        return -torch.nn.functional.logsigmoid(score[rows.pairs.chosen] - score[rows.pairs.rejected]).mean()

    found = {}
    for max_tokens in (EVERYTHING, 1):
        policy = Network(seed="policy")
        value, _ = Engine({"policy": policy}, max_tokens=max_tokens).step([LogProb()], rows, Stats(), loss)
        found[max_tokens] = (value, gradients(policy))
    torch.testing.assert_close(found[1][0], found[EVERYTHING][0], rtol=1e-12, atol=1e-12)
    assert_gradients(found[1][1], found[EVERYTHING][1])
