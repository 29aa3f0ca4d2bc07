"""The statistics of whole comparisons: verdicts, what is left out, and what is said of it."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from keel.compare.analysis import Analysis, analyse, direction, largest_pass
from keel.compare.outcomes import Arm, Budget, Comparison, Outcome
from keel.compare.sentences import findings, remarks
from keel.core.errors import ConfigError
from tests.compare.synthetic import synthetic


def made(cells, seeds=(0, 1, 2), **more):
    """A comparison from {(arm, seed): {metric: values}}; None is a failed cell."""
    arms = tuple(Arm(name, name) for name in dict.fromkeys(arm for arm, _ in cells))
    outcomes = [
        Outcome(arm, seed, "failed", error="it broke")
        if values is None
        else Outcome(arm, seed, "finished", values={k: np.array(v, dtype=float) for k, v in values.items()})
        for (arm, seed), values in cells.items()
    ]
    return Comparison("by-hand", arms, seeds, "task", "tiny", Budget(10.0, "steps"), outcomes=tuple(outcomes), **more)


def two(metric, one, other):
    """Two arms of a row of prompts for each seed."""
    both = [("a", one), ("b", other)]
    return made({(arm, seed): {metric: row} for arm, rows in both for seed, row in enumerate(rows)})


BASE = [[0.2, 0.4, 0.6, 0.8], [0.3, 0.4, 0.6, 0.7], [0.2, 0.5, 0.5, 0.8]]


def added(*amounts):
    return [[value + amount for value in row] for row, amount in zip(BASE, amounts, strict=True)]


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_a_difference_by_hand():
    found = analyse(two("pass@1", BASE, added(0.10, 0.11, 0.12)))
    d = found.difference("b", "pass@1")
    # All prompts change alike: a paired t-test of the three seeds.
    by_scipy = stats.ttest_1samp([0.10, 0.11, 0.12], 0)
    assert d.mean.value == pytest.approx(0.11)
    assert d.mean.low == pytest.approx(by_scipy.confidence_interval(0.95).low)
    assert d.p == d.adjusted == pytest.approx(by_scipy.pvalue, rel=1e-6)
    assert (d.verdict, d.seeds, d.prompts) == ("better", (0, 1, 2), 4)
    assert found.difference("a", "pass@1") is None
    a = found.estimate("a", "pass@1")
    assert a.mean.value == pytest.approx(0.5) and a.runs == pytest.approx((0.5, 0.5, 0.5))
    assert a.iqm.value == pytest.approx(stats.trim_mean(np.array(BASE), 0.25, axis=None))


@pytest.mark.parametrize(
    ("metric", "up", "down"),
    [
        ("pass@16", "better", "worse"),
        ("reward", "better", "worse"),
        ("accuracy", "better", "worse"),
        ("kl", "higher", "lower"),
        ("completions/mean_length", "higher", "lower"),
        ("log_loss", "worse", "better"),
    ],
)
def test_verdicts_know_what_is_good(metric, up, down):
    for amounts, verdict in (((0.10, 0.11, 0.12), up), ((-0.10, -0.11, -0.12), down)):
        found = analyse(two(metric, BASE, added(*amounts)), [metric])
        assert found.difference("b", metric).verdict == verdict
    assert direction("entropy") == 0


def test_a_recipe_under_another_name_is_the_same():
    found = analyse(two("pass@1", BASE, BASE))
    d = found.difference("b", "pass@1")
    assert (d.p, d.verdict, d.improvement.value) == (1.0, "no difference seen", 0.5)
    assert findings(found) == ["b: no difference from a was seen in pass@1: both have the same numbers in every cell."]


@pytest.mark.parametrize("unlike", [0.05, 0.4])
def test_the_null_comparison_finds_nothing_in_nineteen_of_twenty(unlike):
    told = 0
    for repetition in range(20):
        comparison = synthetic(["grpo", "same"], prompts=40, seed=repetition, spread=unlike, unlike=False, steps=2)
        told += any(d.told for d in analyse(comparison, ["pass@1", "pass@16", "kl"]).differences)
    assert told <= 1


def test_a_true_difference_is_found():
    told = [
        analyse(synthetic({"grpo": 0.0, "good": 1.2}, prompts=60, seed=seed, steps=2), ["pass@1"]).differences[0]
        for seed in range(10)
    ]
    assert sum(d.verdict == "better" for d in told) >= 9


def test_what_decides_has_half_of_the_five_percent():
    comparison = synthetic(["grpo", "a", "b"], prompts=30, steps=2)
    found = analyse(comparison, ["pass@1", "kl", "entropy"])
    for d in found.differences:
        assert d.p <= d.adjusted <= 1
    alone = analyse(comparison, ["pass@1"])
    first = min((d for d in found.differences if d.metric == "pass@1"), key=lambda d: d.p)
    assert alone.difference(first.arm, "pass@1").adjusted == pytest.approx(min(1.0, 2 * first.p))
    assert first.adjusted <= min(1.0, 4 * first.p) + 1e-12


# -- what is missing -------------------------------------------------------------------------------------------------


def test_one_seed_tells_nothing_of_the_methods():
    found = analyse(synthetic({"grpo": 0.0, "good": 2.0}, seeds=1, steps=2))
    d = found.difference("good", "pass@1")
    assert d.verdict == "cannot be told: 1 seed" and math.isnan(d.p) and d.mean.low > 0
    assert d.needed.reason == "one seed"
    assert any("over prompts alone" in note for note in found.notes)
    assert "with one seed: of the methods nothing can be told" in findings(found)[0]


def test_failed_cells_are_told_and_not_averaged():
    cells = {(arm, seed): {"pass@1": BASE[seed]} for arm in ("a", "b") for seed in range(3)}
    cells["b", 1] = None
    found = analyse(made(cells))
    assert [(c.arm, c.seed, c.error) for c in found.failed] == [("b", 1, "it broke")]
    assert found.difference("b", "pass@1").seeds == (0, 2) and found.estimate("a", "pass@1").seeds == (0, 1, 2)
    assert "1 cell failed and is in no average: b seed 1 (it broke)." in findings(found)
    assert "b is held against a on the seeds that both finished: 0, 2." in found.notes


def test_cells_that_have_not_run():
    cells = {("a", 0): {"pass@1": BASE[0]}, ("a", 1): {"pass@1": BASE[1]}, ("b", 2): {"pass@1": BASE[2]}}
    found = analyse(made(cells))
    assert {(c.arm, c.seed) for c in found.missing} == {("a", 2), ("b", 0), ("b", 1)}
    assert found.difference("b", "pass@1").verdict == "cannot be told: no common seed"
    assert findings(found)[0] == "b cannot be held against a: no common seed."


def test_an_arm_without_any_cell():
    cells = {("a", 0): {"pass@1": BASE[0]}, ("a", 1): {"pass@1": BASE[1]}, ("b", 0): None, ("b", 1): None}
    found = analyse(made(cells, seeds=(0, 1)))
    assert found.difference("b", "pass@1").verdict == "cannot be told: no finished cell"
    assert math.isnan(found.estimate("b", "pass@1").mean.value) and math.isnan(found.spent["b"].steps)


def test_nothing_at_all():
    found = analyse(made({("a", 0): None, ("b", 0): None}, seeds=(0,)))
    assert found.metrics == () and findings(found)[0] == "No cell has numbers: there is nothing to compare."
    assert findings(analyse(two("pass@1", BASE, [])))[0] == "There is one arm: nothing to hold it against."


def test_prompts_without_a_number_are_left_out():
    holed = [[*row[:3], math.nan] for row in added(0.1, 0.1, 0.1)]
    found = analyse(two("pass@1", BASE, holed))
    assert found.difference("b", "pass@1").prompts == 3
    assert found.difference("b", "pass@1").mean.value == pytest.approx(0.1)
    assert found.estimate("a", "pass@1").prompts == 4
    assert "pass@1: up to 1 of 4 prompts have no number in some cell; left out." in found.notes
    nothing = analyse(two("pass@1", BASE, [[math.nan] * 4] * 3))
    assert nothing.difference("b", "pass@1").verdict.startswith("cannot be told")


def test_a_metric_that_some_cells_lack():
    cells = {(arm, seed): {"pass@1": BASE[seed], "kl": BASE[seed]} for arm in ("a", "b") for seed in range(3)}
    del cells["b", 2]["kl"]
    found = analyse(made(cells))
    assert found.difference("b", "kl").seeds == (0, 1) and found.difference("b", "pass@1").seeds == (0, 1, 2)
    assert "kl was not measured in b seed 2." in found.notes


# -- what is chosen --------------------------------------------------------------------------------------------------


def test_metrics_that_are_looked_at():
    comparison = synthetic(steps=2)
    assert analyse(comparison).metrics == ("pass@1", "pass@16", "kl", "entropy", "completions/mean_length")
    assert largest_pass(comparison) == "pass@16"
    assert analyse(comparison, ["kl"]).metrics == ("kl",)
    with pytest.raises(ConfigError, match=r"pass@17.*pass@1"):
        analyse(comparison, ["pass@17"])


def test_a_reward_of_correct_answers_stands_there_once():
    cells = {(arm, seed): {"pass@1": BASE[seed], "reward": BASE[seed]} for arm in ("a", "b") for seed in range(3)}
    found = analyse(made(cells))
    assert found.metrics == ("pass@1",) and "stands there once" in found.notes[0]
    cells["b", 0]["reward"] = BASE[1]
    assert analyse(made(cells)).metrics == ("pass@1", "reward")


def test_before_training_and_what_was_spent():
    found = analyse(synthetic(["grpo", "b"], steps=20))
    assert found.before["kl"].value == 0.0 and 0 < found.before["pass@1"].value < 1
    assert (found.spent["b"].steps, found.spent["b"].seconds, found.spent["b"].tokens) == (20.0, 61.0, 20010.0)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_other_prompts_are_refused():
    cells = {("a", 0): {"pass@1": [0.1, 0.2]}, ("b", 0): {"pass@1": [0.1]}}
    with pytest.raises(ValueError, match="on 2 prompts, 'b' with seed 0 on 1"):
        analyse(made(cells, seeds=(0,)))


def test_outcomes_that_make_no_sense_are_refused():
    comparison = two("pass@1", BASE, BASE)
    with pytest.raises(ValueError, match="several outcomes of 'a' with seed 0"):
        analyse(replace(comparison, outcomes=comparison.outcomes + comparison.outcomes[:1]))
    with pytest.raises(ValueError, match="'z', which is no arm"):
        analyse(replace(comparison, outcomes=(Outcome("z", 0),)))
    with pytest.raises(ValueError, match="names of their own"):
        analyse(replace(comparison, arms=comparison.arms[:1] * 2))


# -- as values -------------------------------------------------------------------------------------------------------


def test_the_order_of_cells_does_not_matter():
    comparison = synthetic(["grpo", "b"], steps=2)
    turned = replace(comparison, outcomes=tuple(reversed(comparison.outcomes)))
    assert analyse(turned).to_json() == analyse(comparison).to_json()
    assert analyse(comparison, seed=1).to_json() != analyse(comparison).to_json()


@pytest.mark.parametrize("seeds", [1, 3])
def test_an_analysis_comes_back_from_json(seeds):
    found = analyse(synthetic(seeds=seeds, steps=2))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    back = Analysis.from_json(data)
    assert back.to_json() == data
    assert findings(back) == findings(found)
    with pytest.raises(ValueError, match="no analysis"):
        Analysis.from_json({"arms": []})


def test_remarks_tell_of_tuned_strengths():
    comparison = replace(synthetic(steps=2), tuned={"kl_cov": "coef 0.01 of 3."})
    assert "Tuned: kl_cov: coef 0.01 of 3." in remarks(comparison, analyse(comparison))


def test_ten_arms_of_ten_seeds_are_quick():
    comparison = synthetic([f"arm{i}" for i in range(10)], seeds=10, prompts=200, steps=2)
    begun = time.process_time()
    assert len(analyse(comparison).differences) == 45
    assert time.process_time() - begun < 6  # 1.5 s; others may be at work on the machine
