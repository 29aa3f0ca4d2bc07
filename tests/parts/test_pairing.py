"""Pairs and win rates among the completions of a prompt."""

import math

import pytest
import torch
from tests.parts.k8 import k8_rows
from tests.worlds import table
from torch.testing import assert_close

from keel.core.choice import generator, row_ids
from keel.core.errors import MethodError
from keel.core.rows import Rows, Stream, cat
from keel.parts.replay.memory import joined
from keel.parts.rewards.pairing import JUDGE, PLACE, JudgePairs, PairUp, WinRates, bradley_terry
from keel.parts.terms.regressions import WinRateRegression
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

REWARDS = [1.0, 0.25, 0.25, 2.0, 0.0, 0.0, math.nan, 3.0]
NOTHING: dict = {}


def rows_with(rewards=REWARDS, **known) -> Rows:
    """Two groups of four, with row ids as a run gives them."""
    rows = k8_rows().with_(reward=torch.tensor(rewards, dtype=torch.float64)[:, None])
    rows = rows.with_(row=row_ids(0, 0, rows.group, torch.arange(8) % 4), **known)
    return rows


def found(rows: Rows, **options) -> list[tuple]:
    """Row ids of chosen and rejected, and all that is known of each pair, in a fixed order."""
    part = PairUp(**options)
    pairs = part(rows, Stats(), part.init()).pairs
    ids = rows.row.tolist()
    numbers = zip(pairs.measure.tolist(), pairs.label.tolist(), pairs.offset.tolist(), strict=True)
    two = zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)
    return sorted((ids[c], ids[r], *more) for (c, r), more in zip(two, numbers, strict=True))


def by_place(rows: Rows, **options) -> set[tuple[int, int]]:
    place = {identity: i for i, identity in enumerate(rows.row.tolist())}
    return {(place[c], place[r]) for c, r, *_ in found(rows, **options)}


def test_every_two_of_a_group_but_ties_and_rows_without_a_reward():
    assert by_place(rows_with()) == {(0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (7, 4), (7, 5)}
    gaps = sorted(offset for *_, offset in found(rows_with()))
    assert gaps == [0.75, 0.75, 1.0, 1.75, 1.75, 3.0, 3.0]
    assert {label for *_, label, _ in found(rows_with())} == {1.0}


def test_best_and_worst():
    worst = max((1, 2), key=lambda i: int(rows_with().row[i]))
    lost = max((4, 5), key=lambda i: int(rows_with().row[i]))
    assert by_place(rows_with(), how="best_worst") == {(3, worst), (7, lost)}
    level = rows_with([0.0] * 4 + [math.nan] * 3 + [1.0])
    assert by_place(level, how="best_worst") == set()
    tied = found(level, how="best_worst", labels="expected")
    assert [(label, offset) for *_, label, offset in tied] == [(0.5, 0.0)]
    assert tied[0][0] != tied[0][1]


def test_random_pairs_are_disjoint_and_drawn_by_the_rows():
    seen = set()
    for seed in range(40):
        rows = rows_with([0.0, 1.0, 2.0, 3.0] * 2)
        rows = rows.with_(row=row_ids(seed, 0, rows.group, torch.arange(8) % 4))
        pairs = by_place(rows, how="random")
        assert len(pairs) == 4 and len({i for pair in pairs for i in pair}) == 8
        seen |= {pair for pair in pairs if pair[0] < 4}
    assert seen == {(i, j) for i in range(4) for j in range(i)}


def test_min_gap():
    assert by_place(rows_with(), min_gap=1.0) == {(3, 0), (3, 1), (3, 2), (7, 4), (7, 5)}
    assert by_place(rows_with(), min_gap=1.5) == {(3, 1), (3, 2), (7, 4), (7, 5)}


@pytest.mark.parametrize("options", [{}, {"how": "best_worst"}, {"how": "random"}, {"labels": "sampled"},
                                     {"labels": "expected", "temperature": 0.5}])  # fmt: skip
def test_neither_order_nor_company_matters(options):
    rows = rows_with()
    whole = found(rows, **options)
    order = torch.randperm(8, generator=generator("order"))
    assert found(rows.select(order), **options) == whole
    alone = found(rows.select(rows.group == 0), **options) + found(rows.select(rows.group == 1), **options)
    assert sorted(alone) == whole


def test_labels_are_drawn_with_their_probability():
    """4000 pairs of gap 1 at temperature 2: sigmoid(1/2) = 0.622459; the standard error is 0.0077."""
    n = 4000
    base = k8_rows().select(torch.arange(2)).with_(reward=torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    ids = torch.arange(2 * n) // 2
    identity = row_ids(3, 1, ids, torch.arange(2 * n) % 2)
    rows = base.select(torch.arange(2).repeat(n)).with_(group=ids, row=identity)
    pairs = PairUp(labels="sampled", temperature=2.0)(rows, Stats(), NOTHING).pairs
    assert len(pairs.chosen) == n and bool((pairs.label == 1).all())
    right = (pairs.offset > 0).double().mean()
    assert abs(float(right) - 0.622459) < 4 * 0.0077
    again = PairUp(labels="sampled", temperature=2.0)(rows, Stats(), NOTHING).pairs
    assert torch.equal(pairs.chosen, again.chosen)
    expected = PairUp(labels="expected", temperature=2.0)(rows, Stats(), NOTHING).pairs
    assert_close(expected.label, torch.full((n,), 0.6224593312, dtype=torch.float64))


def test_bradley_terry():
    gap = torch.tensor([0.0, 1.0, -1.0, math.nan], dtype=torch.float64)
    assert_close(bradley_terry(gap, 1.0)[:3], torch.tensor([0.5, 0.7310585786, 0.2689414214], dtype=torch.float64))
    assert bradley_terry(gap, 0.0)[:3].tolist() == [0.5, 1.0, 0.0] and bool(bradley_terry(gap, 0.0)[3].isnan())


def test_pairs_survive_what_a_batch_goes_through():
    rows = rows_with()
    part = PairUp()
    paired = part(rows, Stats(), {})
    group = paired.select(paired.group == 1)
    assert sorted(group.reward[group.pairs.chosen, 0].tolist()) == [3.0, 3.0]
    both = cat([group, paired.select(paired.group == 0)])
    gaps = both.reward[both.pairs.chosen, 0] - both.reward[both.pairs.rejected, 0]
    assert_close(gaps, both.pairs.offset)
    assert len(joined([paired, rows.with_(group=rows.group + 5)]).pairs.chosen) == 7
    with pytest.raises(ValueError, match="both rows of a pair"):
        paired.select(torch.arange(3))
    metrics: dict = {}
    part.observe(paired, Stats(), metrics, {})
    assert metrics["pairs/number"] == 7 and metrics["pairs/groups"] == 1.0
    assert metrics["pairs/gap"] == pytest.approx(12 / 7)


def test_a_baseline_is_in_no_pair():
    stream = torch.tensor([0, 0, 0, int(Stream.BASELINE)] * 2)
    assert by_place(rows_with(stream=stream)) == {(0, 1), (0, 2)}


def test_a_batch_without_pairs_counts_none():
    part = PairUp()
    rows = part(rows_with([0.0] * 8), Stats(), {})
    metrics: dict = {}
    part.observe(rows, Stats(), metrics, {})
    assert metrics == {"pairs/number": 0.0, "pairs/groups": 0.0, "pairs/gap": 0.0}


def test_the_weight_of_pairs():
    rows = rows_with(weight=torch.tensor([2.0] * 4 + [1.0] * 4, dtype=torch.float64))
    assert {measure for *_, measure, _, _ in found(rows)} == {1.0, 2.0}
    policy = table("sampler")
    enumerated = policy.weighted(policy.space.rows(0))
    enumerated = enumerated.with_(reward=torch.zeros(len(enumerated), 1, dtype=torch.float64))
    pairs = PairUp(labels="sampled")(enumerated, Stats(), {}).pairs
    assert float(pairs.measure.sum()) == pytest.approx(1.0)  # every two completions, and each with itself
    assert set(pairs.label.tolist()) == {0.5}


# -- a judge ---------------------------------------------------------------------------------------------------------


def judged_rows() -> Rows:
    """The judge is intransitive in the first group: 0 beats 1 beats 2 beats 0; it says nothing of the second."""
    won = torch.full((8, 4), math.nan, dtype=torch.float64)
    won[0, 1], won[1, 2], won[2, 0], won[0, 3] = 0.9, 0.8, 0.8, 0.5
    won[1, 0], won[2, 1], won[0, 2], won[3, 0] = 0.1, 0.2, 0.2, 0.5
    return rows_with(features={JUDGE: won}, columns={PLACE: torch.arange(8) % 4})


def test_pairs_of_a_judge():
    part = JudgePairs("module:function")
    rows = part(judged_rows(), Stats(), {})
    pairs = rows.pairs
    chosen = set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    assert chosen == {(0, 1), (1, 2), (2, 0)}  # 1/2 is dropped
    assert sorted(pairs.offset.tolist()) == pytest.approx([0.6, 0.6, 0.8])
    rate = rows.columns["win_rate"]
    assert rate[:4].tolist() == pytest.approx([1.6 / 3, 0.45, 0.5, 0.5]) and bool(rate[4:].isnan().all())
    soft = JudgePairs("module:function", labels="expected")(judged_rows(), Stats(), {}).pairs
    assert sorted(soft.label.tolist()) == pytest.approx([0.5, 0.8, 0.8, 0.9])
    best = JudgePairs("module:function", how="best_worst")(judged_rows(), Stats(), {}).pairs
    assert list(zip(best.chosen.tolist(), best.rejected.tolist(), strict=True)) == [(0, 1)]


def test_a_judge_that_was_not_asked():
    with pytest.raises(MethodError, match="judge"):
        JudgePairs("module:function")(rows_with(), Stats(), {})


def test_win_rates_by_hand():
    rows = WinRates(temperature=0.0)(rows_with(), Stats(), {})
    assert rows.columns["win_rate"][:4].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1.0])
    assert rows.columns["win_rate"][4:].tolist()[:2] == pytest.approx([0.25, 0.25])
    assert bool(rows.columns["win_rate"][6].isnan()) and bool(rows.reward[6].isnan())
    assert_close(rows.reward[:, 0], rows.columns["win_rate"] - 0.5, equal_nan=True)
    assert rows.columns["win_rate/ess"][:4].tolist() == pytest.approx([1.0] * 4)
    own = WinRates(temperature=0.0, own=True)(rows_with(), Stats(), {}).columns["win_rate"]
    assert own[:4].tolist() == pytest.approx([2.5 / 4, 1 / 4, 1 / 4, 3.5 / 4])
    asked = WinRates(judge="module:function")(judged_rows(), Stats(), {})
    assert asked.columns["win_rate"][:3].tolist() == pytest.approx([1.6 / 3, 0.45, 0.5])
    asked = WinRates(judge="module:function", own=True)(judged_rows(), Stats(), {})
    assert asked.columns["win_rate"][:3].tolist() == pytest.approx([2.1 / 4, 1.4 / 3, 0.5])


def test_opponents_are_weighted():
    """Of the first group, the others of row 3 have the log-ratios 0, log 3 and 0; P = (1, 1, 1) for it, and so on."""
    old = torch.zeros(8, 4, dtype=torch.float64)
    ref = old.clone()
    ref[1, 0], ref[2, 3] = math.log(3), 100.0  # the second lies in the padding
    stats = Stats({LogProb(of=("old",)): old, LogProb(of=("ref",)): ref})
    rows = rows_with()
    rate = WinRates(temperature=0.0, opponent="ref")(rows, stats, {}).columns["win_rate"]
    assert rate[0] == pytest.approx((3 * 1 + 1 + 0) / 5)
    assert rate[2] == pytest.approx((3 * 0.5 + 0 + 0) / 5)
    half = WinRates(temperature=0.0, opponent="ref", share=0.5)(rows, stats, {}).columns
    assert half["win_rate"][0] == pytest.approx((3**0.5 + 1) / (3**0.5 + 2))
    assert half["win_rate/ess"][0] == pytest.approx((3**0.5 + 2) ** 2 / (3 + 2) / 3)
    none = WinRates(temperature=0.0, opponent="ref", share=0.0)(rows, Stats(), {}).columns["win_rate"]
    assert_close(none, WinRates(temperature=0.0)(rows, Stats(), {}).columns["win_rate"], equal_nan=True)


# -- the regression of SPPO ------------------------------------------------------------------------------------------


def test_regression_on_win_rates():
    """V1 and V2 of the hard loss, halved: there it is a sum over the two sides of a pair, here a mean over rows."""
    for a, d, wanted in ((1.0, -1.0, 32.0), (1.5, -0.75, 30.3125)):
        rows = k8_rows().select(torch.arange(2))
        rows = rows.with_(columns={"win_rate": torch.tensor([1.0, 0.0], dtype=torch.float64)})
        old = torch.zeros(2, 4, dtype=torch.float64)
        live = old.clone()
        live[0, 0], live[1, 0], live[0, 3] = a, d, 9.0  # the last lies in the padding
        stats = Stats({LogProb(): live.requires_grad_(), LogProb(of=("old",)): old})
        loss = WinRateRegression(beta=0.1)(rows, stats)
        assert float(2 * loss.detach()) == pytest.approx(wanted, abs=5e-7)
        (grad,) = torch.autograd.grad(loss, live)
        assert grad[:, 0].tolist() == pytest.approx([a - 5.0, d + 5.0]) and float(grad[0, 3]) == 0
        out = rows.with_(columns={"win_rate": torch.tensor([1.0, math.nan], dtype=torch.float64)})
        assert float(WinRateRegression(beta=0.1)(out, stats).detach()) == pytest.approx((a - 5.0) ** 2)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (PairUp, {"how": "none"}),
        (PairUp, {"labels": "none"}),
        (PairUp, {"temperature": -1.0}),
        (PairUp, {"min_gap": -1.0}),
        (JudgePairs, {"judge": ""}),
        (JudgePairs, {"judge": "a:b", "how": "none"}),
        (WinRates, {"share": 1.5}),
        (WinRates, {"temperature": -1.0}),
        (WinRateRegression, {"beta": 0.0}),
    ],
)
def test_bad_settings(part, options):
    with pytest.raises((ValueError, TypeError)):
        part(**options)


def test_a_missing_column_is_named():
    with pytest.raises(MethodError, match="WinRates"):
        WinRateRegression()(k8_rows(), Stats({LogProb(): torch.zeros(8, 4), LogProb(of=("old",)): torch.zeros(8, 4)}))
