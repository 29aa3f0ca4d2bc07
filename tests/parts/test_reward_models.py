"""Losses of reward models: numbers of the literature, strengths, contrast and the step ahead."""

import math

import pytest
import torch
from tests.worlds import heads_of, models_of, noise, rows_for

from keel.core.rows import Pairs, Rows
from keel.models.heads import RewardHead
from keel.parts.controllers.ahead import LookAhead, spread
from keel.parts.rewards.ensembles import RewardEnsemble, aggregate
from keel.parts.rewards.strength import PreferenceStrength
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.reward_models import Centring
from keel.parts.terms.scores import HeadScore
from keel.parts.terms.state_contrast import Contrastive, info_nce
from keel.statistics.engine import Engine
from keel.statistics.functionals import State, Value
from keel.statistics.stats import Stats

REWARD = Value("reward", where="last")


def pair_rows(offset: float = 0.0, label: float = 1.0, count: int = 1) -> Rows:
    """Pairs (2i, 2i + 1), the first one chosen."""
    one = torch.zeros(2 * count, 1, dtype=torch.long)
    pairs = Pairs(
        chosen=2 * torch.arange(count),
        rejected=2 * torch.arange(count) + 1,
        measure=torch.ones(count),
        coef=torch.ones(count),
        label=torch.full((count,), label),
        offset=torch.full((count,), offset),
    )
    index = torch.arange(count).repeat_interleave(2)
    rows = Rows.build(one, one == 0, one, one == 0, group=index, data_index=index)
    return rows.with_(pairs=pairs)


def scored(*scores: float, dtype=torch.float64) -> Stats:
    return Stats({REWARD: torch.tensor(scores, dtype=dtype)})


def loss(rows: Rows, *scores: float, **settings) -> float:
    return float(PairLoss(LogSigmoid(), HeadScore(), beta=1.0, **settings)(rows, scored(*scores)))


def after(mode: str, strength: float, boundary: float = -math.inf) -> Rows:
    part = PreferenceStrength(mode)
    state = part.init() | {"known": torch.tensor([strength]), "boundary": boundary}
    return part(pair_rows(), Stats(), state)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (lambda: loss(pair_rows(), 1.0, -0.5), 0.201413),
        (lambda: loss(pair_rows(0.5), 1.0, -0.5, margin=1.0), 0.313262),
        (lambda: loss(pair_rows(), 1.0, -0.5) + float(Centring()(pair_rows(), scored(1.0, -0.5))), 0.203913),
        (lambda: loss(after("margin", 0.8), 1.0, -0.5, margin=1.0), 0.403186),
        (lambda: float(after("soft", 0.8).pairs.label), 0.689974),
        (lambda: loss(after("soft", 0.8), 1.0, -0.5), 0.666452),
        (lambda: loss(pair_rows(), 1.0, -0.5, label_smoothing=0.1), 0.351413),
        (lambda: loss(after("flip", -0.8, boundary=0.0), 1.0, -0.5), 1.701413),
    ],
)
def test_numbers_of_the_literature(found, wanted):
    assert found() == pytest.approx(wanted, abs=5e-7)


def test_without_a_strength_margin_is_bradley_terry_and_soft_knows_no_order():
    assert loss(after("margin", 0.0), 1.0, -0.5, margin=1.0) == loss(pair_rows(), 1.0, -0.5)
    assert loss(after("soft", 0.0), 1.0, -0.5) == loss(after("soft", 0.0), -0.5, 1.0)


def test_the_soft_label_is_least_at_the_strength():
    gap = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    rows = after("soft", 0.8)
    stats = Stats({REWARD: torch.stack([gap, torch.zeros_like(gap)])})
    (slope,) = torch.autograd.grad(PairLoss(LogSigmoid(), HeadScore(), beta=1.0)(rows, stats), gap)
    assert abs(float(slope)) < 1e-7


STRENGTHS = (1.2, 0.4, -0.3, 0.9, 0.1, 0.7, -0.6, 0.5, 1.0, 0.1)


def test_flip_takes_the_lowest_and_turns_their_strength():
    strength = torch.tensor(STRENGTHS)
    assert (float(strength.mean()), float(strength.std(correction=0))) == pytest.approx((0.4, 0.549545), abs=5e-7)
    rows = pair_rows(count=10)
    for share, wanted in ((0.1, [6]), (0.2, [2, 6]), (0.9, [2, 6])):  # never one that is preferred
        part = PreferenceStrength("flip_margin", share)
        found = part(rows, Stats(), part.measured(strength)).pairs
        assert (found.chosen != rows.pairs.chosen).nonzero().flatten().tolist() == wanted
        turned = [abs(s) if i in wanted else s for i, s in enumerate(STRENGTHS)]
        torch.testing.assert_close(found.offset, torch.tensor(turned))
    part = PreferenceStrength("flip", 0.0)
    assert torch.equal(part(rows, Stats(), part.measured(strength)).pairs.chosen, rows.pairs.chosen)


def test_before_strengths_are_known_nothing_is_flipped():
    part = PreferenceStrength("flip_soft")
    found = part(pair_rows(offset=-2.0), Stats(), part.init()).pairs
    assert found.chosen.tolist() == [0] and float(found.label) == pytest.approx(1 / (1 + math.exp(2)))


def test_aggregates():
    scores = torch.tensor([[1.0], [2.0], [6.0]])
    assert float(aggregate(scores, "mean")) == 3 and float(aggregate(scores, "wco")) == 1
    assert float(aggregate(scores, "uwo")) == pytest.approx(0.666667, abs=5e-7)
    assert float(aggregate(scores, "uwo", 0.5, unbiased=True)) == pytest.approx(-0.5)
    assert float(aggregate(scores, "uwo", 0.1, unbiased=True)) == pytest.approx(2.3, abs=1e-6)
    for rule in ("mean", "wco", "uwo"):
        assert float(aggregate(scores[:1], rule, unbiased=True)) == 1
    with pytest.raises(ValueError, match="at least one"):
        aggregate(scores[:0])


def test_the_spread_of_three_rewards():
    one = torch.zeros(3, 1, dtype=torch.long)
    rows = Rows.build(one, one == 0, one, one == 0, group=one[:, 0])
    assert float(spread(torch.tensor([0.2, 1.0, 2.5]), rows)) == pytest.approx(0.536984, abs=5e-7)
    tied = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(spread(tied, rows), tied)
    assert slope.tolist() == [0.0, 0.0, 0.0]
    two = Rows.build(one, one == 0, one, one == 0, group=torch.tensor([0, 1, 1]))
    pair = 0.5 / (1 + math.exp(-1.5))  # (2 / 4) sigmoid(1.5), and 0 of the prompt with one answer
    assert float(spread(torch.tensor([0.2, 1.0, 2.5]), two)) == pytest.approx(pair / 2, abs=1e-6)


def test_contrast_by_hand():
    """Orthogonal states: each finds itself with log(1 + e^(-1 / t)); equal states: log n."""
    eye, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert float(info_nce(eye, eye, ones, 0.5)) == pytest.approx(math.log1p(math.exp(-2)))
    same = torch.ones(3, 4, dtype=torch.float64)
    assert float(info_nce(same, same, torch.ones(3, dtype=torch.float64), 0.05)) == pytest.approx(math.log(3))


def contrast_rows() -> tuple[Rows, Stats]:
    rows = pair_rows(count=3)
    return rows.with_(row=torch.arange(6) + 100), Stats({State(): noise("states", shape=(6, 40))})


@pytest.mark.parametrize("on", ["states", "differences"])
def test_contrast_does_not_depend_on_the_order_of_rows(on):
    rows, stats = contrast_rows()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    term = Contrastive(1.0, on, temperature=1.0)
    again = term(rows.select(order), stats.select(order))
    torch.testing.assert_close(again, term(rows, stats), rtol=1e-12, atol=0)
    assert float(term(rows, stats)) > 1e-3


def test_views_are_dropout_of_the_row():
    rows, stats = contrast_rows()
    state = torch.ones(6, 4000, dtype=torch.float64)
    one, two = Contrastive(dropout=0.25).views(rows.row, state)
    assert set(one.unique().tolist()) == {0.0, 1 / 0.75} and not torch.equal(one, two)
    assert abs(float((one == 0).double().mean()) - 0.25) < 0.01
    assert not torch.equal(one[0], one[1])
    plain = Contrastive(dropout=0.0).views(rows.row, stats[State()])
    assert all(torch.equal(view, stats[State()]) for view in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_half_precision(dtype):
    rows, wanted = pair_rows(), 0.201413
    found = PairLoss(LogSigmoid(), HeadScore(), beta=1.0)(rows, scored(1.0, -0.5, dtype=dtype))
    assert float(found) == pytest.approx(wanted, abs=1e-6 if dtype == torch.float32 else 2e-3)


def test_the_gradient_of_states_is_that_of_finite_differences():
    """d L / d table through the engine's statistic `state`, in another direction than any log-probability."""
    from keel.recipes.reward_models import contrastive_rm

    method = contrastive_rm(coef=0.7)
    rows = rows_for(method)

    def value(nudge: float, learn: bool = False):
        models = models_of(method)
        with torch.no_grad():
            models["policy"].table += nudge * noise("direction", shape=tuple(models["policy"].table.shape))
        engine = Engine(models, heads_of(method, models["policy"]), max_tokens=16)
        found, _ = engine.step(list(method.live_needs()), rows, Stats(), lambda r, s: method.loss(r, s, {}))
        grad = models["policy"].table.grad
        return float(found), float((grad * noise("direction", shape=tuple(grad.shape))).sum())

    step = 1e-5
    slope = (value(step)[0] - value(-step)[0]) / (2 * step)
    assert value(0.0)[1] == pytest.approx(slope, rel=1e-6) and abs(slope) > 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Contrastive(temperature=0.0),
        lambda: Contrastive(dropout=1.0),
        lambda: Contrastive(on="tokens"),
        lambda: PreferenceStrength("sharp"),
        lambda: PreferenceStrength(share=1.5),
        lambda: PreferenceStrength(folds=1),
        lambda: PreferenceStrength(steps=0),
        lambda: LookAhead(rate=-1.0),
        lambda: LookAhead(num_generations=1),
        lambda: RewardEnsemble(()),
        lambda: RewardEnsemble(("a", "a")),
        lambda: RewardEnsemble(("a",), "median"),
        lambda: RewardEnsemble(("a",), coef=-1.0),
        lambda: RewardHead(-1.0),
    ],
)
def test_bad_settings(bad):
    with pytest.raises((ValueError, TypeError)):
        bad()
