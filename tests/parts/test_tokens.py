"""Methods that treat tokens apart: covariances, rare tokens, entropy changes, shared tokens, on numbers by hand."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, k8_loss, k8_method, k8_rows, k8_stats
from tests.recipes.test_limits import assert_equal
from tests.worlds import from_probs, outcome

from keel.core.aggregate import masked_mean
from keel.core.rows import Rows
from keel.evaluate.entropy_law import fit_entropy_law
from keel.exact.space import SequenceSpace
from keel.parts.advantages.entropy import EntropyPenalty, TokenGroupScale
from keel.parts.controllers.temperature import EntropyScale
from keel.parts.masks.covariance import HighCovariance, covariance
from keel.parts.masks.rarity import RareTokens
from keel.parts.terms.heterogeneous import HeterogeneousClip, entropy_score
from keel.parts.terms.penalties import Summand
from keel.parts.terms.pulls import AbsoluteLogRatio, FilteredPull
from keel.parts.terms.surrogate import Clipped, Unclipped
from keel.parts.weights.covariance import ClipCov
from keel.parts.weights.entropy_change import EntropyChange, entropy_change
from keel.parts.weights.trajectory import ConflictWeight
from keel.recipes.registry import recipe_named
from keel.rollouts.adaptive import AdaptiveTemperature
from keel.statistics.engine import Engine
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats

OLD = LogProb(of=("old",))

# -- covariance ------------------------------------------------------------------------------------------------------


def kl_cov(fraction, coef=1.0):
    held = Summand(AbsoluteLogRatio(), coef, where="cov", per="batch")
    return k8_method(Unclipped()).adding(masks={"cov": HighCovariance(fraction)}, terms={"kl_cov": held})


def prepared(method):
    return method.prepare(k8_rows(), k8_stats(), {})


def test_covariances_on_k8():
    rows = prepared(k8_method(Unclipped()))
    found = covariance(rows, k8_stats())
    assert not found.requires_grad and not found[~MASK].any()
    places = [(3, 0), (0, 2), (0, 0), (1, 1)]
    assert [float(found[place]) for place in places] == pytest.approx(
        [0.751440, 0.729387, 0.508862, 0.433357], abs=1e-6
    )
    assert found.flatten().topk(4).values.tolist() == [float(found[place]) for place in places]


@pytest.mark.parametrize(
    ("fraction", "coef", "wanted"), [(0.1, 1.0, 0.336505), (0.2, 1.0, 0.354005), (0.1, 0.0, 0.300505)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_kl_cov(fraction, coef, wanted, dtype):
    found, grad = k8_loss(kl_cov(fraction, coef), dtype)
    assert float(found) == pytest.approx(wanted, abs=ALIKE if dtype == torch.float64 else 1.2e-6)
    assert bool(torch.isfinite(grad).all())


def test_clip_cov():
    part = ClipCov(0.2, 0.1, 5.0)
    method = k8_method(Clipped(0.2), weights={"cov": part})
    assert float(k8_loss(method)[0]) == pytest.approx(0.162638, abs=ALIKE)
    dropped = part(prepared(method), k8_stats()) == 0
    assert dropped.nonzero().tolist() == [[0, 0], [1, 1], [1, 3], [5, 2]]


def test_the_draw_is_uniform_among_the_candidates():
    """One of four, over many batches; and it depends on the row's number alone, not on its place."""
    part = ClipCov(0.05, 0.1, 5.0)
    rows, stats = prepared(k8_method(Clipped(0.2))), k8_stats()
    count = torch.zeros(8, 4)
    for i in range(400):
        count += part(rows.with_(row=torch.arange(8) + 8 * i), stats) == 0
    drawn = count[count > 0]
    assert len(drawn) == 4 and float(count.sum()) == 400 and float((drawn - 100).abs().max()) < 4 * 8.7
    order = torch.tensor([6, 1, 4, 3, 0, 7, 2, 5])
    assert torch.equal(part(rows.select(order), stats.select(order)), part(rows, stats)[order])


def test_an_enumerated_batch_has_expected_weights():
    part = ClipCov(0.05, 0.1, 5.0)
    rows = prepared(k8_method(Clipped(0.2)))
    found = part(rows.with_(exact=True), k8_stats())
    assert sorted(found.flatten().tolist())[:5] == pytest.approx([0.75] * 4 + [1.0])


def test_without_candidates_nothing_is_dropped():
    rows = prepared(k8_method(Clipped(0.2)))
    assert torch.equal(ClipCov(0.5, 2.0, 5.0)(rows, k8_stats()), torch.ones(8, 4).double())
    assert torch.equal(ClipCov(0.0, 0.1, 5.0)(rows, k8_stats()), torch.ones(8, 4).double())
    plain = outcome(recipe_named("grpo")())
    assert_equal(outcome(recipe_named("clip_cov")(fraction=0.0, low=0.0)), plain)
    assert not torch.equal(outcome(recipe_named("clip_cov")(fraction=0.2, low=0.0)).loss, plain.loss)


def test_kl_cov_pulls_only_once_the_policy_has_moved():
    still = outcome(recipe_named("kl_cov")(fraction=0.5), moved=False)
    plain = outcome(recipe_named("kl_cov")(coef=0.0), moved=False)
    assert_equal(still, plain)
    moved, plain = (outcome(recipe_named("kl_cov")(fraction=0.5, coef=coef)) for coef in (1.0, 0.0))
    assert float((moved.grads["policy.table"] - plain.grads["policy.table"]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("reward", "natural", "policy"),
    [([1.0, 0.0, 0.0, 0.5], -0.178146, -0.065272), ([0.0, 0.0, 0.0, 1.0], 0.092681, None)],
)
def test_the_covariance_is_the_rate_of_the_entropy(reward, natural, policy):
    """Of z += eta A, and of z += eta pi A, as the paper has them; the entropy itself agrees to first order."""
    space = SequenceSpace(4, 1)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    gain = torch.tensor(reward, dtype=torch.float64)
    gain = gain - p @ gain
    rows = from_probs(p.tolist(), space=space).weighted(space.rows())
    stats = Stats({LogProb(): p.log()[:, None]})
    for direction, wanted in ((gain, natural), (p * gain, policy)):
        if wanted is None:
            continue
        mean = masked_mean(covariance(rows.with_(advantage=direction[:, None]), stats), rows)
        assert -float(mean) == pytest.approx(wanted, abs=ALIKE)
        after = (p.log() + 1e-4 * direction).softmax(0)
        change = float((p * p.log()).sum() - (after * after.log()).sum()) / 1e-4
        assert change == pytest.approx(wanted, abs=2e-5)


def test_the_entropy_law():
    entropy = torch.tensor([1.2, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
    exact = fit_entropy_law(entropy, 0.9 - 0.25 * entropy.exp())
    assert (exact.a, exact.b, exact.r_squared) == pytest.approx((0.25, 0.9, 1.0))
    assert exact.ceiling == pytest.approx(0.65)
    torch.testing.assert_close(exact(entropy), 0.9 - 0.25 * entropy.exp())
    off = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.3], dtype=torch.float64)
    x = entropy.exp()
    slope, intercept = torch.linalg.lstsq(torch.stack([x, torch.ones(5).double()], 1), off[:, None]).solution.flatten()
    found = fit_entropy_law(entropy, off)
    assert (found.a, found.b) == pytest.approx((-float(slope), float(intercept))) and 0 < found.r_squared < 1
    for bad in ([0.5], [0.5, 0.5], [0.5, math.nan]):
        with pytest.raises(ValueError, match="entropy"):
            fit_entropy_law(torch.tensor(bad), torch.zeros(len(bad)))


# -- rare tokens -----------------------------------------------------------------------------------------------------

FIVE = SequenceSpace(5, 1)
PI = [0.55, 0.25, 0.12, 0.06, 0.02]


def pull(min_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at the five tokens, and their gradients in log pi, where the policy is the one that sampled."""
    policy = from_probs(PI, space=FIVE)
    part = FilteredPull(min_p)
    rows = FIVE.rows()
    stats = Engine({"policy": policy, "old": policy}).measure(list(part.needs), rows)
    live = stats[LogProb()].requires_grad_()
    value = part(rows, stats)
    (grad,) = torch.autograd.grad(value.sum(), live)
    return value.detach().flatten(), grad.flatten()


def test_the_pull_towards_a_filtered_copy():
    value, grad = pull(0.2)
    assert value.tolist() == pytest.approx([0.003575] * 3 + [0, 0], abs=ALIKE)
    assert grad.tolist() == pytest.approx([-0.086957] * 3 + [0, 0], abs=ALIKE)
    assert not value[3:].any() and not grad[3:].any()  # what the filter removed is let go, exactly
    for min_p in (0.02, 0.0):  # nothing is filtered
        value, grad = pull(min_p)
        assert not value.any() and not grad.any()
    raised, lowered = 0.05 + float(pull(0.2)[1][1]), 0.2 + float(pull(0.2)[1][1])
    assert raised < 0 < lowered  # the gradient in log pi of -A rho + pull at A = -0.05 and -0.2


def test_the_pull_lacks_what_the_divergence_does_to_removed_tokens():
    p = torch.tensor(PI, dtype=torch.float64)
    expected = p * pull(0.2)[1]
    logits = p.log().requires_grad_()
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    target = p * kept / (p * kept).sum()
    log_pi = logits.log_softmax(0)
    (found,) = torch.autograd.grad((expected * log_pi).sum(), logits, retain_graph=True)
    (divergence,) = torch.autograd.grad(-(target * log_pi).sum(), logits, retain_graph=True)
    (removed,) = torch.autograd.grad((p * (1 - kept) * log_pi).sum(), logits)
    torch.testing.assert_close(found, divergence - removed)


def test_the_rarest_punished_tokens_on_k8():
    rows = prepared(k8_method(Unclipped()))
    assert RareTokens(0.2)(rows, k8_stats()).nonzero().tolist() == [[1, 1], [4, 1], [5, 2]]
    assert RareTokens(1e-6)(rows, k8_stats()).nonzero().tolist() == [[5, 2]]
    assert RareTokens(0.0, 0.2)(rows, k8_stats()).nonzero().tolist() == [[7, 0]]
    assert not RareTokens(0.0, 0.0)(rows, k8_stats()).any()


def test_the_pull_is_a_gradient_of_the_whole_recipe():
    lp_reg = recipe_named("lp_reg")
    with_pull, without = outcome(lp_reg(fraction=0.5, min_p=0.5)), outcome(lp_reg(coef=0.0))
    assert_equal(without, outcome(recipe_named("grpo")(epsilon=1.0, epsilon_high=9.0, dual_clip=10.0)))
    assert float((with_pull.grads["policy.table"] - without.grads["policy.table"]).abs().max()) > 1e-3


# -- entropy changes -------------------------------------------------------------------------------------------------


def four_tokens(dtype=torch.float64):
    """Of one distribution with H = 1.142120, on-policy."""
    p = torch.tensor([[0.5], [0.05], [0.3], [0.15]], dtype=dtype)
    advantage = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=dtype)
    ids = torch.zeros(4, 1, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0, advantage=advantage)
    entropy = -(p * p.log()).sum()
    return rows, Stats({LogProb(): p.log(), OLD: p.log(), Entropy(): entropy.expand(4, 1).clone()})


def test_entropy_changes():
    found = entropy_change(*four_tokens()).flatten()
    assert found.tolist() == pytest.approx([0.224486, -1.760932, 0.043297, 0.641750], abs=ALIKE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("linear", [1.157805, 0.8, 1.2, 1.060633]),
        ("exponential", [0.971954, 0.8, 0.994528, 0.921897]),
    ],
)
def test_weights_of_entropy_changes(form, wanted, dtype):
    found = EntropyChange(form=form)(*four_tokens(dtype)).flatten()
    near = {torch.bfloat16: 0.02, torch.float32: 1e-5, torch.float64: 1.2e-6}[dtype]
    assert found.tolist() == pytest.approx(wanted, abs=near)


def test_a_quantile_keeps_an_outlier_from_setting_the_scale():
    """At 0.75 the second largest change has the least weight, too, and so has the outlier."""
    found = EntropyChange(quantile=0.75)(*four_tokens()).flatten()
    middle = 1.2 - 0.4 * (0.224486 - 0.043297) / (0.641750 - 0.043297)
    assert found.tolist() == pytest.approx([middle, 0.8, 1.2, 0.8], abs=2e-6)


def test_equal_changes_weigh_the_mean():
    rows, stats = four_tokens()
    found = EntropyChange(0.8, 1.4)(rows.with_(advantage=torch.zeros(4, 1).double()), stats)
    assert found.flatten().tolist() == pytest.approx([1.1] * 4)


def test_a_token_without_probability_has_no_infinite_change():
    """Its change counts as 0, and its weight is the highest; the others stand between it and the largest, 1.760932."""
    rows, stats = four_tokens()
    one = stats[OLD].clone()
    one[0] = -800.0
    found = EntropyChange()(rows, stats.merged({OLD: one})).flatten()
    wanted = [1.2 - 0.4 * m / 1.760932 for m in (0.0, 1.760932, 0.043297, 0.641750)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    none = stats.merged({OLD: torch.full((4, 1), -800.0).double()})
    assert EntropyChange()(rows, none).flatten().tolist() == pytest.approx([1.0] * 4)


# -- shared tokens ---------------------------------------------------------------------------------------------------

SHARED = [[1, 2, 3, 9, 7, 8], [1, 2, 4, 9, 7, 8], [1, 2, 5, 6, 7, 8], [1, 3, 3, 9, 8, 5]]


def shared_rows(signs=(1.0, -1.0, 1.0, -1.0), gap=False) -> Rows:
    tokens = torch.tensor(SHARED)
    mask = torch.arange(6) < torch.tensor([6, 6, 6, 5])[:, None]
    if gap:  # a token of a tool in the middle of every row, another one each
        tool = torch.tensor([[1], [1], [2], [3]])
        tokens = torch.cat([tokens[:, :2], tool, tokens[:, 2:]], 1)
        mask = torch.cat([mask[:, :2], torch.zeros(4, 1, dtype=torch.bool), mask[:, 2:]], 1)
    advantage = torch.tensor(signs, dtype=torch.float64)[:, None] * mask
    return Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, group=torch.zeros(4).long(), advantage=advantage)


WEIGHTS = [[4.0] * 6, [0, 0, 1, 0, 0, 0], [2, 2, 1, 1, 2, 2], [0, 1, 1, 1, 0]]


@pytest.mark.parametrize("gap", [False, True], ids=["whole", "with a gap"])
def test_conflicts(gap):
    rows = shared_rows(gap=gap)
    found = ConflictWeight()(rows, Stats())
    assert [row[mask].tolist() for row, mask in zip(found, rows.mask, strict=True)] == WEIGHTS
    assert bool((found[~rows.mask] == 1).all())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(ConflictWeight()(rows.select(order), Stats()), found[order])


def test_only_both_sides_of_one_group_conflict():
    ones = torch.ones(4, 6).double()
    for signs in ((1.0, 1.0, 1.0, 0.0), (-1.0, -1.0, 0.0, -1.0)):
        assert torch.equal(ConflictWeight()(shared_rows(signs), Stats()), ones)
    apart = shared_rows().with_(group=torch.arange(4))
    assert torch.equal(ConflictWeight()(apart, Stats()), ones)
    assert torch.equal(ConflictWeight(1.0, 1.0)(shared_rows(), Stats()), ones)


def test_rows_of_high_entropy_are_dropped_and_the_others_pay_for_theirs():
    rows = shared_rows().with_(reward=torch.tensor([[1.0], [0.0], [1.0], [0.0]]).double())
    entropy = torch.tensor([[0.2, 0.4, 0.6], [0.7, 0.7, 0.7], [0.6, 0.8, 0.9], [0.0, 0.0, 0.0]]).double().repeat(1, 2)
    stats, low = Stats({Entropy(of=("old",)): entropy}), {"first": torch.tensor(0.3), "seen": torch.ones(())}
    found = EntropyPenalty()(rows, stats, low)
    assert found.advantage[:, 0].tolist() == pytest.approx([1 - 0.04, -1 - 0.07, 0.0, -1.0])
    assert not found.advantage[3, 5] and torch.equal(found.columns["outcome_advantage"], rows.advantage)
    turned = EntropyPenalty(coef=4.0)(rows, stats, low)
    assert turned.advantage[0, 0] < 0  # and yet the row stays a good one
    assert torch.equal(ConflictWeight()(turned, Stats()), ConflictWeight()(rows, Stats()))


def test_the_filter_is_for_models_that_begin_low():
    """The first batch decides, for good: here 0.41 in the mean, then one at 0.9 of which all is dropped, or nothing."""
    rows = shared_rows().with_(reward=torch.ones(4, 1).double())
    below, above = (Stats({Entropy(of=("old",)): torch.full((4, 6), h).double()}) for h in (0.41, 0.9))
    part = EntropyPenalty(coef=0.0)
    for first, dropped in ((below, True), (above, False)):
        state = part.observe(rows, first, {}, part.init())
        state = part.observe(rows, below, {}, state)
        assert bool((part(rows, above, state).advantage == 0).all()) is dropped
    assert torch.equal(part(rows, above, part.init()).advantage, rows.advantage)


# -- scores of the entropy -------------------------------------------------------------------------------------------

H = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]


def scored():
    ids = torch.zeros(1, 6, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0)
    return entropy_score(torch.tensor([H]).double(), rows, 0.8)


def test_scores_ranges_and_advantages():
    score = scored()
    assert score[0].tolist() == pytest.approx([-1, -0.75, -0.5, -0.25, 0, 1])
    part = HeterogeneousClip()
    low, high = part.range(score)
    assert low[0].tolist() == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2, 0.2])
    assert high[0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0.4])
    rho = torch.tensor([[1.0, 1.0, 1.15, 1.0, 1.3, 1.0]]).double()
    found = part.scaled(torch.ones(1, 6).double(), rho, score)
    assert found[0].tolist() == pytest.approx([0, 0.25, 1, 0.75, 1, 1])


def test_temperatures_of_tokens():
    """By the scale of the same entropies; those beyond it have the temperature of its ends."""
    ids = torch.zeros(1, 6, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0)
    part, metrics = EntropyScale(), {}
    assert part.update(metrics, part.init(), 0)[0] == {}
    part.observe(rows, Stats({Entropy(of=("old",)): torch.tensor([H]).double()}), metrics, part.init())
    method = recipe_named("hapo")()
    for path, value in part.update(metrics, part.init(), 1)[0].items():
        method = method.set(path, value)
    found = method.rollout.adaptive.factor(torch.tensor([*H, 1e-9, 0.0, 5.0]).double())
    assert found.tolist() == pytest.approx([0.95, 0.9625, 0.975, 0.9875, 1, 1.05, 0.95, 0.95, 1.05], abs=1e-12)
    logits = torch.tensor([[0.0, 1.3, -0.4], [0.0, 0.0, -40.0]]).double()
    p = logits.softmax(-1)[0]
    first = -float((p * p.log()).sum())
    heat = 1 + 0.05 * math.log(first / 0.8) / (math.log(2) if first > 0.8 else math.log(16))
    second = 1 + 0.05 * math.log(math.log(2) / 0.8) / math.log(16)
    wanted = logits / torch.tensor([[heat], [second]], dtype=torch.float64)
    torch.testing.assert_close(method.rollout.adaptive(logits), wanted, rtol=0, atol=1e-7)
    masked = logits.masked_fill(torch.tensor([[False, False, True]] * 2), -math.inf)
    assert bool(method.rollout.adaptive(masked)[:, :2].isfinite().all())
    with pytest.raises(ValueError, match="tau"):
        AdaptiveTemperature(1.0)
    with pytest.raises(ValueError, match="low"):
        AdaptiveTemperature(low=-0.1)
    with pytest.raises(ValueError, match="quantile"):
        EntropyScale(1.1)


def test_equal_entropies_score_zero():
    ids = torch.zeros(1, 6, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0)
    assert not entropy_score(torch.full((1, 6), 0.3), rows, 0.8).any()
    assert bool(entropy_score(torch.zeros(1, 6), rows, 0.8).isfinite().all())


def hapo_stats(dtype=torch.float64, garbage=7.0):
    entropy = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return k8_stats(dtype).merged({Entropy(of=("old",)): torch.where(MASK, entropy, garbage)})


def test_without_strength_it_is_the_dual_clip():
    method, stats = k8_method(HeterogeneousClip(dual=3.0, clip=0.0, scale=0.0)), hapo_stats()
    loss = method.loss(method.prepare(k8_rows(), stats, {}), stats, {})
    assert float(loss.detach()) == pytest.approx(0.321804, abs=ALIKE)


def test_gradient_of_the_modulated_clip():
    method, stats = k8_method(HeterogeneousClip()), hapo_stats()
    rows, live = method.prepare(k8_rows(), stats, {}), stats[LogProb()]
    loss = method.loss(rows, stats, {})
    (grad,) = torch.autograd.grad(loss, live)
    for b, t in MASK.nonzero().tolist():
        step = torch.zeros_like(live)
        step[b, t] = 1e-6
        up, down = (method.loss(rows, stats.merged({LogProb(): live.detach() + s * step}), {}) for s in (1, -1))
        assert float(up - down) / 2e-6 == pytest.approx(float(grad[b, t]), abs=1e-8)
    for garbage in (math.nan, math.inf):
        assert float(method.loss(rows, hapo_stats(garbage=garbage), {}).detach()) == pytest.approx(float(loss.detach()))
    for dtype in (torch.bfloat16, torch.float32):
        low = method.prepare(k8_rows(dtype), hapo_stats(dtype), {})
        assert bool(method.loss(low, hapo_stats(dtype), {}).isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_averaged_over_tokens(dtype):
    rows = TokenGroupScale()(k8_rows(dtype), Stats())
    wanted = [1.224742, -0.816495, -0.816495, 1.224742, -0.333332, -0.333332, -0.333332, 2.999990]
    assert rows.advantage[:, 0].tolist() == pytest.approx(wanted, abs=2e-6)
    assert rows.advantage[:4].sum().item() == pytest.approx(0, abs=1e-6)
    assert rows.advantage[4:].sum().item() == pytest.approx(0, abs=1e-6)
    tied = TokenGroupScale()(k8_rows(dtype).with_(reward=torch.full((8, 1), 0.1, dtype=dtype)), Stats())
    assert not tied.advantage.any()


def test_a_group_with_a_huge_advantage_is_averaged_over_rows():
    """One good token among 29: sqrt(28) > 5, so the rows count: mean 1/8, deviation sqrt(1/8)."""
    mask = torch.arange(4) < torch.tensor([1] + [4] * 7)[:, None]
    rows = k8_rows().with_(mask=mask, group=torch.zeros(8).long())
    rows = rows.with_(reward=torch.tensor([[1.0]] + [[0.0]] * 7).double())
    found = TokenGroupScale(epsilon=0.0)(rows, Stats()).advantage[:, 0]
    assert found.tolist() == pytest.approx([0.875 / 0.125**0.5] + [-(0.125**0.5)] * 7)
    kept = TokenGroupScale(epsilon=0.0, largest=6.0)(rows, Stats()).advantage[:, 0]
    assert kept.tolist() == pytest.approx([28**0.5] + [-(28**-0.5)] * 7)


def test_published_settings():
    assert recipe_named("kl_cov")().terms["kl_cov"].coef == 1.0 and not recipe_named("kl_cov")().models
    assert recipe_named("clip_cov")(epsilon_high=0.3).weights["clip_cov"].epsilon_high == 0.3
    assert recipe_named("lp_reg")().surrogate.f == Clipped(1.0, 9.0, 10.0)
    assert recipe_named("gtpo")().aggregation.mode == "sequence_mean_token_mean"
    assert recipe_named("hapo").preset == {"train.dynamic_sampling": True}
    punished = {n: recipe_named(n)(max_completion_length=10240).transforms["overlong"] for n in ("hapo", "dapo")}
    assert punished["hapo"].cache == 4096 and punished["dapo"].cache == 2048


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HighCovariance(1.5), "fraction"),
        (lambda: ClipCov(-0.1), "fraction"),
        (lambda: ClipCov(low=2.0, high=1.0), "low"),
        (lambda: ClipCov(epsilon=-0.1), "epsilon"),
        (lambda: covariance(k8_rows(), k8_stats()), "advantage"),
        (lambda: RareTokens(-0.1), "negative"),
        (lambda: RareTokens(positive=2.0), "positive"),
        (lambda: FilteredPull(1.5), "min_p"),
        (lambda: EntropyChange(low=0.0), "low"),
        (lambda: EntropyChange(low=2.0), "low"),
        (lambda: EntropyChange(quantile=0.0), "quantile"),
        (lambda: ConflictWeight(-1.0), "amplify"),
        (lambda: EntropyPenalty(-1.0), "coef"),
        (lambda: TokenGroupScale(largest=0.0), "largest"),
        (lambda: HeterogeneousClip(-0.1), "epsilon"),
        (lambda: HeterogeneousClip(dual=1.0), "dual"),
        (lambda: HeterogeneousClip(quantile=1.5), "quantile"),
        (lambda: HeterogeneousClip(clip=-0.1), "clip"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
