"""Rewards bent by rarity, preference and entropy: numbers worked out by hand, limits, what must not matter."""

import math

import pytest
import torch
from tests.parts.k8 import k8_rows, k8_stats
from tests.parts.test_anchored import table_rows
from tests.recipes.exact import FIVE, REF, REWARD, outcomes
from tests.worlds import assert_same, noise, outcome, rows_for

from keel.core.rows import Rows
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.rewards.entropy_shaping import PhaseEntropy
from keel.parts.rewards.running import LengthPenalty, RunningReward
from keel.parts.rewards.shaping import PreferenceAsReward, Unlikeliness, shaped
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats
from keel.verify.recipes import verify_recipe

OLD, ENTROPY = LogProb(of=("old",)), Entropy(of=("old",))
NAN = float("nan")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def one_token(scores, reward) -> tuple[Rows, Stats]:
    """One group of completions of one token with given log-probabilities."""
    rows, _ = table_rows(reward, [0.0] * len(reward), [0] * len(reward))
    rows = rows.with_(mask=torch.tensor([[True, False]] * len(reward)))
    score = torch.tensor(scores, dtype=torch.float64)
    return rows, Stats({OLD: torch.stack([score, score + 9], 1)})


# -- unlikeliness ----------------------------------------------------------------------------------------------------


def test_unlikely_successes_earn_more():
    rows, stats = one_token([-0.2, -1.1, -0.7, -0.4], [1.0, 1.0, 0.0, 1.0])
    bent = Unlikeliness(0.25)(rows, stats)
    assert bent.reward[:, 0].tolist() == pytest.approx([0.8125, 1, 0, 0.875], abs=1e-12)
    scaled = GroupStd(1e-6)(GroupCentre()(bent, stats), stats).advantage[:, 0]
    assert scaled.tolist() == pytest.approx([0.309304, 0.721709, -1.477785, 0.446772], abs=5.1e-7)


def test_a_group_of_successes_is_not_tied_any_more():
    rows, stats = one_token([-0.2, -1.1, -0.7, -0.4], [1.0] * 4)
    found = GroupCentre()(Unlikeliness()(rows, stats), stats).advantage[:, 0]
    assert int(found.argmax()) == 1 and float(found.sum()) == pytest.approx(0, abs=1e-12)


def test_ranks_by_hand():
    """Any monotone change of the scores is none; ties share; failures count, what nobody scored does not."""
    for scores in ([-0.2, -1.1, -0.7, -0.7, -9.0], [-1.0, -80.0, -2.0, -2.0, -99.0]):
        rows, stats = one_token(scores, [1.0, 1.0, -2.0, 1.0, NAN])
        found = Unlikeliness(0.4)(rows, stats).reward[:, 0]
        wanted = torch.tensor([1 - 0.4 * 3 / 4, 1.0, -2.0, 1 - 0.4 * 1.5 / 4, NAN], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_scores_are_means_over_tokens():
    """K8, first group: means -.933333, -1.6, -.7, -.6; the padding's numbers count nowhere."""
    found = Unlikeliness(1.0)(k8_rows(), k8_stats()).reward[:4, 0]
    assert found.tolist() == pytest.approx([1 - 1 / 4, 0, 0, 1 - 3 / 4], abs=1e-12)


def test_ranks_of_enumerated_rows_are_probabilities():
    rows = outcomes(REF).weighted(FIVE.rows()).with_(reward=torch.ones(5, 1, dtype=torch.float64))
    found = Unlikeliness(1.0)(rows, Stats({OLD: REF.log()[:, None]})).reward[:, 0]
    torch.testing.assert_close(found, 1 - torch.tensor([0.6, 0.35, 0.15, 0.05, 0.0], dtype=torch.float64))


def test_published_settings():
    unlikeliness = recipe_named("unlikeliness")
    assert unlikeliness.preset == {"train.num_iterations": 2} and unlikeliness().rollout.num_generations == 32
    assert unlikeliness().terms == recipe_named("grpo")(beta=0.1).terms
    assert not unlikeliness(beta=0.0).terms
    assert recipe_named("ares").preset == {"train.dynamic_sampling": True}


# -- preference as reward --------------------------------------------------------------------------------------------


def against(reward, reference, **settings) -> list[float]:
    rows, stats = one_token([-1.0] * len(reward), reward)
    known = torch.tensor(reference, dtype=torch.float64).expand(len(reward), len(reference))
    rows = rows.with_(features={"reference_rewards": known})
    return PreferenceAsReward(**settings)(rows, stats).reward[:, 0].tolist()


def test_preference_over_recorded_references():
    found = against([-2.0, 0.0, 1.0, 3.0, 10.0], [0.0, 1.0, 2.0])
    assert found == pytest.approx([0.061538, 0.296048, 0.5, 0.854810, 0.999832], abs=5.1e-7)
    assert against([3.0], [0.0, 1.0, 2.0], k=2.0) == pytest.approx([0.953446], abs=5.1e-7)
    assert against([3.0], [0.0, 1.0, 2.0], shape="tanh") == pytest.approx([0.906892], abs=5.1e-7)
    assert against([2.036433], [0.0, 1.0, 2.0], shape="log_sigmoid") == pytest.approx([-0.693147], abs=1e-6)
    assert against([3.0], [0.0, 1.0, 2.0], shape="centred") == pytest.approx([2.0])
    assert against([3.0], [0.0, NAN, 2.0, NAN]) == pytest.approx([(0.952574 + 0.731059) / 2], abs=1e-6)


def test_the_shifted_control():
    """r - 3 against (0, 1, 2): at 5 what the sigmoid has at 2, the mean of sigmoid(2), (1) and (0)."""
    found = against([5.0, 3.0], [0.0, 1.0, 2.0], shape="shifted")
    assert found == pytest.approx([(0.880797 + 0.731059 + 0.5) / 3, 0.296048], abs=1e-6)


def test_the_slope_is_steepest_at_par():
    """One reference at 1: k / 4 there, less on either side."""
    for k in (1.0, 2.0):
        rise = [against([r + 1e-5], [1.0], k=k)[0] - against([r - 1e-5], [1.0], k=k)[0] for r in (0.0, 1.0, 2.0)]
        assert rise[1] / 2e-5 == pytest.approx(0.25 * k, abs=1e-9) and rise[1] > max(rise[0], rise[2])


def test_a_reference_is_remembered_once():
    rows, stats = one_token([-1.0] * 3, [0.5, 30.0, 2.0])
    known = torch.tensor([[0.0, 1.0], [NAN, NAN], [5.0, NAN]], dtype=torch.float64)
    rows = rows.with_(features={"reference_rewards": known}, data_index=torch.tensor([7, 8, 9]))
    part = PreferenceAsReward(references=2)
    metrics: dict = {}
    state = part.observe(rows, stats, metrics, part.init())
    assert list(state["known"]) == ["7", "9"] and state["known"]["7"] == [0.0, 1.0]
    assert metrics == {"par/saturated": pytest.approx(2 / 3)}
    changed = rows.with_(features={"reference_rewards": known + 1})
    assert part.observe(changed, stats, {}, state)["known"]["7"] == [0.0, 1.0]
    assert PreferenceAsReward().observe(rows, stats, {}, {"known": {}}) == {"known": {}}


# -- shapes that remember --------------------------------------------------------------------------------------------


def run_of(shape, batches) -> list[list[float]]:
    part = RunningReward(shape)
    state, out = part.init(), []
    for batch in batches:
        rows, stats = one_token([-1.0] * len(batch), batch)
        bent = part(rows, stats, state)
        out.append(bent.reward[:, 0].tolist())
        state = part.observe(bent, stats, {}, state)
    return out


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ("standardise", [-1.0, 1.0], [1.745743, -0.981981, 0.109109]),
        ("clip", [0.0, 2.0], [3.633030, 0.0, 2.0]),
        ("min_max", [0.0, 1.0], [1.0, 0.0, 0.4]),
    ],
)
def test_running_shapes(shape, first, second):
    """Batches (0, 2) and (5, 0, 2): mean 1 and deviation 1, then mean 1.8 and variance 3.36, from 0 to 5."""
    found = run_of(shape, [[0.0, 2.0], [5.0, 0.0, 2.0]])
    assert found[0] == pytest.approx(first, abs=1e-9) and found[1] == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize(("shape", "wanted"), [("standardise", 0.0), ("clip", 3.0), ("min_max", 0.0)])
def test_equal_rewards_and_missing_ones(shape, wanted):
    found = run_of(shape, [[NAN, 3.0, 3.0], [NAN]])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor([NAN, wanted, wanted]), equal_nan=True)
    assert found[1][0] != found[1][0]


def test_tokens_beyond_the_valid_length_cost():
    """K8's lengths 3 4 2 1 2 4 3 1: beyond 2 each token takes half a point."""
    found = LengthPenalty(2, 0.5)(k8_rows(), Stats()).reward[:, 0] - k8_rows().reward[:, 0]
    assert found.tolist() == [-0.5, -1.0, 0, 0, 0, -1.0, -0.5, 0]


@pytest.mark.parametrize("shape", recipe_named("par").choices("shape"))
def test_every_shape_is_a_recipe(shape):
    """Each trains, and the group's best stays the best."""
    method = recipe_named("par")(shape=shape, references=0, num_generations=4, valid_length=2)
    rows = rows_for(method)
    prepared = outcome(method, rows).rows
    assert bool(prepared.reward[~prepared.reward.isnan()].isfinite().all()) and not prepared.advantage[2].any()
    assert (method.claim is None) and list(method.transforms)[1] == "length"


@pytest.mark.parametrize("shape", ["sigmoid", "tanh", "log_sigmoid", "centred"])
def test_a_constant_changes_nothing(shape):
    before, after = against([0.3, 2.0], [0.0, 1.0, 2.0], shape=shape), against([5.3, 7.0], [5.0, 6.0, 7.0], shape=shape)
    assert before == pytest.approx(after, abs=1e-12)
    uncentred = [against([r], [0.0], shape="uncentred")[0] for r in (0.3, 5.3)]
    assert abs(uncentred[0] - uncentred[1]) > 0.3  # the control


def test_the_reference_against_itself_is_at_one_half():
    rows = outcomes(REF).weighted(FIVE.rows()).with_(reward=REWARD[:, None])
    same = Stats({OLD: REF.log()[:, None], LogProb(of=("ref",)): REF.log()[:, None]})
    found = PreferenceAsReward()(rows, same).reward[:, 0]
    assert float((REF * found).sum()) == pytest.approx(0.5, abs=1e-12)
    assert REWARD.argsort().tolist() == found.argsort().tolist()


def test_enumerated_rows_of_another_policy_stand_for_the_reference():
    old = torch.tensor([0.1, 0.3, 0.15, 0.25, 0.2], dtype=torch.float64)
    rows = outcomes(old).weighted(FIVE.rows()).with_(reward=REWARD[:, None])
    stats = Stats({OLD: old.log()[:, None], LogProb(of=("ref",)): REF.log()[:, None]})
    wanted = ((REWARD[:, None] - REWARD).sigmoid() * REF).sum(1)
    torch.testing.assert_close(PreferenceAsReward()(rows, stats).reward[:, 0], wanted)


def test_a_completion_is_held_against_the_others_of_its_group():
    rows, stats = table_rows([1.0, 0.0, NAN, 5.0], [-1.0] * 4, [0, 0, 0, 1])
    stats = stats.merged({OLD: stats[LogProb(of=("ref",))]})
    found = PreferenceAsReward()(rows, stats).reward[:, 0]
    wanted = torch.tensor([0.731059, 0.268941, NAN, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)


def test_a_gentle_slope_is_the_reward_itself():
    """k -> 0: k / 4 of the reward less its mean, which changes no group advantage but its scale."""
    reward = noise("par", shape=(6,))
    weight = torch.ones(6, 6, dtype=torch.float64)
    found = shaped(reward, reward.expand(6, 6), weight, 1e-4, "sigmoid")
    torch.testing.assert_close((found - 0.5) * 4e4, reward - reward.mean(), rtol=1e-5, atol=1e-6)


def test_par_is_exact_where_all_completions_are_known():
    found = verify_recipe("par", {"k": 2.0})
    assert found.gradient_relative_error < 1e-9 and found.off_policy_relative_error > 1e-4
    assert all(group.relative_error < 0.1 for group in found.groups)


# -- phase entropy ---------------------------------------------------------------------------------------------------

THINK = [0.6, 0.9, 0.3]
ANSWER = [0.2, 0.2, 0.4]


def thoughts(reward=(1.0, 1.0, 1.0), order=(0, 1)) -> tuple[Rows, Stats]:
    """Two tokens of thinking, the end 5, two of answer; the entropies .1 around the phase's mean."""
    ids = torch.tensor([[1, 2, 5, 3, 4, 5]] * 3)
    mask = torch.tensor([[True] * 5 + [False]] * 3)
    entropy = torch.full((3, 6), 9.0, dtype=torch.float64)
    for row, (think, answer) in enumerate(zip(THINK, ANSWER, strict=True)):
        entropy[row, list(order)] = torch.tensor([think - 0.1, think + 0.1], dtype=torch.float64)
        entropy[row, 3:5] = torch.tensor([answer + 0.1, answer - 0.1], dtype=torch.float64)
    earned = torch.tensor(reward, dtype=torch.float64)[:, None]
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask, reward=earned, weight=torch.ones(3, dtype=torch.float64))
    return rows, Stats({ENTROPY: entropy})


@pytest.mark.parametrize(
    ("alpha", "wanted"), [(1.0, [0.6, 0.3, 1.0]), (0.5, [0.5, 0.2, 0.9]), (float("inf"), [1.0] * 3)]
)
def test_phase_entropy(alpha, wanted):
    for order in ((0, 1), (1, 0)):
        found = PhaseEntropy((5,), alpha)(*thoughts(order=order)).reward[:, 0]
        assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_failures_keep_their_reward_and_successes_are_not_below_them():
    found = PhaseEntropy((5,), coef=3.0)(*thoughts((0.0, 1.0, NAN))).reward[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, NAN], dtype=torch.float64), equal_nan=True)


def test_without_an_end_all_is_thinking():
    rows, stats = thoughts()
    everything = (2 * 0.6 + 9.0 + 2 * 0.2) / 5
    for end in ((), (7,), (1, 5), (4, 5)):  # absent; not side by side; partly padding
        found = PhaseEntropy(end, coef=0.1)(rows, stats).reward[0, 0]
        assert float(found) == pytest.approx(1 - 0.1 * everything, abs=1e-12)
    several = PhaseEntropy((5, 3), coef=1.0)(rows, stats).reward[0, 0]
    assert float(several) == pytest.approx(1 - (0.6 - 0.1), abs=1e-12)  # the answer is token 4 alone


def test_pear_ends_thinking_at_a_token():
    rows = rows_for(recipe_named("pear")())
    whole, cut = (outcome(recipe_named("pear")(end_of_thinking=end), rows) for end in ((), (1,)))
    assert float((whole.grads["policy.table"] - cut.grads["policy.table"]).abs().max()) > 1e-4


# -- all of them -----------------------------------------------------------------------------------------------------

SHAPED = {"unlikeliness": {}, "par": {}, "pear": {"end_of_thinking": (1,)}}


@pytest.mark.parametrize("name", SHAPED)
def test_columns_of_rewards_and_a_reward_that_is_missing(name):
    """Several columns are summed before they are bent, and a completion without a reward learns nothing."""
    method = recipe_named(name)(num_generations=4, **SHAPED[name])
    rows = rows_for(method)
    prepared = outcome(method, rows).rows
    assert not prepared.advantage[2].any() and bool(prepared.reward[2].isnan().all())
    total = torch.where(rows.reward.isnan().all(1, keepdim=True), NAN, rows.reward.nansum(1, keepdim=True))
    assert_same(outcome(method, rows.with_(reward=total)), outcome(method, rows))


@TYPES
@pytest.mark.parametrize("part", [Unlikeliness(), PreferenceAsReward(), PhaseEntropy((1,))])
def test_low_precision(part, dtype):
    rows = k8_rows(torch.float32)
    old = k8_stats()[OLD]
    numbers = {OLD: old, LogProb(of=("ref",)): old - 0.1, ENTROPY: -old}
    low = part(rows, Stats({f: v.to(dtype) for f, v in numbers.items()})).reward
    exact = part(rows, Stats({f: v.float() for f, v in numbers.items()})).reward
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Unlikeliness(1.5), "penalty"),
        (lambda: PreferenceAsReward(0.0), "k must be positive"),
        (lambda: PreferenceAsReward(math.inf), "k must be positive and finite"),
        (lambda: PreferenceAsReward(shape="step"), "shape"),
        (lambda: PreferenceAsReward(references=-1), "references"),
        (lambda: RunningReward("step"), "shape"),
        (lambda: LengthPenalty(-1), "valid_length"),
        (lambda: LengthPenalty(1, -1.0), "per_token"),
        (lambda: recipe_named("par").make(references=0, num_generations=1), "num_generations"),
        (lambda: PhaseEntropy(alpha=-1.0), "alpha"),
        (lambda: PhaseEntropy(coef=-1.0), "coef"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
