"""Methods that compare the policy's own completions: where their losses rest, and by which gradient they get there."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Pairs, Rows
from keel.exact.games import PreferenceGame
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.sources import Snapshot
from keel.parts.rewards.pairing import JUDGE, PLACE, JudgePairs
from keel.recipes.registry import recipe_named, recipes
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.verify.recipes import verify_recipe

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REF = [0.6, 0.3, 0.1]
PI_T = [0.2, 0.5, 0.3]
SIX = {"rtol": 0, "atol": 5.1e-7}
SPACE = SequenceSpace(vocab=3, horizon=1)


def three(probs) -> TabularPolicy:
    """One prompt, one token of three."""
    return TabularPolicy(SPACE, torch.tensor(probs, dtype=torch.float64).log()[None, None])


def rows_of_game() -> Rows:
    """Every completion at its probability under pi_t, and what the judge of the game says of every two."""
    rows = three(PI_T).weighted(SPACE.rows(0))
    place = torch.arange(3)
    return rows.with_(
        reward=torch.zeros(3, 1, dtype=torch.float64), features={JUDGE: P.clone()}, columns={PLACE: place}
    )


def stats_of(logits: torch.Tensor) -> Stats:
    known = {"ref": REF, "old": PI_T, "past": PI_T}
    frozen = {LogProb(of=(n,)): torch.tensor(p, dtype=torch.float64).log()[:, None] for n, p in known.items()}
    return Stats({LogProb(): logits.log_softmax(0)[:, None], **frozen})


def minimum(method: Method) -> torch.Tensor:
    """The policy at which the method's own loss is least, on all that may be drawn, by L-BFGS."""
    states = method.initial_states()
    rows = method.prepare(rows_of_game(), stats_of(torch.zeros(3, dtype=torch.float64)), states)

    def loss(flat):
        logits = torch.tensor(flat, requires_grad=True)
        value = method.loss(rows, stats_of(logits), states)
        value.backward()
        return float(value.detach()), logits.grad.numpy()

    found = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
    return torch.tensor(found.x).softmax(0)


def inpo(**options) -> Method:
    return recipe_named("inpo")(**{"beta": 0.5, "ratio": 0.4, "judge": "module:judge", **options})


# -- INPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5])
def test_the_loss_of_inpo_is_least_at_the_closed_form(every):
    """eta 0.5, tau 0.2, labels with the judge's probabilities, completions of pi_t: the step of mirror descent."""
    found = minimum(inpo(every=every))
    assert_close(found, torch.tensor([0.401167, 0.431338, 0.167495], dtype=torch.float64), **SIX)
    game = PreferenceGame(P, torch.tensor(REF, dtype=torch.float64).log(), 0.2)
    assert_close(found, game.inpo(torch.tensor(PI_T, dtype=torch.float64).log(), 0.5).exp(), rtol=0, atol=1e-7)


def test_wrong_variants_of_inpo_rest_elsewhere():
    doubled = inpo().set("terms.pairs.link.target", 1.0)  # 1 / eta for 1 / (2 eta)
    assert_close(minimum(doubled), torch.tensor([0.462925, 0.407516, 0.129559], dtype=torch.float64), **SIX)
    swapped = inpo(ratio=0.6)
    assert_close(minimum(swapped), torch.tensor([0.488201, 0.380450, 0.131349], dtype=torch.float64), **SIX)
    hard = minimum(inpo(labels="best"))
    assert float((hard - minimum(inpo())).abs().max()) > 0.01


def vector(method: Method, **logp) -> float:
    """The loss of a pair with given sums of log-probabilities, chosen and rejected, for each model."""
    rows = SPACE.rows(0).select(torch.arange(2))
    one = torch.ones(1, dtype=torch.float64)
    rows = rows.with_(pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, one, logp.pop("gap", 0.0) * one))
    names = {"policy": LogProb(), **{n: LogProb(of=(n,)) for n in ("ref", "old", "past")}}
    zero = torch.zeros(2, 1, dtype=torch.float64)
    known = {f: torch.tensor(logp[n], dtype=torch.float64)[:, None] if n in logp else zero for n, f in names.items()}
    return float(method.loss(rows, Stats(known), {}))


def test_one_pair_of_inpo():
    """c - r = 3, c0 - r0 = 1, cT - rT = 2, tau / eta = 1/3, eta = 0.1: h = 4/3, (h - 5)^2."""
    method = recipe_named("inpo")(beta=0.1)
    found = vector(method, policy=(-2.0, -5.0), ref=(-3.0, -4.0), old=(-1.0, -3.0))
    assert found == pytest.approx(13.444444, abs=5e-7)


def test_limits_of_inpo():
    """tau = eta is IPO against the reference, tau = 0 IPO against pi_t."""
    known = {"policy": (-2.0, -5.0), "ref": (-3.0, -4.0), "old": (-1.0, -3.0)}
    ipo, inpo = recipe_named("online_ipo"), recipe_named("inpo")
    assert vector(inpo(beta=0.1, ratio=1.0), **known) == vector(ipo(beta=0.1), **known)
    assert vector(inpo(beta=0.1, ratio=0.0), **known) == pytest.approx((3 - 2 - 5) ** 2)


def test_iterated_it_comes_to_the_nash_policy_where_dpo_collapses():
    """Exploitability falls on an intransitive game; a Bradley-Terry reward knows no cycle."""
    game = PreferenceGame(P, torch.tensor(REF, dtype=torch.float64).log(), 0.2)
    policy, gaps = torch.tensor(PI_T, dtype=torch.float64).log(), []
    for _ in range(12):
        gaps.append(float(game.exploitability(policy)))
        policy = game.inpo(policy, 1.0)
    assert all(later < gap for gap, later in pairwise(gaps)) and gaps[-1] < 1e-2 * gaps[0]


# -- the other losses, pair by pair ----------------------------------------------------------------------------------

V1 = {"policy": (-12.0, -15.0), "ref": (-13.0, -14.0), "old": (-13.0, -14.0)}
V2 = {"policy": (-10.0, -16.0), "ref": (-11.5, -15.25), "old": (-11.5, -15.25)}


@pytest.mark.parametrize(
    ("recipe", "options", "first", "second"),
    [
        ("online_dpo", {}, 0.598139, 0.586962),
        ("behaviour_dpo", {}, 0.598139, 0.586962),
        ("online_ipo", {}, 9.0, 7.5625),
        ("rebel", {"beta": 0.1}, 0.09, 0.075625),
        ("rebel", {"beta": 0.1, "against": "ref"}, 0.09, 0.075625),
    ],
)
def test_known_pairs(recipe, options, first, second):
    """The gap of the rewards, which REBEL reads, is 0.5."""
    method = recipe_named(recipe)(**options)
    assert vector(method, gap=0.5, **V1) == pytest.approx(first, abs=5.1e-7)
    assert vector(method, gap=0.5, **V2) == pytest.approx(second, abs=5.1e-7)


def test_which_reference():
    other = {**V2, "old": (-11.0, -15.0)}
    names = {"online_dpo": False, "online_ipo": False, "behaviour_dpo": True, "rebel": True, "inpo": True}
    for name, reads in names.items():
        method = recipe_named(name)()
        assert (vector(method, **other) != vector(method, **V2)) == reads, name
        if "every" in recipes()[name].arguments:
            moved = recipe_named(name)(every=4)
            assert moved.models["past"] == Snapshot(4)
            assert vector(moved, **{**V2, "past": V2["old"]}) == pytest.approx(vector(method, **V2))


# -- on worlds that are known ----------------------------------------------------------------------------------------


@cache
def checked(name: str, **options):
    return verify_recipe(name, options)


@pytest.mark.parametrize("name", ["behaviour_dpo", "online_ipo", "inpo", "rebel", "sppo", "nash_md", "nash_mp"])
def test_the_expected_gradient_is_that_of_the_claim(name):
    found = checked(name)
    assert found.gradient_relative_error < 1e-9
    assert found.groups[-1].relative_error < 1e-9


@pytest.mark.parametrize(
    ("name", "options"),
    [("rebel", {"against": "ref"}), ("nash_mp", {"half_step": 3}), ("inpo", {"ratio": 0.0}), ("inpo", {"every": 3})],
)
def test_and_of_its_variants(name, options):
    """With `every` it is the minimum that is looked at: completions of a snapshot make no gradient of the claim."""
    assert verify_recipe(name, options).gradient_relative_error < 1e-9


@pytest.mark.parametrize("name", ["nash_md", "nash_mp"])
def test_opponents_that_are_weighted_over_the_group_are_exact_in_the_limit(name):
    """Those that are drawn are so in groups of any size."""
    found = verify_recipe(name, {"opponents": 0})
    assert found.gradient_relative_error < 1e-9 and 1e-4 < found.groups[-1].relative_error < 0.1


def test_self_play_is_unbiased_in_small_groups():
    found = verify_recipe("nash_md", {"mixture": 0.0})
    assert found.gradient_relative_error < 1e-9 and found.groups[-1].relative_error < 1e-9


def test_online_dpo_is_another_field():
    """Its labels decide whether it misses the gradient by a tenth or by a third."""
    hard, soft = checked("online_dpo"), verify_recipe("online_dpo", {"labels": "expected"})
    assert 0.2 < hard.gradient_relative_error < 0.35
    assert 0.03 < soft.gradient_relative_error < 0.1


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((n, {"num_generations": 1}) for n in ("online_dpo", "online_ipo", "sppo", "rebel", "nash_md", "nash_mp")),
        ("inpo", {"ratio": 1.5}),
        ("inpo", {"every": 0}),
        ("sppo", {"beta": 0.0}),
        ("nash_mp", {"eta": 0.0}),
        ("nash_mp", {"half_step": -1}),
        ("nash_md", {"mixture": 2.0}),
        ("online_dpo", {"pairs": "none"}),
    ],
)  # fmt: skip
def test_bad_settings(name, options):
    with pytest.raises((ConfigError, ValueError)):
        recipes()[name](**options)


def test_without_pairs_nothing_is_learnt():
    method = recipe_named("online_dpo")()
    rows = rows_of_game().with_(exact=False, weight=torch.ones(3, dtype=torch.float64))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rows = method.prepare(rows, Stats(), method.initial_states())
    loss = method.loss(rows, stats_of(logits), {})
    loss.backward()
    assert float(loss.detach()) == 0.0 and bool((logits.grad == 0).all())


def test_a_judge_takes_the_place_of_the_reward():
    method = recipe_named("online_dpo")(judge="module:judge", pairs="best_worst")
    assert method.transforms["pairs"] == JudgePairs("module:judge", "best_worst", "best")
    with pytest.raises(MethodError, match="judge"):
        method.prepare(rows_of_game().with_(features={}), Stats(), method.initial_states())


def test_gradients_by_finite_differences():
    for name in ("online_dpo", "behaviour_dpo", "online_ipo", "inpo", "rebel", "sppo"):
        method = recipe_named(name)(beta=0.5)
        states = method.initial_states()
        reward = torch.tensor([[0.0], [1.0], [0.3]], dtype=torch.float64)
        logits = torch.tensor([0.2, -0.4, 0.7], dtype=torch.float64, requires_grad=True)
        rows = method.prepare(rows_of_game().with_(reward=reward), stats_of(logits.detach()), states)
        (grad,) = torch.autograd.grad(method.loss(rows, stats_of(logits), states), logits)
        for i in range(3):
            step = 1e-6 * torch.eye(3, dtype=torch.float64)[i]
            up, down = (method.loss(rows, stats_of(logits.detach() + s), states) for s in (step, -step))
            assert float(grad[i]) == pytest.approx(float((up - down) / 2e-6), abs=1e-7), name
        assert math.isclose(float(grad.sum()), 0.0, abs_tol=1e-12) and float(grad.abs().max()) > 1e-3
