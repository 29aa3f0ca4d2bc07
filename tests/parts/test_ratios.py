"""Surrogates, estimators and corrections of the sampler's drift on K8, to six digits; their limits and their biases."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, assert_gradient_of_value, k8_loss, k8_method, k8_rows, k8_stats
from tests.recipes.test_limits import FOUR, assert_equal, gradient, policy_gradient
from tests.worlds import from_probs, outcome, rows_for, table

from keel.core.aggregate import masked_mean
from keel.core.config import build
from keel.core.errors import ConfigError
from keel.core.rows import cat
from keel.exact.groups import groups
from keel.exact.space import SequenceSpace
from keel.parts.advantages.estimators import (
    Collision,
    LengthBaseline,
    MaximumGain,
    MaximumLikelihood,
    NonzeroScale,
    OptimalTokenBaseline,
)
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.advantages.rejection import RejectMismatch
from keel.parts.terms.penalties import SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, LogLikelihood, Surrogate, Unclipped
from keel.parts.terms.surrogates import GammaKernel, GeometricMean, SoftGate, TwoSidedClip
from keel.parts.weights.importance import TruncatedImportance
from keel.parts.weights.mismatch import MaskedImportance, StaleNegatives, TrustRegion
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

OLD = LogProb(of=("old",))
SEQUENCES = "sequence_mean_token_mean"


def weighted(weight, f=None):
    return k8_method(f or Clipped(0.2), weights={"weight": weight})


def rejecting(low, high):
    method = k8_method(Clipped(0.2))
    return method.adding(advantage={"reject": RejectMismatch(low, high)})


LOSSES = {
    "two-sided 2": (k8_method(TwoSidedClip(2.0)), 0.278503),
    "two-sided 4": (k8_method(TwoSidedClip(4.0)), 0.350785),
    "gmpo": (k8_method(GeometricMean(0.4), mode=SEQUENCES), -0.069226),
    "sapo": (k8_method(SoftGate(), mode=SEQUENCES), -0.104788),
    "sapo token mean": (k8_method(SoftGate()), 0.449662),
    "vespo": (k8_method(GammaKernel(), "trajectory"), -0.236567),
    "luspo": (k8_method(Clipped(0.2), "sequence", "sequence_mean_token_sum"), 0.654677),
    "dppo": (
        weighted(TrustRegion(against="old"), Unclipped()).adding(
            terms={"old": Summand(SampledKL("k2", against="old"), 2e-3)}
        ),
        0.372057,
    ),
    "tis over its mean": (weighted(TruncatedImportance(normalise=True)), 0.297472),
    "masked token": (weighted(MaskedImportance()), 0.384220),
    "icepop": (weighted(MaskedImportance(0.5, 5.0)), 0.256416),
    "masked sequence": (weighted(MaskedImportance(0.0, 3.0, "sequence")), 0.053740),
    "geometric mask": (weighted(MaskedImportance(0.9, 1.1, "geometric")), -0.098732),
    "rejection": (rejecting(0.5, 2.0), 0.409536),
    "stale negatives": (weighted(StaleNegatives(0.05, "old")), 0.308165),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, dtype):
    method, wanted = LOSSES[name]
    found, _ = k8_loss(method, dtype)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(wanted, abs=ALIKE if dtype == torch.float64 else 1.2e-6)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("gmpo", [-0.038572, -0.038572, 0], [0.035630] * 4),
        ("sapo", [-0.039769, -0.026288, -0.053648], [0.025726, 0.033989, 0.017608, 0.021412]),
    ],
)
def test_gradient(name, first, second):
    _, grad = k8_loss(LOSSES[name][0])
    assert grad[0, :3].tolist() == pytest.approx(first, abs=ALIKE)
    assert grad[1].tolist() == pytest.approx(second, abs=ALIKE)
    assert not grad[~MASK].any()


@pytest.mark.parametrize("name", ["two-sided 2", "sapo", "rejection", "masked sequence"])
def test_gradient_by_finite_differences(name):
    """Of the losses whose gradient is that of their value."""
    assert_gradient_of_value(LOSSES[name][0])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 7.0])
def test_garbage_in_the_padding_does_not_matter(garbage):
    for method, wanted in LOSSES.values():
        stats = k8_stats()
        live = torch.where(MASK, stats[LogProb()].detach(), garbage).requires_grad_()
        behaviour = torch.where(MASK, k8_rows().logp["behaviour"], garbage)
        rows, dirty = k8_rows().with_(logp={"behaviour": behaviour}), stats.merged({LogProb(): live})
        loss = method.loss(method.prepare(rows, dirty, {}), dirty, {})
        assert float(loss.detach()) == pytest.approx(wanted, abs=ALIKE)
        (grad,) = torch.autograd.grad(loss, live)
        assert bool(torch.isfinite(grad[MASK]).all())


# Sums of |A| over the tokens, and over the rows, of winners and losers: 4 and 2 of sqrt(3) / 2, 1 of 3 / 2; 6 and 2 of
# sqrt(3) / 2, 9 and 3 of 1 / 2.
WON, LOST, ROWS = 2 * math.sqrt(3) + 1.5, 3 * math.sqrt(3) + 4.5, math.sqrt(3) + 1.5
FAR = {  # where each ratio is e^1000, which is cut at e^20
    "two-sided 2": (2 * LOST - 1.2 * WON) / 20,
    "two-sided 4": (4 * LOST - 1.2 * WON) / 20,
    "gmpo": ROWS / 8 * (math.exp(20) - math.exp(0.4)),
    "sapo": 4 * ROWS / 8 * (1 / 1.05 - 1),
    "sapo token mean": 4 * (LOST / 1.05 - WON) / 20,
    "vespo": 0.0,
    "luspo": (LOST * math.exp(20) - 1.2 * WON) / 8,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ratios_do_not_overflow(dtype):
    for name, (method, _) in LOSSES.items():
        stats, rows = k8_stats(dtype), k8_rows(dtype)
        far = stats.merged({LogProb(): (stats[LogProb()].detach() + 1000).requires_grad_()})
        loss = method.loss(method.prepare(rows, far, {}), far, {})
        (grad,) = torch.autograd.grad(loss, far[LogProb()])
        assert torch.isfinite(loss) and bool(torch.isfinite(grad).all()), name
        if name in FAR:
            near = {"rel": 1e-5} if dtype == torch.float32 else {"rel": 0.02, "abs": 0.01}
            assert float(loss.detach()) == pytest.approx(FAR[name], **near), name
            assert not grad.any(), name


def test_the_gate_has_slope_one_at_ratio_one():
    for tau in (0.3, 1.0, 1.05, 4.0):
        gate = SoftGate(tau, tau)
        for ratio, wanted in ((1.0, 1.0), (2.0, 0.786448 if tau == 1 else None)):
            log_ratio = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
            (slope,) = torch.autograd.grad(gate(log_ratio, log_ratio, torch.ones(1, 1)).sum(), log_ratio)
            if wanted is not None:
                assert float(slope) / ratio == pytest.approx(wanted, abs=ALIKE)


def test_the_geometric_mean_of_one_token_is_its_ratio():
    rows = k8_rows().with_(mask=MASK & (torch.arange(4) < 1))
    wide = Surrogate(GeometricMean(10.0))
    rows = k8_method(Unclipped()).prepare(rows, k8_stats(), {})
    torch.testing.assert_close(wide(rows, k8_stats()) * rows.mask, Surrogate(Unclipped())(rows, k8_stats()) * rows.mask)


def test_the_kernel_of_an_unmoved_row_is_one():
    zero = torch.zeros(1, 2)
    for a in (-1.0, 1.0):
        assert torch.equal(GammaKernel()(zero, -torch.ones(1, 2), torch.full((1, 2), a)), torch.full((1, 2), -a))
    assert GammaKernel()(zero + 3, -torch.ones(1, 2), torch.ones(1, 2)).abs().max() < 1e-3


def test_a_dropped_row_keeps_its_place_in_the_denominator():
    method, _ = LOSSES["stale negatives"]
    rows = method.prepare(k8_rows(), k8_stats(), {})
    assert method.weights["weight"](rows, k8_stats())[:, 0].tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    rejected = rejecting(0.5, 2.0).prepare(k8_rows(), k8_stats(), {})
    assert int(rejected.loss_mask.sum()) == 17 and int(rejected.mask.sum()) == 20


def test_geometric_means_of_the_drift():
    """Those of rows 3, 4 and 7 alone lie between 0.9 and 1.1."""
    rows = RejectMismatch(0.9, 1.1, "geometric")(k8_rows(), k8_stats())
    assert rows.loss_mask.any(1).nonzero().flatten().tolist() == [3, 4, 7]


# -- advantages ------------------------------------------------------------------------------------------------------


def advantage(chain, rows, stats=None):
    for item in chain:
        rows = item(rows, stats or Stats())
    return rows.advantage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("chain", "wanted"),
    [
        (
            [GroupCentre(), NonzeroScale()],
            [1.333333, -1.333333, -1.333333, 1.333333, -0.666667, -0.666667, -0.666667, 2],
        ),
        ([LengthBaseline()], [0.6, -0.4, -0.4, 0.6, -0.1, -0.1, -0.1, 0.9]),
        ([MaximumGain()], [0, 0, 0, 0, 0, 0, 0, 1.999996]),
        ([MaximumGain(None)], [0, 0, 0, 0, 0, 0, 0, 1]),
        ([MaximumLikelihood()], [1, -1, -1, 1, -1, -1, -1, 3]),
        ([MaximumLikelihood(None)], [1, -1, -1, 1, -1, -1, -1, 3]),
    ],
    ids=["gpg", "opo", "best", "best unscaled", "maxrl", "maxrl returns"],
)
def test_advantages(chain, wanted, dtype):
    found = advantage(chain, k8_rows(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double()[:, None] * MASK, rtol=0, atol=1e-6)
    order = torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])
    torch.testing.assert_close(advantage(chain, k8_rows(dtype).select(order)), found[order])


def test_tied_groups_and_unscored_rows_have_no_advantage():
    rows = k8_rows().with_(reward=torch.tensor([[0.1]] * 4 + [[1.0], [0.0], [math.nan], [0.3]]).double())
    stats = k8_stats().merged({Collision(): torch.full((8, 4), 0.5).double()})
    for chain in ([LengthBaseline()], [MaximumLikelihood(0.1)], [OptimalTokenBaseline()], [MaximumGain()]):
        found = advantage(chain, rows, stats)
        assert not found[:4].any() and not found[6].any() and bool(found[4].any())
    assert not advantage([MaximumLikelihood(2.0)], rows).any()


def test_the_optimal_token_baseline_by_hand():
    """Two rows of one and two tokens, p = (0.5, 0.25), 0.8 and sums of squares 0.4, 0.3, 0.7."""
    rows = k8_rows().select(torch.tensor([2, 3])).with_(reward=torch.tensor([[1.0], [0.0]]).double())
    log_p = torch.tensor([[0.5, 0.25, 1, 1], [0.8, 1, 1, 1]]).double().log()
    stats = Stats({OLD: log_p, Collision(): torch.tensor([[0.4, 0.3, 9, 9], [0.7, 9, 9, 9]]).double()})
    first, second = 1 - 2 * 0.5 + 0.4, 1 - 2 * 0.8 + 0.7
    found = advantage([OptimalTokenBaseline()], rows, stats)
    baseline = first / (first + second)  # at the second position there is one row, whose baseline is itself
    assert found[:, :2].tolist() == [pytest.approx([1 - baseline, 0.0]), pytest.approx([-baseline, 0.0])]


def test_collision_is_the_sum_of_squares():
    space = SequenceSpace(4, 1)
    policy = from_probs([0.5, 0.3, 0.15, 0.05], space=space)
    found = Engine({"old": policy}).measure([Collision()], space.rows())[Collision()]
    torch.testing.assert_close(found, torch.full((4, 1), 0.365).double())


@pytest.mark.parametrize("size", [2, 3, 5])
def test_groups_of_g_ascend_the_first_terms_of_the_likelihood(size):
    """Over all groups, the step of maxrl is exactly the gradient of -sum_{k < G} (1 - p)^k / k."""
    policy = table("maxrl", space=FOUR)
    success = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    batch = groups(policy, size).with_reward(success)
    found = -gradient(policy_gradient(MaximumLikelihood()), batch.rows, policy)
    p = (policy.log_prob(FOUR.rows()).exp() * success).sum()
    series = -sum((1 - p) ** k / k for k in range(1, size))
    (wanted,) = torch.autograd.grad(series, policy.table)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_groups_of_g_ascend_their_expected_maximum(size):
    """Over all groups, those that tie for the best included: exactly."""
    policy = table("best", space=FOUR)
    earned = torch.tensor([0.3, -0.2, 1.0, 0.4], dtype=torch.float64)
    batch = groups(policy, size).with_reward(earned)
    found = -gradient(policy_gradient(MaximumGain(None)), batch.rows, policy)
    p, order = policy.log_prob(FOUR.rows()).exp(), earned.argsort()
    below = torch.cat([p.new_zeros(1), p[order].cumsum(0)]) ** size  # P(max <= each value)
    (wanted,) = torch.autograd.grad((earned[order] * below.diff()).sum() / size, policy.table)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_best_of_rows_of_some_weight():
    """A tie with a row of weight 0 is none; of two rows alike neither learns."""
    rows = k8_rows().with_(reward=torch.tensor([[1.0], [1.0], [0.2], [0.4], [0.7], [0.7], [0.1], [0.0]]).double())
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    found = advantage([MaximumGain(None)], rows.with_(weight=weight))[:, 0]
    assert found.tolist() == [pytest.approx(0.6), 0, 0, 0, 0, 0, 0, 0]
    alone = rows.select(torch.tensor([0]))
    assert not advantage([MaximumGain()], alone).any()
    with pytest.raises(ValueError, match="epsilon"):
        MaximumGain(-1e-3)


def test_population_deviations_where_enumerated():
    """Some implementations divide samples by them, too."""
    found = advantage([GroupCentre(), GroupStd(1e-6)], k8_rows().with_(exact=True))[:, 0]
    wanted = [0.999998, -0.999998, -0.999998, 0.999998, -0.577349, -0.577349, -0.577349, 1.732047]
    assert found.tolist() == pytest.approx(wanted, abs=ALIKE)


def test_importance_weights_over_their_mean():
    rows, stats = k8_rows(), k8_stats()
    part = TruncatedImportance(normalise=True)
    found, plain = part(rows, stats), TruncatedImportance()(rows, stats)
    torch.testing.assert_close(found[MASK], plain[MASK] / 1.129055, rtol=1e-6, atol=0)
    assert float(masked_mean(found, rows)) == pytest.approx(1.0, abs=1e-12) and bool((found[~MASK] == 1).all())
    assert TruncatedImportance().additive and not k8_method(Unclipped(), weights={"tis": part}).additive


def test_without_a_limit_it_is_the_likelihood():
    policy = table("maxrl", space=FOUR)
    success = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    rows = policy.weighted(FOUR.rows()).with_(reward=success[:, None])
    found = -gradient(policy_gradient(MaximumLikelihood()), rows, policy)
    (wanted,) = torch.autograd.grad((policy.log_prob(FOUR.rows()).exp() * success).sum().log(), policy.table)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_published_settings():
    assert recipe_named("gmpo")().surrogate == Surrogate(GeometricMean(0.4))
    assert recipe_named("vespo")().surrogate.level == "trajectory"
    assert recipe_named("luspo")().aggregation.mode == "sequence_mean_token_sum"
    assert recipe_named("luspo")().surrogate == recipe_named("gspo")().surrogate
    assert recipe_named("dro")().terms == {"old": Summand(SampledKL("k2", against="old"), 0.05)}
    assert recipe_named("icepop")().weights == {"mismatch": MaskedImportance(0.5, 5.0)}
    rejecting = recipe_named("icepop")(reject=True)
    assert list(rejecting.advantage) == ["centre", "scale", "reject"] and not rejecting.weights


def test_of_one_step_likelihood_and_ratio_have_one_gradient():
    """On the first update, dro is REINFORCE and dppo unclipped GRPO."""
    plain = outcome(k8_method(LogLikelihood()), moved=False)
    dro = outcome(recipe_named("dro")(scale_rewards="group", advantage_epsilon=1e-6), moved=False)
    torch.testing.assert_close(dro.grads, plain.grads)
    assert_equal(outcome(recipe_named("dppo")(coef=0.0, low=1.0, high=1.0)), outcome(recipe_named("grpo")().replacing(
        surrogate=Surrogate(Unclipped()))))  # fmt: skip


def test_bounds_at_infinity_are_none():
    plain = outcome(recipe_named("grpo")())
    assert_equal(outcome(recipe_named("grpo_two_sided")(delta=math.inf)), plain)
    assert_equal(outcome(recipe_named("stale_negative_masking")(delta=math.inf)), plain)
    assert not torch.equal(outcome(recipe_named("grpo_two_sided")(delta=1.21)).loss, plain.loss)
    agree = rows_for(recipe_named("grpo")()).with_(logp={"behaviour": plain.stats[OLD]})
    for found in (
        recipe_named("icepop")(),
        recipe_named("icepop")(reject=True),
        recipe_named("icepop")(level="sequence"),
    ):
        assert_equal(outcome(found, agree), plain)


@pytest.mark.parametrize(
    ("part", "data", "message"),
    [(RejectMismatch, {"level": "row"}, "'geometric'"), (TrustRegion, {"against": "sampler"}, "'behaviour'")],
)
def test_unknown_choices(part, data, message):
    with pytest.raises(ConfigError, match=message):
        build(part, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoSidedClip(1.1), "delta"),
        (lambda: TwoSidedClip(4.0, -0.1), "epsilon"),
        (lambda: GeometricMean(-0.1), "epsilon"),
        (lambda: SoftGate(0.0), "tau"),
        (lambda: GammaKernel(lam=-1.0), "lam"),
        (lambda: MaskedImportance(2.0, 1.0), "low"),
        (lambda: StaleNegatives(-1.0), "delta"),
        (lambda: TrustRegion(low=-1.0), "low"),
        (lambda: MaskedImportance()(k8_rows().with_(logp={}), k8_stats()), "behaviour"),
        (lambda: advantage([MaximumLikelihood(None)], k8_rows().with_(reward=-k8_rows().reward)), "threshold"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_of_two_batches_share_a_group():
    """Reduced by id: a batch that was put together again has the same advantages."""
    rows = k8_rows()
    mixed = cat([rows.select(torch.tensor([0, 5])), rows.select(torch.tensor([1, 2, 3, 4, 6, 7]))])
    found = advantage([LengthBaseline()], mixed)
    assert found[:, 0].tolist() == pytest.approx([0.6, -0.1, -0.4, -0.4, 0.6, -0.1, -0.1, 0.9])
