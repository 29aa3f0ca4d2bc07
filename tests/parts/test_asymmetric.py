"""APO: a KL that depends on difficulty, and advantages of long mistakes."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_rows, k8_stats
from tests.worlds import assert_same, outcome, rows_for

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.parts.advantages.asymmetric import DifficultyKLWeight, LongMistakes
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.terms.penalties import SampledKL
from keel.parts.terms.weighted import RowWeightedKL
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

NOTHING = Stats()
KL_WEIGHT = "kl_weight"
KAPPA = {0.0: 1, 0.125: 0.907310, 0.25: 0.869804, 0.5: 0.743119, 0.75: 0.493165, 0.875: 0.288077, 1.0: 1}


def group(rewards: list[float], lengths: list[int] | None = None) -> Rows:
    """One group with GRPO's advantages."""
    lengths = [2] * len(rewards) if lengths is None else lengths
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    rows = Rows.build(
        ids[:, :1],
        torch.ones(len(rewards), 1, dtype=torch.bool),
        ids,
        mask,
        group=torch.zeros(len(rewards), dtype=torch.long),
        reward=torch.tensor(rewards, dtype=torch.float64)[:, None],
        weight=torch.ones(len(rewards), dtype=torch.float64),
    )
    return GroupStd(1e-9)(GroupCentre()(rows, NOTHING), NOTHING)


@pytest.mark.parametrize("difficulty", KAPPA)
def test_kappa(difficulty):
    wrong = round(8 * difficulty)
    rows = DifficultyKLWeight()(group([0.9] * wrong + [1.0] * (8 - wrong)), NOTHING)
    found = rows.columns[KL_WEIGHT].tolist()
    assert found[:wrong] == [1.0] * wrong
    assert found[wrong:] == pytest.approx([KAPPA[difficulty]] * (8 - wrong), abs=ALIKE)


def test_long_mistakes():
    """Mean correct length 400; the mistakes are 400 and 1600 tokens longer."""
    rows = group([1, 1, 0, 0], [300, 500, 800, 2000])
    before, found = rows.advantage[:, 0], LongMistakes()(rows, NOTHING).advantage[:, 0]
    assert (found / before).tolist() == pytest.approx([1, 1, 1.003992, 1.015873], abs=ALIKE)
    assert found.tolist() == pytest.approx([0.866025, 0.866025, -0.869483, -0.879771], abs=ALIKE)


@pytest.mark.parametrize(
    ("rewards", "lengths", "factors"),
    [
        ([0.0, 0.5, 0.2], [1, 2, 9], [1, 1, 1]),  # nothing is correct
        ([1.0, 0.0, 0.5], [4, 3, 4], [1, 1, 1]),  # no mistake is longer
        ([1.0, math.nan, 0.0], [2, 9, 6], [1, 1, 2 - 2**-4]),  # what has no reward is no mistake
    ],
)
def test_what_is_no_long_mistake(rewards, lengths, factors):
    rows = group(rewards, lengths)
    found = LongMistakes(2.0)(rows, NOTHING).advantage[:, 0]
    assert found.tolist() == pytest.approx([f * a for f, a in zip(factors, rows.advantage[:, 0].tolist(), strict=True)])


def test_the_mean_is_over_rows():
    """kappa times the row's mean of k3, a mean over rows, whatever the lengths."""
    rows, stats = k8_rows(), k8_stats()
    kappa = torch.tensor([0.5, 1, 1, 0.25, 1, 1, 1, 0.0], dtype=torch.float64)
    ref = stats[LogProb(of=("old",))]
    known = stats.merged({LogProb(of=("ref",)): torch.where(MASK, ref, 7.0)})
    found = RowWeightedKL(0.1)(rows.with_(columns={KL_WEIGHT: kappa}), known)
    live = (stats[LogProb()] - ref).tolist()
    k3 = [sum(math.exp(-d) - 1 + d for d in row[:n]) / n for row, n in zip(live, MASK.sum(1).tolist(), strict=True)]
    assert float(found.detach()) == pytest.approx(0.1 * sum(k * v for k, v in zip(kappa.tolist(), k3, strict=True)) / 8)
    (grad,) = torch.autograd.grad(found, stats[LogProb()])
    assert float(grad[0, 0]) == pytest.approx(0.1 * 0.5 * (1 - math.exp(-0.10)) / 3 / 8)
    assert not grad[7].any() and not grad[~MASK].any()
    plain = RowWeightedKL(0.1)(rows, known)
    wanted = 0.1 * Aggregation("sequence_mean_token_mean")(SampledKL("k3")(rows, known), rows)
    assert torch.equal(plain, wanted)


def test_both_off_is_grpo_with_k3():
    options = {"beta": 0.1, "aggregation": "sequence_mean_token_mean"}
    apo = recipe_named("apo")(difficulty=False, length_base=None, **options)
    rows = rows_for(apo)
    assert_same(outcome(apo, rows), outcome(recipe_named("grpo")(kl="k3", **options), rows), 1e-12)


def test_each_half_changes_the_step():
    given = {"beta": 0.5, "length_base": 2.0, "threshold": 1.2}
    both = recipe_named("apo")(**given)
    rows = rows_for(both)
    found = outcome(both, rows).grads["policy.table"]
    for options in ({"difficulty": False}, {"length_base": None}, {"beta": 0.0}):
        other = outcome(recipe_named("apo")(**{**given, **options}), rows)
        assert float((found - other.grads["policy.table"]).abs().max()) > 1e-3, options


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: LongMistakes(1.0), "base"),
        (lambda: RowWeightedKL(-1.0), "coef"),
        (lambda: RowWeightedKL(estimator="k4"), "k4"),
        (lambda: DifficultyKLWeight()(k8_rows(), NOTHING), "advantage"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
