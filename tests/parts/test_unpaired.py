"""Losses of labelled completions: the numbers of KTO and BCO, their points of reference, and mismatched rows."""

import pytest
import torch
from tests.parts.completions import ALIKE, REF, V1, V2, assert_gradient, beside, completions
from tests.worlds import online_rows, polluted

from keel.core.choice import generator
from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Stream, cat
from keel.parts.terms.scores import HeadScore, LogRatio
from keel.parts.terms.unpaired import MEAN, MISMATCHED, UnpairedLoss, mismatched
from keel.recipes.unpaired import bco, kto
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.train.mismatched import with_mismatched

KTO, BCO = UnpairedLoss(), UnpairedLoss("log_sigmoid", shift="running")
GOOD_AND_BAD = torch.tensor([1.0, 0.0])


def labelled(vector: dict, dtype=torch.float64):
    return completions(**vector, dtype=dtype, label=GOOD_AND_BAD)


def one(vector: dict, side: int, z0: float | None) -> float:
    """The loss of one completion."""
    rows, stats = labelled(vector)
    keep = torch.tensor([side])
    more = None if z0 is None else beside([z0, z0])
    return float(KTO(rows.select(keep), stats.select(keep), KTO.init(), more))


@pytest.mark.parametrize(
    ("vector", "side", "z0", "wanted"),
    [
        (V1, 0, None, 0.475021),
        (V1, 0, 0.0, 0.475021),
        (V1, 0, 0.5, 0.487503),
        (V1, 1, None, 0.475021),
        (V1, 1, 0.5, 0.462570),
        (V2, 0, None, 0.462570),
        (V2, 0, 0.5, 0.475021),
        (V2, 1, None, 0.481259),
        (V2, 1, 0.5, 0.468791),
        (V2, 1, -0.5, 0.481259),  # an estimate below 0 counts as 0
    ],
)
def test_kto(vector, side, z0, wanted):
    assert one(vector, side, z0) == pytest.approx(wanted, abs=ALIKE)


def test_kto_averages_over_examples_and_not_over_classes():
    """Three good ones and a bad one: the mean of four numbers, each weighted by its class."""
    rows, stats = completions([-12, -12, -12, -15], [-13, -13, -13, -14], label=torch.tensor([1.0, 1, 1, 0]))
    weighted = UnpairedLoss(chosen_weight=0.5, rejected_weight=2.0)
    assert float(weighted(rows, stats, {})) == pytest.approx((3 * 0.5 + 2.0) * 0.475021 / 4, abs=ALIKE)
    heavy = rows.with_(weight=torch.tensor([1.0, 0, 0, 3]))
    assert float(KTO(heavy, stats, {})) == pytest.approx(0.475021, abs=ALIKE)
    soft = rows.with_(label=torch.full((4,), 0.25))
    mixed = (
        0.25 * torch.tensor([-0.1, -0.1, -0.1, 0.1]).sigmoid() + 0.75 * torch.tensor([0.1, 0.1, 0.1, -0.1]).sigmoid()
    )
    assert float(KTO(soft, stats, {})) == pytest.approx(float(mixed.mean()), abs=1e-6)


@pytest.mark.parametrize(("vector", "plain"), [(V1, 1.288793), (V2, 1.277307)])
def test_bco_without_a_shift(vector, plain):
    """The pair's two halves, as their mean."""
    rows, stats = labelled(vector)
    loss = UnpairedLoss("log_sigmoid", shift="none")
    assert 2 * float(loss(rows, stats, loss.init())) == pytest.approx(plain, abs=ALIKE)


@pytest.mark.parametrize(("vector", "shifted"), [(V1, 1.289417), (V2, 1.276996)])
def test_bco_at_a_shift_of_5_percent(vector, shifted):
    """A memory whose mean with this batch is 0.05: 0.9 m + 0.1 r = 0.05 (0.9 w + 0.1), r the batch's mean reward."""
    rows, stats = labelled(vector)
    mean = 0.1 * (vector["policy"][0] - vector["ref"][0] + vector["policy"][1] - vector["ref"][1]) / 2
    state = {"total": (0.05 - 0.1 * mean) / 0.9, "weight": 1.0}
    assert 2 * float(BCO(rows, stats, state)) == pytest.approx(shifted, abs=ALIKE)


def test_the_running_mean():
    """Means 0.4 and then 0.1, decay 0.75: (0.75 0.25 0.4 + 0.25 0.1) / (0.75 0.25 + 0.25) = 0.1 / 0.4375."""
    loss = UnpairedLoss("log_sigmoid", beta=1.0, shift="running", decay=0.75)
    rows, stats = completions([-2.6], [-3.0], label=torch.ones(1))
    reward, weight = loss.rewards(rows, stats).detach(), torch.ones(1)
    assert float(loss.delta(reward, weight, loss.init(), None)) == pytest.approx(0.4)  # no start at 0
    metrics = {name: float(value) for name, value in loss.metrics(rows, stats).items()}
    assert metrics[MEAN] == pytest.approx(0.4)
    state = loss.observe(rows, stats, metrics, loss.init())
    rows, stats = completions([-2.9], [-3.0], label=torch.ones(1))
    found = loss.delta(loss.rewards(rows, stats).detach(), weight, state, None)
    assert float(found) == pytest.approx(0.1 / 0.4375)
    assert loss.observe(rows, stats, {}, state) == state == loss.observe(rows, stats, {MEAN: float("nan")}, state)
    still = UnpairedLoss()
    assert still.observe(rows, stats, metrics, still.init()) == still.init()


def test_gradients():
    """Against finite differences with the point of reference held; and of a symmetric pair by hand: p (1 - p) beta."""
    rows, stats = labelled(V2)
    more = beside([0.4, 0.2])
    assert_gradient(lambda r, s: KTO(r, s, {}, more), rows, stats)
    for loss in (KTO, UnpairedLoss("log_sigmoid", shift="none", beta=0.7)):
        assert_gradient(lambda r, s, loss=loss: loss(r, s, loss.init()), rows, stats)
    KTO(rows, stats, {}, more).backward()
    p = torch.tensor(0.1 * (1.5 - 0.3)).sigmoid()
    grad = stats[LogProb()].grad
    assert float(grad[0, 0]) == pytest.approx(float(-0.1 * p * (1 - p) / 2), rel=1e-5)
    assert more[1][LogProb()].grad is None  # a stop-gradient
    rows, stats = labelled(V2)
    BCO(rows, stats, BCO.init()).backward()
    shift = 0.1 * (1.5 - 0.75) / 2
    assert float(stats[LogProb()].grad[0, 0]) == pytest.approx(
        -0.05 * float(torch.tensor(shift - 0.15).sigmoid()), rel=1e-6
    )


@pytest.mark.parametrize("loss", [KTO, BCO], ids=["kto", "bco"])
def test_padding_order_and_precision(loss):
    rows, stats = completions(
        [-4, -5, -6, -3], [-4.5, -4, -6.1, -3.9], [3, 5, 1, 2], label=torch.tensor([1.0, 0, 1, 0])
    )
    more = beside([0.3, -0.1, 0.2])
    wanted = float(loss(rows, stats, loss.init(), more))
    order = torch.randperm(4, generator=generator("labels"))
    assert float(loss(rows.select(order), stats.select(order), loss.init(), more)) == pytest.approx(wanted, abs=1e-12)
    garbage = {f: torch.where(rows.mask, value, float("nan")) for f, value in stats.items()}
    assert float(loss(rows, Stats(garbage), loss.init(), more)) == pytest.approx(wanted, abs=1e-12)
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        coarse = Stats({f: value.detach().to(dtype) for f, value in stats.items()})
        found = loss(rows, coarse, loss.init(), more)
        assert found.dtype == torch.float32 and float(found) == pytest.approx(wanted, abs=near)


def test_metrics():
    """Rewards 0.1, -0.1 of good and -0.05, 0.1 of bad ones: of four comparisons one is right, and one a tie."""
    policy, ref = [-2.0, -4.0, -3.5, -1.0], [-3.0, -3.0, -3.0, -2.0]
    rows, stats = completions(policy, ref, label=torch.tensor([1.0, 1, 0, 0]))
    found = {name: float(value) for name, value in KTO.metrics(rows, stats, beside([0.5, -0.1])).items()}
    assert found["rewards/chosen"] == pytest.approx(0.0, abs=1e-9)
    assert found["rewards/rejected"] == pytest.approx(0.025)
    assert found["rewards/margins"] == pytest.approx(-0.025)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0.5) / 4)  # 0.1 > -0.05, 0.1 = 0.1
    assert found["kl"] == pytest.approx(0.2)
    assert "kl" not in KTO.metrics(rows, stats)


# -- mismatched rows -------------------------------------------------------------------------------------------------


def test_each_prompt_gets_the_completion_of_the_next_other_prompt():
    rows, _ = completions([-1.0] * 5, [-1.0] * 5, [1, 2, 3, 4, 5], label=torch.ones(5))
    rows = rows.with_(prompt_ids=torch.tensor([[7], [7], [8], [9], [7]]), group=torch.tensor([0, 0, 1, 2, 3]))
    found = mismatched(rows)
    assert found.prompt_ids[:, 0].tolist() == [7, 7, 8, 9, 7]
    assert found.lengths.tolist() == [3, 3, 4, 5, 3]  # rows 2, 2, 3, 4, and 2 again
    assert set(found.stream.tolist()) == {int(Stream.REGULARISER)}
    assert len(set(found.row.tolist()) | set(rows.row.tolist())) == 10
    assert found.group.tolist() == [4, 4, 5, 6, 7]


def test_padding_before_a_prompt_makes_no_other_prompt():
    rows = online_rows().with_(reward=None)
    assert torch.equal(mismatched(polluted(rows, 2, 0)).lengths, mismatched(rows).lengths)


def test_a_completion_that_is_too_long_for_its_prompt_is_cut():
    rows, _ = completions([-1.0, -1.0], [-1.0, -1.0], [2, 5])
    found = mismatched(rows, max_length=4)
    assert found.lengths.tolist() == [3, 2]
    assert mismatched(rows, max_length=1).lengths.tolist() == [0, 0]


def test_one_prompt_has_no_mismatch():
    rows, stats = completions([-12.0, -15.0], [-13.0, -14.0], label=GOOD_AND_BAD)
    rows = rows.with_(prompt_ids=torch.zeros_like(rows.prompt_ids))
    assert len(mismatched(rows)) == 0 and len(with_mismatched(rows, None)) == 2
    with pytest.raises(ConfigError, match="a batch of one"):
        with_mismatched(rows.select(torch.tensor([0])), None)
    states = {"terms.labels": KTO.init()}
    assert float(kto().loss(rows, stats, states)) == pytest.approx(0.475021, abs=ALIKE)


def test_rows_that_stand_beside_the_batch_for_others_do_not_count():
    rows, stats = completions([-2.5, -9.0], [-3.0, -3.0])
    rows = rows.with_(columns={MISMATCHED: torch.tensor([True, False])})
    assert float(KTO.delta(torch.zeros(1), torch.ones(1), {}, (rows, stats))) == pytest.approx(0.05)
    labelled_rows, _ = completions([-1.0] * 3, [-1.0] * 3, [1, 2, 3])
    aside = labelled_rows.with_(stream=torch.tensor([0, int(Stream.REGULARISER), 0]))
    assert mismatched(aside).lengths.tolist() == [3, 1]


def test_the_method_reads_them():
    """The loss of the method on rows of both kinds is that with z0, and no row of theirs is learnt from."""
    rows, stats = labelled(V2)
    more, numbers = beside([0.5, 0.5])
    stream = torch.full_like(more.stream, int(Stream.REGULARISER))
    more = more.with_(label=GOOD_AND_BAD, stream=stream, group=more.group + 2)
    whole = cat([rows, more])
    wide = {
        f: torch.cat([torch.nn.functional.pad(x, (0, 16 - x.shape[1])) for x in (stats[f], numbers[f])]) for f in stats
    }
    found = kto().loss(whole, Stats(wide), kto().initial_states())
    assert float(found) == pytest.approx((0.475021 + 0.468791) / 2, abs=1e-6)
    (grad,) = torch.autograd.grad(found, numbers[LogProb()], allow_unused=True)
    assert grad is None or not bool(grad.any())
    assert kto().reads_mismatched and not bco().reads_mismatched and not kto(shift="none").reads_mismatched
    assert kto().reads == bco().reads == "labels"


# -- bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"link": "hinge"}, {"shift": "median"}, {"beta": 0.0}, {"decay": 1.0}, {"chosen_weight": -1.0}],
    ids=str,
)
def test_bad_settings(settings):
    with pytest.raises((ValueError, TypeError)):
        UnpairedLoss(**settings)


def test_scores_that_leave_a_constant_open_are_refused():
    class Open:
        difference_only = True

        def __call__(self, log_ratio):
            return log_ratio

    with pytest.raises(MethodError, match="constant of the prompt"):
        UnpairedLoss(score=LogRatio(map=Open()))
    assert UnpairedLoss(score=HeadScore()).heads_read == ("reward",)


def test_rows_without_labels_are_refused():
    rows, stats = completions([-1.0], [-1.0])
    with pytest.raises(MethodError, match="label"):
        KTO(rows, stats, {})
    assert REF in KTO.needs
