"""Early-learning regularisation: the numbers of its specification, its memory, and what it is for."""

import pytest
import torch

from keel.core.errors import MethodError
from keel.core.rows import Pairs, Rows
from keel.parts.terms.early_learning import EarlyLearning, early_penalty, early_target
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb, Value
from keel.statistics.stats import Stats

SCORE, BEFORE = Value("reward", where="last"), Value("reward", of=("old",), where="last")
P3 = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


def slope(target: torch.Tensor) -> tuple[float, list[float]]:
    """R at p = (.7, .2, .1) and its gradient in the logits."""
    z = P3.log().requires_grad_()
    value = early_penalty(z.softmax(0), target)
    (grad,) = torch.autograd.grad(value, z)
    return float(value.detach()), grad.tolist()


def test_three_classes():
    """First visit at decay .7: <t, p> = .162; and at t = p, where only lambda above 2.875 resists a wrong label."""
    value, grad = slope(early_target(torch.zeros(3, dtype=torch.float64), P3, 0.7))
    assert value == pytest.approx(-0.176737, abs=5e-7)
    assert grad == pytest.approx([-0.040095, 0.024344, 0.015752], abs=1e-6)
    value, grad = slope(P3)
    assert value == pytest.approx(-0.776529, abs=5e-7)
    assert grad == pytest.approx([-0.243478, 0.147826, 0.095652], abs=5e-7)
    total = [0.7 + lam * grad[0] for lam in (1.0, 2.87, 2.88, 3.0)]  # of cross-entropy to the third class
    assert [g < 0 for g in total] == [False, False, True, True]


def test_probabilities_are_clamped_and_targets_sum_to_their_visits():
    sure = torch.tensor([1.0, 0.0], dtype=torch.float64)
    target = early_target(torch.zeros(2, dtype=torch.float64), sure, 0.5)
    assert float(target.sum()) == pytest.approx(0.5) and float(target[1]) == pytest.approx(0.5e-4)
    again = early_target(target, sure, 0.5)
    assert float(again.sum()) == pytest.approx(0.75) and bool(early_penalty(sure, again).isfinite())


def pairs(scores: list[float], index=(0, 1), position=(0, 1), **known) -> tuple[Rows, Stats]:
    """Pairs of two rows each, the chosen one first, with the score of every row."""
    count = len(scores) // 2
    ids = torch.zeros(2 * count, 1, dtype=torch.long)
    one = torch.ones(count, dtype=torch.float64)
    values = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    rows = Rows.build(
        ids, ids == 0, ids, ids == 0,
        data_index=torch.tensor(index[:count]).repeat_interleave(2),
        columns={"position": torch.tensor(position).repeat(count)},
        pairs=Pairs(2 * torch.arange(count), 2 * torch.arange(count) + 1, known.get("measure", one), one, one, 0 * one),
    )  # fmt: skip
    return rows, Stats({SCORE: values, BEFORE: values.detach()})


def test_a_pair_is_two_classes():
    """p = (.9, .1), t = p: the gradient in the margin is lambda (1 - 2 p) p (1 - p) / (1 - <p, p>)."""
    margin = torch.tensor(9.0, dtype=torch.float64).log()
    rows, stats = pairs([float(margin), 0.0])
    part = EarlyLearning(coef=3.0, decay=0.0)
    value = part(rows, stats, part.init())
    assert float(value.detach()) == pytest.approx(3 * float(torch.tensor(1 - 0.82).log()))
    (grad,) = torch.autograd.grad(value, stats[SCORE])
    assert grad.tolist() == pytest.approx([-1.2, 1.2])  # against .9 of a wrong label: it holds
    assert 0.9 - 1.2 < 0 < 0.9 - 2.0 * 0.4


def test_the_running_mean_is_that_of_the_pair_in_every_pass():
    part, state = EarlyLearning(decay=0.7), EarlyLearning().init()
    first, stats = pairs([2.0, 0.0, 1.0, 0.5])
    metrics: dict[str, float] = {}
    state = part.observe(first, stats, metrics, state)
    p = torch.tensor([2.0, 0.5], dtype=torch.float64).sigmoid()
    agreement = 0.3 * (p.square() + (1 - p).square())  # of p and the mean so far, (1 - .7) p
    assert metrics["early/agreement"] == pytest.approx(float(agreement.mean()))
    # in another order, beside another pair; what was seen of both is found again
    turned, known = pairs([1.0, 0.5, 2.0, 0.0], index=(1, 0))
    state = part.observe(turned, known, {}, state)
    wanted = (1 - 0.7**2) * torch.stack([p, 1 - p], 1)
    found = {round(float(t[0]), 9) for t in state["target"]}
    assert found == {round(float(t[0]), 9) for t in wanted} and len(state["key"]) == 2
    other, seen = pairs([3.0, 0.0], index=(7,))
    more = part.observe(other, seen, {}, state)
    assert len(more["key"]) == 3 and bool((more["key"].diff() > 0).all())
    # the other way round is another pair
    assert len(part.observe(*pairs([2.0, 0.0], position=(1, 0)), {}, state)["key"]) == 3


def test_the_loss_takes_this_visit_in_before():
    """t = .7 * .3 p + .3 p on the second visit, whatever the live policy says by then."""
    part = EarlyLearning(coef=1.0, decay=0.7)
    rows, stats = pairs([2.0, 0.0])
    state = part.observe(rows, stats, {}, part.init())
    live = torch.tensor([0.4, 0.0], dtype=torch.float64)
    moved = stats.merged({SCORE: live})
    p, q = (torch.tensor([[m], [-m]], dtype=torch.float64).sigmoid()[:, 0] for m in (2.0, 0.4))
    wanted = torch.log1p(-(0.51 * p * q).sum())
    assert float(part(rows, moved, state)) == pytest.approx(float(wanted))


def test_batches_of_bf16_and_fp32():
    part = EarlyLearning()
    rows, stats = pairs([2.0, 0.0, 1.0, 0.5])
    wanted = float(part(rows, stats, part.init()).detach())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        low = Stats({f: v.detach().to(dtype) for f, v in stats.items()})
        assert float(part(rows, low, part.init())) == pytest.approx(wanted, rel=tolerance)


def accuracy_of_clean_pairs(coef: float) -> tuple[float, float]:
    """The best on the way and the last, of a linear model with more weights than pairs, 40% of which are flipped."""
    chance = torch.Generator().manual_seed(0)
    count, width = 120, 400
    gap = torch.randn(count, width, generator=chance, dtype=torch.float64)
    gap[:, 0] = 3 * (1 + torch.rand(count, generator=chance, dtype=torch.float64))  # what tells better from worse
    flip = torch.arange(count) % 5 < 2
    shown = torch.where(flip[:, None], -gap, gap)
    part = EarlyLearning(coef=coef, decay=0.7)
    rows, _ = pairs([0.0] * (2 * count), index=tuple(range(count)))
    weight, state, told = torch.zeros(width, dtype=torch.float64, requires_grad=True), part.init(), []
    for _ in range(300):
        margin = shown @ weight
        scores = torch.stack([margin, 0 * margin], 1).flatten()
        stats = Stats({SCORE: scores, BEFORE: scores.detach()})
        loss = torch.nn.functional.softplus(-margin).mean() + part(rows, stats, state)
        (grad,) = torch.autograd.grad(loss, weight)
        state = part.observe(rows, stats, {}, state)
        with torch.no_grad():
            weight -= 0.05 * grad
        told.append(float((gap @ weight > 0).double().mean()))
    return max(told), told[-1]


def test_what_it_is_for():
    """Plain Bradley-Terry comes to agree with the flipped labels; regularised it keeps what it knew early on."""
    best, last = accuracy_of_clean_pairs(0.0)
    kept_best, kept_last = accuracy_of_clean_pairs(3.0)
    assert best - last > 0.2 and kept_best - kept_last < 0.05 and kept_last > last + 0.2


def test_bad_settings_and_rows():
    for wrong in ({"coef": -1.0}, {"decay": 1.0}, {"decay": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            EarlyLearning(**wrong)
    rows, stats = pairs([1.0, 0.0])
    part = EarlyLearning()
    with pytest.raises(MethodError, match="pairs of the data"):
        part(rows.with_(columns={}), stats, part.init())
    none = rows.with_(pairs=Pairs(*(t[:0] for t in vars(rows.pairs).values())))
    assert float(part(none, stats, part.init()).detach()) == 0.0
    state = part.observe(none, stats, {}, part.init())
    assert state["key"].tolist() == state["target"].tolist() == []


def test_the_recipe_measures_the_score_before_the_update():
    method = recipe_named("early_learning_rm")()
    assert BEFORE in method.frozen_needs(False) and SCORE in method.live_needs()
    assert recipe_named("early_learning_rm")(coef=0.0).frozen_needs(False) == ()
    assert LogProb() not in method.live_needs()
