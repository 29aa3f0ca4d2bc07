"""Implicit process rewards: soft values on an enumerated world, steps and their aggregates, votes, and the loss."""

import itertools
import math

import pytest
import torch
from tests.worlds import from_probs, sample, table

from keel.core.aggregate import returns
from keel.core.errors import ConfigError
from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.parts.advantages.group import GroupCentre
from keel.parts.advantages.to_go import CentredToGo
from keel.parts.rewards.implicit import (
    ImplicitProcessReward,
    ImplicitScore,
    partial_rewards,
    step_of_token,
    step_rewards,
    step_score,
    weighted_vote,
)
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

BETA = 0.5
TWO = SequenceSpace(vocab=2, horizon=2)
REF = from_probs([0.6, 0.4], [0.5, 0.5], [0.3, 0.7], space=TWO)
PRM = from_probs([0.2, 0.8], [0.9, 0.1], [0.6, 0.4], space=TWO)


def measured(prm, ref, rows) -> Stats:
    needs = (LogProb(of=("prm",)), LogProb(of=("ref",)))
    return Engine({"policy": ref, "prm": prm, "ref": ref}).measure(needs, rows)


def world():
    rows = TWO.rows()
    stats = measured(PRM, REF, rows)
    gap = stats[LogProb(of=("prm",))] - stats[LogProb(of=("ref",))]
    return rows, stats, partial_rewards(gap, rows.mask, BETA)


def test_the_example():
    """Prefix 0: Q = -0.549306 = beta log E exp(r / beta), the mean of r -0.804719; prefix 1: 0.346574, 0.254680."""
    rows, _, q = world()
    r = {tuple(t): float(v) for t, v in zip(rows.tokens.tolist(), q[:, -1], strict=True)}
    assert (r[0, 0], r[0, 1]) == (pytest.approx(-0.255413, abs=5e-7), pytest.approx(-1.354025, abs=5e-7))
    for first, second, value, mean in ((0, (0.5, 0.5), -0.549306, -0.804719), (1, (0.3, 0.7), 0.346574, 0.254680)):
        found = float(q[rows.tokens[:, 0] == first][0, 0])
        soft = BETA * math.log(sum(p * math.exp(r[first, k] / BETA) for k, p in enumerate(second)))
        assert found == pytest.approx(value, abs=5e-7) and soft == pytest.approx(found, abs=1e-12)
        assert sum(p * r[first, k] for k, p in enumerate(second)) == pytest.approx(mean, abs=5e-7)


def test_partial_sums_are_soft_values_of_any_models():
    """Q_t = beta log E_ref[exp(r / beta) | y_<=t] for every prefix of a random world with end tokens."""
    prm, ref = table("prm"), table("ref")
    rows = ref.space.rows()
    stats = measured(prm, ref, rows)
    log_ref = stats[LogProb(of=("ref",))]
    q = partial_rewards(stats[LogProb(of=("prm",))] - log_ref, rows.mask, 0.3)
    chance = torch.where(rows.mask, log_ref, 0.0).sum(1).exp()
    for i, t in itertools.product(range(len(rows)), range(2)):
        if not bool(rows.mask[i, t]):
            continue
        prompt = rows.prompt_ids[:, 0] == rows.prompt_ids[i, 0]
        same = prompt & (rows.tokens[:, : t + 1] == rows.tokens[i, : t + 1]).all(1)
        value = 0.3 * ((chance * (q[:, -1] / 0.3).exp())[same].sum() / chance[same].sum()).log()
        assert float(value) == pytest.approx(float(q[i, t]), abs=1e-9)


def test_the_aggregates_differ():
    """Q at the ends of steps (.2, -.1, .3): the lowest Q is -.1, the lowest step -.3."""
    steps, there = torch.tensor([[0.2, -0.3, 0.4]]), torch.ones(1, 3, dtype=torch.bool)
    wanted = {
        ("accumulative", "min"): -0.1, ("single", "min"): -0.3, ("accumulative", "sum"): 0.4,
        ("single", "sum"): 0.3, ("accumulative", "last"): 0.3, ("single", "last"): 0.4,
    }  # fmt: skip
    for (reading, aggregate), value in wanted.items():
        assert float(step_score(steps, there, reading, aggregate)) == pytest.approx(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_no_step(dtype):
    """A row of two steps beside one of three, and one without tokens; what stands in the padding does not matter."""
    steps = torch.tensor([[0.5, 0.25, -9.0], [0.5, 0.25, -0.5], [7.0, 7.0, 7.0]], dtype=dtype)
    there = torch.tensor([[True, True, False], [True] * 3, [False] * 3])
    for reading, aggregate, wanted in (
        ("single", "min", [0.25, -0.5, 0.0]), ("single", "sum", [0.75, 0.25, 0.0]),
        ("single", "last", [0.25, -0.5, 0.0]), ("accumulative", "min", [0.5, 0.25, 0.0]),
        ("accumulative", "sum", [1.25, 1.5, 0.0]), ("accumulative", "last", [0.75, 0.25, 0.0]),
    ):  # fmt: skip
        assert step_score(steps, there, reading, aggregate).tolist() == wanted


def rows_of_steps() -> tuple[Rows, Stats]:
    """Token 9 ends a step; log-ratios in halves, garbage in the padding; the second row ends with a separator."""
    tokens = torch.tensor([[1, 9, 2, 3, 9, 4], [1, 2, 9, 0, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    ids = torch.zeros(2, 1, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, tokens, mask, reward=torch.tensor([[1.0], [2.0]]))
    ref = torch.tensor([[-1.0] * 6, [-2.0] * 3 + [5.0] * 3])
    gap = torch.tensor([[0.5, -1.0, 2.0, 0.0, -4.0, 1.0], [1.0, -1.5, -0.5, 7.0, 7.0, 7.0]])
    return rows, Stats({LogProb(of=("prm",)): ref + gap, LogProb(of=("ref",)): ref})


def test_tokens_and_steps_by_hand():
    rows, stats = rows_of_steps()
    token = ImplicitProcessReward(beta=2.0)(rows, stats)
    assert token.token_reward.tolist() == [[1, -2, 4, 0, -8, 2], [2, -3, -1, 0, 0, 0]]
    step = ImplicitProcessReward(beta=2.0, separators=(9,), level="step")(rows, stats)
    assert step.token_reward.tolist() == [[0, -1, 0, 0, -4, 2], [0, 0, -2, 0, 0, 0]]
    assert torch.equal(returns(token), returns(step))
    whole = ImplicitProcessReward(beta=2.0, level="step")(rows, stats)
    assert whole.token_reward.tolist() == [[0, 0, 0, 0, 0, -3], [0, 0, -2, 0, 0, 0]]
    turns = rows.with_(segment=torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 5, 5, 5]]))
    by_turn = ImplicitProcessReward(beta=2.0, level="step")(turns, stats)
    assert by_turn.token_reward.tolist() == [[0, 0, 3, 0, 0, -6], [2, 0, -4, 0, 0, 0]]
    twice = ImplicitProcessReward(beta=2.0)(token, stats)
    assert torch.equal(twice.token_reward, 2 * token.token_reward)


def test_a_separator_off_the_mask_ends_nothing():
    tokens = torch.tensor([[1, 9, 2]])
    mask = torch.tensor([[True, False, True]])
    assert step_of_token(tokens, mask, (9,)).tolist() == [[0, 0, 0]]


def test_q_at_the_last_token_is_the_score():
    rows, stats = rows_of_steps()
    q = partial_rewards(stats[LogProb(of=("prm",))] - stats[LogProb(of=("ref",))], rows.mask, 0.05)
    part = ImplicitScore(reading="accumulative", aggregate="last", separators=(9,))
    assert part(rows, stats).reward[:, 0].tolist() == pytest.approx(q[:, -1].tolist(), abs=1e-7)
    lowest = ImplicitScore(beta=2.0, separators=(9,))(rows, stats).reward[:, 0]
    assert lowest.tolist() == [-4.0, -2.0]
    assert ImplicitScore(beta=2.0, separators=(9,), aggregate="sum")(rows, stats).reward.tolist() == [[-3.0], [-2.0]]


def test_more_padding_changes_nothing():
    rows, stats = rows_of_steps()
    wide = rows.padded(3, 9)
    more = Stats({f: torch.nn.functional.pad(v, (0, 3), value=float("nan")) for f, v in stats.items()})
    for part in (ImplicitProcessReward(separators=(9,), level="step"), ImplicitProcessReward()):
        found = part(wide, more).token_reward
        assert torch.equal(found[:, :6], part(rows, stats).token_reward) and not found[:, 6:].any()
    assert torch.equal(ImplicitScore()(wide, more).reward, ImplicitScore()(rows, stats).reward)


def test_bf16_statistics():
    rows, stats = rows_of_steps()
    narrow = Stats({f: v.bfloat16() for f, v in stats.items()})
    found = ImplicitProcessReward(beta=2.0)(rows, narrow).token_reward
    assert found.float().tolist() == ImplicitProcessReward(beta=2.0)(rows, stats).token_reward.tolist()


def test_votes():
    """sigmoid(0) = .5 twice beats sigmoid(1) = .731; no answer has no vote; ties go to the first."""
    best, votes = weighted_vote(["4", "5", "4", None], [0.0, 1.0, 0.0, 9.0])
    assert best == "4" and votes == {"4": pytest.approx(1.0), "5": pytest.approx(0.731059, abs=5e-7)}
    assert weighted_vote(["5", "4"], [0.0, 0.0])[0] == "5"
    assert weighted_vote([None], [1.0])[0] is None and weighted_vote([], [])[0] is None
    with pytest.raises(ValueError, match="2 scores for 1"):
        weighted_vote(["4"], [0.0, 1.0])


@pytest.mark.parametrize(("label", "value"), [(1.0, 0.598139), (0.0, 0.798139)])
def test_the_loss_of_one_response(label, value):
    """Log-ratio 4 at beta .05: r = .2."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0, label=torch.tensor([label]))
    live = torch.tensor([[-1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    stats = Stats({LogProb(): live, LogProb(of=("ref",)): torch.tensor([[-2.0, -2.0]], dtype=torch.float64)})
    method = recipe_named("implicit_prm")()
    assert method.reads == "labels"
    loss = method.loss(rows, stats, method.initial_states())
    assert float(loss.detach()) == pytest.approx(value, abs=5e-7)
    loss.backward()
    slope = 0.05 * (torch.sigmoid(torch.tensor(0.2, dtype=torch.float64)) - label)
    assert live.grad.flatten().tolist() == pytest.approx([float(slope)] * 2, abs=1e-12)


@pytest.mark.parametrize(("loss", "reads"), [("ce", "labels"), ("kto", "labels"), ("dpo", "pairs"), ("nca", "pairs")])
def test_the_same_score_in_other_links(loss, reads):
    method = recipe_named("implicit_prm")(loss=loss)
    assert method.reads == reads and method.terms["outcome"].beta == 0.05
    assert method.terms["outcome"].score == recipe_named("implicit_prm")().terms["outcome"].score


# -- in an online method ---------------------------------------------------------------------------------------------


def test_a_coefficient_of_0_is_grpo_and_no_model_is_an_error():
    prm = recipe_named("grpo_implicit_prm")
    assert prm(prm_beta=0.0) == recipe_named("grpo")()
    method = prm(prm="runs/prm", beta=0.1)
    assert set(method.models) == {"ref", "prm", "prm_reference"}
    from keel.train.setup import prepare_setup

    with pytest.raises(ConfigError, match="no model is named"):
        prepare_setup(
            "grpo_implicit_prm", None, None, "countdown", None, None, seed=0, name=None, config=None, settings={}
        )


def test_to_go_by_hand():
    """Two completions, rewards 1 and 0, token rewards (1, 2, 4) and (3, 1): what comes from each token on."""
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    token = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 9.0]])
    group = torch.zeros(2, dtype=torch.long)
    rows = Rows.build(
        ids[:, :1], ids[:, :1] == 0, ids, mask, group=group, token_reward=token, reward=torch.tensor([[1.0], [0.0]])
    )
    # to go: (7, 6, 4) and (4, 1, -); means (5.5, 3.5, 2); outcomes .5 and -.5
    assert CentredToGo()(rows, Stats()).advantage.tolist() == [[2.0, 3.0, 2.5], [-2.0, -3.0, 0.0]]
    plain = rows.with_(token_reward=None)
    assert torch.equal(CentredToGo()(plain, Stats()).advantage, GroupCentre()(plain, Stats()).advantage)
    unscored = rows.with_(reward=torch.tensor([[1.0], [float("nan")]]))
    assert not CentredToGo()(unscored, Stats()).advantage.any()


def test_to_go_has_the_gradient_of_the_sum():
    """Over many samples E[A_t grad log pi_t] is the gradient of E[R + sum of token rewards]."""
    space = SequenceSpace(vocab=2, horizon=2)
    policy = from_probs([0.6, 0.4], [0.5, 0.5], [0.3, 0.7], space=space)
    rows = sample(policy, 10_000, seed=5)
    token = torch.stack([rows.tokens[:, 0] * 1.0, rows.tokens[:, 1] * 2.0 - rows.tokens[:, 0]], 1).double()
    rows = rows.with_(reward=(rows.tokens.sum(1) == 1).double()[:, None], token_reward=token)
    advantage = CentredToGo()(rows, Stats()).advantage
    found = _gradient(policy, rows, (advantage * rows.mask))
    whole = returns(rows)[:, None].expand_as(advantage)
    assert found == pytest.approx(_gradient(policy, rows, whole - whole.mean()), abs=0.04)
    assert max(map(abs, found)) > 0.1


def _gradient(policy, rows, weight) -> list[float]:
    policy.table.grad = None
    at = policy.space.prefix_index(rows.tokens)
    logp = policy.table[rows.prompt_ids[:, 0]][torch.arange(len(rows))[:, None], at].log_softmax(-1)
    chosen = logp.gather(-1, rows.tokens[..., None])[..., 0]
    ((weight * chosen).sum() / len(rows)).backward()
    return policy.table.grad.flatten().tolist()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ImplicitProcessReward(beta=0.0), "beta"),
        (lambda: ImplicitProcessReward(prm="ref"), "both"),
        (lambda: ImplicitProcessReward(level="word"), "level"),
        (lambda: ImplicitScore(aggregate="max"), "aggregate"),
        (lambda: ImplicitScore(reading="all"), "reading"),
    ],
)
def test_bad_settings(make, named):
    with pytest.raises((ValueError, TypeError)):
        make()


def test_steps_of_a_batch_without_tokens():
    nothing = torch.zeros(2, 3)
    earned, there = step_rewards(nothing, nothing > 0, nothing.long())
    assert not earned.any() and not there.any() and step_score(earned, there).tolist() == [0.0, 0.0]
