"""Credit by token: the KL to come, a shifted temperature, token rewards; numbers by hand, limits, exact worlds."""

import math
from functools import partial

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows, k8_stats
from tests.recipes.exact import FIVE, REWARD, gradient, outcomes
from tests.worlds import online_rows, outcome, rows_for

from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.parts.advantages.future import FutureKL, at_segment_ends
from keel.parts.advantages.group import LeaveOneOut
from keel.parts.advantages.shifted import TemperatureShift
from keel.parts.advantages.stream import discounted_sum
from keel.parts.terms.positive import OutcomeLoss, TokenRewardLoss, running_mean
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb, Value
from keel.statistics.stats import Stats
from keel.verify.population import expected_update
from keel.verify.recipes import verify_recipe
from keel.verify.world import World

DIGITS = 5.1e-7
OLD, REF, TOKENS = LogProb(of=("old",)), LogProb(of=("ref",)), Value("token_reward", of=("old",))
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_row(mask, **known) -> Rows:
    mask = torch.tensor([mask])
    ids = torch.zeros_like(mask, dtype=torch.long)
    return Rows.build(ids[:, :1], mask[:, :1], ids, mask, reward=double(1.0)[:, None], **known)


# -- the KL to come --------------------------------------------------------------------------------------------------

GAP = double(0.2, -0.1, 0.3, 0.1, -0.2, 0.4)


@pytest.mark.parametrize("padded", [False, True])
def test_segments(padded):
    """A tool's output between the second and the third token, and padding behind, count for nothing."""
    places = [0, 1, 3, 4, 5, 6] if padded else [0, 1, 2, 3, 4, 5]
    mask = [i in places for i in range(9 if padded else 6)]
    gap = torch.full((1, len(mask)), 7.0, dtype=torch.float64)
    gap[0, places] = GAP
    rows = one_row(mask, advantage=torch.full_like(gap, 0.8))
    stats = Stats({OLD: gap - 1, REF: -torch.ones_like(gap)})
    suffix = discounted_sum(gap, rows.mask, 1.0)[0, places]
    assert suffix.tolist() == pytest.approx([0.7, 0.5, 0.6, 0.3, 0.2, 0.4])
    found = FutureKL(0.5, 2)(rows, stats).advantage[0, places]
    assert found.tolist() == pytest.approx([0.55, 0.55, 0.65, 0.65, 0.6, 0.6])
    each = FutureKL(0.5, 1)(rows, stats).advantage[0, places]
    assert each.tolist() == pytest.approx((0.8 - 0.5 * suffix).tolist())


def test_a_segment_end_at_zero_is_an_end():
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = at_segment_ends(double(3, 0, 2, 1)[None], mask, 2)
    assert found.tolist() == [[0, 0, 1, 1]]


def tree() -> World:
    """Two binary tokens, logits (.4, -.3, .9) of a 1, uniform reference, r(0, 0) = 1 and r(1, 1) = .5."""
    logits = torch.zeros(1, 3, 2, dtype=torch.float64)
    logits[0, :, 1] = double(0.4, -0.3, 0.9)
    flat = torch.zeros_like(logits)
    return World(SequenceSpace(2, 2), double(1, 0, 0, 0.5)[None], logits, logits, flat, flat)


def test_future_kl_is_the_gradient_of_the_sequence():
    """Twice the direction, for a mean over two tokens is a half of the sum."""
    make = partial(recipe_named("prl"), beta=0.5, scale_rewards="none")
    found = 2 * expected_update(make(), tree()).direction[0, :, 1]
    assert found.tolist() == pytest.approx([-0.110359, -0.083389, 0.006152], abs=DIGITS)
    coarse = 2 * expected_update(make(step_length=256), tree()).direction[0, :, 1]
    assert abs(float(coarse[0]) + 0.110359) > 1e-3  # the control: the end of the only segment


def test_prl_is_exact_without_the_deviation():
    found = verify_recipe("prl", {"scale_rewards": "none"})
    assert found.gradient_relative_error < 1e-9
    assert verify_recipe("prl").gradient_relative_error > 0.1


def test_reward_less_kl_is_flat_at_the_optimum():
    world = tree()
    best = torch.softmax(world.reward / 0.5, 1)
    flat = world.reward - 0.5 * (best / 0.25).log()
    assert flat[0].tolist() == pytest.approx([0.553759] * 4, abs=DIGITS)


def test_group_deviations_ascend_an_arcsine():
    """E[A dlog p / dlogit] = sqrt(p (1 - p)) at p = .3, with the population's deviation."""
    table = torch.tensor([[[math.log(0.3 / 0.7), 0.0]]], dtype=torch.float64)
    world = World(SequenceSpace(2, 1), double(1, 0)[None], *(table,) * 4)
    found = expected_update(recipe_named("grpo")(advantage_epsilon=0.0), world).direction[0, 0, 0]
    assert float(found) == pytest.approx(0.4582576, abs=1e-7)


# -- a shifted temperature -------------------------------------------------------------------------------------------


def shifted(part: TemperatureShift, entropy: float, reward, factor: float = 1.1) -> Rows:
    """One-token rows of a given entropy estimate, whose shifted probability is `factor` times the old."""
    n = len(reward)
    ids, mask = torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1, dtype=torch.bool)
    old = torch.full((n, 1), -entropy, dtype=torch.float64)
    value = double(*reward)
    rows = Rows.build(ids, mask, ids, mask, reward=value[:, None], weight=torch.ones(n, dtype=torch.float64))
    rows = rows.with_(advantage=torch.where(value > 0, 0.866, -0.866)[:, None])
    other = old + math.log(factor)
    return part(rows, Stats({OLD: old, part.at(part.high): other, part.at(part.low): other}))


@pytest.mark.parametrize(("entropy", "alpha"), [(0.3, 0.2), (0.48, 0.047619), (0.5, 0.0), (2.0, 0.2)])
def test_strength_of_the_pull(entropy, alpha):
    found = shifted(TemperatureShift(), entropy, [1.0, 1.0, 0.0, 0.0, 0.0]).advantage[:, 0]
    assert float(found[0]) == pytest.approx((1 - alpha) * 0.866 + alpha * 1.1, abs=1e-6)
    assert float(found[4]) == pytest.approx((1 - alpha) * -0.866, abs=1e-6)
    if alpha == pytest.approx(0.2):
        assert (float(found[0]), float(found[4])) == (pytest.approx(0.9128), pytest.approx(-0.6928))


def test_without_a_good_completion_nothing_pulls():
    rows = shifted(TemperatureShift(), 0.3, [0.0, 0.0, 0.0])
    assert rows.advantage[:, 0].tolist() == pytest.approx([-0.866] * 3)
    assert float(shifted(TemperatureShift(), 2.0, [1.0], 1e6).advantage) == pytest.approx(
        0.866 / 1.1 + 0.1 / 1.1 * 10.0
    )


def test_the_ratio_is_one_on_average_and_shifts_the_gradient():
    """p = (.7, .2, .1), r = (1, 0, 1), T = 1.2: E_p[kappa r grad log p] = E_(p^T)[r grad log p]."""
    p = double(0.7, 0.2, 0.1)
    hot = p.pow(1 / 1.2) / p.pow(1 / 1.2).sum()
    assert hot.tolist() == pytest.approx([0.645312, 0.227185, 0.127503], abs=DIGITS)
    ids, mask = torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool)
    rows = Rows.build(ids, mask, ids, mask)
    kappa = TemperatureShift().ratios(hot.log()[:, None], p.log()[:, None], rows)[:, 0]
    assert float((p * kappa).sum()) == pytest.approx(1.0)
    slope = torch.eye(3, dtype=torch.float64) - p
    found = (p * kappa * double(1, 0, 1)) @ slope
    assert found.tolist() == pytest.approx([0.104341, -0.154563, 0.050222], abs=DIGITS)


@pytest.mark.parametrize(("temperature", "rate"), [(1.2, 0.025559), (0.8, -0.033307), (1.0, 0.0)])
def test_the_pull_moves_the_entropy(temperature, rate):
    """p = (.7, .2, .1): dH along p^T - p in the logits."""
    p = double(0.7, 0.2, 0.1)
    other = p.pow(1 / temperature) / p.pow(1 / temperature).sum()
    entropy = -(p * p.log()).sum()
    assert float(-(p * (p.log() + entropy)) @ (other - p)) == pytest.approx(rate, abs=DIGITS)


def test_no_shift_is_positive_reinforce():
    part = TemperatureShift(high=1.0, low=1.0)
    found = shifted(part, 0.3, [1.0, 0.0], factor=1.0).advantage[:, 0]
    alpha = 0.2 / 1.2
    assert found.tolist() == pytest.approx([(1 - alpha) * 0.866 + alpha, (1 - alpha) * -0.866])


def test_the_temperature_follows_the_entropy():
    """In the world of the tests H is about .8: a target of .5 cools, one of 2 heats."""
    rows = rows_for(recipe_named("dcpo")())
    cold, hot = (outcome(recipe_named("dcpo")(target_entropy=t), rows).rows.advantage for t in (0.5, 2.0))
    plain = outcome(recipe_named("grpo")(), rows)
    entropy = float(-plain.stats[OLD][rows.mask].mean())
    assert 0.5 < entropy < 2.0 and not torch.equal(cold, hot)
    prepared = outcome(recipe_named("dcpo")(target_entropy=2.0, high=1.0), rows).rows
    alpha = 0.1 / (7 / 7) / (1 + 0.1)
    wanted = (1 - alpha) * plain.rows.advantage + alpha * rows.mask * (~rows.reward.isnan().all(1))[:, None]
    torch.testing.assert_close(prepared.advantage, wanted)


# -- right and wrong completions -------------------------------------------------------------------------------------


def test_token_weights():
    rows = one_row([True] * 4)
    stats = Stats({LogProb(): torch.zeros(1, 4).double(), TOKENS: double(2, -1, 0.5, 0.5)[None]})
    above, below = OutcomeLoss(head="token_reward").token_weights(rows, stats)
    assert running_mean(double(2, -1, 0.5, 0.5)[None], rows.mask)[0].tolist() == pytest.approx([2, 0.5, 0.5, 0.5])
    assert above[0].tolist() == pytest.approx([0.761594, 0.244919, 0.244919, 0.244919], abs=DIGITS)
    assert not below.any()
    turned = Stats({LogProb(): torch.zeros(1, 4).double(), TOKENS: -double(2, -1, 0.5, 0.5)[None]})
    swapped = OutcomeLoss(head="token_reward").token_weights(rows, turned)
    torch.testing.assert_close((swapped[1], swapped[0]), (above, below))


def test_the_surest_tokens_alone():
    """p = sigmoid of the running mean (0.5, 0, 2, -1): the largest of four from 0 to 1; for the wrong the smallest."""
    q = double(0.5, -0.5, 6.0, -10.0)[None]
    assert running_mean(q, torch.ones(1, 4, dtype=torch.bool))[0].tolist() == [0.5, 0.0, 2.0, -1.0]
    for width in (4, 6):
        numbers = torch.full((1, width), 7.0, dtype=torch.float64)
        numbers[:, :4] = q
        rows = one_row([i < 4 for i in range(width)])
        stats = Stats({LogProb(): torch.zeros_like(numbers), TOKENS: numbers})
        above, below = OutcomeLoss(head="token_reward", share=0.5).token_weights(rows, stats)
        assert above[0, :4].tolist() == [0, 0, 1, 0] and below[0, :4].tolist() == [0, 0, 0, 1]
        above, below = OutcomeLoss(head="token_reward", share=0.75).token_weights(rows, stats)
        p = [0.622459, 0.5, 0.880797, 0.268941]
        middle = (p[0] - p[1]) / (p[2] - p[1]), (p[0] - p[1]) / (p[0] - p[3])
        assert above[0].tolist() == pytest.approx([middle[0], 0, 1, 0] + [0] * (width - 4), abs=1e-5)
        assert below[0].tolist() == pytest.approx([0, middle[1], 0, 1] + [0] * (width - 4), abs=1e-5)


def test_tokens_that_agree_count_alike():
    """Also in a row shorter than 1 / share, where one token is left."""
    rows = one_row([True] * 3)
    stats = Stats({LogProb(): torch.zeros(1, 3).double(), TOKENS: torch.zeros(1, 3).double()})
    above, below = OutcomeLoss(head="token_reward", share=0.25).token_weights(rows, stats)
    assert above[0].tolist() == below[0].tolist() == [1, 0, 0]
    above, _ = OutcomeLoss(head="token_reward", share=1.0).token_weights(rows, stats)
    assert above[0].tolist() == [1, 1, 1]


def loss_and_gradient(part, rows, stats):
    loss = part(rows, stats)
    return float(loss.detach()), torch.autograd.grad(loss, stats[LogProb()])[0]


def test_with_equal_weights_it_is_reinforce_by_sign():
    """The numerators of both signs add up to that of -A log pi."""
    rows, stats = LeaveOneOut()(k8_rows(), Stats()), k8_stats()
    _, grad = loss_and_gradient(OutcomeLoss(1.0, 1.0, expected=True), rows, stats)
    share = double(1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1)
    right = rows.reward[:, 0] > 0
    tokens = [float((share * rows.lengths)[chosen].sum()) for chosen in (right, ~right)]
    assert tokens == pytest.approx([(3 + 1) / 2 + 1, (4 + 2) / 2 + (2 + 4 + 3) / 3])
    per = torch.where(right, share / tokens[0], share / tokens[1])
    wanted = -rows.advantage * per[:, None] * MASK
    torch.testing.assert_close(grad, wanted)


def test_one_right_and_one_wrong_completion_of_each_prompt():
    rows, stats = LeaveOneOut()(k8_rows().with_(row=torch.tensor([9, 4, 7, 3, 6, 5, 8, 2])), Stats()), k8_stats()
    loss, grad = loss_and_gradient(OutcomeLoss(1.0, 0.5), rows, stats)
    learnt = grad.any(1)
    assert learnt.tolist() == [False, True, False, True, False, True, False, True]
    right = (0.666667 * 0.38 + 1.0 * 2.15) / 2
    wrong = (4 * -0.666667 + 4 * -0.333333) / 8
    assert loss == pytest.approx(right - 0.5 * wrong, abs=1e-6)
    assert bool((grad[rows.reward[:, 0] > 0] <= 0).all()) and bool((grad[rows.reward[:, 0] == 0] >= 0).all())
    order = torch.tensor([5, 1, 7, 0, 2, 6, 3, 4])
    again, _ = loss_and_gradient(OutcomeLoss(1.0, 0.5), rows.select(order), stats_of(stats, order))
    assert again == pytest.approx(loss, abs=1e-12)


def stats_of(stats: Stats, order: torch.Tensor) -> Stats:
    return Stats({f: value[order].detach().requires_grad_() for f, value in stats.items()})


def test_prompts_of_one_sign_teach_nothing():
    rows = k8_rows().with_(reward=torch.ones(8, 1, dtype=torch.float64))
    loss, grad = loss_and_gradient(OutcomeLoss(), LeaveOneOut()(rows, Stats()), k8_stats())
    assert loss == 0 and not grad.any()


def test_sampling_the_best_of_n_is_a_tilt():
    """p = .3, N = 4: p* = 1 - .7^4, the tilt with exp(1 / beta) = odds of p* over odds of p."""
    p, best = 0.3, 1 - 0.7**4
    beta = 1 / math.log(best / (1 - best) * (1 - p) / p)
    assert (best, beta) == (pytest.approx(0.759900), pytest.approx(0.500143, abs=1e-6))
    assert p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p) == pytest.approx(best)


def test_token_reward_loss():
    """K8 with q = (0, 1, ...): the mean of softplus(-m) over the right and softplus(m) over the wrong."""
    rows = k8_rows()
    q = torch.arange(4, dtype=torch.float64).expand(8, 4).clone()
    q[~MASK] = 7.0
    q.requires_grad_()
    live = Value("token_reward", stop=("policy",))
    means = ((rows.lengths - 1) / 2).tolist()
    right = rows.reward[:, 0].tolist()
    wanted = sum(math.log1p(math.exp(-m if r else m)) for m, r in zip(means, right, strict=True)) / 8
    loss = TokenRewardLoss()(rows, Stats({live: q}))
    assert float(loss.detach()) == pytest.approx(wanted)
    (grad,) = torch.autograd.grad(loss, q)
    assert float(grad[3, 0]) == pytest.approx(-0.5 / 8) and not grad[~MASK].any()


def test_token_rewards_do_not_move_the_policy():
    method = recipe_named("oreal")(num_generations=4, token_rewards="head", positive=0.0, negative=0.0, beta=0.0)
    found = outcome(method)
    assert not found.grads["policy.table"].any() and found.grads["token_reward.weight"].any()


def test_oreal_knows_its_objective_on_two_outcomes():
    """Right 1 and wrong 0, one token, all known: a multiple of the gradient of E[r]."""
    reward = (REWARD >= 1).double()
    policy = outcomes(double(0.10, 0.30, 0.15, 0.25, 0.20))
    method = recipe_named("oreal")(token_rewards="none", beta=0.0, negative=1.0)
    found = gradient(method, policy, policy, reward).flatten()
    p = policy.log_prob(FIVE.rows()).exp().detach()
    wanted = -(p * (reward - (p * reward).sum()))
    torch.testing.assert_close(found / found.norm(), wanted / wanted.norm())


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prl", "dcpo", "oreal", "riskpo", "copo"])
def test_a_completion_without_a_reward_learns_nothing(name):
    prepared = outcome(recipe_named(name)(num_generations=4), online_rows()).rows
    assert not prepared.advantage[2].any() and bool(prepared.advantage.any())


@TYPES
@pytest.mark.parametrize("name", ["prl", "dcpo", "outcome"])
def test_low_precision(name, dtype):
    old = k8_stats()[OLD]
    shift = TemperatureShift()
    numbers = {OLD: old, REF: old - 0.1, shift.at(1.2): old - 0.2, shift.at(0.8): old + 0.2, TOKENS: -old}
    rows = LeaveOneOut()(k8_rows(torch.float32), Stats())
    stats = Stats({f: v.to(dtype) for f, v in numbers.items()})
    if name == "outcome":
        live = old.to(dtype).requires_grad_()
        loss, grad = loss_and_gradient(OutcomeLoss(head="token_reward"), rows, stats.merged({LogProb(): live}))
        assert math.isfinite(loss) and bool(grad.isfinite().all())
        return
    part = FutureKL(0.5) if name == "prl" else shift
    exact = part(rows, Stats({f: v.float() for f, v in numbers.items()})).advantage
    found = part(rows, stats).advantage
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: FutureKL(-1.0), "beta"),
        (lambda: FutureKL(step_length=0), "step_length"),
        (lambda: TemperatureShift(target=-1.0), "target"),
        (lambda: TemperatureShift(cap=-1.0), "cap"),
        (lambda: TemperatureShift(high=0.9), "high"),
        (lambda: TemperatureShift(largest=0.5), "largest"),
        (lambda: OutcomeLoss(positive=-1.0), "positive"),
        (lambda: OutcomeLoss(margin=1.0), "margin"),
        (lambda: OutcomeLoss(share=0.0), "share"),
        (lambda: TokenRewardLoss(-1.0), "coef"),
        (lambda: recipe_named("oreal").make(num_generations=1), "num_generations"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
