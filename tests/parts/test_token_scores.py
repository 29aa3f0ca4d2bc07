"""Scores that look at single tokens, against the specification's numbers and hand computation."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE
from tests.parts.pair_numbers import KL, REF, assert_gradients_of_value, loss_of, numbers, pair_rows, spread, stats_of
from tests.worlds import outcome, rows_for
from torch import Tensor

from keel.core.errors import MethodError
from keel.core.rows import Pairs, Rows
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss, Side
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.token_scores import (
    DifferingTokens,
    MisorderWeight,
    PairPenalty,
    SequentialKL,
    TokenRewardLikelihood,
    differing_tokens,
)
from keel.parts.terms.token_weights import LearnedMask
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

BETTER, WORSE = (LogProb(of=(name,)) for name in ("better", "worse"))
DPO = 0.598139  # of a margin of 2 at beta 0.1


# -- TDPO ------------------------------------------------------------------------------------------------------------

TWO = {"u": ([0.75, 0.25], [-0.5, -0.25, -0.25]), "k": ([0.1, 0.2], [0.5, 0.1, 0.2])}  # m = 2, K_w = 0.3, K_l = 0.8


@pytest.mark.parametrize(("version", "loss", "chosen", "rejected"), [(1, 0.620957, -0.046257, 0.046257),
                                                                     (2, 0.609470, 0.0, 0.022818)])  # fmt: skip
@pytest.mark.parametrize("wide", [0, 3])
def test_tdpo(version, loss, chosen, rejected, wide):
    rows = pair_rows((2, 3), wide=wide)
    found = numbers(rows, **TWO)
    value = loss_of(recipe_named("tdpo")(version=version), rows, found)
    assert value.item() == pytest.approx(loss, abs=ALIKE)
    (grad,) = torch.autograd.grad(value, found["k"])
    assert grad[0, :2].tolist() == pytest.approx([chosen] * 2, abs=ALIKE)
    assert grad[1, :3].tolist() == pytest.approx([rejected] * 3, abs=ALIKE)
    assert not grad[0, 2:].any() and not grad[1, 3:].any()


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_without_the_divergence_is_dpo(version):
    """Bit for bit, and the divergence is not even measured."""
    method = recipe_named("tdpo")(alpha=0.0, version=version)
    assert method.update_needs() == recipe_named("dpo")().update_needs()
    found, wanted = outcome(method), outcome(recipe_named("dpo")())
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.grads["policy.table"], wanted.grads["policy.table"])


def test_tdpo_at_the_reference_is_log_two():
    rows = pair_rows((2, 3))
    found = numbers(rows, u=([0.0, 0.0], [0.0, 0.0, 0.0]), k=([0.0, 0.0], [0.0, 0.0, 0.0]))
    assert loss_of(recipe_named("tdpo")(), rows, found).item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(("version", "loss"), [(1, 0.647608), (2, 0.652353)])
def test_the_direction_of_the_divergence(version, loss):
    """One position each, whole distributions through the engine: K is an expectation under the reference."""
    space = SequenceSpace(vocab=3, horizon=1, prompts=2)
    probs = {"policy": [[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], "ref": [[0.5, 0.3, 0.2]] * 2}
    models = {name: TabularPolicy(space, torch.tensor(p).double().log()[:, None]) for name, p in probs.items()}
    one = torch.ones(1, dtype=torch.float64)
    rows = Rows.build(
        torch.tensor([[0], [1]]),
        torch.ones(2, 1, dtype=torch.bool),
        torch.tensor([[1], [0]]),
        torch.ones(2, 1, dtype=torch.bool),
        pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, one, 0 * one),
    )
    stats = Engine(models).measure([LogProb(), REF, KL], rows)
    side = stats[LogProb()] - stats[REF]
    assert float(side[0] - side[1]) == pytest.approx(0.733969, abs=ALIKE)
    assert stats[KL].flatten().tolist() == pytest.approx([0.223805, 0.025267], abs=ALIKE)
    assert float(recipe_named("tdpo")(version=version).loss(rows, stats, {})) == pytest.approx(loss, abs=ALIKE)


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_of_tdpo(version):
    """Of version 2 all but that of the chosen side's divergence, which is held constant."""
    rows = pair_rows((2, 3), wide=1)
    constant = (("k", 0),) if version == 2 else ()
    assert_gradients_of_value(recipe_named("tdpo")(version=version), rows, numbers(rows, **TWO), constant)


def test_half_precision_is_summed_in_single():
    """A thousand tokens of log-ratio 0.01 in bf16: 16 bits would stop at a fraction of 10."""
    rows = pair_rows((1000, 1), dtype=torch.float32)
    long = [0.01] * 1000
    found = numbers(rows, dtype=torch.bfloat16, u=(long, [0.0]), k=(long, [0.0]))
    side = Side(rows, stats_of(found), torch.tensor([0]), torch.tensor([1]))
    step = float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert SequentialKL()(side).dtype == torch.float32
    assert float(SequentialKL()(side)) == pytest.approx(1000 * step, rel=1e-5)
    assert float(LogRatio()(side)) == pytest.approx(1000 * step, rel=1e-5)
    value = loss_of(recipe_named("tdpo")(version=1), rows, found)
    assert value.dtype == torch.float32 and float(value) == pytest.approx(
        math.log1p(math.exp(-2 * 100 * step)), rel=1e-5
    )


# -- RRPO ------------------------------------------------------------------------------------------------------------

# "the cat sat </s>" and "the old dog sat </s>": 1 differs from 2 3
TOKENS = [[5, 1, 6, 9], [5, 2, 3, 6, 9]]


def test_differing_tokens():
    rows = pair_rows((4, 5), TOKENS, wide=2)
    found = differing_tokens(rows, torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert found.int().tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]]


def test_spans_of_the_data_come_before_the_alignment():
    rows = pair_rows((4, 5), TOKENS)
    spans = torch.zeros(2, 5, dtype=torch.bool)
    spans[0, 0] = spans[1, 4] = True
    side = Side(rows.with_(masks={"phrases": spans}), Stats(), torch.tensor([1]), torch.tensor([0]))
    assert DifferingTokens()(side).tolist() == [[0, 0, 0, 0, 1]]


def rrpo_numbers(rows: Rows) -> dict[str, Tensor]:
    """Phrases of log-ratio 0.8 and -1.0, common tokens of 3 each, K_w = 2."""
    return numbers(rows, u=([3.0, 0.8, 3.0, 3.0], [3.0, -0.4, -0.6, 3.0, 3.0]), k=([0.5] * 4, [0.9] * 5))


@pytest.mark.parametrize(("alpha", "loss"), [(0.01, 0.627192), (0.0, 0.607192)])
@pytest.mark.parametrize("wide", [0, 2])
def test_rrpo(alpha, loss, wide):
    rows = pair_rows((4, 5), TOKENS, wide)
    assert float(loss_of(recipe_named("rrpo")(alpha=alpha), rows, rrpo_numbers(rows))) == pytest.approx(loss, abs=ALIKE)


def test_common_tokens_neither_count_nor_learn():
    """Where they are moved, the loss stays as it is, bit for bit, and its gradient there is 0."""
    rows, method = pair_rows((4, 5), TOKENS), recipe_named("rrpo")()
    found = rrpo_numbers(rows)
    value = loss_of(method, rows, found)
    (grad,) = torch.autograd.grad(value, found["u"])
    assert (grad != 0).int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    moved = found["u"].detach().clone()
    moved[:, 0] += 5
    assert torch.equal(loss_of(method, rows, {**found, "u": moved}), value)


def test_rrpo_of_completions_with_nothing_in_common_is_dpo():
    rows = pair_rows((2, 3), [[1, 2], [3, 4, 5]])
    found = numbers(rows, **TWO)
    wanted = loss_of(recipe_named("dpo")(), rows, found)
    assert torch.equal(loss_of(recipe_named("rrpo")(alpha=0.0), rows, found), wanted)
    assert float(wanted) == pytest.approx(DPO, abs=ALIKE)


def test_rrpo_of_equal_completions():
    """log 2 and the divergence of the chosen one, without a gradient of the preference."""
    rows = pair_rows((2, 2), [[1, 2], [1, 2]])
    found = numbers(rows, u=([1.0, 1.0], [-1.0, -1.0]), k=([0.5, 0.5], [0.5, 0.5]))
    value = loss_of(recipe_named("rrpo")(alpha=0.1), rows, found)
    assert float(value) == pytest.approx(math.log(2) + 0.1, abs=1e-12)
    assert not torch.autograd.grad(value, found["u"])[0].any()


def test_gradients_of_rrpo():
    rows = pair_rows((4, 5), TOKENS, wide=1)
    assert_gradients_of_value(recipe_named("rrpo")(), rows, rrpo_numbers(rows))


# -- T-REG -----------------------------------------------------------------------------------------------------------


def logit(reward: float) -> float:
    """The log-odds of which a token reward is made."""
    return math.log((reward + 0.5) / (0.5 - reward))


LOGP = ([-0.5, -1.0], [-0.7, -0.9])
REWARDS = ([0.1, -0.2], [-0.3, 0.05])


def t_reg_stats(rows: Rows, live: Tensor, rewards=REWARDS) -> Stats:
    """a = 1 and d = -1."""
    odds = spread(rows, *([logit(r) for r in side] for side in rewards)).detach()
    ratios = spread(rows, [0.25, 0.75], [-0.5, -0.5]).detach()
    before = spread(rows, *LOGP).detach()
    return Stats({LogProb(): live, REF: before - ratios, BETTER: odds - 3.0, WORSE: torch.full_like(odds, -3.0)})


def test_a_token_reward():
    rows = pair_rows((1, 1))
    stats = Stats({BETTER: spread(rows, [-0.2], [-2.0]), WORSE: spread(rows, [-1.0], [-2.0])})
    found = TokenRewardLikelihood().rewards(Side(rows, stats, torch.tensor([0, 1])))
    assert found.flatten().tolist() == pytest.approx([0.189974, 0.0], abs=ALIKE) and not found.requires_grad


def test_t_reg():
    rows = pair_rows((2, 2), wide=1)
    live = spread(rows, *LOGP)
    stats = t_reg_stats(rows, live)
    first, second = (Side(rows, stats, torch.tensor([i]), torch.tensor([1 - i])) for i in range(2))
    feature = TokenRewardLikelihood()
    assert float(MisorderWeight(LogRatio())(first, second)) == pytest.approx(0.450166, abs=ALIKE)
    assert float(feature(first)) == pytest.approx(-0.015, abs=1e-12)
    assert float(feature(second)) == pytest.approx(-0.0165, abs=1e-12)
    assert float(recipe_named("t_reg")().loss(rows, stats, {})) == pytest.approx(0.594594, abs=ALIKE)


def test_equal_prompts_give_dpo():
    """And so does a coefficient of 0, for which no further model is loaded."""
    rows = pair_rows((2, 2))
    stats = t_reg_stats(rows, spread(rows, *LOGP), ([0.0, 0.0], [0.0, 0.0]))
    plain = recipe_named("dpo")().loss(rows, stats, {})
    assert torch.equal(recipe_named("t_reg")().loss(rows, stats, {}), plain)
    assert recipe_named("t_reg")(alpha=0.0) == recipe_named("dpo")()
    simpo = recipe_named("t_reg")(alpha=0.0, base="simpo")
    assert not simpo.models and set(simpo.terms) == {"pairs"}


def test_rewarded_tokens_are_pushed_on_both_sides():
    rows = pair_rows((2, 2))
    grads = []
    for name in ("t_reg", "dpo"):
        live = spread(rows, *LOGP)
        (grad,) = torch.autograd.grad(recipe_named(name)().loss(rows, t_reg_stats(rows, live), {}), live)
        grads.append(grad)
    push = (grads[0] - grads[1])[rows.mask].view(2, 2)
    wanted = -0.25 * 0.450166 * 0.1 * torch.tensor(REWARDS, dtype=torch.float64)
    torch.testing.assert_close(push, wanted, atol=1e-8, rtol=1e-6)


def test_the_weight_of_simpo():
    """beta 2, gamma 1: means -0.75 and -0.8, z = 0.1, w = sigmoid(1 - 0.1) = 0.710950, L_reg = -0.3 and -0.33."""
    rows = pair_rows((2, 2))
    stats = t_reg_stats(rows, spread(rows, *LOGP))
    w = 1 / (1 + math.exp(-0.9))
    wanted = math.log1p(math.exp(0.9)) + 0.25 * w * (-0.3 - 0.33)
    assert w == pytest.approx(0.710950, abs=ALIKE)
    assert float(recipe_named("t_reg")(base="simpo").loss(rows, stats, {})) == pytest.approx(wanted, abs=1e-12)


def test_the_weight_is_held_constant():
    """The gradient is that of the loss with w as a number."""
    rows = pair_rows((2, 2))
    live = spread(rows, *LOGP)
    (grad,) = torch.autograd.grad(recipe_named("t_reg")().loss(rows, t_reg_stats(rows, live), {}), live)

    def value(at: Tensor) -> float:
        gain = at - live.detach()
        margin = 2 + float(gain[0, :2].sum() - gain[1, :2].sum())
        reg = sum(-0.1 * r * float(at[i, t]) for i, side in enumerate(REWARDS) for t, r in enumerate(side))
        return math.log1p(math.exp(-0.1 * margin)) + 0.25 * (1 / (1 + math.exp(0.2))) * reg

    for i, t in rows.mask.nonzero().tolist():
        step = torch.zeros_like(grad)
        step[i, t] = 1e-6
        found = (value(live.detach() + step) - value(live.detach() - step)) / 2e-6
        assert found == pytest.approx(float(grad[i, t]), abs=1e-8)


def test_metrics_of_token_rewards():
    """r = 0.1, -0.2 and -0.3, 0.05, against log-ratios 0.25, 0.75 and -0.5, -0.5."""
    rows = pair_rows((2, 2), wide=2)
    stats = t_reg_stats(rows, spread(rows, *LOGP))
    found = recipe_named("t_reg")().terms["token_rewards"].metrics(rows, stats)
    assert float(found["token_reward/mean/chosen"]) == pytest.approx(-0.05)
    assert float(found["token_reward/correlation/chosen"]) == pytest.approx(-1.0)
    assert float(found["token_reward/correlation/rejected"]) == 0.0


def test_bad_settings():
    with pytest.raises((ValueError, TypeError)):
        PairPenalty(SequentialKL(), sides="left")
    with pytest.raises((ValueError, TypeError)):
        SequentialKL(against="policy")
    with pytest.raises(ValueError, match="dropout"):
        LearnedMask(dropout=1.0)
    with pytest.raises(MethodError, match="has none"):
        PairPenalty(SequentialKL())(pair_rows((1, 1)).with_(pairs=None), Stats())
    rows = pair_rows((1, 1))
    with pytest.raises(MethodError, match="no partner"):
        DifferingTokens()(Side(rows, Stats(), torch.tensor([0])))
    with pytest.raises(MethodError, match="no head 'mask'"):
        Method(
            kind="pairs",
            terms={"pairs": PairLoss(LogSigmoid(), LogRatio(weight=LearnedMask()))},
            models={"ref": Initial(), "layers": Initial()},
        )


def test_phrases_in_an_exact_world():
    """Tokens that both completions of each pair share get no gradient by the preference, through tables."""
    method = recipe_named("rrpo")(alpha=0.0)
    found = outcome(method)
    side = Side(rows_for(method), found.stats, rows_for(method).pairs.chosen, rows_for(method).pairs.rejected)
    assert 0 < float(DifferingTokens()(side).sum()) < float(side.mask.sum())
    assert bool(found.grads["policy.table"].any())
