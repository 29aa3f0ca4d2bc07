"""Tabular MDPs against six-digit reference values, linear programming, finite differences and the tree of sequences."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tests.worlds import noise, table

from keel.exact.mdp import TabularMDP, sequence_mdp
from keel.exact.space import SequenceSpace
from keel.exact.states import state_optimum

# Four states, two actions: rows are (state, action), columns the next state.
TRANSITION = [
    [[0.7, 0.3, 0, 0], [0, 0.2, 0.8, 0]],
    [[0, 0.5, 0, 0.5], [0.1, 0, 0.9, 0]],
    [[0.6, 0, 0.4, 0], [0, 0, 0.1, 0.9]],
    [[1.0, 0, 0, 0], [0, 0.5, 0, 0.5]],
]
REWARD = [[0.0, 0.1], [0.2, -0.3], [0.0, -0.1], [1.0, 0.5]]
BEHAVIOUR = [[0.6, 0.4], [0.5, 0.5], [0.8, 0.2], [0.3, 0.7]]


def t(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def four() -> TabularMDP:
    return TabularMDP(t(TRANSITION), t(REWARD), t([0.5, 0.5, 0, 0]), 0.9)


def random_mdp(*seed, states: int = 5, actions: int = 3, gamma: float = 0.9) -> tuple[TabularMDP, torch.Tensor]:
    """An MDP and a reference policy."""
    transition = (2 * noise("transition", *seed, shape=(states, actions, states))).softmax(-1)
    reward = noise("reward", *seed, shape=(states, actions))
    initial = noise("initial", *seed, shape=(states,)).softmax(-1)
    return TabularMDP(transition, reward, initial, gamma), noise("ref", *seed, shape=(states, actions)).softmax(-1)


def optimal_return_by_linear_programme(mdp: TabularMDP) -> float:
    """max sum D r over occupancies D >= 0 with sum_a D(s, a) = initial(s) + gamma sum P(s | s', a') D(s', a')."""
    n, a = mdp.states, mdp.actions
    flow = np.kron(np.eye(n), np.ones(a)) - mdp.gamma * mdp.transition.reshape(n * a, n).T.numpy()
    found = linprog(-mdp.reward.flatten().numpy(), A_eq=flow, b_eq=mdp.initial.numpy(), method="highs")
    return -found.fun


# -- without a regulariser -------------------------------------------------------------------------------------------


def test_the_behaviour_policy_of_the_four_states():
    mdp, behaviour = four(), t(BEHAVIOUR)
    values = mdp.values(behaviour)
    assert values.tolist() == pytest.approx([0.830059, 0.943701, 0.887050, 1.710046], abs=1e-6)
    wanted = [0.777736, 0.908542, 1.394186, 0.493216, 0.767570, 1.364972, 1.747053, 1.694186]
    assert mdp.action_values(values).flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(mdp.objective(behaviour)) == pytest.approx(0.886880, abs=1e-6)
    wanted = [0.211148, 0.140765, 0.114024, 0.114024, 0.223297, 0.055824, 0.042275, 0.098642]
    occupancy = mdp.occupancy(behaviour)
    assert occupancy.flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    assert float((occupancy * mdp.reward).sum() / 0.1) == pytest.approx(0.886880, abs=1e-6)


def test_the_optimum_of_the_four_states():
    found = four().optimum()
    assert found.values.tolist() == pytest.approx([3.008586, 3.397231, 3.190394, 3.707727], abs=1e-6)
    assert found.policy[:, 1].tolist() == [1, 0, 1, 0]
    assert found.objective == pytest.approx(3.202908, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_optima_against_linear_programming(seed):
    mdp, _ = random_mdp("lp", seed)
    assert mdp.optimum().objective == pytest.approx(optimal_return_by_linear_programme(mdp), abs=1e-8)


def test_value_iteration_arrives_at_the_optimum():
    mdp, _ = random_mdp("iteration")
    values = torch.zeros(5, dtype=torch.float64)
    for _ in range(400):
        values = mdp.action_values(values).amax(1)
    torch.testing.assert_close(mdp.optimum().values, values, rtol=0, atol=1e-12)


def test_visits_against_a_power_series():
    mdp, policy = random_mdp("series")
    step = torch.einsum("sa,sat->st", policy, mdp.transition)
    now, total = mdp.initial, torch.zeros_like(mdp.initial)
    for _ in range(400):
        total, now = total + now, 0.9 * now @ step
    torch.testing.assert_close(mdp.visits(policy), total, rtol=0, atol=1e-12)
    torch.testing.assert_close(mdp.state_occupancy(policy), 0.1 * total, rtol=0, atol=1e-12)


def test_a_horizon_is_a_recursion():
    """Three steps, undiscounted, the best action at each: backward induction over time, written out."""
    mdp, _ = random_mdp("horizon")
    endless = TabularMDP(mdp.transition, mdp.reward, mdp.initial, 0.5)  # any discount: replaced below
    values = torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        values = (mdp.reward + 0.5 * mdp.transition @ values).amax(1)
    found = endless.unrolled(3)
    assert found.optimum().objective == pytest.approx(float(mdp.initial @ values), abs=1e-12)
    uniform = torch.full_like(found.reward, 1 / 3)
    assert found.state_occupancy(uniform).reshape(3, 5).sum(1).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


# -- regularised -----------------------------------------------------------------------------------------------------

KL, HALF_CHI2, BARRIER = "kl_policy_ref", "alpha:2", "kl_ref_policy"
SOFT = [  # f, beta, V, probability of action 1, return of the policy
    (
        KL,
        0.1,
        [2.420795, 2.888342, 2.599513, 3.239765],
        [0.811610, 0.000088, 0.977353, 0.837075],
        3.115075,
    ),
    (
        KL,
        1.0,
        [1.120159, 1.341532, 1.183701, 2.007337],
        [0.430542, 0.279412, 0.313278, 0.699758],
        1.590116,
    ),
    (
        KL,
        10.0,
        [0.857168, 0.980983, 0.914599, 1.737911],
        [0.403129, 0.477377, 0.209738, 0.698992],
        0.951587,
    ),
    (HALF_CHI2, 0.1, [2.452709, 2.980435, 2.616078, 3.309421], [0.808312, 0, 1, 0.958293], 3.131929),
    (HALF_CHI2, 1.0, [1.120914, 1.348087, 1.180411, 2.010650], [0.429374, 0.261396, 0.296739, 0.700548], 1.618383),
    (HALF_CHI2, 10.0, [0.857079, 0.980899, 0.914478, 1.737837], [0.403124, 0.477361, 0.209567, 0.698993], 0.951339),
    (
        BARRIER,
        0.1,
        [2.200044, 2.594721, 2.371276, 3.011766],
        [0.751062, 0.052250, 0.850406, 0.774815],
        2.863296,
    ),
    (
        BARRIER,
        1.0,
        [1.117095, 1.330537, 1.185508, 2.001078],
        [0.431909, 0.302134, 0.332655, 0.698704],
        1.555154,
    ),
    (
        BARRIER,
        10.0,
        [0.857252, 0.981060, 0.914718, 1.737979],
        [0.403134, 0.477409, 0.209916, 0.698991],
        0.951813,
    ),
]


@pytest.mark.parametrize(("name", "beta", "values", "action", "gain"), SOFT)
def test_soft_fixed_points_of_the_four_states(name, beta, values, action, gain):
    mdp, behaviour = four(), t(BEHAVIOUR)
    found = mdp.regularised_optimum(behaviour, beta, name)
    assert found.values.tolist() == pytest.approx(values, abs=1.1e-6)
    assert found.policy[:, 1].tolist() == pytest.approx(action, abs=1.1e-6)
    assert float(mdp.objective(found.policy)) == pytest.approx(gain, abs=1.1e-6)
    again, _ = mdp.backup(found.values, behaviour, beta, name)
    torch.testing.assert_close(again, found.values, rtol=0, atol=1e-11)
    assert float(mdp.objective(found.policy, behaviour, beta, name)) == pytest.approx(found.objective, abs=1e-11)


def test_backups_from_zero():
    """log-sum-exp, three times, and a contraction by 0.9."""
    mdp, behaviour = four(), t(BEHAVIOUR)
    fixed = mdp.regularised_optimum(behaviour, 1.0).values
    values, errors = torch.zeros(4, dtype=torch.float64), []
    for wanted in (
        [0.041208, -0.019070, -0.019216, 0.677825],
        [0.046042, 0.171829, 0.117944, 0.874901],
        [0.133967, 0.327401, 0.204761, 0.992676],
    ):
        soft = (behaviour.log() + mdp.action_values(values)).logsumexp(1)
        values, _ = mdp.backup(values, behaviour, 1.0)
        torch.testing.assert_close(values, soft, rtol=0, atol=1e-12)
        assert values.tolist() == pytest.approx(wanted, abs=1e-6)
        errors.append(float((values - fixed).abs().max()))
    assert errors == pytest.approx([1.360602, 1.169703, 1.014660], abs=2e-6)


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy", "chi2_policy_ref", "hellinger", "tv"])
def test_properties_of_the_backup(name):
    """T(V + c) = T V + gamma c; monotone; no policy is better at the optimum; the limits of beta."""
    mdp, ref = random_mdp("backup", name)
    low, up = noise("low", shape=(5,)), noise("up", shape=(5,)).abs()
    base, _ = mdp.backup(low, ref, 0.5, name)
    torch.testing.assert_close(mdp.backup(low + 3.0, ref, 0.5, name)[0], base + 2.7, rtol=0, atol=1e-10)
    assert bool((mdp.backup(low + up, ref, 0.5, name)[0] >= base).all())
    best = mdp.regularised_optimum(ref, 0.5, name)
    for seed in range(5):
        other = noise("other", seed, shape=(5, 3)).softmax(-1)
        for step in (1e-2, 0.5, 1.0):
            mixed = (1 - step) * best.policy + step * other
            assert float(mdp.objective(mixed, ref, 0.5, name)) <= best.objective + 1e-11
    assert mdp.regularised_optimum(ref, 1e-5, name).objective == pytest.approx(mdp.optimum().objective, abs=2e-2)
    far = mdp.regularised_optimum(ref, 1e6, name)
    assert far.objective == pytest.approx(float(mdp.objective(ref)), abs=1e-3)


@pytest.mark.parametrize("name", [None, "kl_policy_ref", "kl_ref_policy", "chi2_policy_ref"])
def test_policy_gradient_against_finite_differences(name):
    mdp, ref = random_mdp("gradient")
    logits = noise("logits", shape=(5, 3))
    penalty = () if name is None else (ref, 0.3, name)
    found = mdp.policy_gradient(logits, *penalty)
    for s in range(5):
        for a in range(3):
            step = torch.zeros_like(logits)
            step[s, a] = 1e-5
            up, down = (float(mdp.objective((logits + sign * step).softmax(-1), *penalty)) for sign in (1, -1))
            assert float(found[s, a]) == pytest.approx((up - down) / 2e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy"])
def test_the_gradient_vanishes_at_the_optimum(name):
    mdp, ref = random_mdp("vanish")
    policy = mdp.regularised_optimum(ref, 0.5, name).policy
    assert float(mdp.policy_gradient(policy.log(), ref, 0.5, name).abs().max()) < 1e-9
    assert float(mdp.policy_gradient(ref.log(), ref, 0.5, name).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy", "chi2_policy_ref"])
def test_writing_a_sequence_is_an_mdp(name):
    """The same optimum by policy iteration on the MDP of prefixes as by induction on the tree."""
    space = SequenceSpace(3, 3, eos=2)
    ref = table("tree", space=space)
    reward = noise("tree", shape=(15,))
    tree = state_optimum(ref, reward[None], 0.5, name)
    mdp = sequence_mdp(space, reward)
    found = mdp.regularised_optimum(ref.table.detach()[0].softmax(-1), 0.5, name)
    torch.testing.assert_close(found.values, tree.values[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.policy, tree.log_probs[0].exp(), rtol=0, atol=1e-8)
    assert mdp.optimum().objective == pytest.approx(float(reward.max()), abs=1e-12)


# -- what is no MDP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.0}, "never ends"),
        ({"gamma": 0.0}, "gamma"),
        ({"initial": [0.5, 0.6, 0, 0]}, "initial"),
        ({"transition": 1.1}, "transition"),
    ],
)
def test_what_is_refused(change, message):
    mdp = four()
    transition = mdp.transition * change.get("transition", 1.0)
    initial = t(change["initial"]) if "initial" in change else mdp.initial
    with pytest.raises(ValueError, match=message):
        TabularMDP(transition, mdp.reward, initial, change.get("gamma", 0.9))


def test_an_episode_that_may_end_needs_no_discount():
    """One state that ends with probability 1/4: four visits, value 4 r."""
    mdp = TabularMDP(t([[[0.75], [0.5]]]), t([[1.0, 1.0]]), t([1.0]))
    assert float(mdp.values(t([[1.0, 0.0]]))) == pytest.approx(4.0)
    assert mdp.visits(t([[0.0, 1.0]])).tolist() == pytest.approx([2.0])
    assert mdp.optimum().objective == pytest.approx(4.0) and math.isfinite(mdp.optimum().objective)
