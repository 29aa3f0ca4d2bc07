"""Rows without gradient (tied groups, say) are left out of the backward pass, and nothing else changes."""

import pytest
import torch
from tests.statistics.whole_logits import assert_gradients, critic_of, gradients, kl, log_prob, logits
from tests.worlds import EVERYTHING, Network, text_rows

from keel.statistics.engine import AGAIN, Engine
from keel.statistics.functionals import Divergence, LogProb, TopK, Value
from keel.statistics.stats import Stats

ROWS = text_rows(10)
KL = Divergence("kl_policy_ref")


def weights(learning: list[int]) -> torch.Tensor:
    out = torch.zeros(10, dtype=torch.float64)
    out[learning] = torch.arange(1.0, 1 + len(learning), dtype=torch.float64)
    return out[:, None]


def step(policy, ref, learning, *, additive=False, **settings) -> None:
    engine = Engine({"policy": policy, "ref": ref}, **settings)
    weight = weights(learning)

    def loss(rows, stats):
        return (weight[rows.row] * (stats[LogProb()] + 0.3 * stats[KL])).sum()

    engine.step([LogProb(), KL], ROWS, Stats(), loss, additive=additive)


def wanted(policy, ref, learning) -> dict[str, torch.Tensor]:
    z = logits(policy, ROWS, 1.0)
    with torch.no_grad():
        q = logits(ref, ROWS, 1.0)
    token = (log_prob(z, ROWS) + 0.3 * kl(z, q)) * ROWS.mask
    policy.zero_grad()
    (weights(learning) * token).sum().backward()
    return gradients(policy)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("max_tokens", [EVERYTHING, 40])
@pytest.mark.parametrize("learning", [[3], [0, 9], [1, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6, 8], list(range(10))])
def test_gradients_are_those_of_all_rows(learning, max_tokens, additive):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    step(policy, ref, learning, max_tokens=max_tokens, additive=additive)
    found = gradients(policy)
    assert_gradients(found, wanted(policy, ref, learning))


@pytest.mark.parametrize(
    "learning, calls",
    [([3], [10, 1]), ([1, 4, 6], [10, 3]), ([0, 1, 2, 3, 4, 5, 6, 8], [10]), (list(range(10)), [10]), ([], [10])],
)
def test_one_pass_goes_again_only_where_that_is_cheaper(learning, calls):
    policy, ref = Network(seed="policy"), Network(seed="ref")
    step(policy, ref, learning, max_tokens=EVERYTHING)
    assert policy.calls == calls and ref.calls == [10]
    assert 3 <= AGAIN * 10 < 8


def test_of_two_passes_the_second_has_the_learning_rows_only():
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=40)
    sizes = [len(index) for index in engine.split(ROWS)]
    learning = list(range(8))
    step(policy, ref, learning, max_tokens=40)
    again = [sum(int(i) in learning for i in index) for index in engine.split(ROWS)]
    assert policy.calls == sizes + [count for count in again if count] and ref.calls == sizes
    assert sum(again) == 8 and len(sizes) > 1


@pytest.mark.parametrize("max_tokens", [EVERYTHING, 40])
def test_dropout_keeps_its_masks(max_tokens):
    """With dropout all rows of a micro-batch go again, since its masks are drawn for all of them."""
    policy, ref = Network(seed="policy", dropout=0.5), Network(seed="ref")
    step(policy, ref, [0, 3], max_tokens=max_tokens, dropout=True)
    assert all(count in [len(i) for i in Engine({}, max_tokens=max_tokens).split(ROWS)] for count in policy.calls)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_heads_and_autograd_functionals_of_some_rows(kind):
    found = []
    for max_tokens in (EVERYTHING, 1):
        policy = Network(seed="policy")
        critic = critic_of(policy, kind)
        engine = Engine({"policy": policy}, {"value": critic}, max_tokens=max_tokens)
        weight = weights([2, 7])
        needs = [Value(), TopK(2)]
        engine.step(
            needs,
            ROWS,
            Stats(),
            lambda rows, stats, w=weight: (w * stats[Value()].square()).sum() + (w[..., None] * stats[TopK(2)]).sum(),
        )
        found.append({**gradients(policy), **{f"critic.{n}": g for n, g in gradients(critic).items()}})
    assert_gradients(found[0], found[1])
    assert any(bool(grad.any()) for name, grad in found[0].items() if name.startswith("critic"))
