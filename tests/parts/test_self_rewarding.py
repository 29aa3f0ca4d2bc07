"""Scores of one's own, agreement of two versions, and the pairs of past and future."""

import math

import pytest
import torch
from tests.parts.k8 import k8_rows
from torch.testing import assert_close

from keel.core.choice import generator
from keel.core.errors import MethodError
from keel.core.rows import Rows
from keel.parts.rewards.pairing import PairUp
from keel.parts.rewards.self_rewarding import RankAgreement, SelfScore, consistency, kendall_tau, temporal_pair
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

ONE, OTHER = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 3.0, 5.0, 4.0]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kendall_tau():
    assert kendall_tau(tensor(*ONE), tensor(*OTHER)) == pytest.approx(0.6)
    assert kendall_tau(tensor(*ONE), tensor(*ONE)) == 1.0
    assert kendall_tau(tensor(*ONE), -tensor(*ONE)) == -1.0
    assert kendall_tau(tensor(1, 1, 2), tensor(1, 1, 2)) == 1.0  # of equals the earlier one is first
    assert kendall_tau(tensor(1, 1), tensor(0, 1)) == -1.0
    with pytest.raises(ValueError, match="two"):
        kendall_tau(tensor(1), tensor(1))


def five(now=ONE, before=OTHER) -> tuple[Rows, Stats]:
    """A group of five; the scores stand in the first token, garbage in the padding; `ref` is 0."""
    rows = k8_rows().select(torch.tensor([0, 1, 2, 4, 5]))
    rows = rows.with_(group=torch.zeros(5, dtype=torch.long), row=torch.arange(5) + 7)
    table = {}
    for name, scores in (("old", now), ("past", before), ("ref", [0.0] * 5)):
        table[LogProb(of=(name,))] = torch.where(rows.mask, 0.0, 9.0).double()
        table[LogProb(of=(name,))][:, 0] = tensor(*scores)
    return rows, Stats(table)


@pytest.mark.parametrize("agreement", ["prompt", "mean"])
def test_the_label_is_the_agreement(agreement):
    rows, stats = five()
    rows = PairUp("best_worst")(SelfScore()(rows, stats), stats, {})
    assert (rows.pairs.chosen.tolist(), rows.pairs.rejected.tolist()) == ([4], [0])
    part = RankAgreement(agreement=agreement)
    found = part(rows, stats, part.init())
    assert found.pairs.label.tolist() == pytest.approx([0.8])
    metrics: dict = {}
    part.observe(found, stats, metrics, {})
    assert metrics["pairs/consistency"] == pytest.approx(0.8)
    assert RankAgreement(agreement="none")(rows, stats, {}).pairs.label.tolist() == [1.0]
    with pytest.raises(MethodError, match="PairUp"):
        part(rows.with_(pairs=None), stats, {})


def test_the_mean_is_over_the_pairs():
    rows, now = k8_rows(), torch.arange(8.0, dtype=torch.float64)
    before = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4], dtype=torch.float64)
    assert consistency(rows, now, before).tolist() == [1.0] * 4 + [0.0] * 4
    order = torch.randperm(8, generator=generator("order"))
    again = consistency(rows.select(order), now[order], before[order])
    assert again.tolist() == consistency(rows, now, before)[order].tolist()


@pytest.mark.parametrize(("c", "r", "c0", "r0", "wanted"), [
    (-12.0, -15.0, -13.0, -14.0, 0.638139), (-10.0, -16.0, -11.5, -15.25, 0.631962),
])  # fmt: skip
def test_a_softened_pair(c, r, c0, r0, wanted):
    """V1 and V2 at C = 0.8; at C = 1 DPO, at C = 1/2 even in the margin."""
    rows, stats = five()
    rows = RankAgreement()(PairUp("best_worst")(SelfScore()(rows, stats), stats, {}), stats, {})
    live, ref = torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    live[4, 0], live[0, 0], ref[4, 0], ref[0, 0] = c, r, c0, r0
    stats = Stats({LogProb(): live.requires_grad_(), LogProb(of=("ref",)): ref})
    loss = PairLoss(LogSigmoid(), LogRatio(), 0.1)(rows, stats)
    assert float(loss.detach()) == pytest.approx(wanted, abs=5.1e-7)


def test_where_the_softened_loss_rests():
    rows, stats = five()
    rows = RankAgreement()(PairUp("best_worst")(SelfScore()(rows, stats), stats, {}), stats, {})
    margin = math.log(0.8 / 0.2)
    assert margin == pytest.approx(1.386294, abs=5e-7)
    live = torch.zeros(5, 4, dtype=torch.float64)
    live[4, 0] = margin / 0.1
    stats = Stats({LogProb(): live.requires_grad_(), LogProb(of=("ref",)): torch.zeros(5, 4, dtype=torch.float64)})
    (grad,) = torch.autograd.grad(PairLoss(LogSigmoid(), LogRatio(), 0.1)(rows, stats), live)
    assert float(grad.abs().max()) < 1e-12


def test_the_first_iteration_scores_by_token():
    """While the policy is the initial model, the mean log-probability of a token; afterwards the whole log-ratio."""
    rows, stats = five()
    same = Stats({LogProb(of=(n,)): stats[LogProb(of=("old",))] for n in ("old", "ref")})
    assert_close(SelfScore()(rows, same).reward[:, 0], tensor(*ONE) / rows.lengths)
    assert_close(SelfScore()(rows, stats).reward[:, 0], tensor(*ONE))


# -- past and future -------------------------------------------------------------------------------------------------

CURRENT, ANCHOR, FUTURE = (6, 8, 5), (4, 7, 3), (9, 2, 7)


@pytest.mark.parametrize(
    ("anchor", "future", "wanted"),
    [
        (ANCHOR, (), (("current", 1), ("anchor", 2))),
        (ANCHOR, FUTURE, (("future", 0), ("anchor", 2))),
        ((6, 7, 6), (), (("current", 1), ("current", 2))),
        (ANCHOR, (8, 2, 7), (("current", 1), ("anchor", 2))),
        (CURRENT, (), (("current", 1), ("current", 2))),
        ((), (), (("current", 1), ("current", 2))),
    ],
)
def test_pairs_of_past_and_future(anchor, future, wanted):
    assert temporal_pair(CURRENT, anchor, future) == wanted


def test_equal_scores_make_no_pair():
    assert temporal_pair((5, 5), (5, 5), (5, 5)) is None
    assert temporal_pair((5, 5), (4, 5)) == (("current", 0), ("anchor", 0))
    with pytest.raises(ValueError, match="no scores"):
        temporal_pair(())


def test_bad_settings():
    with pytest.raises((ValueError, TypeError)):
        RankAgreement(agreement="some")


def test_recipes():
    cream = recipe_named("cream")()
    assert list(cream.transforms) == ["score", "pairs", "agreement"]
    assert {"ref", "past"} == set(cream.models)
