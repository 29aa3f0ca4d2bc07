"""Masks of tokens: learned ones, their norm and its price, against the specification's numbers."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE
from tests.parts.pair_numbers import assert_gradients_of_value, loss_of, numbers, pair_rows, stats_of

from keel.core.rows import Pairs, Rows
from keel.parts.terms.pairs import Side
from keel.parts.terms.token_scores import PairPenalty
from keel.parts.terms.token_weights import Activation, ActivationMask, LearnedMask, WeightNorm
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Value
from keel.statistics.stats import Stats

# -- learned masks ---------------------------------------------------------------------------------------------------

SPARSE = {"u": ([0.5, 0.3], [-0.4, -0.6]), "k": ([0.1, 0.2], [0.3, 0.5])}


def sparse(masks: tuple[list[float], list[float]], kl: tuple | None = None, wide: int = 0, **options):
    """The loss of `sparse_po` with given masks, its rows and its numbers."""
    rows = pair_rows((2, 2), wide=wide)
    found = numbers(rows, **SPARSE, mask_reward=masks, mask_kl=masks if kl is None else kl)
    method = recipe_named("sparse_po")(dropout=0.0, **options)
    return method, rows, found


ONES, ZEROS = ([1.0, 1.0], [1.0, 1.0]), ([0.0, 0.0], [0.0, 0.0])
HALVES = ([1.0, 0.0], [0.0, 1.0])


@pytest.mark.parametrize("wide", [0, 2])
@pytest.mark.parametrize(
    ("masks", "options", "loss"),
    [
        (ONES, {}, 0.630258),
        (HALVES, {}, 0.658760),
        (HALVES, {"l1_reward": 1e-3, "l1_kl": 1e-3}, 0.662760),
        (ZEROS, {}, math.log(2)),
    ],
)
def test_sparse_po(masks, options, loss, wide):
    method, rows, found = sparse(masks, wide=wide, **options)
    assert loss_of(method, rows, found).item() == pytest.approx(loss, abs=ALIKE)


def test_masks_of_one_are_tdpo_and_none_on_the_divergence_is_dpo():
    method, rows, found = sparse(ONES)
    assert torch.equal(loss_of(method, rows, found), loss_of(recipe_named("tdpo")(version=1), rows, found))
    method, rows, found = sparse(ONES, ZEROS)
    assert torch.equal(loss_of(method, rows, found), loss_of(recipe_named("dpo")(), rows, found))


def test_masks_of_zero_teach_the_policy_nothing():
    method, rows, found = sparse(ZEROS)
    grads = torch.autograd.grad(loss_of(method, rows, found), [found["u"], found["k"]])
    assert not any(bool(grad.any()) for grad in grads)


def test_a_common_mask_pays_half_of_both():
    rows = pair_rows((2, 2))
    found = numbers(rows, **SPARSE, mask=HALVES)
    method = recipe_named("sparse_po")(masks="common", l1_reward=1e-3, l1_kl=1e-3, dropout=0.0)
    assert loss_of(method, rows, found).item() == pytest.approx(0.660760, abs=ALIKE)


def test_gradients_of_sparse_po():
    method, rows, found = sparse(([0.7, 0.2], [0.4, 1.3]), ([0.3, 0.6], [0.9, 0.1]), 1, l1_reward=0.01, l1_kl=0.02)
    assert_gradients_of_value(method, rows, found)


def test_dropped_tokens_depend_on_rows_alone():
    """A fifth of them, the rest scaled so that the mean stays; the other rows of a batch do not matter."""
    rows = Rows.build(*[torch.zeros(500, n, dtype=torch.long) if i % 2 == 0 else torch.ones(500, n, dtype=torch.bool)
                        for i, n in enumerate((1, 1, 8, 8))])  # fmt: skip
    weight = LearnedMask("mask", dropout=0.2)
    stats = Stats({Value("mask", of=("layers", "policy")): torch.ones(500, 8)})
    index = torch.arange(500)
    found = weight(Side(rows, stats, index))
    assert sorted(found.unique().tolist()) == pytest.approx([0.0, 1.25])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(weight(Side(rows, stats, index[7:9])), found[7:9])


def test_metrics_of_masks():
    method, rows, found = sparse(([0.5, 0.0], [0.0, 0.0]), ONES, wide=2)
    told = method.terms["l1_reward"].metrics(rows, stats_of(found))
    assert {name: float(value) for name, value in told.items()} == {
        "mask_reward/sparsity/chosen": 0.5,
        "mask_reward/mean/chosen": 0.25,
        "mask_reward/sparsity/rejected": 1.0,
        "mask_reward/mean/rejected": 0.0,
    }
    assert float(method.terms["l1_kl"].metrics(rows, stats_of(found))["mask_kl/sparsity/chosen"]) == 0


# -- the penalty of pairs --------------------------------------------------------------------------------------------


def test_a_penalty_of_pairs():
    """Two pairs of measure 1 and 3 over the mask's norms: (1 (2 + 1) + 3 (0.5 + 4)) / 4, and sides by themselves."""
    rows = pair_rows((2, 2))
    rows = Rows.build(*(torch.cat([x, x]) for x in (rows.prompt_ids, rows.prompt_mask, rows.tokens, rows.mask)))
    ones = torch.ones(2, dtype=torch.float64)
    pairs = Pairs(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([1.0, 3.0]).double(), ones, ones, 0 * ones)
    masks = torch.tensor([[1.5, 0.5], [1.0, 0.0], [0.0, 0.5], [4.0, 0.0]], dtype=torch.float64)
    stats = Stats({Value("mask", of=("layers", "policy")): masks})
    for sides, wanted in (("both", 4.125), ("chosen", 0.875), ("rejected", 3.25)):
        term = PairPenalty(WeightNorm(LearnedMask()), 2.0, sides)
        assert float(term(rows.with_(pairs=pairs), stats)) == pytest.approx(2 * wanted)


def test_ma_po_masks_both_parts_and_is_held_constant():
    """The vector of learned masks (1, 0) and (0, 1), here read off activations; no gradient reaches them."""
    rows = pair_rows((2, 2), wide=1)
    found = numbers(rows, **SPARSE, mask=HALVES)
    seen = {Activation(): found["mask"]}
    loss = recipe_named("ma_po")().loss(rows, stats_of(found).merged(seen), {})
    assert loss.item() == pytest.approx(0.658760, abs=ALIKE)
    grads = torch.autograd.grad(loss, [found["u"], found["k"], found["mask"]], allow_unused=True)
    assert grads[2] is None and (grads[0] != 0).int().tolist() == [[1, 0, 0], [0, 1, 0]]
    side = Side(rows, Stats(seen), torch.tensor([0]))
    assert not ActivationMask()(side).requires_grad
