"""Reweighted references (RAPO), teachers (KDRL) and stored samples (DPH-RL): optima, exact gradients, limits."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_rows, k8_stats, padded
from tests.parts.k8 import REWARD as REWARD_OF_K8
from tests.recipes.exact import FIVE, POLICY, REF, REWARD, gradient, outcomes, prepared
from tests.worlds import outcome, rows_for

from keel.core.aggregate import Aggregation
from keel.core.config import build
from keel.core.errors import ConfigError
from keel.core.rows import Rows, Stream, cat
from keel.divergences.family import f_divergence
from keel.exact.optima import optimum
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre
from keel.parts.masks.outcome import Failed
from keel.parts.terms.covering import RehearsalDivergence, ReweightedReference
from keel.parts.terms.penalties import SampledKL, Summand
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.recipes.registry import recipe_named
from keel.rollouts.rollout import Rollout
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.verify.recipes import HOLDS, verify_recipe

REFERENCE = LogProb(of=("ref",))


def choice(probs: list[float]) -> TabularPolicy:
    logits = torch.tensor(probs, dtype=torch.float64).log()[None, None]
    return TabularPolicy(SequenceSpace(len(probs), 1), logits)


def climber(phi: float, beta: float = 0.5) -> Method:
    return Method(
        rollout=Rollout(num_generations=2),
        advantage={"centre": GroupCentre()},
        surrogate=Surrogate(LogLikelihood()),
        aggregation=Aggregation("sequence_mean_token_sum"),
        terms={"kl": Summand(ReweightedReference(phi, None, "sequence"), beta)},
        models={"ref": Initial()},
    )


# -- RAPO ------------------------------------------------------------------------------------------------------------

OPTIMA = {
    "inside the support": ([0.6, 0.3, 0.1], [0.0, 0.0, 1.0], [0.276393, 0.138197, 0.585410]),
    "outside": ([0.6, 0.3, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0], [0.3, 0.15, 0.05, 0.5]),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_gradient_vanishes_at_the_optimum(name):
    """beta ref / (nu - r); outside the support the rest of the mass, where KL(pi || ref) would forbid any."""
    ref, reward, best = OPTIMA[name]
    policy, worth = choice(best), torch.tensor(reward, dtype=torch.float64)
    found = gradient(climber(0.0), policy, choice(ref), worth)
    assert float(found.abs().max()) < 1e-6
    elsewhere = gradient(climber(0.0), choice([1 / len(ref)] * len(ref)), choice(ref), worth)
    assert float(elsewhere.abs().max()) > 1e-2
    if name == "inside the support":
        closed = optimum(worth, choice(ref).table[0, 0].detach(), 0.5, "kl_ref_policy").prob
        assert closed.tolist() == pytest.approx(best, abs=ALIKE)


def test_optimum_with_a_reweighted_reference():
    """phi = 1: the optimum is that of plain forward KL from ref e^r / Z."""
    ref, worth = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    tilted = (ref.log() + worth).log_softmax(-1)
    best = optimum(worth, tilted, 0.5, "kl_ref_policy").prob
    found = gradient(climber(1.0), choice(best.tolist()), choice(ref.tolist()), worth)
    assert float(found.abs().max()) < 1e-6


def test_without_weights_it_is_the_forward_kl():
    """p = (.5, .3, .2), ref = (.2, .3, .5): the slope of KL(ref || p) is p - ref, as that of k3 in the loss."""
    policy, ref, none = choice([0.5, 0.3, 0.2]), choice([0.2, 0.3, 0.5]), torch.zeros(3, dtype=torch.float64)
    found = gradient(climber(0.0, 1.0), policy, ref, none)[0, 0]
    assert found.tolist() == pytest.approx([0.3, 0.0, -0.3], abs=1e-12)
    for level in ("token", "sequence"):
        k3 = climber(0.0, 1.0).replacing(terms={"kl": Summand(SampledKL("k3"), 1.0)})
        one = climber(0.0, 1.0).replacing(terms={"kl": Summand(ReweightedReference(0.0, None, level), 1.0)})
        torch.testing.assert_close(gradient(one, policy, ref, none), gradient(k3, policy, ref, none))


def test_weights_by_hand():
    """Group 0 of K8 earns (1, 0, 0, 1), so u = 2 e / (e + 1) and 2 / (e + 1); group 1 (0, 0, 0, 1)."""
    stats = k8_stats()
    ref = stats[LogProb(of=("old",))] + padded(
        [[0.1] * 3, [2.0] * 4, [0.0] * 2, [0.0], *[[0.0] * n for n in (2, 4, 3, 1)]], 7.0
    )
    live = stats[LogProb()]
    found = ReweightedReference(1.0, 5.0)(k8_rows(), stats.merged({REFERENCE: ref}))
    (grad,) = torch.autograd.grad(found[MASK].sum(), live)
    good, bad = 2 * math.e / (math.e + 1), 2 / (math.e + 1)
    assert grad[0, :3].tolist() == pytest.approx([-good * math.exp(0.1)] * 3)
    assert grad[1].tolist() == pytest.approx([-bad * 5.0] * 4)  # e^2 is cut at 5
    assert grad[2, :2].tolist() == pytest.approx([-bad] * 2)
    assert float(grad[7, 0]) == pytest.approx(-4 * math.e / (math.e + 3))
    whole = ReweightedReference(1.0, 5.0, "sequence")(k8_rows(), stats.merged({REFERENCE: ref}))
    (grad,) = torch.autograd.grad(whole[MASK].sum(), live)
    mean = (math.e * math.exp(0.3) + 5.0 + 1 + math.e) / 4
    assert grad[:4, 0].tolist() == pytest.approx([-x / mean for x in (math.e * math.exp(0.3), 5.0, 1, math.e)])


def test_padding_and_unscored_rows():
    rows = k8_rows()
    reward = rows.reward.clone()
    reward[1] = torch.nan
    stats = k8_stats()
    garbage = torch.where(MASK, stats[LogProb(of=("old",))], torch.nan)
    found = ReweightedReference()(rows.with_(reward=reward), stats.merged({REFERENCE: garbage}))
    assert bool(found[MASK].isfinite().all()) and not found[1].any()
    assert found[0, :3].tolist() == pytest.approx((-(3 * math.e / (2 * math.e + 1)) * stats[LogProb()][0, :3]).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_rewards_and_ratios_are_finite(dtype):
    rows, stats = k8_rows(), k8_stats(torch.float32)
    rows = rows.with_(reward=1000 * rows.reward)
    far = stats.merged({REFERENCE: (stats[LogProb(of=("old",))] + 500).to(dtype)})
    for part in (ReweightedReference(), ReweightedReference(1.0, None, "sequence")):
        assert bool(part(rows, far)[MASK].isfinite().all())


def test_rapo_holds_without_what_grpo_adds():
    """Whole sequences, no deviation, no cap: the gradient is that of the paper's objective."""
    exact = dict(level="sequence", scale_rewards="none", aggregation="sequence_mean_token_sum", cap=1e6)
    found = verify_recipe("rapo", exact)
    assert found.gradient_relative_error < 1e-9
    assert verify_recipe("rapo").status != HOLDS


def test_rapo_moves():
    method = recipe_named("rapo")(beta=0.5)
    rows = rows_for(method)
    found, plain = outcome(method, rows), outcome(recipe_named("grpo")(), rows)
    assert float((found.grads["policy.table"] - plain.grads["policy.table"]).abs().max()) > 1e-2


# -- KDRL ------------------------------------------------------------------------------------------------------------

TEACHER = [0.05, 0.45, 0.10, 0.25, 0.15]


def distilled(method: Method, rows: Rows, policy: TabularPolicy) -> tuple[float, torch.Tensor]:
    """Loss and gradient towards the teacher, on rows of the policy."""
    models = {"policy": policy, "old": policy, "teacher": outcomes(TEACHER)}
    rows, frozen = prepared(method, rows, models)
    policy.zero_grad()
    loss, _ = Engine(models).step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    slope = policy.table.grad
    return float(loss), torch.zeros(5, dtype=torch.float64) if slope is None else slope[0, 0].clone()


def test_the_pull_of_the_teacher():
    """No reward: the slope of KL(p || T), sample by sample that of k2."""
    policy = outcomes(POLICY)
    rows = policy.weighted(FIVE.rows()).with_(reward=torch.zeros(5, 1, dtype=torch.float64))
    _, found = distilled(recipe_named("kdrl")(beta=1.0), rows, policy)
    assert found.tolist() == pytest.approx([0.062712, -0.141449, 0.050915, -0.016508, 0.044330], abs=ALIKE)


def test_optimum_of_reward_and_teacher():
    """T e^(r / beta) / Z at beta 0.5."""
    best = [0.002462, 0.163722, 0.013384, 0.672084, 0.148348]
    tilted = (torch.tensor(TEACHER, dtype=torch.float64).log() + REWARD / 0.5).softmax(-1)
    assert tilted.tolist() == pytest.approx(best, abs=ALIKE)
    policy = outcomes(tilted)
    rows = policy.weighted(FIVE.rows()).with_(reward=REWARD[:, None])
    _, found = distilled(recipe_named("kdrl")(beta=0.5, scale_rewards="none"), rows, policy)
    assert float(found.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("guided", "correct", "wanted"),
    [
        ("none", [0, 1, 1, 1], 0.101157),
        ("response", [0, 1, 1, 1], 0.240227),
        ("group", [0, 1, 1, 1], 0.0),
        ("group", [0, 0, 0, math.nan], (0.240227 + 0.082201 + 0.0) / 3),
        ("response", [0, math.nan, 1, 1], 0.240227),
    ],
)
def test_guided_by_reward(guided, correct, wanted):
    """Outcomes 0, 1, 3, 1 were drawn: log(p / T) = (.693147, -.405465, 0, -.405465)."""
    policy = outcomes(POLICY)
    reward = torch.tensor(correct, dtype=torch.float64)
    rows = FIVE.rows().select(torch.tensor([0, 1, 3, 1])).with_(reward=reward[:, None])
    kdrl = recipe_named("kdrl")(beta=1.0, guided=guided)
    loss, _ = distilled(kdrl.replacing(surrogate=None), rows, policy)
    assert loss == pytest.approx(wanted, abs=ALIKE)


def test_masks_of_failures():
    rows = k8_rows()
    assert Failed()(rows, Stats()).any(1).tolist() == [r == 0 for r in REWARD_OF_K8]
    hard = rows.with_(reward=rows.reward * (rows.group == 0)[:, None])
    found = Failed(level="group")(hard, Stats())
    assert found.any(1).tolist() == [False] * 4 + [True] * 4 and not found[~MASK].any()


def test_the_teacher_fades():
    """5e-3 at first, 4e-3 at step 20, 1e-3 from step 80 on."""
    controller = recipe_named("kdrl")().controllers["distil"]
    found = [controller.update({}, {}, step)[0]["terms.distil.coef"] for step in (0, 20, 80, 100)]
    assert found == pytest.approx([5e-3, 4e-3, 1e-3, 1e-3])
    assert not recipe_named("kdrl")(decay=0.0).controllers
    steep = recipe_named("kdrl")(decay=0.01).controllers["distil"]  # a step takes off more than there is
    found = [steep.update({}, {}, step)[0]["terms.distil.coef"] for step in (0, 1, 2)]
    assert found == pytest.approx([5e-3, 1e-3, 1e-3])


# -- DPH-RL ----------------------------------------------------------------------------------------------------------


def rehearsed(name: str, policy: TabularPolicy, coef: float = 1.0) -> tuple[float, torch.Tensor]:
    """Value and slope on all samples of the reference, which stand in the stream of regularisers."""
    rows = outcomes(REF).weighted(FIVE.rows())
    log_ref = REF.log()[:, None]
    rows = rows.with_(stream=torch.full((5,), int(Stream.REGULARISER)), logp={"stored": log_ref})
    method = Method(kind="supervised", terms={"rehearsal": RehearsalDivergence(coef, name)})
    policy.zero_grad()
    engine = Engine({"policy": policy})
    loss, _ = engine.step(method.live_needs(), rows, Stats(), lambda r, s: method.loss(r, s, {}), additive=False)
    slope = policy.table.grad
    return float(loss), torch.zeros(5, dtype=torch.float64) if slope is None else slope[0, 0].clone()


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl_ref_policy", 0.405530), ("2*js", 0.183625), ("alpha:0.8", 0.376237), ("hellinger", 0.094820)],
)
def test_divergence_of_stored_samples(name, value):
    """Value and exact slope of D(policy || ref)."""
    policy = outcomes(POLICY)
    found, slope = rehearsed(name, policy)
    assert found == pytest.approx(value, abs=ALIKE)
    log_p = policy.table[0, 0].log_softmax(-1)
    (wanted,) = torch.autograd.grad(f_divergence(name).value(log_p, REF.log()), policy.table)
    torch.testing.assert_close(slope, wanted[0, 0])
    zero, still = rehearsed(name, outcomes(REF))
    assert zero == pytest.approx(0, abs=1e-12) and float(still.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "pull"), [("kl_ref_policy", 0.3999), ("hellinger", 0.0031), ("alpha:0.8", 0.0022), ("js", 0.0004)]
)
def test_what_brings_back_a_lost_outcome(name, pull):
    """Its probability has fallen from 0.4 to 1e-4: only KL(ref || policy) pulls at a useful rate."""
    _, slope = rehearsed(name, outcomes([1e-4, 0.3, 0.15, 0.25, 0.2999]))
    assert -float(slope[0]) == pytest.approx(pull, abs=6e-5)


def test_without_stored_rows_it_is_grpo():
    grpo = recipe_named("grpo")()
    rows = rows_for(grpo)
    found, plain = outcome(grpo.adding(terms={"rehearsal": RehearsalDivergence()}), rows), outcome(grpo, rows)
    assert torch.equal(found.loss, plain.loss)
    assert torch.equal(found.grads["policy.table"], plain.grads["policy.table"])


def test_stored_rows_do_not_touch_the_others():
    """Mixed in one step: GRPO of the main rows, plus the divergence over the stored ones alone."""
    grpo = recipe_named("grpo")()
    rows = rows_for(grpo)
    stored = rows.select(rows.group == 0)
    stored = stored.with_(
        stream=torch.full((4,), int(Stream.REGULARISER)),
        group=stored.group + 9,
        logp={**stored.logp, "stored": stored.logp["behaviour"]},
    )
    other = rows.with_(logp={**rows.logp, "stored": torch.full_like(rows.logp["behaviour"], math.nan)})
    term = RehearsalDivergence(0.5)
    plain, both = outcome(grpo, rows), outcome(grpo.adding(terms={"rehearsal": term}), cat([other, stored]))
    alone = outcome(Method(kind="supervised", terms={"rehearsal": term}), stored, additive=False)
    assert float(alone.loss) > 1e-3
    for name in ("loss", "grads"):
        one, two, sum_ = (getattr(o, name) for o in (plain, alone, both))
        if name == "grads":
            one, two, sum_ = (g["policy.table"] for g in (one, two, sum_))
        torch.testing.assert_close(sum_, one + two)


U = math.exp(20)
FAR = {  # f(u) and u f'(u)
    "kl_ref_policy": (U - 21, U - 1),
    "js": (((1 + U) * math.log(2) - 21) / 2, U / 2 * math.log(2)),
    "alpha:0.8": ((0.8 * U + 0.2 - U**0.8) / 0.16, 5 * (U - U**0.8)),
    "chi2_policy_ref": ((U - 1) ** 2, 2 * U * (U - 1)),
}


@pytest.mark.parametrize("name", FAR)
def test_far_samples(name):
    """e^10000 times as likely as they were when stored: all is as at u = e^20."""
    rows = FIVE.rows().with_(stream=torch.full((5,), int(Stream.REGULARISER)), logp={"stored": torch.zeros(5, 1) - 1e4})
    live = torch.zeros(5, 1, requires_grad=True)
    loss = RehearsalDivergence(1.0, name)(rows, Stats({LogProb(): live}))
    (grad,) = torch.autograd.grad(loss, live)
    value, slope = FAR[name]
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert grad[:, 0].tolist() == pytest.approx([slope / 5] * 5, rel=1e-5)


def test_stored_rows_need_their_log_probabilities():
    rows = FIVE.rows().with_(stream=torch.full((5,), int(Stream.REGULARISER)))
    with pytest.raises(ValueError, match="stored"):
        RehearsalDivergence()(rows, Stats({LogProb(): torch.zeros(5, 1)}))
    with pytest.raises(ValueError, match="coef"):
        RehearsalDivergence(-1.0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"phi": -1.0}, "phi"), ({"cap": 0.0}, "cap"), ({"level": "word"}, "level")],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        build(ReweightedReference, settings)


def test_several_rewards_are_refused():
    rows: Rows = k8_rows()
    stats = k8_stats()
    with pytest.raises(ValueError, match="WeightedSum"):
        ReweightedReference()(
            rows.with_(reward=rows.reward.expand(8, 2)), Stats({**stats, REFERENCE: stats[LogProb(of=("old",))]})
        )
