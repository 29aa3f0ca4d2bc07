"""Objectives, expected updates, fixed points and placements of the KL, held to known numbers and to each other."""

import pytest
import torch
from tests.verify.reinforce import reinforce

from keel.exact.space import SequenceSpace
from keel.models.sources import Initial
from keel.parts.advantages.group import LeaveOneOut
from keel.parts.rewards.transforms import KLInReward
from keel.recipes.registry import recipes
from keel.verify.fixed_point import fixed_point, total_variation
from keel.verify.objectives import Objective
from keel.verify.placements import PLACEMENTS, sweep
from keel.verify.population import expected_update
from keel.verify.recipes import compare, group_world, worlds
from keel.verify.world import World, random_world

# -- known numbers ---------------------------------------------------------------------------------------------------

Q = [0.40, 0.25, 0.20, 0.10, 0.05]
P = [0.10, 0.30, 0.15, 0.25, 0.20]
R = [0.0, 1.0, 0.5, 2.0, 1.5]


def five(policy=P, ref=Q) -> World:
    """One prompt, one token of five."""
    log = [torch.tensor(x, dtype=torch.float64).log()[None, None] for x in (policy, policy, ref, ref)]
    return World(SequenceSpace(5, 1), torch.tensor([R], dtype=torch.float64), *log)


def test_gradient_of_the_reward_with_kl():
    found = Objective("reward", "kl_policy_ref", "sequence", 0.5).gradient(five()).flatten()
    assert found.tolist() == pytest.approx([-0.029223, -0.022961, -0.051230, 0.139119, -0.035705], abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "gradient"),
    [
        ("kl_policy_ref", [0.058446, 0.045923, 0.102461, -0.278239, 0.071410]),
        ("kl_ref_policy", [0.056780, 0.100404, 0.091258, -0.339931, 0.091488]),
        ("js", [0.013447, 0.017720, 0.022326, -0.072964, 0.019471]),
        ("chi2_policy_ref", [0.154773, -0.022111, 0.304098, -0.558054, 0.121293]),
        ("chi2_ref_policy", [0.143863, 0.354832, 0.220810, -0.985716, 0.266211]),
    ],
)
def test_gradient_of_a_target(divergence, gradient):
    found = Objective("target", divergence, "sequence", 0.5, "tilt").gradient(five()).flatten()
    assert (-found).tolist() == pytest.approx(gradient, abs=1e-6)


def test_optimum():
    best = Objective("reward", "kl_policy_ref", "sequence", 0.5).optimum(five()).exp().flatten()
    assert best.tolist() == pytest.approx([0.043220, 0.199596, 0.058742, 0.589931, 0.108512], abs=1e-6)


def two_tokens() -> World:
    """pi (.7, .3), ((.9, .1), (.4, .6)) against (.5, .5), ((.5, .5), (.2, .8)); no reward."""
    pi = torch.tensor([[[0.7, 0.3], [0.9, 0.1], [0.4, 0.6]]], dtype=torch.float64).log()
    ref = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64).log()
    return World(SequenceSpace(2, 2), torch.zeros(1, 4, dtype=torch.float64), pi, pi, ref, ref)


@pytest.mark.parametrize(("level", "wanted"), [("sequence", 0.233250), ("state", 0.177933)])
def test_what_an_earlier_token_does_to_later_states(level, wanted):
    """The per-state form lacks 0.055317 of the sequence's gradient at the first token, with the same value."""
    objective = Objective("reward", "kl_policy_ref", level, 1.0)
    world = two_tokens()
    assert float(-objective.value(world.table(), world).detach()) == pytest.approx(0.371323, abs=1e-6)
    assert float(-objective.gradient(world)[0, 0, 0]) == pytest.approx(wanted, abs=1e-6)


def test_a_gradient_is_that_of_its_value():
    world = worlds()["far"]
    for objective in (
        Objective("reward", "js", "sequence", 0.3),
        Objective("target", "chi2_ref_policy", "sequence", 0.5, "tilt"),
        Objective("data"),
    ):
        step = 1e-6 * torch.randn(world.policy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        up, down = (world.at(world.policy + sign * step) for sign in (1, -1))
        difference = (objective.value(up.table(), up) - objective.value(down.table(), down)) / 2
        assert float(difference.detach()) == pytest.approx(float((objective.gradient(world) * step).sum()), rel=1e-5)


# -- the expected update ---------------------------------------------------------------------------------------------


def test_the_expected_update_is_the_mean_of_sampled_ones():
    """Monte Carlo, an oracle that shares no enumeration: within four standard errors at every logit."""
    world = group_world()
    method = reinforce(advantage={"part": LeaveOneOut()}, transforms={"kl": KLInReward(0.3)}, models={"ref": Initial()})
    draws = 100
    probs = world.log_probs("old").exp()[0]
    picked = torch.multinomial(probs, 50 * draws, replacement=True, generator=torch.Generator().manual_seed(1))
    every = world.rows("old")
    singles = []
    for chunk in picked.reshape(draws, 50):
        rows = every.select(chunk).with_(weight=torch.ones(50, dtype=torch.float64), exact=False)
        rows = rows.with_(logp={"behaviour": torch.zeros(rows.tokens.shape, dtype=torch.float64)})
        rows = rows.with_(group=torch.arange(50) // 2, row=torch.arange(50))
        singles.append(expected_update(method, world, rows).direction)
    each = torch.stack(singles)
    error = each.std(0) / draws**0.5
    assert bool(((each.mean(0) - expected_update(method, world).direction).abs() <= 4 * error + 1e-12).all())


def test_critics_know_the_exact_value():
    """With lam 0 the advantage is one step of exact values, and the update still that of the whole return."""
    ppo = recipes()["ppo"]
    world = worlds()["far"]
    wanted = Objective("reward", "kl_policy_ref", "sequence", 0.5).gradient(world)
    for lam in (0.0, 0.5, 1.0):
        update = expected_update(ppo(beta=0.5, lam=lam, whiten=False), world).direction
        assert compare("", update, wanted).relative_error < 1e-12


# -- fixed points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "divergence",
    ["kl_policy_ref", "kl_ref_policy", *(pytest.param(d, marks=pytest.mark.slow) for d in ("js", "chi2_ref_policy"))],
)
def test_the_field_of_an_objective_rests_at_its_optimum(divergence):
    world = random_world(SequenceSpace(2, 2), 7, distance=0.3)
    objective = Objective("reward", divergence, "sequence", 1.0)
    reached = fixed_point(objective.gradient, world, objective)
    assert total_variation(reached.log_probs(), objective.optimum(world)) < 1e-6


@pytest.mark.parametrize(("scale_rewards", "away"), [("group", True), ("none", False)])
def test_deviations_move_the_fixed_point_of_grpo(scale_rewards, away):
    """Divided by the group's deviation, the reward outgrows the KL as the policy settles."""
    method = recipes()["grpo"](beta=0.5, kl="k2", scale_rewards=scale_rewards)
    objective, world = Objective("reward", "kl_policy_ref", "state", 0.5), worlds()["far"]
    reached = fixed_point(lambda at: expected_update(method, at).direction, world, objective)
    assert (total_variation(reached.log_probs(), objective.optimum(world)) > 0.1) is away


# -- placements ------------------------------------------------------------------------------------------------------


def test_placements_of_the_kl():
    points = {(p.placement, p.distance, p.on_policy): p.error for p in sweep(seeds=1, distances=(0.1, 1.0))}
    assert {name for name, *_ in points} == set(PLACEMENTS)
    for distance in (0.1, 1.0):
        assert points["k1 in the reward", distance, True] < 1e-9
        same = [points[name, distance, True] for name in ("k2 in the loss", "k3 times the ratio")]
        assert same == pytest.approx([points["full KL(pi || ref) per token", distance, True]] * 2)
        assert points["k3 in the loss", distance, True] == pytest.approx(
            points["full KL(ref || pi) per token", distance, True]
        )
    assert points["k1 in the reward", 1.0, False] > 0.01
    assert points["k1 in the loss", 1.0, True] > 0.3
