"""Sequences with gaps, best-of-n in several groups, and features that are partly unknown."""

import math

import pytest
import torch
from tests.parts.test_targets import MOMENTS, PHI, drawn, statistics

from keel.core.rows import Rows, cat
from keel.parts.terms.moments import MomentTarget, within_reach
from keel.parts.terms.targets import BestOfNTarget, sequence


def test_a_sequence_is_summed_over_its_mask():
    """Also over tokens that the loss does not count, such as those that a tool wrote; not over padding."""
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    rows = rows.with_(owner=torch.tensor([[True, False, True, True], [False, True, True, True]]))
    log_prob = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-16.0, -32.0, -64.0, math.nan]], dtype=torch.float64)
    assert sequence(log_prob, rows).tolist() == [-7.0, -16.0]


def test_best_of_n_is_that_of_each_group():
    """Three groups: with the reference's shares, the same with rewards 10 higher, and one without any reward."""
    first, second, nothing = (drawn([8, 5, 4, 2, 1], group=g) for g in (0, 1, 2))
    second = second.with_(reward=second.reward + 10)
    rows = cat([first, second, nothing.with_(reward=nothing.reward * torch.nan)])
    score = BestOfNTarget(4, samples="reference")(rows, statistics(rows))
    # F of the rewards 0, 1, 1/2, 2, 3/2 and just below them
    upto = torch.tensor([0.4, 0.85, 0.6, 1.0, 0.9], dtype=torch.float64)
    below = torch.tensor([0.0, 0.6, 0.4, 0.9, 0.85], dtype=torch.float64)
    wanted = (upto**4 - below**4)[first.tokens[:, 0]]
    torch.testing.assert_close(score[:20].exp(), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(score[20:40].exp(), wanted, rtol=1e-9, atol=0)
    assert bool(score[40:].isnan().all())


@pytest.mark.parametrize("unknown", [[True, True], [True, False], [False, True]])
def test_rows_with_unknown_features_are_left_out_of_the_fit(unknown):
    """Eight rows of outcome 4 whose features are partly unknown change neither the multipliers nor the means."""
    rows, metrics = cat([drawn([8, 5, 4, 2, 1]), drawn([0, 0, 0, 0, 8])]), {}
    phi = PHI[rows.tokens[:, 0]].clone()
    phi[20:] = torch.where(torch.tensor(unknown), math.nan, phi[20:])
    state = MOMENTS.observe(rows.with_(features={"moments": phi}), torch.zeros(28), metrics, MOMENTS.init())
    assert state["multipliers"].tolist() == pytest.approx([0.263748, 1.230859], abs=6e-7)
    assert (metrics["moments/a"], metrics["moments/b"]) == (pytest.approx(7 / 20), pytest.approx(3 / 20))


def test_rows_without_weight_are_left_out_of_the_fit():
    rows, metrics = cat([drawn([8, 5, 4, 2, 1]), drawn([0, 0, 0, 0, 8])]), {}
    rows = rows.with_(weight=(torch.arange(28) < 20).double())
    state = MOMENTS.observe(rows, torch.zeros(28), metrics, MOMENTS.init())
    assert state["multipliers"].tolist() == pytest.approx([0.263748, 1.230859], abs=6e-7)
    assert metrics["moments/b"] == pytest.approx(3 / 20)


def test_groups_without_a_row_within_a_hard_constraint_are_left_out_of_the_fit():
    """Feature b shall have half of what has feature a, outcomes 1 and 3 at 5 to 2: lambda = ln 2.5."""
    target = MomentTarget(("a", "b"), (1.0, 0.5), fit_batches=1)
    rows = cat([drawn([8, 5, 4, 2, 1]), drawn([8, 0, 4, 0, 1], group=1)])
    state = target.observe(rows, torch.zeros(33), {}, target.init())
    assert float(state["multipliers"][1]) == pytest.approx(math.log(2.5), abs=1e-9)


def test_reach_is_the_mean_of_the_groups_ends():
    """Groups that reach from 0 to 1 and from 2 to 5: from 1 to 3 on average, less 2% of that range at both ends."""
    features = torch.tensor([[0.0, 1.0, -9.0], [5.0, 2.0, 9.0]], dtype=torch.float64)[..., None]
    log_weight = torch.tensor([[0.0, -3.0, -math.inf], [0.0, 0.0, -math.inf]], dtype=torch.float64)
    for asked, given in ((9.0, 2.96), (-9.0, 1.04), (2.5, 2.5)):
        found = within_reach(features, torch.tensor([asked], dtype=torch.float64), log_weight)
        assert found.tolist() == pytest.approx([given], rel=1e-12)
