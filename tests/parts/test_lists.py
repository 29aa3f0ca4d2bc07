"""Ranked lists: the numbers of the papers, what two items are, ties, items that are missing, and metrics."""

import itertools
import math

import pytest
import torch
from tests.parts.completions import ALIKE, assert_gradient, completions, paired

from keel.core.choice import generator
from keel.core.errors import DataError, MethodError
from keel.core.rows import Rows, cat
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.lists import ListRanking, Lists, PlackettLuce
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.ranking import mean_reciprocal_rank, ndcg, recall
from keel.parts.terms.scores import LogRatio
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

S, Y = (1.0, -0.5, 0.2), (2.0, 0.0, 1.0)
SUMMED = ListRanking(LogRatio())


def listed(scores, relevance, group=None, lengths=None, dtype=torch.float64) -> tuple[Rows, Stats]:
    """Items whose log-ratios are `scores`, position by position."""
    group = [0] * len(scores) if group is None else group
    rows, stats = completions([s - 3 for s in scores], [-3.0] * len(scores), lengths, dtype)
    position = torch.tensor([group[:i].count(g) for i, g in enumerate(group)])
    columns = {"score": torch.tensor(relevance), "position": position}
    return rows.with_(group=torch.tensor(group), columns=columns), stats


def test_the_paper_numbers():
    rows, stats = listed(S, Y)
    assert float(SUMMED(rows, stats)) == pytest.approx(0.433037, abs=ALIKE)
    lists = Lists.of(rows)
    assert SUMMED._weights(lists)[0].tolist() == pytest.approx([3.0, 0.0, 0.5])
    lifted = listed([s + 5 for s in S], Y)
    assert float(SUMMED(*lifted)) == pytest.approx(0.433037, abs=ALIKE)


def test_the_terms_of_the_numbers():
    """-z by hand: log 2 - log(e^-1.5 + e^-0.8) and its like; without the 1 / (N - 1), the loss is 0.733344."""
    gaps = [[-1.5, -0.8], [1.5, 0.7], [0.8, -0.7]]
    z = [math.log(sum(math.exp(g) for g in some) / 2) for some in gaps]
    assert [-x for x in z] == pytest.approx([1.089961, -1.177953, -0.308266], abs=ALIKE)
    loss = [
        sum(w * math.log1p(math.exp(x + c)) for w, x in zip((3, 0, 0.5), z, strict=True)) / 3 for c in (0, math.log(2))
    ]
    assert loss == pytest.approx([0.433037, 0.733344], abs=ALIKE)


def test_the_mean_of_an_item_is_over_its_tokens():
    """Log-ratios of S times the lengths, so that the means are S."""
    lengths = [2, 4, 5]
    rows, stats = listed([s * n for s, n in zip(S, lengths, strict=True)], Y, lengths=lengths)
    assert float(ListRanking()(rows, stats)) == pytest.approx(0.433037, abs=ALIKE)


def test_equal_scores():
    """Each item has w_i log 2."""
    rows, stats = listed((0.7, 0.7, 0.7), Y)
    assert float(SUMMED(rows, stats)) == pytest.approx(3.5 / 3 * math.log(2), abs=1e-6)


@pytest.mark.parametrize(("weighting", "weights"), [("discount", (1, 0.630930, 0.5)), ("reciprocal", (3, 0, 1 / 3))])
def test_other_weights(weighting, weights):
    rows, stats = listed(S, Y)
    z = (-1.089961, 1.177953, 0.308266)
    wanted = sum(w * math.log1p(math.exp(x)) for w, x in zip(weights, z, strict=True)) / 3
    assert float(ListRanking(LogRatio(), weighting=weighting)(rows, stats)) == pytest.approx(wanted, abs=1e-6)


def two_items(dtype=torch.float64):
    rows, stats = listed((0.9, -0.4, 0.3, 1.1), (1.0, 0.0, 1.0, 0.0), [0, 0, 1, 1], [3, 5, 2, 4], dtype)
    return paired(rows, [0, 2], [1, 3]), stats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_items_are_dpo_bit_for_bit(dtype):
    rows, stats = two_items(dtype)
    mean = LogRatio(norm="mean")
    half = ListRanking(mean, 0.3)(rows, stats)
    assert torch.equal(half, 0.5 * PairLoss(LogSigmoid(), mean, 0.3)(rows, stats))
    assert torch.equal(PlackettLuce(LogRatio(), 0.3)(rows, stats), PairLoss(LogSigmoid(), LogRatio(), 0.3)(rows, stats))


def test_plackett_luce_is_the_probability_of_the_order():
    """The sum over all orders of e^-L is 1, and the order 0, 2, 1 has the product of its picks."""
    total = 0.0
    for order in itertools.permutations(range(3)):
        relevance = [0.0] * 3
        for rank, item in enumerate(order):
            relevance[item] = 3.0 - rank
        total += math.exp(-float(PlackettLuce(beta=1.0)(*listed(S, relevance))))
    assert total == pytest.approx(1, abs=1e-6)
    e = [math.exp(s) for s in S]
    wanted = -math.log(e[0] / sum(e) * e[2] / (e[1] + e[2]))
    assert float(PlackettLuce(beta=1.0)(*listed(S, Y))) == pytest.approx(wanted, abs=1e-6)


def test_items_of_equal_relevance_are_not_compared():
    """One good item among bad ones is a softmax; two good ones are each told from the bad one alone."""
    e = [math.exp(s) for s in S]
    one = PlackettLuce(beta=1.0)(*listed(S, (1.0, 0.0, 0.0)))
    assert float(one) == pytest.approx(-math.log(e[0] / sum(e)), abs=1e-6)
    two = PlackettLuce(beta=1.0)(*listed(S, (1.0, 0.0, 1.0)))
    wanted = math.log1p(e[1] / e[0]) + math.log1p(e[1] / e[2])
    assert float(two) == pytest.approx(wanted, abs=1e-6)
    assert float(PlackettLuce()(*listed(S, (1.0, 1.0, 1.0)))) == 0


@pytest.mark.parametrize("loss", [SUMMED, PlackettLuce(beta=0.7)], ids=["ranking", "plackett_luce"])
def test_order_padding_gradient_and_lists_of_other_lengths(loss):
    rows, stats = listed((*S, 0.4, -0.6), (*Y, 0.0, 3.0), [0, 0, 0, 1, 1], [1, 3, 2, 2, 4])
    first, second = (loss(rows.select(i), stats.select(i)) for i in (torch.arange(3), torch.arange(3, 5)))
    found = loss(rows, stats)
    assert float(found) == pytest.approx(float(first + second) / 2, abs=1e-12)
    order = torch.randperm(5, generator=generator("lists"))
    assert float(loss(rows.select(order), stats.select(order))) == pytest.approx(float(found), abs=1e-12)
    heavy = rows.with_(weight=torch.tensor([2.0, 2, 2, 1, 1]))
    assert float(loss(heavy, stats)) == pytest.approx(float(2 * first + second) / 3, abs=1e-6)
    assert_gradient(loss, rows, stats)
    coarse = Stats({f: value.detach().bfloat16() for f, value in stats.items()})
    assert float(loss(rows, coarse)) == pytest.approx(float(found), abs=2e-2)


@pytest.mark.parametrize("loss", [SUMMED, PlackettLuce(beta=0.7)], ids=["ranking", "plackett_luce"])
def test_items_without_tokens_and_lists_of_one_item_do_not_count(loss):
    rows, stats = listed((*S, 0.1), (*Y, 5.0), [0, 0, 0, 0])
    gone = rows.with_(mask=rows.mask & (torch.arange(4) != 3)[:, None])
    assert float(loss(gone, stats)) == pytest.approx(float(loss(*listed(S, Y))), abs=1e-9)
    alone = rows.with_(group=torch.tensor([0, 0, 0, 1]))
    found = loss(alone, stats)
    assert float(found) == pytest.approx(float(loss(*listed(S, Y))), abs=1e-9)
    (grad,) = torch.autograd.grad(found, stats[LogProb()])
    assert bool(grad.isfinite().all()) and not bool(grad[3].any())
    nothing = rows.select(torch.tensor([0]))
    assert float(loss(nothing, stats.select(torch.tensor([0])))) == 0


def test_the_item_that_is_most_out_of_order_is_pushed_most():
    """The gradient of a score within z is a softmax of the scores: the best-scored bad item gets the most."""
    rows, stats = listed((0.0, 2.0, -2.0), (1.0, 0.0, 0.0))
    (grad,) = torch.autograd.grad(SUMMED(rows, stats), stats[LogProb()])
    assert float(grad[1, 0] / grad[2, 0]) == pytest.approx(math.exp(4), rel=1e-6)


# -- metrics ---------------------------------------------------------------------------------------------------------


def numbers(scores, relevance, k=2):
    scores, relevance = torch.tensor([scores]), torch.tensor([relevance])
    valid = torch.ones_like(scores, dtype=torch.bool)
    found = (
        ndcg(scores, relevance, valid, k),
        mean_reciprocal_rank(scores, relevance, valid),
        recall(scores, relevance, valid, k),
    )
    return [float(x) for x in found]


def test_ranking_metrics():
    """Order 1, 2, 0: at 2, gains 0 and 1 / log2 3 of 3 + 1 / log2 3; the first good item is second; one of two in."""
    discount = 1 / math.log2(3)
    assert numbers([-1.0, 0.5, 0.2], [2.0, 0.0, 1.0]) == pytest.approx([discount / (3 + discount), 0.5, 0.5], abs=1e-6)
    assert numbers([3.0, 1.0, 2.0], [2.0, 0.0, 1.0]) == pytest.approx([1, 1, 1], abs=1e-6)
    assert numbers([3.0, 1.0, 2.0], [0.0, 0.0, 0.0]) == [0, 0, 0]


def test_ties_are_what_chance_gives():
    """The mean over all orders of the tied items, enumerated."""
    relevance = [2.0, 0.0, 1.0, 0.0]
    for scores in ([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]):
        each = []
        for noise in itertools.permutations([0.0, 1e-3, 2e-3, 3e-3]):
            each.append(numbers([s + n for s, n in zip(scores, noise, strict=True)], relevance))
        wanted = torch.tensor(each).mean(0).tolist()
        assert numbers(scores, relevance) == pytest.approx(wanted, abs=1e-5)


def test_metrics_of_a_batch():
    """A list in order, one turned round, and one in which nothing is relevant and which does not count."""
    scores, relevance = (1.0, 0.0, 0.0, 1.0, 0.3, 0.2), (1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    rows, stats = listed(scores, relevance, [0, 0, 1, 1, 2, 2])
    found = PlackettLuce(k=1).metrics(rows, stats)
    assert {name: float(value) for name, value in found.items()} == {
        "ranking/ndcg@1": 0.5,
        "ranking/mrr": 0.75,
        "ranking/recall@1": 0.5,
    }


# -- bad input -------------------------------------------------------------------------------------------------------


OUT_OF_RANGE = [(part, *bad) for part in (ListRanking, PlackettLuce) for bad in (("beta", 0.0), ("k", 0))]
BAD = [(ListRanking, "weighting", "none"), *OUT_OF_RANGE]


@pytest.mark.parametrize(("part", "name", "value"), BAD)
def test_bad_settings(part, name, value):
    with pytest.raises((ValueError, TypeError)):
        part(**{name: value})


def test_bad_data():
    rows, stats = listed(S, (1.0, -1.0, 0.0))
    with pytest.raises(DataError, match="negative"):
        SUMMED(rows, stats)
    with pytest.raises(MethodError, match="'score'"):
        SUMMED(rows.with_(columns={}), stats)
    both = cat([rows, rows.with_(group=rows.group + 1)])
    assert Lists.of(both).index.tolist() == [[0, 1, 2], [3, 4, 5]]
