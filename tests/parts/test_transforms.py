"""Reward transforms against numbers worked out by hand."""

import math

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows

from keel.core.rows import Rows, Stream
from keel.parts.rewards.transforms import ClipReward, KLInReward, Overlong, WeightedSum, WhitenReward
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

NONE = Stats()
NAN = math.nan


def columns(*values: list[float]) -> Rows:
    """Rows with one reward column for each argument."""
    reward = torch.tensor(values, dtype=torch.float64).T
    ids = torch.zeros(len(reward), 1, dtype=torch.long)
    return Rows.build(ids, ids == 0, ids, ids == 0, reward=reward)


def test_overlong_on_k8():
    found = Overlong(4, 2)(k8_rows(), NONE).reward
    assert found[:, 0].tolist() == [0.5, -1, 0, 1, 0, -1, -0.5, 1]


def test_overlong_beyond_the_limit():
    found = Overlong(3, 1)(k8_rows(), NONE).reward - k8_rows().reward
    assert found[:, 0].tolist() == [-1, -1, 0, 0, 0, -1, -1, 0]
    for bad in ((4, 0), (4, 5)):
        with pytest.raises(ValueError, match="cache"):
            Overlong(*bad)


def test_dapo_punishes_length_once_however_many_rewards_there_are():
    rows = k8_rows().with_(reward=k8_rows().reward * torch.tensor([1.0, 0.5]))
    method = recipe_named("dapo")(num_generations=4, max_completion_length=4, overlong_cache=2)
    found = method.prepare(rows, NONE, {}).reward
    assert found[:, 0].tolist() == [1.0, -1, 0, 1.5, 0, -1, -0.5, 1.5]


def test_weighted_sum_leaves_out_what_does_not_apply():
    rows = columns([1.0, NAN, NAN], [10.0, 20.0, NAN])
    plain = WeightedSum()(rows, NONE).reward
    assert plain[:2, 0].tolist() == [11.0, 20.0] and bool(plain[2].isnan())
    weighted = WeightedSum((2.0, -0.5))(rows, NONE).reward
    assert weighted[:2, 0].tolist() == [-3.0, -10.0] and bool(weighted[2].isnan())
    with pytest.raises(ValueError, match="3 weights for 2 reward columns"):
        WeightedSum((1.0, 1.0, 1.0))(rows, NONE)


def test_clip():
    found = ClipReward(-1.0, 2.0)(columns([-3.0, 0.5, NAN], [5.0, 2.0, 0.0]), NONE).reward
    assert found[:, 1].tolist() == [2.0, 2.0, 0.0]
    assert found[:2, 0].tolist() == [-1.0, 0.5] and bool(found[2, 0].isnan())
    with pytest.raises(ValueError, match="above"):
        ClipReward(1.0, 0.0)


def test_whitening_each_column():
    """Column one: 1, 3 (the third does not apply), mean 2, variance 2; column two: 0, 2, 4, mean 2, variance 4."""
    rows = columns([1.0, 3.0, NAN], [0.0, 2.0, 4.0])
    found = WhitenReward(epsilon=0.0)(rows, NONE).reward
    assert found[:2, 0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert bool(found[2, 0].isnan())
    assert found[:, 1].tolist() == [-1.0, 0.0, 1.0]
    scaled = WhitenReward(centre=False, epsilon=0.0)(rows, NONE).reward
    assert scaled[:, 1].tolist() == [0.0, 1.0, 2.0]


def test_whitening_is_over_main_rows():
    rows = columns([0.0, 2.0, 100.0]).with_(stream=torch.tensor([0, 0, int(Stream.BASELINE)]))
    found = WhitenReward(epsilon=0.0)(rows, NONE).reward
    assert found[:2, 0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.3), ("k2", 0.045), ("k3", 0.040818)])
def test_kl_in_the_reward(kind, value):
    """-0.5 k(0.3) at each token, on top of what is there, nothing off the mask."""
    rows = k8_rows().with_(token_reward=torch.ones(8, 4, dtype=torch.float64) * MASK)
    old = torch.where(MASK, -1.0, 7.0).double()
    stats = Stats({LogProb(of=("old",)): old, LogProb(of=("ref",)): torch.where(MASK, -1.3, 0.0).double()})
    found = KLInReward(0.5, kind)(rows, stats).token_reward
    torch.testing.assert_close(found, (1 - 0.5 * value) * MASK.double(), rtol=0, atol=5e-7)
    first = KLInReward(0.5, kind)(k8_rows(), stats).token_reward
    torch.testing.assert_close(first, -0.5 * value * MASK.double(), rtol=0, atol=5e-7)


def test_rows_without_a_reward():
    with pytest.raises(ValueError, match="no reward"):
        WeightedSum()(columns([1.0]).with_(reward=None), NONE)
