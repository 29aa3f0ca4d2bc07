"""Advantage estimators against numbers worked out by hand."""

import math
from typing import cast

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_rows

from keel.core.aggregate import Groups
from keel.core.rows import Rows, Stream, cat
from keel.parts.advantages.group import (
    BatchCentre,
    GreedyBaseline,
    GroupCentre,
    GroupStd,
    LeaveOneOut,
    Returns,
)
from keel.parts.advantages.stream import GAE, RewardToGo, RunningBaseline, Whiten, discounted_sum, next_counted
from keel.statistics.functionals import Value
from keel.statistics.stats import Stats

NONE = Stats()
THIRD = 1 / 3
ESTIMATORS = {
    "reinforce": ([Returns()], [1, 0, 0, 1, 0, 0, 0, 1]),
    "reward to go": ([RewardToGo()], [1, 0, 0, 1, 0, 0, 0, 1]),
    "batch": ([BatchCentre()], [0.625, -0.375, -0.375, 0.625, -0.375, -0.375, -0.375, 0.625]),
    "reinforce++": (
        [RewardToGo(), Whiten()],
        [1.688194, -0.562731, -0.562731, 1.688194, -0.562731, -0.562731, -0.562731, 1.688194],
    ),
    "reinforce++ baseline": (
        [GroupCentre(), Whiten()],
        [1.496852, -0.898111, -0.898111, 1.496852, -0.299370, -0.299370, -0.299370, 2.095593],
    ),
    "rloo": ([LeaveOneOut()], [2 * THIRD, -2 * THIRD, -2 * THIRD, 2 * THIRD, -THIRD, -THIRD, -THIRD, 1]),
    "dr_grpo": ([GroupCentre()], [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75]),
    "grpo 1e-6": (
        [GroupCentre(), GroupStd(1e-6)],
        [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997],
    ),
    "grpo 1e-4": (
        [GroupCentre(), GroupStd(1e-4)],
        [0.865875, -0.865875, -0.865875, 0.865875, -0.499900, -0.499900, -0.499900, 1.499700],
    ),
    "grpo batch std": (
        [GroupCentre(), GroupStd(1e-4, "batch")],
        [0.965905, -0.965905, -0.965905, 0.965905, -0.482953, -0.482953, -0.482953, 1.448858],
    ),
}


def advantage(chain, rows: Rows) -> torch.Tensor:
    for part in chain:
        rows = part(rows, NONE)
    return cast(torch.Tensor, rows.advantage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_k8(name, dtype):
    chain, wanted = ESTIMATORS[name]
    found = advantage(chain, k8_rows(dtype))
    assert found.dtype == dtype
    wanted = torch.tensor(wanted, dtype=torch.float64)[:, None] * MASK
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=ALIKE if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_are_reduced_by_id_not_by_position(name):
    chain, wanted = ESTIMATORS[name]
    order = torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])
    rows = k8_rows().with_(group=17 - 4 * k8_rows().group).select(order)
    torch.testing.assert_close(advantage(chain, rows)[:, 0], torch.tensor(wanted).double()[order], rtol=0, atol=ALIKE)


def test_greedy_baseline_on_k8():
    greedy = k8_rows().select(torch.tensor([2, 6]))
    reward = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    greedy = greedy.with_(reward=reward, stream=torch.full((2,), int(Stream.BASELINE)))
    found = advantage([GreedyBaseline()], cat([greedy, k8_rows()]))
    wanted = torch.tensor([0, 0, 0, -1, -1, 0, 0, 0, 0, 1]).double()
    assert torch.equal(found[:, 0], wanted)
    with pytest.raises(ValueError, match=r"rollout\.greedy_baseline"):
        GreedyBaseline()(cat([greedy.select(torch.tensor([0])), k8_rows()]), NONE)


@pytest.mark.parametrize("chain", [[GroupCentre(), GroupStd()], [LeaveOneOut()], [GroupCentre()]], ids=str)
def test_no_baseline_row_counts_in_its_group(chain):
    greedy = k8_rows().select(torch.tensor([2, 6]))
    greedy = greedy.with_(reward=9 + greedy.reward, stream=torch.full((2,), int(Stream.BASELINE)))
    found = advantage(chain, cat([k8_rows(), greedy]))[:8]
    assert torch.equal(found, advantage(chain, k8_rows()))


ESTIMATE = pytest.mark.parametrize(
    "chain",
    [[GroupCentre()], [GroupCentre(), GroupStd(0.0)], [GroupCentre(), GroupStd(0.0, "batch")], [LeaveOneOut()]],
    ids=["centre", "grpo", "grpo batch", "rloo"],
)


@ESTIMATE
def test_tied_groups_have_exactly_no_advantage(chain):
    """Though ten times 0.1, divided by ten, is not 0.1 in fp32."""
    rows = k8_rows().select(torch.arange(20) % 8)
    rows = rows.with_(reward=torch.tensor([[0.1]] * 10 + [[0.7]] * 10), group=torch.arange(20) // 10)
    groups = Groups.of(rows)
    assert bool((rows.reward[:, 0] - groups.broadcast(groups.mean(rows.reward[:, 0]))).any())
    assert torch.equal(advantage(chain, rows), torch.zeros(20, 4))


@ESTIMATE
def test_single_members_have_no_advantage(chain):
    rows = k8_rows().with_(group=torch.arange(8))
    assert torch.equal(advantage(chain, rows), torch.zeros(8, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unscored_rows_are_left_out(name):
    chain, _ = ESTIMATORS[name]
    unscored = k8_rows().select(torch.tensor([1, 5]))
    unscored = unscored.with_(reward=torch.full((2, 1), torch.nan, dtype=torch.float64))
    found = advantage(chain, cat([k8_rows(), unscored]))
    assert torch.equal(found[8:], torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(found[:8], advantage(chain, k8_rows()), rtol=1e-12, atol=1e-12)


def test_a_group_without_any_score():
    rows = k8_rows()
    reward = torch.where(rows.group[:, None] == 0, torch.nan, rows.reward)
    for chain, _ in ESTIMATORS.values():
        found = advantage(chain, rows.with_(reward=reward))
        assert not found[:4].any() and bool(torch.isfinite(found).all())


def test_token_rewards_count_in_the_return():
    rows = k8_rows()
    penalty = torch.where(MASK, -0.25, 7.0).double()
    found = advantage([Returns()], rows.with_(token_reward=penalty))
    assert found[:, 0].tolist() == [0.25, -1.0, -0.5, 0.75, -0.5, -1.0, -0.75, 0.75]
    to_go = advantage([RewardToGo()], rows.with_(token_reward=penalty))
    assert to_go[1].tolist() == [-1.0, -0.75, -0.5, -0.25]
    assert to_go[0].tolist() == [0.25, 0.5, 0.75, 0.0]
    halved = advantage([RewardToGo(0.5)], rows.with_(token_reward=penalty))
    assert halved[0].tolist() == [-0.25 - 0.125 + 0.25 * 0.75, -0.25 + 0.5 * 0.75, 0.75, 0.0]


def test_group_std_needs_an_advantage_before_it():
    with pytest.raises(ValueError, match="group_centre"):
        GroupStd()(k8_rows(), NONE)


# -- generalised advantage estimation --------------------------------------------------------------------------------

GAE_VECTORS = {
    1.0: ([0.8, 0.5, 0.6], [1.0, 1.0, 1.0]),
    0.95: ([0.7465, 0.47, 0.6], [0.9465, 0.97, 1.0]),
    0.0: ([0.3, -0.1, 0.6], [0.5, 0.4, 1.0]),
}


def gae_rows(values: list[float], mask: list[bool]) -> tuple[Rows, Stats]:
    width = len(mask)
    shown = torch.tensor([mask])
    ids = torch.zeros(1, width, dtype=torch.long)
    rows = Rows.build(ids[:, :1], ids[:, :1] == 0, ids, shown, reward=torch.ones(1, 1, dtype=torch.float64))
    return rows, Stats({Value("value", of=("old",)): torch.tensor([values], dtype=torch.float64)})


@pytest.mark.parametrize("lam", GAE_VECTORS)
def test_gae(lam):
    wanted, returns = GAE_VECTORS[lam]
    rows, stats = gae_rows([0.2, 0.5, 0.4, 7.0], [True, True, True, False])
    found = GAE(1.0, lam)(rows, stats)
    assert found.advantage[0].tolist() == pytest.approx([*wanted, 0.0], abs=1e-12)
    assert found.columns["returns"][0].tolist() == pytest.approx([*returns, 0.0], abs=1e-12)
    assert found.columns["values"][0].tolist() == [0.2, 0.5, 0.4, 0.0]


@pytest.mark.parametrize("lam", GAE_VECTORS)
def test_gae_skips_what_no_model_chose(lam):
    wanted, returns = GAE_VECTORS[lam]
    rows, stats = gae_rows([0.2, 9.0, 9.0, 0.5, 0.4, 9.0], [True, False, False, True, True, False])
    found = GAE(1.0, lam)(rows, stats)
    kept = rows.mask[0]
    assert found.advantage[0, kept].tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.columns["returns"][0, kept].tolist() == pytest.approx(returns, abs=1e-12)
    assert not found.advantage[0, ~kept].any()


def test_gae_of_a_completion_without_a_reward():
    """It has no advantage, and returns that tell the critic what it says already; a penalty in its tokens included."""
    rows, stats = gae_rows([0.2, 0.5, 0.4, 7.0], [True, True, True, False])
    unscored = rows.with_(reward=torch.full((1, 1), torch.nan).double(), token_reward=torch.full((1, 4), -0.1).double())
    for lam in GAE_VECTORS:
        found = GAE(1.0, lam)(unscored, stats)
        assert not found.advantage.any()
        assert found.columns["returns"][0].tolist() == found.columns["values"][0].tolist() == [0.2, 0.5, 0.4, 0.0]


def test_gae_with_discount():
    """delta = (0.45 - 0.2, 0.36 - 0.5, 0.6), trace 0.45: the sum written out."""
    rows, stats = gae_rows([0.2, 0.5, 0.4], [True, True, True])
    found = GAE(0.9, 0.5)(rows, stats).advantage[0].tolist()
    assert found == pytest.approx([0.25 + 0.45 * -0.14 + 0.45**2 * 0.6, -0.14 + 0.45 * 0.6, 0.6], abs=1e-12)


def test_discounted_sum_over_long_rows():
    values = torch.ones(1, 37, dtype=torch.float64)
    mask = torch.ones(1, 37, dtype=torch.bool)
    found = discounted_sum(values, mask, 0.9)[0]
    wanted = [(1 - 0.9 ** (37 - t)) / 0.1 for t in range(37)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_next_counted():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, True, False]])
    assert next_counted(values, mask).tolist() == [[3.0, 3.0, 0.0, 0.0]]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_running_baseline():
    """Means 0.375, then 0.75, decay 0.9: b = 0.375, then 0.375, then 0.4125."""
    part = RunningBaseline(0.9)
    first = k8_rows()
    second = first.with_(reward=2 * first.reward)
    state = part.init()
    assert torch.equal(part(first, NONE, state).advantage, BatchCentre()(first, NONE).advantage)
    state = part.observe(first, NONE, {}, state)
    assert part(second, NONE, state).advantage[0, 0] == 2 - 0.375
    state = part.observe(second, NONE, {}, state)
    assert float(part(first, NONE, state).advantage[0, 0]) == pytest.approx(1 - 0.4125, abs=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GroupStd(-1e-9),
        lambda: RewardToGo(1.1),
        lambda: RunningBaseline(-0.1),
        lambda: GAE(gamma=1.5),
        lambda: GAE(lam=-1.0),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_whitening_without_centre_keeps_the_mean():
    """Advantages (1, 3) once each: variance 2, so (1, 3) / sqrt 2."""
    rows = k8_rows().select(torch.tensor([3, 7])).with_(reward=torch.tensor([[1.0], [3.0]]).double())
    found = advantage([Returns(), Whiten(centre=False)], rows)[:, 0]
    assert found.tolist() == pytest.approx([1 / math.sqrt(2), 3 / math.sqrt(2)], abs=1e-7)
