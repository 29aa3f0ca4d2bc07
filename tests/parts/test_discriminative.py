"""Good completions against bad ones on K8, the preference for short ones, and the trust region."""

import math

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows, k8_stats
from tests.recipes.exact import FIVE, REWARD, outcomes
from tests.recipes.exact import gradient as expected
from tests.worlds import online_rows, outcome

from keel.core.aggregate import Groups
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.terms.discriminative import Discrimination, KLHinge
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

DIGITS = 5.1e-7
OLD = LogProb(of=("old",))
INF = math.inf
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (Discrimination("log_likelihood", INF), 0.347778),
        (Discrimination("ratio", INF), -0.124284),
        (Discrimination("log_likelihood", 10.0), 0.351262),
        (Discrimination("log_likelihood", 0.1), 0.509360),
        (Discrimination("ratio", 1.0), -0.103592),
        (Discrimination(length_temperature=0.1, max_length=4), 0.239445),
        (Discrimination(length_temperature=1e6, max_length=4), 0.351262),
    ],
    ids=str,
)
def test_loss(part, wanted):
    assert float(part(k8_rows(), k8_stats()).detach()) == pytest.approx(wanted, abs=DIGITS)


def test_scores():
    wanted = [-0.833333, -1.325, -0.6, -0.38, -1.225, -1.0375, -1.033333, -2.15]
    assert Discrimination().scores(k8_rows(), k8_stats()).tolist() == pytest.approx(wanted, abs=DIGITS)


def test_a_flat_soft_maximum_is_the_mean():
    loss = [float(Discrimination(temperature=t)(k8_rows(), k8_stats()).detach()) for t in (1e5, INF)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-5)


def gradient(part, rows=None, stats=None) -> torch.Tensor:
    stats = k8_stats() if stats is None else stats
    (grad,) = torch.autograd.grad(part(k8_rows() if rows is None else rows, stats), stats[LogProb()])
    return grad


def test_the_bad_completions_are_pushed_down_as_their_scores_weigh():
    """By softmax at temperature .1; rows 2 and 4 to 6 have scores -.6, -1.225, -1.0375, -1.033333, row 1 -1.325."""
    grad = gradient(Discrimination(temperature=0.1))
    wanted = [-0.5, 0.000710, 0.999290, -0.5, 0.069837, 0.455394, 0.474769, -1]
    assert (2 * (grad * MASK).sum(1)).tolist() == pytest.approx(wanted, abs=2 * DIGITS)
    assert not grad[~MASK].any()


@pytest.mark.parametrize(
    "part",
    [Discrimination(), Discrimination("ratio", 1.0), Discrimination(length_temperature=0.1, max_length=4), "hinge"],
    ids=str,
)
def test_gradient_by_finite_differences(part):
    stats = k8_stats()
    if part == "hinge":
        part = KLHinge(10.0, 0.01)
        stats = stats.merged(
            {LogProb(): (stats[OLD] - 0.3 * (stats[LogProb()] - stats[OLD])).detach().requires_grad_()}
        )
    grad, live = gradient(part, stats=stats), stats[LogProb()].detach()
    assert float(grad.abs().max()) > 1e-3
    for b, t in MASK.nonzero().tolist():
        step = torch.zeros_like(live)
        step[b, t] = 1e-6
        up, down = (float(part(k8_rows(), stats.merged({LogProb(): live + s * step}))) for s in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(float(grad[b, t]), abs=1e-7)


def test_prompts_without_a_good_or_without_a_bad_completion_count_nothing():
    """In the numerator; in the denominator they do."""
    rows = k8_rows()
    reward = rows.reward.clone()
    reward[:4] = 1.0
    first, both = (gradient(Discrimination(), r) for r in (rows.with_(reward=reward), rows))
    assert not first[:4].any() and torch.equal(first[4:][MASK[4:]], both[4:][MASK[4:]])


def test_a_completion_without_a_reward_is_neither():
    rows = k8_rows()
    reward = rows.reward.clone()
    reward[3] = torch.nan
    grad = gradient(Discrimination(temperature=INF), rows.with_(reward=reward))
    assert not grad[3].any() and float(grad[0, 0]) == pytest.approx(-1 / 3 / 2)


def test_difficulty_does_not_scale_the_step():
    """The weight of all good completions together is 1 a prompt; GRPO's is sqrt(p (1 - p)), with population std."""
    for right in (1, 2, 4):
        reward = torch.tensor([1.0] * right + [0.0] * (8 - right), dtype=torch.float64)
        rows = k8_rows().with_(group=torch.zeros(8, dtype=torch.long), reward=reward[:, None])
        found = (gradient(Discrimination(), rows) * MASK).sum(1)
        assert float(found[:right].sum()) == pytest.approx(-1) and float(found[right:].sum()) == pytest.approx(1)
        grpo = GroupStd(0.0)(GroupCentre()(rows, Stats()), Stats()).advantage[0, 0]
        p = right / 8
        assert p * float(grpo) == pytest.approx(math.sqrt(p * (1 - p)) * math.sqrt(7 / 8))


def test_preference_for_short_answers():
    rows = k8_rows()
    part = Discrimination(length_temperature=0.1, max_length=4)
    plain = ((1 - rows.lengths / 4) / 0.1).exp().tolist()
    assert plain == pytest.approx([12.182494, 1, 148.413159, 1808.042414, 148.413159, 1, 12.182494, 1808.042414], 1e-6)
    weight = part.preference(rows, Groups.of(rows, rows.reward[:, 0] > 0))
    assert float(weight[0] / weight[3]) == pytest.approx(plain[0] / plain[3], rel=1e-6)
    tiny = Discrimination(length_temperature=1e-4, max_length=4)
    assert math.isfinite(float(tiny(rows, k8_stats()).detach()))  # exp would overflow
    grad = (gradient(part) * MASK).sum(1)
    assert bool((grad[rows.reward[:, 0] > 0] < 0).all())


def test_on_two_outcomes_it_is_the_reward_over_its_variance():
    """One token, all completions known: the gradient of J is that of E[r] over p (1 - p)."""
    policy = outcomes(torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64))
    p, reward = policy.log_prob(FIVE.rows()).exp().detach(), (REWARD >= 1).double()
    mean = (p * reward).sum()
    found = expected(recipe_named("disco")(tau=INF), policy, policy, reward).flatten()
    torch.testing.assert_close(found, -p * (reward - mean) / (mean * (1 - mean)))


def test_a_length_penalty_in_grpo_holds_length_against_a_good_answer():
    """Rewards (.5, .95, .95, .95, 0), the first right but long; and all four of them right."""
    for rewards, wanted in (([0.5, 0.95, 0.95, 0.95, 0.0], -0.402656), ([0.5, 0.95, 0.95, 0.95], -1.5)):
        n = len(rewards)
        rows = k8_rows().select(torch.arange(n))
        rows = rows.with_(group=torch.zeros(n, dtype=torch.long), reward=torch.tensor(rewards).double()[:, None])
        found = GroupStd(1e-12)(GroupCentre()(rows, Stats()), Stats()).advantage[0, 0]
        assert float(found) == pytest.approx(wanted, abs=DIGITS)


# -- the trust region ------------------------------------------------------------------------------------------------


def test_trust_region():
    """K8 moves the wrong way, K = -.1035; at K = .0035 the gradient of K has the factor 3.4."""
    assert float(KLHinge()(k8_rows(), k8_stats()).detach()) == 0 and not gradient(KLHinge()).any()
    stats = k8_stats()
    near = stats.merged({LogProb(): (stats[OLD] - 0.0035).requires_grad_()})
    assert float(gradient(KLHinge(), stats=near)[0, 0]) == pytest.approx(-3.4 / 20, abs=1e-9)


@TYPES
@pytest.mark.parametrize("part", [Discrimination(), Discrimination("ratio", 1.0), KLHinge(1.0, 0.0)], ids=str)
def test_low_precision(part, dtype):
    exact = k8_stats()
    live = torch.where(MASK, exact[OLD] - 0.1, exact[LogProb()].detach())
    numbers = {LogProb(): live, OLD: exact[OLD]}
    low = Stats({f: v.to(dtype).requires_grad_() for f, v in numbers.items()})
    high = Stats({f: v.to(dtype).double().requires_grad_() for f, v in numbers.items()})
    found, wanted = (part(k8_rows(torch.float32), s) for s in (low, high))
    assert bool(torch.isfinite(found)) and float(found.detach()) == pytest.approx(float(wanted.detach()), abs=0.02)
    assert bool(gradient(part, stats=low).isfinite().all())


def test_recipes():
    disco = recipe_named("disco")
    assert disco().terms["gap"].temperature == 10.0 and disco(score="ratio").terms["gap"].temperature == 1.0
    assert disco(tau=INF).terms["gap"].temperature == INF
    rows = online_rows()
    hard = outcome(recipe_named("drpo")(length_temperature=0.1, max_completion_length=3), rows)
    assert not torch.equal(hard.grads["policy.table"], outcome(disco(), rows).grads["policy.table"])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Discrimination(temperature=0.0), "temperature"),
        (lambda: Discrimination(length_temperature=-1.0), "length_temperature"),
        (lambda: Discrimination(max_length=0), "max_length"),
        (lambda: Discrimination(score="sum"), "score"),
        (lambda: KLHinge(-1.0), "coef"),
        (lambda: KLHinge(delta=-1.0), "delta"),
        (lambda: recipe_named("disco").make(num_generations=1), "num_generations"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises((ValueError, TypeError), match=what):  # the annotations are checked in tests, too
        make()
