"""Corners of means, spreads and shares: tokens of other owners, trees, weights below one, ends of the range."""

import math

import pytest
import torch

from keel.core.aggregate import Aggregation, Groups, masked_mean, returns, top_share, totals, weighted_std
from keel.core.rows import Rows, Stream

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 7.0, 7.0], [5.0, 6.0, 7.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
MODES = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant")
BASELINE, REGULARISER = int(Stream.BASELINE), int(Stream.REGULARISER)


def make(**known) -> Rows:
    ids = torch.zeros(3, 3, dtype=torch.long)
    return Rows.build(ids[:, :1], ids[:, :1] == 0, ids, MASK, **known)


def loss(mode: str, rows: Rows, where: torch.Tensor | None = None, per: str = "batch") -> float:
    return float(Aggregation(mode, 10 if mode == "constant" else None)(VALUES, rows, where, per))


def grouped(weight: list[float], stream: list[int] | None = None) -> Rows:
    ids = torch.zeros(len(weight), 1, dtype=torch.long)
    known = {} if stream is None else {"stream": torch.tensor(stream)}
    return Rows.build(ids, ids == 0, ids, ids == 0, group=ids[:, 0], weight=torch.tensor(weight), **known)


# -- which tokens count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "wanted"), list(zip(MODES, [(1 + 3 + 5) / 3, (2 + 5) / 2, (1 + 3 + 5) / 3, 9 / 30], strict=True))
)
def test_tokens_that_another_row_owns_count_nowhere(mode, wanted):
    """Left are 1 and 3 of the first row and 5 of the third; the second has none and is a sequence for sums only."""
    owner = torch.tensor([[True, False, True], [False, True, True], [True, False, False]])
    assert loss(mode, make(owner=owner)) == pytest.approx(wanted)


def test_a_sequence_whose_tokens_are_all_owned_elsewhere_is_none():
    owner = torch.tensor([[True, True, True], [False, True, True], [True, True, True]])
    found = totals(make(owner=owner))
    assert (found.tokens, found.sequences, found.rows) == (5.0, 2.0, 3.0)


@pytest.mark.parametrize("per", ["batch", "where"])
@pytest.mark.parametrize("mode", MODES)
def test_where_does_not_reach_beyond_the_mask(mode, per):
    """What it says of padding, of other streams and of tokens owned elsewhere makes no difference."""
    owner = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    rows = make(owner=owner, stream=torch.tensor([0, 0, BASELINE]))
    inside = torch.tensor([[True, False, False], [True, False, False], [False, False, False]])
    everywhere = inside | ~rows.loss_mask
    assert loss(mode, rows, everywhere, per) == loss(mode, rows, inside, per) != 0


WITHIN = torch.tensor([[False, True, True], [True, True, True], [False, True, False]])


@pytest.mark.parametrize(
    ("mode", "batch", "per_where"),
    [  # weights 2, 1, 1, and the third row counts in no mean: 2 and 3, twice, and 4
        ("token_mean", 14 / 7, 14 / 5),
        ("sequence_mean_token_mean", (2 * 5 / 3 + 4) / 3, (2 * 2.5 + 4) / 3),
        ("sequence_mean_token_sum", 14 / 3, 14 / 3),
        ("constant", 14 / 30, 14 / 30),
    ],
)
def test_denominators_of_the_batch_and_of_a_mask(mode, batch, per_where):
    rows = make(weight=torch.tensor([2.0, 1.0, 1.0]), stream=torch.tensor([0, 0, REGULARISER]))
    assert loss(mode, rows, WITHIN) == pytest.approx(batch)
    assert loss(mode, rows, WITHIN, "where") == pytest.approx(per_where)


@pytest.mark.parametrize(
    ("mode", "batch", "per_where"),
    [  # the first row has no token within, and weighs two
        ("token_mean", 10 / 9, 10 / 2),
        ("sequence_mean_token_mean", (4 + 6 / 2) / 4, (4 + 6) / 2),
        ("sequence_mean_token_sum", 10 / 4, 10 / 2),
        ("constant", 10 / 40, 10 / 20),
    ],
)
def test_rows_without_a_token_within_a_mask(mode, batch, per_where):
    rows = make(weight=torch.tensor([2.0, 1.0, 1.0]))
    within = WITHIN & torch.tensor([[False], [True], [True]])
    assert loss(mode, rows, within) == pytest.approx(batch)
    assert loss(mode, rows, within, "where") == pytest.approx(per_where)


TREE = torch.tensor([[3, 2, 1], [1, 1, 1], [2, 1, 1]])


@pytest.mark.parametrize(
    ("mode", "wanted"),
    list(zip(MODES, [30 / 10, (10 / 6 + 4 + 16 / 3) / 3, 30 / 3, 30 / 30], strict=True)),
)
def test_tokens_of_a_tree_count_for_each_leaf(mode, wanted):
    """3 * 1 + 2 * 2 + 3 = 10 over 6, 4 over 1, 2 * 5 + 6 = 16 over 3."""
    assert loss(mode, make(mult=TREE)) == pytest.approx(wanted)


def test_tokens_of_a_tree_within_a_mask():
    """2 * 2 + 3 = 7 over 3, 4 over 1, 6 over 1."""
    rows = make(mult=TREE)
    assert loss("token_mean", rows, WITHIN, "where") == pytest.approx(17 / 5)
    assert loss("sequence_mean_token_mean", rows, WITHIN, "where") == pytest.approx((7 / 3 + 4 + 6) / 3)


def test_an_empty_row_counts_in_a_constant_denominator():
    rows = make().with_(mask=MASK & torch.tensor([[True], [False], [True]]))
    assert loss("constant", rows) == pytest.approx(17 / 30)


def test_the_gradient_of_a_masked_mean():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, make()).backward()
    assert torch.equal(values.grad, MASK / 6)


def test_token_rewards_count_in_rows_that_the_loss_leaves_out():
    """A greedy completion has a return, too, though no token of it is in the loss."""
    reward, token_reward = torch.ones(3, 1), torch.full((3, 3), -0.25)
    rows = make(reward=reward, token_reward=token_reward, stream=torch.tensor([0, BASELINE, BASELINE]))
    assert returns(rows).tolist() == [0.25, 0.75, 0.5]


# -- spreads with weights --------------------------------------------------------------------------------------------


def test_less_than_one_row_has_no_spread():
    assert float(weighted_std(torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.25]))) == 0


def test_a_row_and_a_half():
    """Mean 2, squares 0.75 + 0.75, over 1.5 - 1."""
    found = weighted_std(torch.tensor([1.0, 3.0]), torch.tensor([0.75, 0.75]))
    assert float(found) == pytest.approx(math.sqrt(3))


def test_spread_of_an_uneven_group():
    """Weights 3 and 1 of 0 and 1: 16 / 10 rows, variance 3 / 16, unbiased 3 / 16 * 1.6 / 0.6 = 1 / 2."""
    groups = Groups.of(grouped([3.0, 1.0]))
    assert float(groups.size()) == pytest.approx(1.6)
    assert float(groups.std(torch.tensor([0.0, 1.0]))) == pytest.approx(math.sqrt(0.5))


def test_valid_rows_are_rows_of_the_main_stream():
    rows = grouped([1.0, 1.0, 1.0], [0, 0, BASELINE])
    groups = Groups.of(rows, torch.tensor([True, False, True]))
    assert groups.weight.tolist() == [1.0, 0.0, 0.0]


# -- ends of the range -----------------------------------------------------------------------------------------------


def test_the_smallest_share_is_one_value():
    values = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert top_share(values, 1e-12, torch.ones(2, 2)).tolist() == [[True, False], [False, False]]
