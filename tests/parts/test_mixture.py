"""JS by its definition (DPH-RL): KL to the mean of two policies, by samples of each; batches drawn by chance."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_rows, k8_stats
from tests.worlds import assert_same, outcome, rows_for

from keel.core.aggregate import Aggregation
from keel.core.config import from_config, to_config
from keel.core.rows import Rows, Stream
from keel.exact.space import SequenceSpace
from keel.models.sources import Initial
from keel.parts.controllers.coefficients import OnSomeBatches
from keel.parts.terms.mixture import MixtureKL, RehearsalMixtureKL
from keel.parts.terms.penalties import Summand
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.verify.population import expected_update
from keel.verify.world import World

POLICY, REF = [0.10, 0.30, 0.15, 0.25, 0.20], [0.40, 0.25, 0.20, 0.10, 0.05]
KINDS = {"kind": "js_by_definition", "eta": 1.0}
REFERENCE = LogProb(of=("ref",))


def five(policy: list[float]) -> World:
    """One prompt, one token of five; no completion earns anything."""
    log = [torch.tensor(x, dtype=torch.float64).log()[None, None] for x in (policy, policy, REF, REF)]
    return World(SequenceSpace(5, 1), torch.zeros(1, 5, dtype=torch.float64), *log)


def slope_of(value, policy: list[float]) -> torch.Tensor:
    """Gradient of a function of the probabilities by the logits."""
    logits = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    (found,) = torch.autograd.grad(value(logits.softmax(0)), logits)
    return found


def half(first: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(first || (p + q) / 2)."""
    return (first * (2 * first / (p + q)).log()).sum()


REF_ = torch.tensor(REF, dtype=torch.float64)


def test_both_halves_are_twice_the_jensen_shannon_divergence():
    """2 JS = .183625 on the example of the specification, with its exact gradient."""
    method = recipe_named("dph_rl")(**KINDS).set("terms.rollouts.penalty.estimator", "unbiased")
    found = expected_update(method, five(POLICY))
    assert found.loss == pytest.approx(0.183625, abs=ALIKE)
    wanted = slope_of(lambda p: half(p, p, REF_) + half(REF_, p, REF_), POLICY)
    torch.testing.assert_close(-found.direction[0, 0], wanted, rtol=1e-9, atol=1e-12)


def test_the_half_on_stored_samples():
    """Its value and its gradient, from k1 and from k3; of the first nothing is left but noise where they agree."""
    method = recipe_named("dph_rl")(**KINDS).set("terms.rollouts.coef", 0.0)
    for estimator in ("k1", "k3"):
        made = method.set("terms.rehearsal.estimator", estimator)
        found = expected_update(made, five(POLICY))
        p = torch.tensor(POLICY, dtype=torch.float64)
        assert found.loss == pytest.approx(float(half(REF_, p, REF_)), abs=1e-12)
        wanted = slope_of(lambda p: half(REF_, p, REF_), POLICY)
        torch.testing.assert_close(-found.direction[0, 0], wanted, rtol=1e-9, atol=1e-12)


def test_the_estimators_on_the_policys_samples():
    """k1 and k3 have the value; the slope of k3 is (u - 1) / (2 u (1 + u)), which is not that of the divergence."""
    method = recipe_named("dph_rl")(**KINDS).set("terms.rehearsal.coef", 0.0)
    p = torch.tensor(POLICY, dtype=torch.float64)
    u, value = p / REF_, float(half(p, p, REF_))
    for estimator in ("k1", "k3", "unbiased"):
        made = method.set("terms.rollouts.penalty.estimator", estimator)
        assert expected_update(made, five(POLICY)).loss == pytest.approx(value, abs=1e-12)
    weight = p * (u - 1) / (2 * u * (1 + u))
    by_hand = weight - p * weight.sum()
    k3 = -expected_update(method, five(POLICY)).direction[0, 0]
    torch.testing.assert_close(k3, by_hand, rtol=1e-9, atol=1e-12)
    exact = slope_of(lambda p: half(p, p, REF_), POLICY)
    made = method.set("terms.rollouts.penalty.estimator", "unbiased")
    torch.testing.assert_close(-expected_update(made, five(POLICY)).direction[0, 0], exact, rtol=1e-9, atol=1e-12)
    assert float((k3 - exact).abs().max()) > 1e-2


def test_nothing_moves_while_the_policies_are_one():
    found = expected_update(recipe_named("dph_rl")(**KINDS), five(REF))
    assert found.loss == pytest.approx(0, abs=1e-12) and float(found.direction.abs().max()) < 1e-12


def test_what_brings_back_a_lost_outcome():
    """One of probability 0.4 that has fallen to 1e-4: as 2 JS, .0008, of which the stored samples are .0001.

    k3 pulls at p / (2 u) = 0.2, by one sample in 10^4 of slope 2000.
    """
    lost = [1e-4, 0.3, 0.15, 0.25, 0.2999]
    method = recipe_named("dph_rl")(**KINDS).set("terms.rollouts.penalty.estimator", "unbiased")
    both = expected_update(method, five(lost)).direction[0, 0, 0]
    stored = expected_update(method.set("terms.rollouts.coef", 0.0), five(lost)).direction[0, 0, 0]
    assert float(both) == pytest.approx(0.0008, abs=6e-5) and float(stored) == pytest.approx(0.0001, abs=6e-5)
    assert float(expected_update(recipe_named("dph_rl")(**KINDS), five(lost)).direction[0, 0, 0]) == pytest.approx(
        0.2, abs=1e-3
    )


def test_values_by_hand():
    """log u = log 3: log(pi / m) = log 1.5, log(ref / m) = -log 2; k3 are -1/3 + log 1.5 and 1 - log 2."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    mask = torch.tensor([[True, False]])
    live = torch.tensor([[math.log(0.6), 9.0]], dtype=torch.float64)
    other = torch.tensor([[math.log(0.2), math.nan]], dtype=torch.float64)
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    stats = Stats({LogProb(): live, REFERENCE: other})
    for kind, wanted in {"k1": math.log(1.5), "k2": math.log(1.5) ** 2 / 2, "k3": math.log(1.5) - 1 / 3}.items():
        found = MixtureKL(kind)(rows, stats)
        assert float(found[0, 0]) == pytest.approx(wanted, abs=1e-12) and bool(found.isfinite().all())
    stored = rows.with_(stream=torch.full((1,), int(Stream.REGULARISER)), logp={"stored": other})
    for kind, wanted in {"k1": -math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 1 - math.log(2)}.items():
        found = RehearsalMixtureKL(2.0, kind)(stored, Stats({LogProb(): live}))
        assert float(found) == pytest.approx(2 * wanted, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_slopes_by_differences(estimator):
    def value(live: torch.Tensor) -> torch.Tensor:
        stats = Stats({LogProb(): live, REFERENCE: torch.full_like(live, -1.1)})
        return MixtureKL(estimator)(k8_rows(), stats)[MASK].sum()

    live = k8_stats()[LogProb()].detach().requires_grad_()
    (grad,) = torch.autograd.grad(value(live), live)
    for place in ((0, 0), (1, 3), (7, 0)):
        step = torch.zeros_like(live)
        step[place] = 1e-6
        found = float((value(live + step) - value(live - step)).detach()) / 2e-6
        assert float(grad[place]) == pytest.approx(found, rel=1e-6) and found != 0


LOG2, U = math.log(2), math.exp(20)
FAR = {  # log(ref / pi): value and slope of k1, k3, unbiased, and of stored samples, at u = e^-20 and e^20
    500.0: [
        (LOG2 - 20, 1.0),
        (U / 2 + LOG2 - 20.5, 0.5 - U / 2),
        (U / 2 + LOG2 - 20.5, LOG2 - 19.5),
        (LOG2 - 0.5, 0.0),
    ],
    -500.0: [(LOG2, 0.0), (LOG2 - 0.5, 0.0), (LOG2 - 0.5, LOG2 - 0.5), (U / 2 + LOG2 - 20.5, U / 2 - 0.5)],
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("gap", FAR)
def test_far_samples(gap, dtype, tolerance):
    """log u is cut at +-20: no number is infinite, and each is that of the cut."""
    live = torch.full((8, 4), -1.0, dtype=dtype, requires_grad=True)
    ref = (live.detach() + gap).to(dtype)
    stored = k8_rows(torch.float32).with_(stream=torch.full((8,), int(Stream.REGULARISER)), logp={"stored": ref})
    losses = [MixtureKL(k)(k8_rows(torch.float32), Stats({LogProb(): live, REFERENCE: ref}))[MASK].float().mean()
              for k in ("k1", "k3", "unbiased")]  # fmt: skip
    losses.append(RehearsalMixtureKL(1.0)(stored, Stats({LogProb(): live})).float())
    for loss, (value, slope) in zip(losses, FAR[gap], strict=True):
        (grad,) = torch.autograd.grad(loss, live)
        assert float(loss.detach()) == pytest.approx(value, rel=tolerance)
        assert (20 * grad[MASK].float()).tolist() == pytest.approx([slope] * 20, rel=tolerance, abs=1e-6)


def test_the_recipe():
    """Without eta it is GRPO; another KL may stand beside it; the composition can be written down."""
    recipe = recipe_named("dph_rl")
    assert recipe(kind="js_by_definition", eta=0.0) == recipe_named("grpo")(epsilon_high=0.28)
    method = recipe(kind="js_by_definition", rollout_share=0.3)
    assert method.terms["rehearsal"].coef == 0.1 and method.controllers["rollouts"].share == 0.3
    assert method.claim is None and from_config(to_config(method)) == method
    assert set(recipe(kind="js_by_definition", beta=0.01).terms) == {"kl", "rehearsal", "rollouts"}


def test_the_reference_rests_on_other_batches():
    method = recipe_named("dph_rl")(kind="js_by_definition")
    assert REFERENCE in method.update_needs()
    assert REFERENCE not in method.set("terms.rollouts.coef", 0.0).update_needs()
    plain = recipe_named("grpo")(epsilon_high=0.28)
    rows = rows_for(plain)
    quiet = outcome(method.set("terms.rollouts.coef", 0.0), rows)
    assert torch.equal(quiet.loss, outcome(plain, rows).loss)
    alone = plain.adding(terms={"rollouts": Summand(MixtureKL(), 0.1)}, models={"ref": Initial()})
    assert_same(outcome(method, rows), outcome(alone, rows))


def test_the_mean_is_that_of_the_method():
    method = recipe_named("dph_rl")(kind="js_by_definition", aggregation="sequence_mean_token_sum")
    assert method.terms["rehearsal"].aggregation == Aggregation("sequence_mean_token_sum")


def test_a_tenth_of_the_batches():
    """By seed and step alone: 1000 batches, 4 standard errors around 100."""
    part = OnSomeBatches("terms.rollouts.coef", 0.5)
    state = part.init(3)
    found = [part.update({"kl": 1.0}, state, step)[0]["terms.rollouts.coef"] for step in range(1000)]
    assert set(found) == {0.0, 0.5} and 62 <= found.count(0.5) <= 138
    assert found[17:40] == [part.update({}, part.init(3), step)[0]["terms.rollouts.coef"] for step in range(17, 40)]
    assert found != [part.update({}, part.init(4), step)[0]["terms.rollouts.coef"] for step in range(1000)]
    for share, wanted in ((0.0, {0.0}), (1.0, {0.5})):
        every = OnSomeBatches("terms.rollouts.coef", 0.5, share=share)
        assert {every.update({}, state, step)[0]["terms.rollouts.coef"] for step in range(50)} == wanted


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: MixtureKL("k4"), "estimator"),
        (lambda: RehearsalMixtureKL(-1.0), "coef"),
        (lambda: RehearsalMixtureKL(1.0, "unbiased"), "estimator"),
        (lambda: OnSomeBatches("terms.a.coef", 1.0, share=1.1), "share"),
    ],
)
def test_bad_settings(make, what):
    with pytest.raises((ValueError, TypeError), match=what):
        make()


def test_stored_rows_need_their_log_probabilities():
    rows = k8_rows().with_(stream=torch.full((8,), int(Stream.REGULARISER)))
    with pytest.raises(ValueError, match="stored"):
        RehearsalMixtureKL()(rows, k8_stats())
