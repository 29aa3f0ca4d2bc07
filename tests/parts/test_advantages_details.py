"""Corners of advantages: rows beside the main stream, uneven groups, rows without tokens."""

import pytest
import torch
from tests.parts.k8 import k8_rows

from keel.core.rows import Rows, Stream, cat
from keel.parts.advantages.group import BatchCentre, GreedyBaseline, GroupCentre, GroupStd, LeaveOneOut, Returns
from keel.parts.advantages.stream import GAE, RewardToGo, RunningBaseline, Whiten, discounted_sum, reward_stream
from keel.statistics.functionals import Value
from keel.statistics.stats import Stats

NONE = Stats()
BASELINE, REGULARISER = int(Stream.BASELINE), int(Stream.REGULARISER)


def rows_of(mask: list[list[bool]], reward: list[float], **known) -> Rows:
    shown = torch.tensor(mask, dtype=torch.bool)
    ids = torch.zeros(shown.shape, dtype=torch.long)
    first = torch.zeros(len(mask), 1, dtype=torch.long)
    column = torch.tensor(reward, dtype=torch.float64)[:, None]
    return Rows.build(first, first == 0, ids, shown, reward=column, **known)


def beside(rows: Rows, stream: int) -> Rows:
    """The rows, and two of them again in another stream with a much larger reward."""
    more = rows.select(torch.tensor([2, 6]))
    return cat([rows, more.with_(reward=9 + more.reward, stream=torch.full((2,), stream))])


@pytest.mark.parametrize("stream", [BASELINE, REGULARISER])
@pytest.mark.parametrize("chain", [[BatchCentre()], [GroupCentre(), GroupStd(scope="batch")]], ids=str)
def test_statistics_of_the_batch_are_those_of_the_main_stream(chain, stream):
    def found(rows: Rows) -> torch.Tensor:
        for part in chain:
            rows = part(rows, NONE)
        return rows.advantage

    torch.testing.assert_close(found(beside(k8_rows(), stream))[:8], found(k8_rows()), rtol=1e-12, atol=1e-12)


def test_rows_beside_the_main_stream_have_their_own_return():
    """A part that reads them sees it on the tokens that a model chose."""
    found = Returns()(beside(k8_rows(), BASELINE), NONE).advantage
    assert found[8].tolist() == [9.0, 9.0, 0.0, 0.0] and found[9].tolist() == [9.0, 9.0, 9.0, 0.0]


def test_only_the_main_stream_is_compared_with_the_greedy_completion():
    greedy = k8_rows().select(torch.tensor([2, 6])).with_(stream=torch.full((2,), BASELINE))
    apart = k8_rows().select(torch.tensor([0, 7])).with_(stream=torch.full((2,), REGULARISER))
    found = GreedyBaseline()(cat([k8_rows(), greedy, apart]), NONE).advantage
    assert not found[8:].any() and found[:8, 0].tolist() == k8_rows().reward[:, 0].tolist()


def test_leaving_one_out_of_an_uneven_group():
    """Weights 3 and 1 of 0 and 1: 1.6 rows, mean 1 / 4, so (-1 / 4, 3 / 4) * 1.6 / 0.6."""
    rows = rows_of([[True], [True]], [0.0, 1.0], group=torch.zeros(2, dtype=torch.long))
    found = LeaveOneOut()(rows.with_(weight=torch.tensor([3.0, 1.0], dtype=torch.float64)), NONE).advantage
    assert found[:, 0].tolist() == pytest.approx([-2 / 3, 2.0])


# -- streams of token rewards ----------------------------------------------------------------------------------------


def test_a_stream_of_rewards():
    """The reward stands on the last counted token, in every stream of rows; off the mask there is nothing."""
    mask = [[True, False, True, False], [True, True, False, False], [False] * 4]
    rows = rows_of(mask, [1.0, 2.0, 4.0], stream=torch.tensor([0, BASELINE, 0]))
    assert reward_stream(rows).tolist() == [[0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    within = reward_stream(rows.with_(token_reward=torch.full((3, 4), 0.5, dtype=torch.float64)))
    assert within.tolist() == [[0.5, 0, 1.5, 0], [0.5, 2.5, 0, 0], [0, 0, 0, 0]]


def test_rewards_to_go_beside_the_main_stream():
    rows = rows_of([[True, True, False]], [1.0], stream=torch.tensor([BASELINE]))
    assert RewardToGo(0.5)(rows, NONE).advantage.tolist() == [[0.5, 1.0, 0.0]]


def test_rows_without_any_column_of_tokens():
    rows = rows_of([[], []], [1.0, 2.0])
    assert reward_stream(rows).tolist() == RewardToGo()(rows, NONE).advantage.tolist() == [[], []]


def test_sums_over_a_gap():
    """1 + 0.5 * (4 + 0.5 * 8) where the position between is skipped, whatever stands there."""
    values = torch.tensor([[1.0, 100.0, 4.0, 8.0]])
    mask = torch.tensor([[True, False, True, True]])
    assert discounted_sum(values, mask, 0.5).tolist() == [[5.0, 0.0, 8.0, 8.0]]
    assert discounted_sum(values, mask, 0.0).tolist() == [[1.0, 0.0, 4.0, 8.0]]


def test_values_of_rows_beside_the_main_stream():
    """delta = (0.5 - 0.25, 1 - 0.5), gamma = lam = 1; the value after the end is 0."""
    rows = rows_of([[True, True, False]], [1.0], stream=torch.tensor([BASELINE]))
    stats = Stats({Value("value", of=("old",)): torch.tensor([[0.25, 0.5, 7.0]], dtype=torch.float64)})
    found = GAE(1.0, 1.0)(rows, stats)
    assert found.advantage.tolist() == [[0.75, 0.5, 0.0]]
    assert found.columns["values"].tolist() == [[0.25, 0.5, 0.0]]
    assert found.columns["returns"].tolist() == [[1.0, 1.0, 0.0]]


# -- whitening and running baselines ---------------------------------------------------------------------------------


def test_whitening_adds_epsilon_to_the_variance():
    """(1, 3): variance 2, and 2 more, so (-1, 1) / 2."""
    rows = rows_of([[True], [True]], [0.0, 0.0]).with_(advantage=torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    assert Whiten(epsilon=2.0)(rows, NONE).advantage.tolist() == [[-0.5], [0.5]]


@pytest.mark.parametrize("reward", [None, torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])], ids=["none", "partly"])
def test_whitening_counts_rows_that_are_scored_in_part_or_not_by_rewards(reward):
    rows = rows_of([[True], [True]], [0.0, 0.0]).with_(advantage=torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    found = Whiten(epsilon=0.0)(rows.with_(reward=reward), NONE).advantage
    assert found[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_a_running_baseline_is_over_scored_rows_of_the_main_stream():
    """1 and 3 count, an unscored row and a greedy one do not: baseline 2."""
    stream = torch.tensor([0, 0, 0, BASELINE])
    rows = rows_of([[True]] * 4, [1.0, 3.0, torch.nan, 50.0], stream=stream)
    part = RunningBaseline(0.5)
    assert part(rows, NONE, part.init()).advantage[:3, 0].tolist() == [-1.0, 1.0, 0.0]
    state = part.observe(rows, NONE, {}, part.init())
    assert float(state["mean"]) == 2.0
