"""Occupancy-level optima against reference values and convex programming; the bound on the true reward."""

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tests.worlds import noise

from keel.exact.mdp import TabularMDP
from keel.exact.occupancy import (
    Proxy,
    demonstration,
    occupancy_divergence,
    occupancy_optimum,
    proxy_of,
    root_chi2_optimum,
    tempting_world,
)


def t(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def four() -> tuple[TabularMDP, torch.Tensor]:
    """Four states, two actions, and a behaviour policy."""
    transition = [
        [[0.7, 0.3, 0, 0], [0, 0.2, 0.8, 0]],
        [[0, 0.5, 0, 0.5], [0.1, 0, 0.9, 0]],
        [[0.6, 0, 0.4, 0], [0, 0, 0.1, 0.9]],
        [[1.0, 0, 0, 0], [0, 0.5, 0, 0.5]],
    ]
    reward = t([[0.0, 0.1], [0.2, -0.3], [0.0, -0.1], [1.0, 0.5]])
    mdp = TabularMDP(t(transition), reward, t([0.5, 0.5, 0, 0]), 0.9)
    return mdp, t([[0.6, 0.4], [0.5, 0.5], [0.8, 0.2], [0.3, 0.7]])


def bandit(reward: list[float], ref: list[float]) -> tuple[TabularMDP, torch.Tensor]:
    """One state that never ends: the occupancy is the policy."""
    return TabularMDP(torch.ones(1, len(ref), 1, dtype=torch.float64), t([reward]), t([1.0]), 0.5), t([ref])


def random_mdp(*seed) -> tuple[TabularMDP, torch.Tensor]:
    transition = (2 * noise("transition", *seed, shape=(4, 3, 4))).softmax(-1)
    mdp = TabularMDP(transition, noise("r", *seed, shape=(4, 3)), noise("i", *seed, shape=(4,)).softmax(-1), 0.9)
    return mdp, noise("ref", *seed, shape=(4, 3)).softmax(-1)


def flow(mdp: TabularMDP) -> tuple[np.ndarray, np.ndarray]:
    """A d = b holds for the normalised occupancies and for nothing else."""
    n, a = mdp.states, mdp.actions
    matrix = np.kron(np.eye(n), np.ones(a)) - mdp.gamma * mdp.transition.reshape(n * a, n).T.numpy()
    return matrix, (1 - mdp.gamma) * mdp.initial.numpy()


def by_convex_programming(mdp: TabularMDP, ref: torch.Tensor, penalty) -> float:
    """max d r - penalty(d) over the flow polytope, by sequential quadratic programming from the reference."""
    matrix, right = flow(mdp)
    reward = mdp.reward.flatten().numpy()
    start = mdp.occupancy(ref).flatten().numpy()
    found = minimize(
        lambda d: -(d @ reward) + penalty(d, start),
        start,
        bounds=[(0, None)] * len(start),
        constraints={"type": "eq", "fun": lambda d: matrix @ d - right, "jac": lambda d: matrix},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return -found.fun


# -- optima ----------------------------------------------------------------------------------------------------------

# f = (u - 1)^2 / 2 is alpha:2; after the occupancy the objective and the discounted return of the policy
FOUR = {
    ("alpha:2", 0.1): ([0, 0.180797, 0.321415, 0, 0, 0.143048, 0.145330, 0.209411], 0.245645, 3.180929),
    ("alpha:2", 1.0): (
        [0.185076, 0.147210, 0.156788, 0.089109, 0.190475, 0.061830, 0.060902, 0.108610],
        0.108529,
        1.283692,
    ),
    ("kl_policy_ref", 0.1): (
        [0.050477, 0.173625, 0.312352, 0.000082, 0.010499, 0.130062, 0.151805, 0.171099],
        0.239699,
        3.041559,
    ),
    ("kl_policy_ref", 1.0): (
        [0.185470, 0.147132, 0.160603, 0.086759, 0.187743, 0.061598, 0.062852, 0.107843],
        0.109613,
        1.314197,
    ),
}


@pytest.mark.parametrize(("name", "beta"), FOUR)
def test_optimal_occupancies_of_the_four_states(name, beta):
    mdp, ref = four()
    wanted, objective, gain = FOUR[name, beta]
    found = occupancy_optimum(mdp, ref, beta, name)
    assert found.occupancy.flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.objective == pytest.approx(objective, abs=1e-6)
    assert float(mdp.objective(found.policy)) == pytest.approx(gain, abs=1e-6)


@pytest.mark.parametrize("name", ["kl_policy_ref", "kl_ref_policy", "chi2_policy_ref", "hellinger"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_optima_against_convex_programming(name, beta):
    penalties = {
        "kl_policy_ref": lambda d, q: float((d * np.log(np.maximum(d, 1e-300) / q)).sum()),
        "kl_ref_policy": lambda d, q: float((q * np.log(q / np.maximum(d, 1e-300))).sum()),
        "chi2_policy_ref": lambda d, q: float(((d - q) ** 2 / q).sum()),
        "hellinger": lambda d, q: float(1 - np.sqrt(np.maximum(d, 0) * q).sum()),
    }
    mdp, ref = random_mdp("convex")
    found = occupancy_optimum(mdp, ref, beta, name)
    wanted = by_convex_programming(mdp, ref, lambda d, q: beta * penalties[name](d, q))
    assert found.objective == pytest.approx(wanted, abs=1e-6)
    matrix, right = flow(mdp)
    assert np.abs(matrix @ found.occupancy.flatten().numpy() - right).max() < 1e-12
    torch.testing.assert_close(mdp.occupancy(found.policy), found.occupancy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["kl_policy_ref", "chi2_policy_ref"])
def test_small_coefficients_reach_the_linear_programme(name):
    mdp, ref = random_mdp("limit")
    matrix, right = flow(mdp)
    best = -linprog(-mdp.reward.flatten().numpy(), A_eq=matrix, b_eq=right, method="highs").fun
    assert occupancy_optimum(mdp, ref, 1e-4, name).reward == pytest.approx(best, abs=2e-3)
    far = occupancy_optimum(mdp, ref, 1e4, name)
    torch.testing.assert_close(far.occupancy, mdp.occupancy(ref), rtol=0, atol=1e-4)


def test_chi2_of_a_bandit_by_hand():
    """d = ref (1 + (r - E r) / (2 beta)) while positive."""
    mdp, ref = bandit([0, 1, 2, -1], [0.4, 0.3, 0.2, 0.1])
    found = occupancy_optimum(mdp, ref, 2.0)
    assert found.policy[0].tolist() == pytest.approx([0.34, 0.33, 0.27, 0.06], abs=1e-10)


def test_root_of_chi2_has_a_threshold():
    """The standard deviation of the reward, 0.916515 here: above it the reference, below it a jump to the boundary.

    At 0.9 of it the outcome of reward -1 is given up. On the other three d = ref / 0.9 (1 + s (r - 7/9)), and the slope
    in s vanishes where s^2 (0.84 - v / 0.9) = 1/9, v = 50/81 the variance there: the objective is 0.66.
    """
    mdp, ref = bandit([0, 1, 2, -1], [0.4, 0.3, 0.2, 0.1])
    sd = math.sqrt(0.84)
    above = root_chi2_optimum(mdp, ref, 1.01 * sd)
    assert torch.equal(above.policy, ref) and above.divergence == 0 and above.objective == pytest.approx(0.6)
    below = root_chi2_optimum(mdp, ref, 0.9 * sd)
    assert below.objective == pytest.approx(0.66, abs=1e-9)
    s = math.sqrt(1 / 9 / (0.84 - 50 / 81 / 0.9))
    wanted = [q / 0.9 * (1 + s * (r - 7 / 9)) for q, r in zip([0.4, 0.3, 0.2], [0, 1, 2], strict=True)]
    assert below.policy[0].tolist() == pytest.approx([*wanted, 0.0], abs=1e-7)


@pytest.mark.parametrize("coefficient", [0.05, 0.2])
def test_root_of_chi2_against_convex_programming(coefficient):
    mdp, ref = random_mdp("root")
    found = root_chi2_optimum(mdp, ref, coefficient)

    def penalty(d, q):
        return coefficient * math.sqrt(((d - q) ** 2 / q).sum() + 1e-18)

    assert found.objective == pytest.approx(by_convex_programming(mdp, ref, penalty), abs=1e-5)
    assert found.divergence > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_occupancies_differ_at_least_as_much_as_actions(seed):
    """The chain rule: KL(d || d_ref) = KL of the states + mean KL of the actions."""
    mdp, ref = random_mdp("chain", seed)
    policy = noise("policy", seed, shape=(4, 3)).softmax(-1)
    d, q = mdp.occupancy(policy), mdp.occupancy(ref)
    states = float((d.sum(1) * (d.sum(1) / q.sum(1)).log()).sum())
    actions = float((d.sum(1) * (policy * (policy / ref).log()).sum(1)).sum())
    assert occupancy_divergence(d, q, "kl_policy_ref") == pytest.approx(states + actions, abs=1e-12)
    assert states > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: occupancy_optimum(*bandit([0, 1], [0.5, 0.5]), 0.0), "positive"),
        (lambda: occupancy_optimum(TabularMDP(t([[[0.5]]]), t([[1.0]]), t([1.0])), t([[1.0]]), 1.0), "never end"),
        (lambda: proxy_of(t([[1.0, 1.0]]), t([[0.0, 1.0]]), t([[0.5, 0.5]])), "constant"),
        (lambda: Proxy(-0.1, 1.0, 1.0).least_true_gain(0.0, 0.0), "correlation"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- what a proxy promises -------------------------------------------------------------------------------------------


def test_correlation_by_hand():
    """True 0, 1, 1, 0 and proxy 0, 1, 0, 0, each with probability 1/4: 1 / sqrt(3)."""
    found = proxy_of(t([[0, 1], [1, 0]]), t([[0, 1], [0, 0]]), t([[0.25, 0.25], [0.25, 0.25]]))
    assert found.correlation == pytest.approx(1 / math.sqrt(3))
    assert (found.sd_true, found.sd_proxy) == pytest.approx((0.5, math.sqrt(3) / 4))
    assert found.safe_coefficient == pytest.approx(math.sqrt(3) / 4 * math.sqrt(2 / 3))


def test_the_bound_holds_on_random_worlds():
    """Random MDPs, rewards and policies, close to the reference and far away."""
    checked, least = 0, math.inf
    for seed in range(300):
        mdp, ref = random_mdp("bound", seed)
        true = mdp.reward + noise("true", seed, shape=(4, 3)) * (0.1 + seed % 3)
        q = mdp.occupancy(ref)
        proxy = proxy_of(true, mdp.reward, q)
        if proxy.correlation <= 0.02:
            continue
        for scale in (0.1, 1.0, 4.0):
            d = mdp.occupancy((ref.log() + scale * noise("move", seed, shape=(4, 3))).softmax(-1))
            gains = [float(((d - q) * r).sum()) for r in (mdp.reward, true)]
            slack = gains[1] - proxy.least_true_gain(gains[0], occupancy_divergence(d, q))
            least, checked = min(least, slack), checked + 1
    assert checked > 500 and least >= -1e-12


def test_the_bound_is_attained():
    """Moving along what in the proxy has nothing to do with the true reward gains exactly what is promised: nothing."""
    q = t([[0.25, 0.25, 0.25, 0.25]])
    true, error = t([[1, 1, -1, -1]]), t([[1, -1, 1, -1]])
    proxy = proxy_of(true, 0.6 * true + 0.8 * error, q)
    assert proxy.correlation == pytest.approx(0.6)
    d = q * (1 + 0.5 * error)
    proxy_gain = float(((d - q) * (0.6 * true + 0.8 * error)).sum())
    assert proxy_gain == pytest.approx(0.4)
    assert proxy.least_true_gain(proxy_gain, occupancy_divergence(d, q)) == pytest.approx(0.0, abs=1e-12)
    assert float(((d - q) * true).sum()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_safe_coefficient_never_loses_true_reward(seed):
    mdp, ref = random_mdp("safe", seed)
    true = mdp.reward + 0.5 * noise("true", seed, shape=(4, 3))
    q = mdp.occupancy(ref)
    proxy = proxy_of(true, mdp.reward, q)
    assert proxy.correlation > 0
    found = root_chi2_optimum(mdp, ref, proxy.safe_coefficient)
    assert float(((found.occupancy - q) * true).sum()) >= -1e-9


# -- the demonstration -----------------------------------------------------------------------------------------------


def test_only_occupancies_keep_the_true_reward_up():
    entries = demonstration()

    def true_gains(where: str, divergence: str) -> list[float]:
        return [e["true_gain"] for e in entries if (e["where"], e["divergence"]) == (where, divergence)]

    assert all(e["proxy_gain"] > 0 for e in entries)
    assert all(e["true_gain"] >= e["promised"] - 1e-9 for e in entries)
    for name in ("kl_policy_ref", "chi2_policy_ref"):
        assert max(true_gains("actions", name)) < 0  # whatever the coefficient
    chi2, kl = true_gains("occupancy", "chi2_policy_ref"), true_gains("occupancy", "kl_policy_ref")
    assert chi2[0] < 0  # too weak a regulariser hacks in any case
    assert min(chi2[2:]) > 0 and max(chi2) > 0.3
    assert 0 < max(kl) < max(chi2) / 2
    safe = entries[-1]
    assert safe["true_gain"] > safe["promised"] > 0.1


def test_without_temptation_actions_do_as_well():
    """Where the exploit pays no more than work, the optimum of the proxy is to work: action-level wins by a little."""
    entries = demonstration(coefficients=(0.03, 0.1, 0.3), exploit_proxy=1.0)
    best = {where: max(e["true_gain"] for e in entries if e["where"] == where) for where in ("actions", "occupancy")}
    assert best["actions"] > best["occupancy"] > 0.4


def test_the_reference_rarely_exploits():
    mdp, true, ref = tempting_world()
    q = mdp.occupancy(ref)
    assert float(q[1].sum()) < 0.03 and proxy_of(true, mdp.reward, q).correlation > 0.55


def test_the_page_shows_what_its_examples_print(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "exact.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for code, shown in blocks:
        (tmp_path / "example.py").write_text(code)
        runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
        assert capsys.readouterr().out.strip() == shown.strip()
