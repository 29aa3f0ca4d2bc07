"""AOT: sorted margins, sorted log-ratios, and weights as multiplicities."""

from dataclasses import replace

import pytest
import torch
from tests.parts.completions import ALIKE, V1, V2, assert_gradient, completions, paired

from keel.core.choice import generator
from keel.core.errors import MethodError
from keel.core.rows import Pairs
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.sorted_pairs import SortedPairs, matched
from keel.statistics.stats import Stats

MARGINS, COMPLETIONS = SortedPairs(), SortedPairs("completions")
BOTH = pytest.mark.parametrize("loss", [MARGINS, COMPLETIONS], ids=["aot", "aot_unpaired"])


def spec(dtype=torch.float64):
    """a = (1, -0.5) of the chosen and d = (-1, 0.8) of the rejected ones."""
    rows, stats = completions([-2.0, -3.5, -4.0, -2.2], [-3.0] * 4, dtype=dtype)
    return paired(rows, [0, 1], [2, 3]), stats


@pytest.mark.parametrize(
    ("vector", "eps", "wanted"),
    [(V1, 0.0, 0.598139), (V2, 0.0, 0.586962), (V1, 0.1, 0.618139), (V2, 0.1, 0.609462)],
)
@BOTH
def test_a_single_pair_is_that_of_cdpo(loss, vector, eps, wanted):
    rows, stats = completions(**vector)
    found = SortedPairs(loss.compared, label_smoothing=eps)(paired(rows, [0], [1]), stats)
    assert float(found) == pytest.approx(wanted, abs=ALIKE)
    if eps == 0:
        dpo = PairLoss(LogSigmoid(), LogRatio())(paired(rows, [0], [1]), stats)
        assert float(found) == pytest.approx(float(dpo), abs=1e-12)


def test_sorted_completions():
    """(-0.5, 1) against (-1, 0.8): z = 0.5, 0.2; DPO compares 1 with -1 and -0.5 with 0.8."""
    rows, stats = spec()
    assert float(COMPLETIONS(rows, stats)) == pytest.approx(0.675828, abs=ALIKE)
    assert float(PairLoss(LogSigmoid(), LogRatio())(rows, stats)) == pytest.approx(0.679199, abs=ALIKE)


def test_sorted_margins():
    """c - r = 3, -1 and c0 - r0 = -1, 0: sorted -1, 3 against -1, 0, so z = 0 and 3; unsorted they are 4 and -1."""
    rows, stats = completions([-1, -5, -4, -4], [-4, -4, -3, -4])
    found = float(SortedPairs(beta=1.0)(paired(rows, [0, 1], [2, 3]), stats))
    assert found == pytest.approx((0.693147 + 0.048587) / 2, abs=1e-6)


@BOTH
def test_a_pair_of_weight_two_is_the_pair_twice(loss):
    policy, ref = [-2.0, -3.5, -1.7, -4.0, -2.2, -3.0], [-3.0, -2.9, -3.1, -3.0, -2.8, -3.3]
    rows, stats = completions(policy, ref)
    weighted = loss(paired(rows, [0, 1, 2], [3, 4, 5], [1.0, 2.0, 0.0]), stats)
    plain = loss(paired(rows, [0, 1, 1], [3, 4, 4]), stats)
    assert float(weighted) == pytest.approx(float(plain), abs=1e-12)
    left, right, share = matched(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0]), torch.tensor([1.0, 3.0]))
    assert (left.tolist(), right.tolist(), share.tolist()) == ([0, 1, 1], [1, 1, 0], [1.0, 2.0, 1.0])


@BOTH
def test_order_gradient_and_precision(loss):
    policy, ref = [-2.0, -3.5, -1.7, -4.0, -2.2, -3.1], [-3.0, -2.9, -3.1, -3.05, -2.8, -3.3]
    rows, stats = completions(policy, ref, [1, 2, 3, 2, 1, 4])
    wanted = float(loss(paired(rows, [0, 1, 2], [3, 4, 5]), stats))
    assert float(loss(paired(rows, [2, 0, 1], [5, 3, 4]), stats)) == pytest.approx(wanted, abs=1e-12)
    turned = [float(loss(paired(rows, [0, 1, 2], some), stats)) for some in ([5, 3, 4], [4, 5, 3])]
    if loss.compared == "completions":  # who is paired with whom does not matter
        assert turned == pytest.approx([wanted, wanted], abs=1e-12)
    else:
        assert max(abs(value - wanted) for value in turned) > 1e-4
    assert_gradient(loss, paired(rows, [0, 1, 2], [3, 4, 5]), stats)
    order = torch.randperm(6, generator=generator("sorted"))
    shuffled = paired(rows, [0, 1, 2], [3, 4, 5]).select(order)
    assert float(loss(shuffled, stats.select(order))) == pytest.approx(wanted, abs=1e-12)
    coarse = Stats({f: value.detach().bfloat16() for f, value in stats.items()})
    assert float(loss(paired(rows, [0, 1, 2], [3, 4, 5]), coarse)) == pytest.approx(wanted, abs=5e-3)


def test_no_pairs():
    rows, stats = completions([-1.0], [-1.0])
    index, none = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    assert float(MARGINS(rows.with_(pairs=Pairs(index, index, none, none, none, none)), stats)) == 0


def test_metrics_are_those_of_the_pairs():
    rows, stats = spec()
    assert COMPLETIONS.metrics(rows, stats) == PairLoss(LogSigmoid(), LogRatio()).metrics(rows, stats)
    assert float(MARGINS.metrics(rows, stats)["rewards/accuracies"]) == 0.5


@pytest.mark.parametrize("settings", [{"compared": "rows"}, {"beta": 0.0}, {"label_smoothing": 0.5}], ids=str)
def test_bad_settings(settings):
    with pytest.raises((ValueError, TypeError)):
        SortedPairs(**settings)


@pytest.mark.parametrize("name", ["label", "coef"])
def test_pairs_with_numbers_of_their_own_are_refused(name):
    rows, stats = spec()
    rows = rows.with_(pairs=replace(rows.pairs, **{name: torch.tensor([1.0, 0.5])}))
    with pytest.raises(MethodError, match="belong to no pair"):
        MARGINS(rows, stats)
