"""Windows of high entropy, bonuses by difficulty, and a KL that follows a target for each."""

import math

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows, k8_stats

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.parts.rewards.window_entropy import ExplorationReward, difficulty_of, window_means
from keel.parts.terms.by_difficulty import KLByDifficulty
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats

DIGITS = 5.1e-7
ENTROPY, OLD, REF = Entropy(of=("old",)), LogProb(of=("old",)), LogProb(of=("ref",))
H = [0.1, 0.2, 1.5, 0.3, 0.05, 0.9, 0.4, 0.2]


def test_windows():
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])
    mean, whole = window_means(torch.tensor([H, H], dtype=torch.float64), mask, 4)
    assert mean[0, :4].tolist() == pytest.approx([0.5125, 0.6875, 0.4125, 0.3875])
    assert whole[0].tolist() == [True] * 4 + [False] * 4 and not whole[1].any()
    gap = torch.tensor([[True, False] * 8])  # tool output between all tokens
    wide = torch.full((1, 16), 7.0, dtype=torch.float64)
    wide[0, ::2] = torch.tensor(H, dtype=torch.float64)
    again, there = window_means(wide, gap, 4)
    assert torch.equal(there[0, ::2], whole[0]) and not there[0, 1::2].any()
    torch.testing.assert_close(again[0, ::2], mean[0])


@pytest.mark.parametrize(
    ("level", "count", "right", "wanted"),
    [
        (0, 10, True, 1.0),
        (0, 14, True, 0.785714),
        (0, 6, True, 1.0),
        (1, 14, True, 0.965909),
        (1, 6, True, 0.965909),
        (2, 14, True, 1.554485),
        (2, 4, True, 0.968750),
        (0, 14, False, 0.233190),
        (1, 14, False, 0.258263),
        (2, 14, False, 0.324942),
    ],
)
def test_bonus(level, count, right, wanted):
    found = ExplorationReward().bonus(
        torch.tensor([count]).double(), torch.tensor([10.0]).double(), torch.tensor([level]), torch.tensor([right])
    )
    assert float(right + found) == pytest.approx(wanted, abs=DIGITS)


def test_difficulty():
    found = difficulty_of(torch.tensor([1.0, 2 / 3, 0.6, 1 / 3, 0.3, 0.0]))
    assert found.tolist() == [0, 0, 1, 1, 2, 2]


def batch() -> tuple[Rows, Stats]:
    """An easy prompt and a hard one, four tokens, windows of one; n = 3 0 1 2 for each at an edge of .5."""
    ids = torch.tensor([[5, 5, 5, 6]] * 8)
    mask = torch.ones(8, 4, dtype=torch.bool)
    high = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]] * 2).double()
    reward = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.float64)[:, None]
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask, group=torch.arange(8) // 4, reward=reward)
    return rows.with_(weight=torch.ones(8, dtype=torch.float64)), Stats({ENTROPY: high})


def test_rewards_of_a_batch():
    """n* is round(1.5) = 2 in both; margins 1."""
    part = ExplorationReward(window=1, edge=0.5)
    found = part(*batch(), part.init())
    assert part.windows(*batch(), torch.tensor(0.5)).tolist() == [3, 0, 1, 2] * 2
    assert found.columns["difficulty"].tolist() == [0] * 4 + [2] * 4

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    wanted = [1, 1, 1, 0.3 * s(0), 0.6 * s(0), 0.6 * s(0), 0.6 * s(0), 1 + 0.6 * s(1 / 3)]
    assert found.reward[:, 0].tolist() == pytest.approx(wanted)
    assert part(*batch(), {"edge": torch.tensor(9.0)}).reward[0, 0] == 1  # without windows all are as wanted
    none = ExplorationReward((6,), window=1, edge=0.5)
    assert none.windows(*batch(), torch.tensor(0.5)).tolist() == [0] * 8  # the only trigger ends the text
    assert ExplorationReward((5,), window=1, edge=0.5).windows(*batch(), torch.tensor(0.5)).tolist() == [3, 0, 1, 2] * 2


def test_the_edge_is_that_of_the_first_batch():
    """The 95% quantile of a row of three windows is their largest: 1, 0, 1, 1."""
    part = ExplorationReward(window=1)
    rows, stats = batch()
    state = part.observe(rows, stats, {}, part.init())
    assert float(state["edge"]) == pytest.approx(0.75)
    later = part.observe(rows, Stats({ENTROPY: 3 * stats[ENTROPY]}), {}, state)
    assert float(later["edge"]) == pytest.approx(0.75)
    assert torch.equal(part(rows, stats, part.init()).reward, part(rows, stats, state).reward)


def test_a_batch_without_windows_sets_no_edge():
    """None of four tokens is followed by nine; nothing counts there, and the edge is that of the next batch."""
    rows, stats = batch()
    part = ExplorationReward(window=9)
    assert part(rows, stats, part.init()).reward[0, 0] == 1
    state = part.observe(rows, stats, {}, part.init())
    assert math.isnan(state["edge"])
    later = ExplorationReward(window=1)
    assert float(later.observe(rows, stats, {}, state)["edge"]) == pytest.approx(0.75)


def test_low_precision():
    rows, stats = batch()
    part = ExplorationReward(window=1, edge=0.5)
    for dtype in (torch.float32, torch.bfloat16):
        low = part(rows.with_(reward=rows.reward.float()), Stats({ENTROPY: stats[ENTROPY].to(dtype)}), part.init())
        torch.testing.assert_close(low.reward.double(), part(rows, stats, part.init()).reward, rtol=0, atol=1e-6)


# -- a KL for each difficulty ----------------------------------------------------------------------------------------


def with_reference(gap: float = 0.1) -> Stats:
    stats = k8_stats()
    return stats.merged({REF: stats[OLD] - gap})


def test_coefficients_by_difficulty():
    """At 1 it is k3; doubled on the hard prompt, that half of it is."""
    level = torch.tensor([0.0] * 4 + [2.0] * 4)
    rows, stats = k8_rows().with_(columns={"difficulty": level}), with_reference()
    part = KLByDifficulty(0.5)
    state = part.init()
    d = stats[LogProb()].detach() - stats[REF]
    k3 = torch.where(MASK, torch.expm1(-d) + d, 0.0)
    assert float(part(rows, stats, state).detach()) == pytest.approx(0.5 * float(k3.sum()) / 20)
    state["log_beta"][2] = math.log(2.0)
    loss = part(rows, stats, state)
    assert float(loss.detach()) == pytest.approx(0.5 * float(k3[:4].sum() + 2 * k3[4:].sum()) / 20, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, stats[LogProb()])
    wanted = 0.5 * -torch.expm1(-d) * torch.tensor([1.0] * 4 + [2.0] * 4)[:, None] * MASK / 20
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-9)
    whole = KLByDifficulty(0.5, aggregation=Aggregation("sequence_mean_token_sum"))(k8_rows(), stats, part.init())
    assert float(whole.detach()) == pytest.approx(0.5 * float(k3.sum()) / 8)


def test_the_controller():
    part = KLByDifficulty(target=0.01, every=1)
    state = {**part.init(), "error": torch.tensor([0.03, 0.03, 0.03])}
    assert part.averaged(0.03, 0.01) == pytest.approx(0.97 * 0.03)  # inside the dead zone
    assert part.averaged(0.0, 1.0) == pytest.approx(0.03 * 99) and part.averaged(0.0, 0.0) == pytest.approx(-0.03)
    assert math.exp(0.05 * 0.03) == pytest.approx(1.001501, abs=DIGITS)
    rows = k8_rows().with_(columns={"difficulty": torch.tensor([0] * 4 + [2] * 4)})
    metrics: dict = {}
    after = part.observe(rows, with_reference(1.0), metrics, state)
    wanted = 0.97 * 0.03 + 0.03 * (math.exp(-1) / 0.01 - 1)  # k3 is e^-1; beyond the clip
    assert after["error"].tolist() == pytest.approx([wanted, 0.03, wanted])
    assert after["log_beta"].tolist() == pytest.approx([0.05 * 0.2, 0.05 * 0.03, 0.05 * 0.2])
    assert metrics["kl_by_difficulty/1"] == pytest.approx(1.001501, abs=1e-6)
    rare = KLByDifficulty(every=2).observe(rows, with_reference(1.0), {}, state)
    assert rare["batches"] == 1 and not rare["log_beta"].any()
    off = KLByDifficulty(target=None, every=1)
    assert off.observe(rows, with_reference(), {}, state) is state


def test_ares_keeps_the_aggregation():
    method = recipe_named("ares")(aggregation="constant", max_completion_length=9)
    assert method.terms["kl_by_difficulty"].aggregation == method.aggregation == Aggregation("constant", 9)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ExplorationReward(window=0), "window"),
        (lambda: ExplorationReward(alpha=-1.0), "alpha"),
        (lambda: ExplorationReward(k=(0.0, 1.0, 1.0)), "k must"),
        (lambda: KLByDifficulty(-1.0), "coef"),
        (lambda: KLByDifficulty(target=0.0), "target"),
        (lambda: KLByDifficulty(decay=1.0), "decay"),
        (lambda: KLByDifficulty(every=0), "every"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
