"""Entropy held at an anchor (SIREN) and inside the band of its history (EPO): numbers by hand, gradients, limits."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_rows
from tests.worlds import from_probs, outcome, rows_for, table

from keel.core.aggregate import masked_mean
from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.method import Method
from keel.parts.controllers.entropy import EntropyAnchor, PhaseWeight, TurnEntropy, phase_weight
from keel.parts.masks.entropy import PeakEntropy
from keel.parts.terms.entropy import AnchoredEntropy, EntropyBand
from keel.parts.terms.penalties import NegativeEntropy, Summand
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.entropy import nucleus_entropy, peaks
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats

TEN = [0.1, 0.2, 1.5, 0.3, 0.05, 0.9, 0.4, 0.2, 0.6, 1.1]
LIVE, OLD = Entropy(), Entropy(of=("old",))


def one_row(values: list[float], padding: int = 0, fill: float = math.nan) -> tuple[Rows, torch.Tensor]:
    width = len(values) + padding
    mask = torch.arange(width)[None] < len(values)
    ids = torch.zeros(1, width, dtype=torch.long)
    rows = Rows.build(ids[:, :1], torch.ones(1, 1, dtype=torch.bool), ids, mask)
    return rows, torch.tensor([values + [fill] * padding], dtype=torch.float64)


# -- SIREN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "wanted"), [(1.0, 1.142120), (0.9, 0.993268), (0.8, 0.661563)], ids=["all", "three kept", "two kept"]
)
def test_entropy_of_a_nucleus(top_p, wanted):
    """At p = 0.9 the third token crosses and stays; the two that the release keeps are the nucleus of 0.8."""
    space = SequenceSpace(4, 1)
    need = nucleus_entropy(top_p, 10000)
    found = Engine({"policy": from_probs([0.5, 0.3, 0.15, 0.05], space=space)}).measure([need], space.rows())[need]
    assert float(found[0, 0]) == pytest.approx(wanted, abs=ALIKE)


def test_peaks_by_hand():
    """The quantile of 0.8 is 0.94; the peaks are tokens 2 and 9, of mean 1.3; (1.3 - 0.8)^2 0.005 = 0.00125."""
    for padding in (0, 3):
        rows, entropy = one_row(TEN, padding)
        found = peaks(entropy, rows.mask, 0.8)
        assert found[0].nonzero().flatten().tolist() == [2, 9]
        term = AnchoredEntropy(0.005, 0.8, "peaks", 1.0, None)
        value = term(rows.with_(masks={"peaks": found}), Stats({term.needs[0]: entropy}))
        assert float(value) == pytest.approx(0.00125, abs=1e-12)


def test_ties_leave_no_row_without_a_peak():
    rows, entropy = one_row([0.7, 0.7, 0.7, 0.1], 2)
    assert peaks(entropy, rows.mask, 0.8)[0].tolist() == [True, True, True, False, False, False]
    single, value = one_row([0.4], 1)
    assert peaks(value, single.mask, 0.8)[0].tolist() == [True, False]
    assert peaks(entropy, rows.mask, 0.0).equal(rows.mask)


def test_rows_without_tokens_count_for_nothing():
    rows, entropy = one_row(TEN)
    empty = rows.with_(mask=torch.zeros_like(rows.mask))
    assert not peaks(entropy, empty.mask, 0.8).any()
    term = AnchoredEntropy(1.0, 0.0, None, 1.0, None)
    assert float(term(empty, Stats({term.needs[0]: entropy}))) == 0


@pytest.mark.parametrize(("anchor", "direction"), [(0.1, 1.0), (2.0, -1.0)], ids=["above", "below"])
def test_the_pull_has_two_sides(anchor, direction):
    """d/dH = 2 c (Hbar - anchor) / (rows x peaks of the row), Hbar = 0.7 of rows with means 0.4 and 1."""
    entropy = torch.tensor([[0.2, 0.6, 7.0], [1.0, 7.0, 7.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    term = AnchoredEntropy(0.5, anchor, None, 1.0, None)
    (grad,) = torch.autograd.grad(term(rows, Stats({term.needs[0]: entropy})), entropy)
    pull = 2 * 0.5 * (0.7 - anchor)
    assert pull * direction > 0
    assert grad.tolist() == [pytest.approx([pull / 4, pull / 4, 0]), pytest.approx([pull / 2, 0, 0])]


def test_at_the_anchor_nothing_pulls():
    method = recipe_named("siren")(epsilon=0.2, epsilon_high=None)
    rows = rows_for(method)
    plain = outcome(recipe_named("dr_grpo")(), rows, moved=False)
    found = outcome(method, rows, moved=False)
    torch.testing.assert_close(found.grads["policy.table"], plain.grads["policy.table"], rtol=0, atol=0)
    away = outcome(recipe_named("siren")(epsilon=0.2, epsilon_high=None, anchor=0.3), rows, moved=False)
    assert float((away.grads["policy.table"] - plain.grads["policy.table"]).abs().max()) > 1e-4


def test_the_gradient_reaches_the_table():
    """Finite differences, with the peaks as they are."""
    method = Method(kind="supervised", masks={"peaks": PeakEntropy()}, terms={"e": AnchoredEntropy(1.0, 0.2, "peaks")})
    found = outcome(method).grads["policy.table"].flatten()
    assert float(found.abs().max()) > 1e-2
    for index in found.abs().topk(3).indices.tolist():
        move = torch.zeros_like(found)
        losses = []
        for sign in (1, -1):
            move[index] = sign * 1e-6
            losses.append(float(outcome(method, nudge=move).loss))
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(found[index]), rel=1e-5)


def test_the_anchor_is_that_of_the_first_batch():
    """It arrives with the second batch, under the masks and the mean of the term, and stays."""
    method = recipe_named("siren")()
    controller, term = method.controllers["anchor"], method.terms["peak_entropy"]
    rows = rows_for(method)
    policy = table("old")
    stats = Engine({"old": policy, "policy": policy}).measure([*controller.needs, term.needs[0]], rows)
    values, state = controller.update({}, controller.init(), 0)
    assert values == {} and method.terms["peak_entropy"].anchor is None
    metrics: dict = {}
    controller.observe(rows, stats, metrics, {})
    values, state = controller.update(metrics, state, 1)
    later, state = controller.update({"entropy/peak": 99.0}, state, 2)
    assert later == values == {"terms.peak_entropy.anchor": metrics["entropy/peak"]}
    for path, value in values.items():
        method = method.set(path, value)
    masks = {"peaks": method.masks["peaks"](rows, stats)}
    assert float(method.terms["peak_entropy"](rows.with_(masks=masks), stats)) == pytest.approx(0, abs=1e-18)


# -- EPO -------------------------------------------------------------------------------------------------------------

FOUR = [0.1, 0.5, 1.0, 2.2]


def band(values: list[float], **settings) -> tuple[torch.Tensor, torch.Tensor]:
    rows, entropy = one_row(values, 1)
    entropy.requires_grad_()
    penalty = EntropyBand(**settings)(rows, Stats({LIVE: entropy}))
    grad = torch.zeros_like(entropy)
    if penalty.requires_grad:
        (grad,) = torch.autograd.grad(penalty[rows.mask].sum(), entropy)
    return penalty.detach()[0, :-1], grad[0]


def test_band_by_hand():
    released, slope = band(FOUR, gradient=False)
    assert (0.1 * released).tolist() == pytest.approx([0.1, 0.1, 0, 0.1]) and not slope.any()
    hinge, slope = band(FOUR)
    assert hinge.tolist() == pytest.approx([0.7, 0.3, 0, 1.0])
    assert slope.tolist() == [-1, -1, 0, 1, 0]
    for history in ((), (math.inf,)):
        assert not band(FOUR, history=history, low=0.0)[0].any()


def test_band_of_a_row():
    """Mean 0.95 is inside; the mean of the first two, 0.3, lacks 0.5, and each of them may help."""
    assert not band(FOUR, level="sequence")[0].any()
    found, slope = band(FOUR[:2], level="sequence")
    assert found.tolist() == pytest.approx([0.5, 0.5]) and slope.tolist() == pytest.approx([-1, -1, 0])


@pytest.mark.parametrize("per_token", [False, True])
def test_turns_have_their_own_history(per_token):
    """Rows 0-3 are turn 1, rows 4-7 turn 3, which no batch has had."""
    rows = k8_rows()
    turn = 1 + 2 * rows.group
    column = turn[:, None].expand(8, 4) if per_token else turn
    rows = rows.with_(columns={"turn": column})
    entropy = torch.full((8, 4), 2.0, dtype=torch.float64)
    found = EntropyBand(0.5, 1.5, (9.0, 1.0, 9.0))(rows, Stats({LIVE: entropy}))
    assert found[:4].unique().tolist() == [0.5] and not found[4:].any()


def test_history_over_batches():
    """Turn 0 has 1 and 3, turn 1 only 2 from the second batch; turn 3 waits for turn 2."""
    controller = TurnEntropy("band")
    state = controller.init()
    for metrics, wanted in (
        ({}, ()),
        ({"entropy/turn/0": 1.0}, (1.0,)),
        ({"entropy/turn/0": 3.0, "entropy/turn/1": 2.0, "entropy/turn/3": 5.0}, (2.0, 2.0)),
        ({"entropy/turn/2": 4.0}, (2.0, 2.0, 4.0, 5.0)),
    ):
        values, state = controller.update(metrics, state, 0)
        assert values == {"terms.band.penalty.history": wanted}
    method = recipe_named("epo")()
    for path, value in values.items():
        method = method.set(path, value)
    assert method.terms["band"].penalty.history == (2.0, 2.0, 4.0, 5.0)


def test_what_a_batch_says_of_its_turns():
    rows = k8_rows()
    rows = rows.with_(columns={"turn": rows.group})
    entropy = torch.where(MASK, 1.0 + rows.group[:, None].double(), 7.0)
    metrics: dict = {}
    TurnEntropy().observe(rows, Stats({OLD: entropy}), metrics, {})
    assert metrics == {"entropy/turn/0": pytest.approx(1.0), "entropy/turn/1": pytest.approx(2.0)}


def test_phase_weight():
    found = [phase_weight(e, 150) for e in (0, 37, 75, 76, 150)]
    assert found == pytest.approx([1, 0.874563, 0.827067, 0.768632, 0.039830], abs=ALIKE)
    part = PhaseWeight("terms.band.coef", 0.01, 150)
    assert part.update({}, {}, 76)[0] == {"terms.band.coef": pytest.approx(0.00768632, abs=1e-8)}


def test_the_released_penalty_moves_nothing_and_the_other_does():
    """At a history that puts every token outside the band."""
    epo, grpo = recipe_named("epo"), recipe_named("grpo")
    bonus = outcome(grpo(entropy_coef=0.1)).grads["policy.table"]
    made = {
        name: epo(entropy_coef=0.1, smoothing=0.5, high=1.1, differentiable=name == "hinge").set(
            "terms.band.penalty.history", (0.5,)
        )
        for name in ("hinge", "released")
    }
    found = {name: outcome(method) for name, method in made.items()}
    assert torch.equal(found["released"].grads["policy.table"], bonus)
    assert float(found["released"].loss) > float(outcome(grpo(entropy_coef=0.1)).loss) + 1e-3
    assert float((found["hinge"].grads["policy.table"] - bonus).abs().max()) > 1e-3


def test_above_the_band_the_hinge_takes_the_bonus_back():
    """Everything above: -0.1 mean H + 0.1 alpha mean (H - c), slope 1 - alpha of the bonus."""
    hinge = Summand(EntropyBand(0.0, 1.0, (0.01,)), 0.05)
    both = Method(kind="supervised", terms={"bonus": Summand(NegativeEntropy(), 0.1), "band": hinge})
    alone = Method(kind="supervised", terms={"bonus": Summand(NegativeEntropy(), 0.05)})
    found, wanted = outcome(both), outcome(alone)
    torch.testing.assert_close(found.grads["policy.table"], wanted.grads["policy.table"], rtol=1e-9, atol=1e-12)
    rows = found.rows
    assert float(masked_mean(found.stats[LIVE], rows)) > 0.01


def test_without_smoothing_it_is_the_bonus():
    assert recipe_named("epo")(smoothing=0.0, entropy_coef=0.1) == recipe_named("grpo")(entropy_coef=0.1)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: PeakEntropy(quantile=1.0), "quantile"),
        (lambda: PeakEntropy(top_p=0.0), "top_p"),
        (lambda: PeakEntropy(top_k=0), "top_k"),
        (lambda: EntropyAnchor(quantile=-0.1), "quantile"),
        (lambda: AnchoredEntropy(coef=-1.0), "coef"),
        (lambda: AnchoredEntropy(top_p=2.0), "top_p"),
        (lambda: AnchoredEntropy(1.0, 1.0, "none")(k8_rows(), Stats()), "no mask 'none'"),
        (lambda: EntropyBand(1.2, 0.8), "low <= high"),
        (lambda: EntropyBand(history=(-1.0,)), "history"),
        (lambda: PhaseWeight("terms.band.coef", steps=1), "steps"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
