"""Chi-square between the laws of completions, as a reward: values, gradients, closed-form optima, the threshold."""

import math

import pytest
import torch
from tests.recipes.exact import gradient
from tests.worlds import assert_same, online_rows, outcome, rows_for

from keel.exact.optima import optimum
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.parts.rewards.occupancy import OccupancyPenalty, trimmed_mean
from keel.parts.terms.penalties import RootChi2
from keel.recipes.divergence import occupancy_chi2
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Divergence, LogProb
from keel.statistics.stats import Stats
from keel.verify.objectives import Objective
from keel.verify.world import World

P, Q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
REF, REWARD = [0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 2.0, -1.0]
LOGITS = [0.2, -0.1, 0.5, 0.0]
OLD, REFERENCE = LogProb(of=("old",)), LogProb(of=("ref",))


def table(log_probs: torch.Tensor) -> TabularPolicy:
    return TabularPolicy(SequenceSpace(len(log_probs), 1), log_probs[None, None].double())


def logs(probs: list[float]) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def added(part: OccupancyPenalty, p: list[float] = P, q: list[float] = Q) -> torch.Tensor:
    """What the part adds to rewards of 0, on all outcomes."""
    policy = table(logs(p))
    rows = policy.weighted(policy.space.rows())
    rows = rows.with_(reward=torch.zeros(len(rows), 1, dtype=torch.float64))
    stats = Stats({OLD: logs(p)[:, None], REFERENCE: logs(q)[:, None]})
    return part(rows, stats).reward[:, 0]


def test_rewards_by_hand():
    """u = (2.5, 1, 0.4), chi2 = 0.63, its root 0.793725, KL 0.274887."""
    excess = torch.tensor([1.5, 0.0, -0.6], dtype=torch.float64)
    p = torch.tensor(P, dtype=torch.float64)
    root = added(OccupancyPenalty(1.0))
    assert root.tolist() == pytest.approx((-excess / 0.793725).tolist(), abs=1e-6)
    assert float((p * root).sum()) == pytest.approx(-0.793725, abs=5.1e-7)
    assert added(OccupancyPenalty(0.5, "chi2")).tolist() == pytest.approx((-excess).tolist())
    assert float((p * added(OccupancyPenalty(1.0, "kl"))).sum()) == pytest.approx(-0.274887, abs=5.1e-7)
    assert added(OccupancyPenalty(1.0, clip=0.5)).tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert not added(OccupancyPenalty(1.0), Q).any()


def test_policy_gradient_of_the_root():
    policy, ref = table(torch.tensor(LOGITS)), table(logs(REF))
    found = gradient(occupancy_chi2(beta=1.0), policy, ref, torch.zeros(4, dtype=torch.float64))[0, 0]
    assert found.tolist() == pytest.approx([-0.307778, -0.230638, 0.250107, 0.288309], abs=5.1e-7)


@pytest.mark.parametrize("kind", ["chi2", "sqrt_chi2"])
def test_policy_gradient_by_finite_differences(kind):
    world = World(SequenceSpace(4, 1), torch.zeros(1, 4).double(), *[torch.tensor(LOGITS).double()[None, None]] * 2,
                  logs(REF)[None, None], logs(REF)[None, None])  # fmt: skip
    name = {"chi2": "chi2_policy_ref", "sqrt_chi2": "sqrt chi2_policy_ref"}[kind]
    objective = Objective("reward", name, "sequence", 1.0)
    found = gradient(occupancy_chi2(beta=1.0, kind=kind), world.table(), world.table("ref"), world.reward[0])[0, 0]
    for i in range(4):
        values = []
        for sign in (1, -1):
            moved = world.policy.clone()
            moved[0, 0, i] += sign * 1e-6
            here = world.at(moved)
            values.append(float(objective.value(here.table(), here).detach()))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(-float(found[i]), abs=1e-8)


def test_optimum_under_chi2():
    """ref (1 + (r - E r) / (2 lambda)) at lambda 2; the policy gradient vanishes there."""
    best = [0.34, 0.33, 0.27, 0.06]
    worth = torch.tensor(REWARD, dtype=torch.float64)
    assert optimum(worth, logs(REF), 2.0, "chi2_policy_ref").prob.tolist() == pytest.approx(best, abs=1e-9)
    found = gradient(occupancy_chi2(beta=2.0, kind="chi2"), table(logs(best)), table(logs(REF)), worth)
    assert float(found.abs().max()) < 1e-9


@pytest.mark.parametrize(("share", "stays"), [(1.01, True), (0.99, False), (0.9, False)])
def test_the_root_has_a_threshold(share, stays):
    """sd_ref(r) = 0.916515: above it the optimum is the reference; at 0.9 of it the value is 0.66, the ref's 0.6."""
    world = World(SequenceSpace(4, 1), torch.tensor([REWARD], dtype=torch.float64), *[logs(REF)[None, None]] * 4)
    objective = Objective("reward", "sqrt chi2_policy_ref", "sequence", share * 0.916515)
    best = objective.optimum(world)[0]
    moved = float((best.exp() - logs(REF).exp()).abs().max())
    assert (moved < 1e-6) is stays and (stays or moved > 0.05)
    if share == 0.9:
        there = world.at(best[None, None].clamp(min=-40))
        assert float(objective.value(there.table(), there).detach()) == pytest.approx(0.66, abs=1e-6)


def test_trimmed_mean():
    """Below 100 numbers nothing is trimmed; a weight of 2 is two rows."""
    values = torch.arange(100.0)
    assert float(trimmed_mean(values, torch.ones(100), 0.01)) == pytest.approx(values[1:99].mean())
    values[-1] = 1e6
    assert float(trimmed_mean(values, torch.ones(100), 0.01)) == pytest.approx(49.5)
    assert float(trimmed_mean(values[:99], torch.ones(99), 0.01)) == pytest.approx(49.0)
    double = trimmed_mean(values, torch.full((100,), 2.0), 0.01)
    assert float(double) == pytest.approx(float(trimmed_mean(values.repeat(2), torch.ones(200), 0.01)))


def test_a_batch_closer_than_the_reference_is_not_divided():
    """All drawn where u < 1: the mean of u - 1 is negative, and the reward is that of u - 1 itself."""
    rows = online_rows(4).with_(reward=torch.zeros(8, 1, dtype=torch.float64))
    ref = torch.zeros(rows.tokens.shape, dtype=torch.float64)
    stats = Stats({OLD: ref - 0.1 * rows.mask, REFERENCE: ref})
    found = OccupancyPenalty(1.0)(rows, stats).reward[:, 0]
    assert found.tolist() == pytest.approx((-torch.expm1(-0.1 * rows.lengths.double())).tolist())


def test_ratios_that_overflow_and_rewards_that_are_missing():
    """All are cut at e^20, so that (u - 1) / sqrt(mean of u - 1) is sqrt(e^20 - 1)."""
    rows = online_rows(4)
    reward = torch.zeros(8, 1, dtype=torch.float64)
    reward[3] = math.nan
    old = torch.where(rows.mask, 0.0, math.nan).double()
    ref = torch.where(rows.mask, -500.0, math.nan).double()
    ref[0] = -math.inf
    found = OccupancyPenalty(1e-9)(rows.with_(reward=reward), Stats({OLD: old, REFERENCE: ref})).reward[:, 0]
    wanted = [-1e-9 * math.sqrt(math.expm1(20))] * 8
    wanted[3] = math.nan
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, nan_ok=True)


def test_kl_of_completions_is_rloo():
    """The same reward as k1 token by token."""
    rows = rows_for(recipe_named("rloo")())
    found = outcome(occupancy_chi2(beta=0.05, kind="kl", num_generations=4), rows)
    assert_same(found, outcome(recipe_named("rloo")(beta=0.05, num_generations=4), rows))


def test_roots_of_positions():
    """chi2 .63 has the root .793725; below 1e-4 the floor, with no gradient."""
    chi2 = Divergence("chi2_policy_ref", "ref")
    numbers = torch.tensor([[0.63, 1e-5, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    found = RootChi2()(online_rows(4), Stats({chi2: numbers}))
    assert found[0].tolist() == pytest.approx([0.793725, 0.01, 0.01, 2.0], abs=5.1e-7)
    (grad,) = torch.autograd.grad(found.sum(), numbers)
    assert grad[0].tolist() == pytest.approx([0.5 / math.sqrt(0.63), 0.0, 0.0, 0.25])


@pytest.mark.parametrize("kind", ["chi2", "sqrt_chi2"])
def test_divergences_of_actions_in_the_loss(kind):
    """One token: the loss without a reward is beta times the divergence, and its gradient that of all outcomes."""
    method = occupancy_chi2(beta=0.7, kind=kind, level="state")
    assert list(method.terms) == ["occupancy"] and "occupancy" not in method.transforms
    policy, ref = table(logs(P)), table(logs(Q))
    found = gradient(method, policy, ref, torch.zeros(3, dtype=torch.float64))[0, 0]
    x = logs(P).requires_grad_()
    p, q = x.softmax(0), torch.tensor(Q, dtype=torch.float64)
    value = ((p - q) ** 2 / q).sum() ** (1.0 if kind == "chi2" else 0.5)
    (wanted,) = torch.autograd.grad(0.7 * value, x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"coef": -1.0}, "coef"), ({"trim": 0.5}, "trim"), ({"clip": 0.0}, "clip")],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ValueError, match=what):
        OccupancyPenalty(**settings)


def test_a_root_without_a_floor():
    with pytest.raises(ValueError, match="floor"):
        RootChi2(floor=0.0)
