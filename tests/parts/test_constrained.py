"""Rewards under constraints (mu- and xi-PPO), a moving KL threshold (SAFE), weights of objectives (RECAP)."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.parts.k8 import ALIKE, k8_rows
from tests.worlds import assert_same, noise, outcome, rows_for

from keel.core.components import COMPONENTS
from keel.core.rows import Rows
from keel.models.heads import SlowCopy
from keel.parts.advantages.constrained import ConstrainedGAE, mix
from keel.parts.advantages.group import GroupCentre, GroupStd, Returns
from keel.parts.advantages.pessimistic import SoftMinCritics
from keel.parts.advantages.stream import GAE
from keel.parts.controllers.convergence import ObjectiveWeights
from keel.parts.controllers.lagrange import Lagrange, ThresholdSearch, next_point, search_thresholds
from keel.parts.controllers.pid import KLPreview, KLThreshold
from keel.parts.rewards.components import KeepComponents, StandardiseComponents
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.critics import SoftMinValueLoss, SquaredValueLoss
from keel.recipes.registry import recipe_named
from keel.statistics.critics import soft_min
from keel.statistics.functionals import LogProb, Value
from keel.statistics.stats import Stats
from keel.train.online import control
from keel.verify.recipes import HOLDS, verify_recipe

NOTHING = Stats()
OLD, REF = LogProb(of=("old",)), LogProb(of=("ref",))
PATH = "advantage.constrained.multipliers"


def with_rewards(rows: Rows, *more: list[float]) -> Rows:
    """K8 with further reward columns."""
    columns = [rows.reward, *(torch.tensor(m, dtype=torch.float64)[:, None] for m in more)]
    return rows.with_(reward=torch.cat(columns, 1))


SECOND = [0.5, 0.5, 1.0, 0.0, 0.0, 2.0, 1.0, math.nan]


# -- constrained RLHF ------------------------------------------------------------------------------------------------


def test_mixed_advantages():
    """M = 2; one row of two tokens: A^KL = (.5, -1), A^1 = (1, -1), A^2 = (0, 2)."""
    given = torch.tensor([[[0.5, -1.0]], [[1.0, -1.0]], [[0.0, 2.0]]], dtype=torch.float64)
    assert mix(given, (0.5, 0.5)).tolist() == [[1.0, -0.5]]
    assert mix(given, (0.0, 0.0)).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(
    ("squash", "u", "multipliers"),
    [
        ("sigmoid", (-0.0025, 0.00125), (0.499375, 0.5003125)),
        ("tanh", (-0.01, 0.005), (-0.009999667, 0.004999958)),
        ("identity", (0.0, 0.005), (0.0, 0.005)),
    ],
)
def test_dual_step(squash, u, multipliers):
    """Rewards 0.1 above and 0.05 below their thresholds."""
    part = Lagrange((0.5, 0.5), squash)
    values, state = part.update({}, part.init(), 0)
    assert values == {PATH: (0.5, 0.5) if squash == "sigmoid" else (0.0, 0.0)}
    values, state = part.update({"constraints/0": 0.6, "constraints/1": 0.45}, state, 1)
    assert state["u"] == pytest.approx(u, abs=1e-12)
    assert values[PATH] == pytest.approx(multipliers, abs=1e-8)
    waiting, _ = part.update({"constraints/0": math.nan}, state, 2)
    assert waiting == values


def test_momentum():
    """tanh at u = 0 has slope 1, near 0 almost: after two equal steps the second is 1.1 of the first."""
    part = Lagrange((0.0,), "identity", learning_rate=0.1, momentum=0.1, start=1.0)
    state = part.init()
    for wanted in (0.9, 0.79):
        _, state = part.update({"constraints/0": 1.0}, state, 0)
        assert state["u"] == pytest.approx([wanted])


FIXED = {
    ("sigmoid", 0.4): (0.7, 0.556101),
    ("tanh", 0.4): (0.7, 0.556101),
    ("tanh", 0.75): (0.7, None),
    ("sigmoid", 0.75): (0.75, 0.0),
    ("tanh", 0.9): (0.8452, -1.0),
}


@pytest.mark.parametrize(("squash", "ref"), FIXED)
def test_fixed_points_of_a_bandit(squash, ref):
    """Two actions of reward 1 and 0, threshold 0.7; the best policy of each multiplier, p = s(logit ref + lam/(1-lam)).

    A bounded multiplier cannot bring 0.9 down to 0.7, and one that stays positive cannot bring 0.75 down at all.
    """
    best, multiplier = FIXED[squash, ref]
    saturates = multiplier in (0.0, -1.0)
    part = Lagrange((0.7,), squash, learning_rate=20.0 if saturates else 0.5)
    state, metrics = part.init(), {}
    for step in range(1500):
        values, state = part.update(metrics, state, step)
        lam = values[PATH][0]
        p = 1 / (1 + math.exp(-(math.log(ref / (1 - ref)) + lam / (1 - lam))))
        metrics = {"constraints/0": p}
    assert p == pytest.approx(best, abs=1e-3 if saturates else 1e-6)
    if multiplier is None:
        assert lam < 0
    else:
        assert lam == pytest.approx(multiplier, abs=2e-3 if saturates else ALIKE)


def test_one_constraint_halfway_is_half_of_ppo():
    """M = 1, lam = 1/2, no whitening: (A^KL + A^r) / 2, and the critics add up to PPO's."""
    rows = k8_rows().with_(token_reward=-0.1 * noise("kl", shape=(8, 4)))
    kl, reward = noise("v kl", shape=(8, 4)), noise("v 0", shape=(8, 4))
    names = {"value_kl": kl, "value_0": reward, "value": kl + reward}
    stats = Stats({Value(name, of=("old",)): value for name, value in names.items()})
    found = ConstrainedGAE((0.5,), 0.9, 0.8, whiten=False)(KeepComponents()(rows, NOTHING), stats)
    wanted = GAE(0.9, 0.8)(rows, stats)
    torch.testing.assert_close(found.advantage, wanted.advantage / 2)
    returns = found.columns["returns/value_kl"] + found.columns["returns/value_0"]
    torch.testing.assert_close(returns * rows.mask, wanted.columns["returns"] * rows.mask)


def test_each_reward_is_whitened_on_its_own():
    """A reward of another unit changes nothing, and what nobody could score counts nothing."""
    rows = with_rewards(k8_rows(), SECOND)
    heads = ("value_kl", "value_0", "value_1")
    stats = Stats({Value(h, of=("old",)): torch.zeros(8, 4, dtype=torch.float64) for h in heads})
    part = ConstrainedGAE((0.3, 0.6), 1.0, 1.0)
    scale = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    found, scaled = (
        part(WeightedSum()(KeepComponents()(r, NOTHING), NOTHING), stats)
        for r in (rows, rows.with_(reward=rows.reward * scale))
    )
    torch.testing.assert_close(found.advantage, scaled.advantage, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.features[COMPONENTS], rows.reward, equal_nan=True)
    torch.testing.assert_close(found.reward[:, 0], rows.reward.nan_to_num(0.0).sum(1))
    alone = ConstrainedGAE((1.0,), 1.0, 1.0)(k8_rows(), stats).advantage
    torch.testing.assert_close(found.advantage[7], 0.3 * alone[7])


def test_mean_rewards_for_the_dual():
    metrics: dict = {}
    Lagrange((0.0, 0.0)).observe(KeepComponents()(with_rewards(k8_rows(), SECOND), NOTHING), NOTHING, metrics, {})
    assert metrics == {"constraints/0": pytest.approx(3 / 8), "constraints/1": pytest.approx(5 / 7)}


def test_value_error_of_one_head():
    value = torch.full((8, 4), 2.0, dtype=torch.float64)
    rows = k8_rows().with_(columns={"returns/value_0": torch.full((8, 4), 0.5, dtype=torch.float64)})
    assert SquaredValueLoss("value_0")(rows, Stats({Value("value_0"): value})).unique().tolist() == [2.25]
    with pytest.raises(ValueError, match="value_1"):
        SquaredValueLoss("value_1")(rows, Stats({Value("value_1"): value}))


@pytest.mark.parametrize(("name", "options"), [("mu_ppo", {"whiten": False}), ("safe", {})])
def test_constrained_methods_hold_undiscounted(name, options):
    given = options | ({"gamma": 1.0} if name != "safe" else {"entropy_coef": 0.0})
    assert verify_recipe(name, given).status == HOLDS


def test_the_multipliers_arrive():
    method = recipe_named("xi_ppo")(thresholds=(0.2, 0.4))
    assert set(method.heads) == {"value_kl", "value_0", "value_1"} == set(method.terms)
    controller = method.controllers["multipliers"]
    values, _ = controller.update({"constraints/0": 0.0, "constraints/1": 0.4}, controller.init(), 0)
    for path, value in values.items():
        method = method.set(path, value)
    assert method.advantage["constrained"].multipliers == pytest.approx((math.tanh(0.02), 0.0))


def test_search_of_thresholds():
    """A quadratic with its top at (0.3, 0.7); no point is asked for twice."""
    asked = []

    def score(point):
        asked.append(point)
        return 1 - (point[0] - 0.3) ** 2 - 2 * (point[1] - 0.7) ** 2

    best, value = search_thresholds(score, [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], evaluations=80)
    assert best == pytest.approx((0.3, 0.7), abs=1e-3) and value == pytest.approx(1, abs=1e-5)
    assert len(asked) == len(set(asked)) <= 80
    few = search_thresholds(score, [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], evaluations=3)
    assert few[0] == (0.0, 1.0)


def searched(part: ThresholdSearch, score, batches: int) -> tuple[list[tuple], dict]:
    """The thresholds in force at each batch, the metric being `score` of those in force before."""
    state, metrics, points = part.init(), {}, []
    for step in range(batches):
        values, state = part.update(metrics, json.loads(json.dumps(state)), step)
        points.append(values["controllers.multipliers.thresholds"])
        metrics = {"reward": score(points[-1])}
    return points, state


def test_thresholds_are_found_within_a_run():
    """The peak at (.7, .2); each point is in force for two batches and asked for once."""
    part = ThresholdSearch((0.5, 0.5), width=0.2, every=2, evaluations=60)
    points, state = searched(part, lambda x: -((x[0] - 0.7) ** 2) - 2 * (x[1] - 0.2) ** 2, 130)
    assert points[-1] == pytest.approx((0.7, 0.2), abs=2e-3)
    tried = [tuple(point) for point, _ in state["known"]]
    assert len(tried) == 60 == len(set(tried)) and points[-1] in tried
    assert points[:6] == [(0.5, 0.5), (0.5, 0.5), (0.7, 0.5), (0.7, 0.5), (0.5, 0.7), (0.5, 0.7)]
    outside, _ = search_thresholds(lambda x: -((x[0] - 0.7) ** 2) - 2 * (x[1] - 0.2) ** 2, part.simplex, 60)
    assert points[-1] == pytest.approx(outside)


def test_moves_of_the_simplex():
    """From 0 and 1 with scores 0 and 1: reflection to 2; better: expansion to 3; worse: contraction to 1.5."""
    first = [((0.0,), 0.0), ((1.0,), 1.0)]
    start = [(0.0,), (1.0,)]
    assert next_point(start, []) == (0.0,) and next_point(start, first[:1]) == (1.0,)
    assert next_point(start, first) == (2.0,)
    assert next_point(start, [*first, ((2.0,), 2.0)]) == (3.0,)
    assert next_point(start, [*first, ((2.0,), 0.5)]) == (1.5,)
    inside = [*first, ((2.0,), -1.0)]
    assert next_point(start, inside) == (0.5,)


def test_the_thresholds_arrive_at_the_dual():
    method = recipe_named("mu_ppo")(thresholds=(0.5, 0.3), search_metric="rewards/true/mean")
    assert list(method.controllers) == ["search", "multipliers"]
    moved = method.set("controllers.multipliers.thresholds", (0.6, 0.3))
    assert moved.controllers["multipliers"].thresholds == (0.6, 0.3)
    values, state = method.controllers["search"].update({}, method.controllers["search"].init(), 0)
    assert values == {"controllers.multipliers.thresholds": (0.5, 0.3)} and state["since"] == []


def test_the_dual_goes_by_the_thresholds_of_the_search():
    """At once, whatever the method was built with: a run that goes on from a checkpoint has only the states."""
    method = recipe_named("mu_ppo")(search_metric="reward")
    states = {name: item.init() for name, item in method.controllers.items()}
    states["search"]["point"] = [0.9]
    session = SimpleNamespace(
        method=method, metrics=[{"constraints/0": 0.7}], controller_states=states, position=SimpleNamespace(step=3)
    )
    control(session)
    assert session.controller_states["multipliers"]["u"][0] == pytest.approx(0.1 * 0.25 * 0.2)


# -- SAFE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "wanted"), [(0.3, 1.197428), (1e-3, 1.000693), (1e3, 1.499875)])
def test_soft_minimum(a, wanted):
    one, two = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    assert float(soft_min(one, two, a)) == pytest.approx(wanted, abs=ALIKE)
    assert float(soft_min(two, one, a)) == pytest.approx(wanted, abs=ALIKE)


def test_pessimistic_advantages():
    rows = k8_rows()
    reward = rows.reward.clone()
    reward[6] = math.nan
    values = {"value_a": 1.0, "value_b": 2.0}
    stats = Stats({Value(h, of=("old",)): torch.full((8, 4), v, dtype=torch.float64) for h, v in values.items()})
    found = SoftMinCritics()(rows.with_(reward=reward), stats)
    assert found.advantage[0, :3].tolist() == pytest.approx([1 - 1.197428] * 3, abs=ALIKE)
    assert found.advantage[1].tolist() == pytest.approx([-1.197428] * 4, abs=ALIKE)
    assert not found.advantage[6].any() and not found.advantage[~rows.mask].any()


def test_loss_of_the_critics():
    """V = 1.197428 before and now 1.697428, R = 1: errors .697428 and, clipped at +.2, .397428."""
    rows = k8_rows().with_(
        columns={"returns": torch.ones(8, 4).double(), "values": torch.full((8, 4), 1.197428).double()}
    )
    live = {h: torch.full((8, 4), v, dtype=torch.float64) for h, v in (("value_a", 1.5), ("value_b", 2.5))}
    live["value_a"].requires_grad_()
    loss = SoftMinValueLoss()(rows, Stats({Value(h): v for h, v in live.items()}))
    wanted = (0.5 * (0.697428 - 0.25) + 0.5 * 0.397428**2) / 2
    assert float(loss.detach()[0, 0]) == pytest.approx(wanted, abs=1e-6)
    (grad,) = torch.autograd.grad(loss[0, 0], live["value_a"])
    share = 1 / (1 + math.exp(-1 / 0.3))  # of the soft minimum; the clipped half has no slope
    assert float(grad[0, 0]) == pytest.approx(0.5 * 0.5 * share)


def ticks(part: KLThreshold, rewards: list[float], kl: float, entropy: float = 1.0) -> tuple[list[float], list[dict]]:
    state, coefficients, states = part.init(), [], []
    for reward in rewards:
        metrics = {"safe/kl": kl, "reward": reward, "entropy": entropy}
        values, state = part.update(metrics, state, 0)
        coefficients.append(values["terms.kl.coef"])
        states.append(state)
    return coefficients, states


def test_pid_and_average():
    part = KLThreshold("terms.kl.coef")
    assert part.update({}, part.init(), 0)[0] == {"terms.kl.coef": 0.0}
    _, states = ticks(part, [0.5, 0.6, 0.6, 0.4, 0.4], 1.0)
    outputs = [state["output"] for state in states]
    assert outputs[:4] == pytest.approx([0, 0.001440, 0.001190, -0.002445], abs=ALIKE)
    assert states[-1]["kl"] == pytest.approx(0.409510)


def test_threshold_and_penalty():
    """Warm-up threshold 0.45; ks = 1: the penalty is 0.055 at H = 1 and 0.015125 at H = 5."""
    part = KLThreshold("terms.kl.coef")
    state = {**part.init(), "mean": 0.5}
    threshold = part.threshold({**state, "rewards": [0.5]})
    assert threshold == pytest.approx(0.45)
    for entropy, penalty in ((1.0, 0.055), (5.0, 0.015125)):
        assert 0.1 * (1 - threshold) ** 2 * part.urgency(entropy) == pytest.approx(penalty)
    steady = {**state, "kl": 1.0}
    values, after = part.update({"safe/kl": 1.0, "reward": 0.5, "entropy": 1.0}, steady, 0)
    slope = 0.2 * (1 - part.threshold(after)) * part.urgency(1.0)
    assert values["terms.kl.coef"] == pytest.approx(slope) and slope == pytest.approx(0.2, rel=1e-2)


def test_phases_move_the_threshold():
    part = KLThreshold("terms.kl.coef", gains=(0.0, 0.0, 0.0))
    for rewards, wanted in (
        ([0.5] * 49, 0.45),
        ([0.5] * 50, 0.24),
        ([0.5] * 50 + [0.6] * 50, 0.36),
        ([0.8] * 50, 0.3),
        ([0.7, 0.9] * 50, 0.24),
    ):
        _, states = ticks(part, rewards, 0.0)
        assert part.threshold(states[-1]) == pytest.approx(wanted)


def test_below_the_threshold_nothing_is_added():
    """And above it the penalty has a gradient, which the released number has not."""
    method = recipe_named("safe")()
    rows = rows_for(method)
    coefficients, _ = ticks(method.controllers["kl"], [0.5] * 3, 0.4)
    assert coefficients == [0.0] * 3
    silent, loud = outcome(method, rows), outcome(method.set("terms.kl.coef", 0.2), rows)
    assert float((loud.grads["policy.table"] - silent.grads["policy.table"]).abs().max()) > 1e-3
    assert_same(outcome(method.replacing(models={}, controllers={}, terms={
        name: term for name, term in method.terms.items() if name != "kl"}), rows), silent)  # fmt: skip


def test_slow_critics_judge():
    """The slow pair gives (1, 2), the live pair (3, 3): the advantage is of the one, the clip range of the other."""
    part = SoftMinCritics(slow=("slow_a", "slow_b"))
    values = {"value_a": 3.0, "value_b": 3.0, "slow_a": 1.0, "slow_b": 2.0}
    stats = Stats({Value(h, of=("old",)): torch.full((8, 4), v, dtype=torch.float64) for h, v in values.items()})
    found = part(k8_rows(), stats)
    assert found.advantage[0, :3].tolist() == pytest.approx([1 - 1.197428] * 3, abs=ALIKE)
    assert found.columns["values"][0, :3].tolist() == pytest.approx([3.0] * 3)
    method = recipe_named("safe")(slow=0.05)
    assert list(method.heads) == ["value_a", "value_b", "slow_a", "slow_b"]
    assert set(part.heads_read) == set(method.heads)


@pytest.mark.parametrize(("kl", "scale"), [(2.0, 0.25), (0.5, 1.0), (0.4, 1.0), (0.0, 1.0), (math.nan, 0.0)])
def test_share_of_a_step(kl, scale):
    """min(1, .5 / KL) over the tokens of the rows; garbage in the padding counts for nothing."""
    rows = k8_rows()
    found = Stats({KLPreview().looks_at[0]: torch.where(rows.mask, kl, 9.0).double()})
    assert KLPreview().scale_step(rows, found) == pytest.approx(scale)


def test_the_controller_sees_the_kl_while_nothing_is_added():
    method = recipe_named("safe")()
    assert {OLD, REF} <= set(method.prepare_needs())
    rows = k8_rows()
    gap = torch.full((8, 4), 0.25, dtype=torch.float64)
    metrics: dict = {}
    zero = torch.zeros(8, 4, dtype=torch.float64)
    method.controllers["kl"].observe(rows, Stats({OLD: zero, REF: -gap}), metrics, {})
    assert metrics == {"safe/kl": pytest.approx(0.25)}


# -- RECAP -----------------------------------------------------------------------------------------------------------

HISTORY = [[0.50, 0.48, 0.45, 0.40], [0.10] * 4, [0.70, 0.40, 0.80, 0.50]]


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [("product", (0.861308, 0.746678, 1.392014)), ("sum", (0.624910, 0.691078, 1.684013))],
)
def test_weights_of_objectives(combine, wanted):
    part = ObjectiveWeights(4, 0.5, combine)
    assert part.weights(HISTORY) == pytest.approx(wanted, abs=ALIKE)
    state, found = part.init(), []
    for step in range(4):
        metrics = {f"objectives/{k}": past[step] for k, past in enumerate(HISTORY)}
        values, state = part.update(metrics, state, step)
        found.append(values)
    assert found[:3] == [{}] * 3
    assert found[3]["transforms.sum.weights"] == pytest.approx(wanted, abs=ALIKE)
    method = recipe_named("recap")()
    for path, value in found[3].items():
        method = method.set(path, value)
    assert method.transforms["sum"].weights == pytest.approx(wanted, abs=ALIKE)


def test_static_weights():
    part = ObjectiveWeights(4, 0.5)
    assert part.weights([HISTORY[0]] * 3) == (1.0, 1.0, 1.0)
    assert ObjectiveWeights(4, 1e9).weights(HISTORY) == pytest.approx([1.0] * 3)
    assert sum(part.weights(HISTORY)) == pytest.approx(3.0)
    assert min(part.weights(HISTORY)) == part.weights(HISTORY)[1]  # what stands still gets the least
    assert ObjectiveWeights(4, 0.5, cap=1.2).weights(HISTORY)[2] == 1.2
    assert part.weights([[0.0] * 4, [0.0] * 4]) == (1.0, 1.0)


def test_objectives_that_do_not_apply_keep_their_past():
    part = ObjectiveWeights(2, 1.0)
    metrics: dict = {}
    part.observe(with_rewards(k8_rows(), [math.nan] * 8), NOTHING, metrics, {})
    assert metrics["objectives/0"] == pytest.approx(5 / 8) and math.isnan(metrics["objectives/1"])
    state = {"history": [[0.5], [0.3]]}
    values, state = part.update(metrics, state, 0)
    assert values == {} and state == {"history": [[0.5, 5 / 8], [0.3]]}


def test_each_reward_in_its_group():
    """With one column it is GRPO's advantage; a tied column becomes 0, a missing entry stays missing."""
    rows = k8_rows()
    found = Returns()(StandardiseComponents(1e-6)(rows, NOTHING), NOTHING).advantage
    wanted = GroupStd(1e-6)(GroupCentre()(rows, NOTHING), NOTHING).advantage
    torch.testing.assert_close(found, wanted)
    two = StandardiseComponents()(with_rewards(rows, [3.0] * 4 + SECOND[4:]), NOTHING).reward
    assert two[:4, 1].tolist() == [0.0] * 4 and two[7].isnan().tolist() == [False, True]
    assert two[4:7, 1].tolist() == pytest.approx([-1, 1, 0], abs=1e-3)


def test_weights_change_the_step():
    method = recipe_named("recap")()
    rows = rows_for(method)
    plain, weighted = outcome(method, rows), outcome(method.set("transforms.sum.weights", (0.5, 1.5)), rows)
    assert float((plain.grads["policy.table"] - weighted.grads["policy.table"]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ConstrainedGAE(()), "multipliers"),
        (lambda: ConstrainedGAE(gamma=1.5), "gamma"),
        (lambda: Lagrange(()), "thresholds"),
        (lambda: Lagrange(learning_rate=0.0), "learning_rate"),
        (lambda: Lagrange(momentum=1.0), "momentum"),
        (lambda: search_thresholds(sum, [(0.0, 0.0)]), "M . 1 points"),
        (lambda: KLPreview(0.0), "limit"),
        (lambda: ThresholdSearch(()), "start"),
        (lambda: ThresholdSearch(width=0.0), "width"),
        (lambda: ThresholdSearch(every=0), "every"),
        (lambda: ThresholdSearch(evaluations=1), "evaluations"),
        (lambda: SoftMinCritics(slow=("one",)), "slow"),
        (lambda: SlowCopy("value", 0.0), "rate"),
        (lambda: search_thresholds(sum, [(0.0,), (1.0,)], evaluations=1), "evaluations"),
        (lambda: SoftMinCritics(0.0), "sharpness"),
        (lambda: SoftMinCritics(math.inf), "sharpness"),
        (lambda: SoftMinValueLoss(math.inf), "sharpness"),
        (lambda: SoftMinCritics(heads=("v", "v")), "heads"),
        (lambda: SoftMinValueLoss(epsilon=0.0), "epsilon"),
        (lambda: KLThreshold("terms.kl.coef", base=0.0), "base"),
        (lambda: ObjectiveWeights(3), "window"),
        (lambda: ObjectiveWeights(temperature=0.0), "temperature"),
        (lambda: ObjectiveWeights(cap=0.0), "cap"),
        (lambda: StandardiseComponents(-1.0), "epsilon"),
        (lambda: KeepComponents()(k8_rows().with_(reward=None), NOTHING), "no reward"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_another_number_of_rewards():
    heads = ("value_kl", "value_0")
    stats = Stats({Value(h, of=("old",)): torch.zeros(8, 4, dtype=torch.float64) for h in heads})
    with pytest.raises(ValueError, match="1 multipliers for 2 reward columns"):
        ConstrainedGAE((0.5,))(with_rewards(k8_rows(), SECOND), stats)
