"""Numbers that the papers' methods stand on, apart from any one part: exact rates, optima, filtered copies."""

import math

import pytest
import torch
from tests.parts.k8 import LIVE_OLD, MASK, OLD_BEHAVIOUR, k8_method, k8_rows, k8_stats
from tests.recipes.exact import FIVE, outcomes, prepared
from tests.recipes.exact import groups as sampled_groups
from tests.worlds import Outcome, assert_same, outcome, rows_for

from keel.core.rows import Rows
from keel.divergences.estimators import estimate
from keel.divergences.family import f_divergence
from keel.exact.optima import optimum
from keel.parts.advantages.consistency import AnswerConsistency
from keel.parts.advantages.future import FutureKLToToken
from keel.parts.advantages.group import GroupCentre
from keel.parts.advantages.risk import risk
from keel.parts.controllers.convergence import ObjectiveWeights, signals
from keel.parts.masks.entropy import PeakEntropy
from keel.parts.terms.surrogate import Surrogate, Unclipped
from keel.parts.terms.surrogates import GeometricMean
from keel.parts.weights.mismatch import MaskedImportance, at_level, mismatch
from keel.parts.weights.trajectory import ConflictShare, shared_run
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.statistics.transforms import KeepMinP

DIGITS = 5.1e-7
OLD = LogProb(of=("old",))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rate_of_the_entropy_along_one_token():
    """(.5, .3, .15, .05), a step along grad log p_a: what STEER's estimate -p (1 - p) (ln p + H) leaves out."""
    p = double(0.5, 0.3, 0.15, 0.05)
    logits = p.log().requires_grad_()
    q = logits.softmax(0)
    (slope,) = torch.autograd.grad(-(q * q.log()).sum(), logits)
    found = (torch.eye(4).double() - p) @ slope
    assert found.tolist() == pytest.approx([-0.139431, 0.103611, 0.198305, 0.177736], abs=DIGITS)
    by_hand = -(p * (p.log() - (p * p.log()).sum())) + (p.square() * (p.log() - (p * p.log()).sum())).sum()
    torch.testing.assert_close(found, by_hand)
    entropy = -(p * p.log()).sum()
    assert float(entropy) == pytest.approx(1.142120, abs=DIGITS)


@pytest.mark.parametrize(
    ("reward", "natural", "rate"), [([1, 0, 0, 0.5], True, -0.178159), ([1, 0, 0, 0.5], False, -0.065274),
                                    ([0, 0, 0, 1], True, 0.092682)],
)  # fmt: skip
def test_rate_of_the_entropy_along_a_step(reward, natural, rate):
    """By a step of 1e-4, for the natural and for the policy gradient; the covariance agrees to 1e-5."""
    p = double(0.5, 0.3, 0.15, 0.05)
    gain = double(*reward) - (p * double(*reward)).sum()
    moved = (p.log() + 1e-4 * (gain if natural else p * gain)).softmax(0)
    found = (-(moved * moved.log()).sum() + (p * p.log()).sum()) / 1e-4
    assert float(found) == pytest.approx(rate, abs=DIGITS)


def test_forward_and_reverse_optimum():
    """beta = .5, ref (.6, .3, .1), r (0, 0, 1): nu = 1.085410 where the KL is forward; the reverse one is a tilt."""
    ref, worth = double(0.6, 0.3, 0.1), double(0, 0, 1)
    forward = optimum(worth, ref.log(), 0.5, "kl_ref_policy").prob
    reverse = optimum(worth, ref.log(), 0.5, "kl_policy_ref").prob
    assert forward.tolist() == pytest.approx([0.276393, 0.138197, 0.585410], abs=DIGITS)
    assert (0.5 * ref / forward + worth).tolist() == pytest.approx([1.085410] * 3, abs=DIGITS)
    assert reverse.tolist() == pytest.approx([0.366098, 0.183049, 0.450853], abs=DIGITS)


def test_what_lies_outside_the_support():
    """r of an outcome that the reference never shows: half of the mass, at a value of .153426."""
    ref, worth, best = double(0.6, 0.3, 0.1, 0.0), double(0, 0, 0, 1), double(0.3, 0.15, 0.05, 0.5)
    value = (best * worth).sum() - 0.5 * f_divergence("kl_ref_policy").value(best.log(), ref.log())
    assert float(value) == pytest.approx(0.153426, abs=DIGITS)


def test_estimators_of_the_forward_kl():
    """p (.5, .3, .2), ref (.2, .3, .5): E_p[rho ln rho] = E_p[rho ln rho - rho + 1] = KL(ref || p) = .274887."""
    p, ref = double(0.5, 0.3, 0.2), double(0.2, 0.3, 0.5)
    rho = ref / p
    for value in (rho * rho.log(), rho * rho.log() - rho + 1):
        assert float((p * value).sum()) == pytest.approx(0.274887, abs=DIGITS)
    assert float(f_divergence("kl_ref_policy").value(p.log(), ref.log())) == pytest.approx(0.274887, abs=DIGITS)


def test_a_filtered_copy():
    """Min-p .2 of (.55, .25, .12, .06, .02): three tokens stay, each log(1 / .92) = .083382 more likely."""
    p = double(0.55, 0.25, 0.12, 0.06, 0.02)
    found = KeepMinP(0.2)(p.log()[None]).softmax(-1)[0]
    assert found.tolist() == pytest.approx([0.597826, 0.271739, 0.130435, 0, 0], abs=DIGITS)
    assert (found[:3].log() - p[:3].log()).tolist() == pytest.approx([0.083382] * 3, abs=DIGITS)


def test_a_sequence_of_the_band():
    assert recipe_named("epo")(level="sequence").terms["band"].penalty.level == "sequence"


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("k1", [0.0, 0.0, 0.0]),
        ("k2", [0.131286, -0.206921, 0.075635]),
        ("k3", [0.137585, -0.249911, 0.112327]),
    ],
)
def test_what_an_estimator_in_the_loss_pulls_towards(estimator, wanted):
    """Logits (.2, -.1, .4), ref (.2, .5, .3): k2 is the gradient of KL(pi || ref), k3 of KL(ref || pi), k1 none."""
    logits, ref = double(0.2, -0.1, 0.4).requires_grad_(), double(0.2, 0.5, 0.3)
    p = logits.softmax(0)
    loss = (p.detach() * estimate(estimator, p.log() - ref.log())).sum()
    (found,) = torch.autograd.grad(loss, logits)
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)
    if estimator == "k2":
        live = logits.softmax(0)
        (exact,) = torch.autograd.grad((live * (live / ref).log()).sum(), logits)
        torch.testing.assert_close(found, exact)


# -- K8 --------------------------------------------------------------------------------------------------------------


def test_geometric_means_with_a_cut():
    """GMPO's ratios differ from the plain geometric means in rows 0 and 6 alone; no length, no padding enters."""
    rows = k8_method(Unclipped()).prepare(k8_rows(), k8_stats(), {})
    cut = GeometricMean(0.4)(
        k8_stats()[LogProb()] - k8_stats()[OLD], k8_stats()[LogProb()], rows.advantage, rows, Stats()
    )
    found = (cut / rows.advantage)[:, 0]
    wanted = [1.068939, 1.316531, 1.105171, 1.246077, 0.839457, 1.091442, 1.033895, 1.419068]
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)


def test_the_one_ratio_that_a_dual_clip_is_for():
    rho = Surrogate(Unclipped()).log_ratio(k8_rows(), k8_stats()).detach().exp()
    assert float(rho[1, 3]) == pytest.approx(3.669, abs=5e-4) and float(rho[MASK].max()) == float(rho[1, 3])
    assert math.exp(LIVE_OLD[1][3]) == pytest.approx(float(rho[1, 3]))


def test_geometric_means_of_the_gap_between_sampler_and_trainer():
    rows, stats = k8_rows(), k8_stats()
    found = at_level(mismatch(rows, stats, "test"), rows, "geometric").exp()[:, 0]
    wanted = [1.327548, 0.824894, 1.150274, 1.0, 0.995012, 1.158933, 1.834307, 0.990050]
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)
    kept = MaskedImportance(0.999, 1.002, "geometric")(rows, stats)
    assert (kept * MASK).any(1).nonzero().flatten().tolist() == [3]  # by the published band one row stays


def test_an_interval_and_its_mirror_image():
    """ICE-POP's .5 to 5 drops the token of w = .449 and keeps that of 2.460; 1/5 to 2 is the other way round."""
    rows, stats = k8_rows(), k8_stats()
    rare, common = (math.exp(OLD_BEHAVIOUR[i][t]) for i, t in ((1, 2), (0, 2)))
    assert (rare, common) == pytest.approx((0.449, 2.460), abs=5e-4)
    for low, high, wanted in ((0.5, 5.0, (0.0, common)), (0.2, 2.0, (rare, 0.0))):
        found = MaskedImportance(low, high)(rows, stats)
        assert (float(found[1, 2]), float(found[0, 2])) == pytest.approx(wanted, abs=1e-9)


# -- by paper --------------------------------------------------------------------------------------------------------


def test_signals_of_objectives():
    """RECAP: (.50, .48, .45, .40), (.10 four times), (.70, .40, .80, .50)."""
    past = [(0.50, 0.48, 0.45, 0.40), (0.10,) * 4, (0.70, 0.40, 0.80, 0.50)]
    found = [signals(one) for one in past]
    assert [c for c, _ in found] == pytest.approx([0.867347, 1, 1.181818], abs=DIGITS)
    assert [i for _, i in found] == pytest.approx([0.082331, 0, 0.263523], abs=DIGITS)
    assert [c * i for c, i in found] == pytest.approx([0.071409, 0, 0.311436], abs=DIGITS)
    assert ObjectiveWeights(4, 0.5).weights(past) == pytest.approx((0.861308, 0.746678, 1.392014), abs=DIGITS)
    assert ObjectiveWeights(4, 0.5, "sum").weights(past) == pytest.approx((0.624910, 0.691078, 1.684013), abs=DIGITS)


def test_token_mean_and_deviation_of_a_group():
    """HAPO on K8: .4 and .489898 over the ten tokens of the first group, .1 and .3 over those of the second."""
    rows = k8_rows()
    for group, mean, spread in ((0, 0.4, 0.489898), (1, 0.1, 0.3)):
        earned = rows.reward.expand(-1, 4)[(rows.group == group)[:, None] & MASK]
        assert float(earned.mean()) == pytest.approx(mean) and len(earned) == 10
        assert float(earned.std(correction=0)) == pytest.approx(spread, abs=DIGITS)


def test_the_lower_tail_alone():
    """RiskPO: -[q_low - X]_+ / low is (-5, 0, 0, 0, 0, 0) at q = 1, 4 and levels .2, .8."""
    total, known = double(0, 1, 2, 3, 4, 5), (torch.tensor(1.0), torch.tensor(4.0), 0.2, 0.8)
    both, between = risk(total, *known, 1.5) * 2.5, risk(total, *known, 0.0)
    assert ((both - between) / 1.5).tolist() == pytest.approx([-5, 0, 0, 0, 0, 0], abs=1e-6)
    nearly = risk(total, *known, 1e9)
    assert nearly.tolist() == pytest.approx([-5, 0, 0, 0, 0, 0], abs=1e-6)


def test_what_a_group_is_worth_by_its_consistency():
    """COPO: AABC with A right is worth .5 (1 - .375 1.5) = .5 .4375 = .21875; all different leaves 1 / G."""
    answer = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 7, 8])
    right = double(1, 1, 0, 0, 1, 1, 1, 1, *[0.0] * 8)
    rows = sampled_groups(torch.arange(16).reshape(4, 4), right).with_(columns={"answer": answer})
    found = []
    for coefficient in (True, False):
        part = AnswerConsistency(blend="global", coefficient=coefficient, epsilon=0.0)
        prepared = part(GroupCentre()(rows, Stats()), Stats())
        first, second, third, last = prepared.columns["global_advantage"][::4, 0].tolist()
        found.append([(first - third) / (second - third), (last - third) / (second - third)])  # R, as 1 and 0 are known
    assert found[0] == pytest.approx([0.21875, 0], abs=1e-9) and found[1] == pytest.approx([0.5, 0], abs=1e-9)
    assert found[0][0] / found[1][0] == pytest.approx(0.4375, abs=1e-9)


def test_runs_of_shared_tokens():
    """GTPO: from the first token they have 6, 2, 2, 1 tokens, from the last 6, 3, 2, 1; dividing by their number."""
    tokens = torch.tensor([[1, 2, 3, 9, 7, 8], [1, 2, 4, 9, 7, 8], [1, 2, 5, 6, 7, 8], [1, 3, 3, 9, 8, 0]])
    mask = torch.arange(6) < torch.tensor([6, 6, 6, 5])[:, None]
    signs = double(1, -1, 1, -1)
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, group=torch.zeros(4).long(),
                      advantage=signs[:, None] * mask)  # fmt: skip
    back = torch.stack([torch.cat([t[m].flip(0), t[~m]]) for t, m in zip(tokens, mask, strict=True)])
    for order, wanted in ((tokens, [6, 2, 2, 1]), (back, [6, 3, 2, 1])):
        assert shared_run(order, mask, signs > 0, signs < 0, rows).sum(1).tolist() == wanted
    assert (1 / ConflictShare()(rows, Stats())[:, 0]).tolist() == pytest.approx([6, 5, 4, 2])
    apart = rows.with_(group=torch.arange(4))  # nothing is shared: nothing is divided
    assert torch.equal(ConflictShare()(apart, Stats()), torch.ones(4, 6))
    assert set(recipe_named("gtpo")(per_conflict=True).weights) == {"conflict", "share"}


def test_segments_that_end_at_listed_tokens():
    """PRL: ends at a line break (5) and at the last token; suffixes (.7, .5, .6, .3, .2, .4), 1 / eta = .5."""
    tokens = torch.tensor([[1, 5, 2, 3, 5, 4, 5]])
    mask = torch.tensor([[True] * 6 + [False]])
    gap = torch.tensor([[0.2, -0.1, 0.3, 0.1, -0.2, 0.4, 7.0]], dtype=torch.float64)
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, advantage=torch.full_like(gap, 0.8),
                      reward=torch.ones(1, 1).double())  # fmt: skip
    stats = Stats({OLD: gap - 1, LogProb(of=("ref",)): -torch.ones_like(gap)})
    found = FutureKLToToken(0.5, (5,))(rows, stats).advantage[0, :6]
    assert found.tolist() == pytest.approx([0.55, 0.55, 0.7, 0.7, 0.7, 0.6])
    whole = FutureKLToToken(0.5, (9,))(rows, stats).advantage[0, :6]  # none there: the last token ends the only one
    assert whole.tolist() == pytest.approx([0.6] * 6)
    assert recipe_named("prl")(segment_ends=(5,)).advantage["future_kl"].ends == (5,)
    with pytest.raises(ValueError, match="segment_ends"):
        recipe_named("prl").make(step_length=2, segment_ends=(5,))
    with pytest.raises(ValueError, match="beta"):
        FutureKLToToken(-1.0)


def test_a_token_that_pays_for_itself_alone():
    """PRL's tree: the first coordinate is -.110359 with the KL to come, -.100662 with that of the token itself."""
    logits = torch.zeros(1, 3, 2, dtype=torch.float64)
    logits[0, :, 1] = double(0.4, -0.3, 0.9)
    log_p = logits[0].log_softmax(-1)
    first = torch.tensor([0, 0, 1, 1])
    second = torch.tensor([0, 1, 0, 1])
    p = (log_p[0, first] + log_p[1 + first, second]).exp()
    gap = log_p[0, first] - math.log(0.5)
    later = log_p[1 + first, second] - math.log(0.5)
    score = first - log_p[0, 1].exp()
    own = (p * score * (double(1, 0, 0, 0.5) - 0.5 * gap)).sum()
    whole = (p * score * (double(1, 0, 0, 0.5) - 0.5 * (gap + later))).sum()
    assert (float(own), float(whole)) == pytest.approx((-0.100662, -0.110359), abs=DIGITS)


# -- a teacher in several forms --------------------------------------------------------------------------------------

STUDENT, TEACHER = [0.10, 0.30, 0.15, 0.25, 0.20], [0.05, 0.45, 0.10, 0.25, 0.15]


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("k2", [0.062712, -0.141449, 0.050915, -0.016508, 0.044330]),
        ("vocabulary", [0.062712, -0.141449, 0.050915, -0.016508, 0.044330]),
        ("reward", [0.062712, -0.141449, 0.050915, -0.016508, 0.044330]),
        ("k3", [0.05, -0.15, 0.05, 0.0, 0.05]),
    ],
)
def test_pull_of_a_teacher(form, wanted):
    """KDRL without reward: the gradient of KL(p || T) = .066031, but for k3, whose is p - T."""
    p, teacher = double(*STUDENT), double(*TEACHER)
    assert float((p * (p / teacher).log()).sum()) == pytest.approx(0.066031, abs=DIGITS)
    method = recipe_named("kdrl")(beta=1.0, form=form, scale_rewards="none")
    policy = outcomes(STUDENT)
    models = {"policy": policy, "old": policy, "teacher": outcomes(TEACHER)}
    rows = policy.weighted(FIVE.rows()).with_(reward=torch.zeros(5, 1, dtype=torch.float64))
    rows, frozen = prepared(method, rows, models)
    Engine(models).step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, method.with_old(s), {}))
    assert policy.table.grad[0, 0].tolist() == pytest.approx(wanted, abs=DIGITS)


def test_forms_of_a_teacher():
    kdrl = recipe_named("kdrl")
    assert kdrl(form="reward").controllers["distil"].path == "transforms.distil.coef"
    assert kdrl(form="vocabulary", guided="group").terms["distil"].where == "failed"
    assert kdrl(form="k3", beta=0.0) == kdrl(beta=0.0) == recipe_named("grpo")()
    with pytest.raises(ValueError, match="guided"):
        kdrl.make(form="reward", guided="group")


# -- limits ----------------------------------------------------------------------------------------------------------


def both(first, second) -> tuple[Outcome, Outcome]:
    rows = rows_for(first)
    return outcome(first, rows), outcome(second, rows)


def test_ares_without_bonus_and_target_is_grpo_with_a_fixed_kl():
    ares = recipe_named("ares")(alpha=0.0, kl_target=None, kl_coef=0.1)
    assert_same(*both(ares, recipe_named("grpo")(beta=0.1, kl="k3")), 1e-12)


def test_peaks_and_nuclei_at_their_ends_are_all_tokens():
    """SIREN: quantile 0 and p = 1 leave nothing out."""
    mask = k8_rows().mask
    part = PeakEntropy(0.0, 1.0)
    entropy = torch.where(MASK, torch.arange(32.0).reshape(8, 4), 7.0)
    assert torch.equal(part(k8_rows(), Stats({part.needs[0]: entropy})), mask)


def test_hapo_without_a_punishment_of_length():
    """It is to be turned off where the length falls."""
    assert "overlong" in recipe_named("hapo")().transforms
    assert (
        not recipe_named("hapo")(overlong_cache=0).transforms and not recipe_named("dapo")(overlong_cache=0).transforms
    )
