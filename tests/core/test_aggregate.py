"""Means, spreads, shares and groups, with weights, against hand computation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.core.aggregate import (
    Aggregation,
    Groups,
    masked_mean,
    ratio,
    returns,
    token_weight,
    top_share,
    totals,
    weighted_mean,
    weighted_quantile,
    weighted_std,
)
from keel.core.rows import Rows, Stream

NAN = math.nan
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 7.0, 7.0], [5.0, 6.0, 7.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def make(**known) -> Rows:
    ids = torch.zeros(3, 3, dtype=torch.long)
    return Rows.build(ids[:, :1], ids[:, :1] == 0, ids, MASK, **known)


def grouped(group: list[int], **known) -> Rows:
    ids = torch.zeros(len(group), 1, dtype=torch.long)
    return Rows.build(ids, ids == 0, ids, ids == 0, group=torch.tensor(group), **known)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# -- aggregation -----------------------------------------------------------------------------------------------------

ALL = {"token_mean": 21 / 6, "sequence_mean_token_mean": (2 + 4 + 5.5) / 3, "sequence_mean_token_sum": 7.0,
       "constant": 21 / 30}  # fmt: skip
HEAVY = {"token_mean": 27 / 9, "sequence_mean_token_mean": (2 * 2 + 4 + 5.5) / 4, "sequence_mean_token_sum": 27 / 4,
         "constant": 27 / 40}  # fmt: skip


def aggregation(mode: str) -> Aggregation:
    return Aggregation(mode, 10 if mode == "constant" else None)


@pytest.mark.parametrize("mode", ALL)
def test_modes(mode):
    assert float(aggregation(mode)(VALUES, make())) == pytest.approx(ALL[mode])


@pytest.mark.parametrize("mode", ALL)
def test_a_row_of_weight_two_counts_twice(mode):
    assert float(aggregation(mode)(VALUES, make(weight=tensor(2, 1, 1)))) == pytest.approx(HEAVY[mode])


@pytest.mark.parametrize("mode", ALL)
def test_slices_add_up(mode):
    rows = make(weight=tensor(2, 1, 1))
    whole = totals(rows)
    parts = [rows.with_(totals=whole).select(torch.tensor(index)) for index in ([1], [2, 0])]
    found = aggregation(mode)(VALUES[[1]], parts[0]) + aggregation(mode)(VALUES[[2, 0]], parts[1])
    assert float(found) == pytest.approx(HEAVY[mode])


@pytest.mark.parametrize("mode", ALL)
def test_nothing_counted_is_zero(mode):
    none = make(stream=torch.full((3,), int(Stream.REGULARISER)))
    assert float(aggregation(mode)(VALUES, none)) == 0
    assert float(aggregation(mode)(VALUES, make().with_(mask=torch.zeros_like(MASK)))) == 0


def test_numbers_off_the_mask_are_ignored():
    dirty = torch.where(MASK, VALUES, NAN)
    assert float(masked_mean(dirty, make())) == pytest.approx(3.5)


def test_rows_of_other_streams_do_not_count():
    rows = make(stream=torch.tensor([0, int(Stream.BASELINE), 0]))
    assert float(masked_mean(VALUES, rows)) == pytest.approx(17 / 5)
    assert totals(rows) == totals(make().select(torch.tensor([0, 2])))


def test_empty_rows_are_sequences_for_sums_only():
    rows = make().with_(mask=MASK & torch.tensor([[True], [False], [True]]))
    assert float(aggregation("sequence_mean_token_mean")(VALUES, rows)) == pytest.approx((2 + 5.5) / 2)
    assert float(aggregation("sequence_mean_token_sum")(VALUES, rows)) == pytest.approx(17 / 3)


def test_tokens_below_which_a_tree_branches_count_for_each_leaf():
    rows = make(mult=torch.tensor([[3, 2, 1], [1, 1, 1], [1, 1, 1]]))
    assert token_weight(rows).tolist() == [[3, 2, 1], [1, 0, 0], [1, 1, 0]]
    assert float(masked_mean(VALUES, rows)) == pytest.approx((3 + 4 + 3 + 4 + 11) / 9)


def test_constant_needs_a_length():
    with pytest.raises(ValueError, match="max_length"):
        Aggregation("constant")


def test_ratio():
    assert ratio(tensor(1, 0, 2), tensor(0, 0, 4)).tolist() == [0, 0, 0.5]
    x = tensor(3.0).requires_grad_()
    ratio(x, tensor(0.0)).sum().backward()
    assert x.grad.tolist() == [0]


# -- weighted statistics ---------------------------------------------------------------------------------------------

counts = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 3)), min_size=1, max_size=8).filter(
    lambda pairs: sum(w for _, w in pairs) > 1
)


@given(counts)
def test_weights_are_frequencies(pairs):
    values = torch.tensor([float(v) for v, _ in pairs], dtype=torch.float64)
    weight = torch.tensor([float(w) for _, w in pairs], dtype=torch.float64)
    repeated = torch.tensor([float(v) for v, w in pairs for _ in range(w)], dtype=torch.float64)
    assert float(weighted_mean(values, weight)) == pytest.approx(float(repeated.mean()), abs=1e-12)
    assert float(weighted_std(values, weight)) == pytest.approx(float(repeated.std()), abs=1e-9)
    assert float(weighted_std(values, weight, exact=True)) == pytest.approx(float(repeated.std(correction=0)), abs=1e-9)
    for q in (0.0, 0.25, 0.5, 0.9, 1.0):
        place = math.ceil(round(q * len(repeated), 9))  # the smallest value with a share of at least q below or at it
        wanted = repeated.sort().values[max(0, place - 1)]
        assert float(weighted_quantile(values, q, weight)) == float(wanted)


def test_values_without_weight_are_ignored():
    values, weight = tensor(1, NAN, 3), tensor(1, 0, 1)
    assert float(weighted_mean(values, weight)) == 2
    assert float(weighted_std(values, weight)) == pytest.approx(math.sqrt(2))
    assert float(weighted_quantile(values, 1.0, weight)) == 3


def test_a_single_value_has_no_spread():
    assert float(weighted_std(tensor(4.0), tensor(1.0))) == 0
    assert float(weighted_std(tensor(4.0, 9.0), tensor(0.5, 0.0))) == 0  # less than one row


def test_quantile_edges():
    assert math.isnan(float(weighted_quantile(tensor(1.0), 0.5, tensor(0.0))))
    with pytest.raises(ValueError, match="quantile"):
        weighted_quantile(tensor(1.0), 1.5, tensor(1.0))
    thirds = tensor(1, 2, 3)
    assert float(weighted_quantile(thirds, 1 / 3, tensor(1, 1, 1))) == 1  # not pushed up by rounding
    assert float(weighted_quantile(thirds, 0.34, tensor(1, 1, 1))) == 2


def test_top_share():
    values = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    ones = torch.ones(2, 2)
    assert top_share(values, 0.5, ones).tolist() == [[True, False], [True, False]]
    assert top_share(values, 1e-9, ones).tolist() == [[True, False], [False, False]]
    assert top_share(values, 1.0, ones).all() and not top_share(values, 0.0, ones).any()
    heavy = torch.tensor([[3.0, 1.0], [1.0, 1.0]])  # the largest value alone holds half the weight
    assert top_share(values, 0.5, heavy).tolist() == [[True, False], [False, False]]
    kept = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert top_share(values, 1 / 3, kept).tolist() == [[False, False], [True, False]]
    tied = torch.tensor([[2.0, 2.0], [2.0, 1.0]])
    assert top_share(tied, 0.25, ones).tolist() == [[True, True], [True, False]]
    assert not top_share(values, 0.5, 0 * ones).any()
    with pytest.raises(ValueError, match="share"):
        top_share(values, 1.1, ones)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_groups_by_id():
    rows = grouped([7, 3, 7, 3, 7])
    groups = Groups.of(rows)
    values = tensor(1, 10, 2, 20, 6)
    assert groups.mean(values).tolist() == [15, 3]
    assert groups.size().tolist() == [2, 3]
    assert groups.std(values).tolist() == pytest.approx([math.sqrt(50), math.sqrt(7)])
    assert groups.broadcast(groups.mean(values)).tolist() == [3, 15, 3, 15, 3]
    low, high = groups.range(values)
    assert low.tolist() == [10, 1] and high.tolist() == [20, 6]


def test_groups_of_valid_rows_only():
    rows = grouped([0, 0, 0, 1, 1], stream=torch.tensor([0, 0, int(Stream.BASELINE), 0, 0]))
    values = tensor(1, 3, 100, NAN, NAN)
    groups = Groups.of(rows, ~values.isnan())
    assert groups.mean(values).tolist() == [2, 0]
    assert groups.std(values).tolist() == pytest.approx([math.sqrt(2), 0])
    assert groups.tied(values).tolist() == [False, True]
    low, high = groups.range(values)
    assert low[1] == math.inf and high[1] == -math.inf


def test_single_members_have_no_spread():
    groups = Groups.of(grouped([0, 1, 1]))
    assert groups.std(tensor(5, 1, 3)).tolist() == pytest.approx([0, math.sqrt(2)])
    assert groups.tied(tensor(5, 1, 3)).tolist() == [True, False]


def test_ties_are_exact():
    values = torch.full((10,), 0.1)
    groups = Groups.of(grouped([0] * 10))
    assert groups.tied(values).tolist() == [True]


@given(st.floats(0.1, 1e3))
def test_a_groups_weight_does_not_change_its_statistics(weight):
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    heavy = Groups.of(grouped([0, 0, 0], weight=torch.full((3,), weight, dtype=torch.float64)))
    assert float(heavy.std(values)) == pytest.approx(float(values.std()), rel=1e-12)
    assert float(heavy.mean(values)) == pytest.approx(7 / 3, rel=1e-12)
    assert float(heavy.size()) == pytest.approx(3, rel=1e-12)


def test_enumerated_groups_are_populations():
    """Probabilities 0.5, 0.3, 0.2 of the values 0, 1, 2: mean 0.7, variance 1.1 - 0.49."""
    rows = grouped([0, 0, 0], weight=tensor(0.5, 0.3, 0.2), exact=True)
    values = tensor(0, 1, 2)
    assert float(Groups.of(rows).mean(values)) == pytest.approx(0.7)
    assert float(Groups.of(rows).std(values)) == pytest.approx(math.sqrt(0.61))


# -- returns ---------------------------------------------------------------------------------------------------------


def test_returns():
    reward = torch.tensor([[1.0], [NAN], [0.5]])
    token_reward = torch.tensor([[0.1, 0.2, 0.3], [1.0, 7.0, 7.0], [-1.0, -2.0, 7.0]])
    found = returns(make(reward=reward, token_reward=token_reward))
    assert found[[0, 2]].tolist() == pytest.approx([1.6, -2.5]) and bool(found[1].isnan())
    with pytest.raises(ValueError, match="no reward"):
        returns(make())
    with pytest.raises(ValueError, match="WeightedSum"):
        returns(make(reward=torch.ones(3, 2)))
