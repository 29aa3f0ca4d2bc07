"""Diagnosis: every finding from numbers made for it, and none from a healthy run."""

import math

import pytest

from keel.report.diagnosis import Level, diagnose
from keel.train.configuration import Request, resolve

CONFIG = {
    "recipe": {"name": "grpo", "arguments": {"beta": 0.0, "num_generations": 8}},
    "method": {"terms": {"kl": {"name": "summand", "coef": 0.1}}, "rollout": {"max_completion_length": 24}},
    "model": {"dtype": "bfloat16"},
    "train": {"learning_rate": 7e-5},
}


def curve(*values, steps=100):
    """A course through the given values, in equal parts."""
    return [(step + 1, float(values[step * len(values) // steps])) for step in range(steps)]


HEALTHY = {
    "reward": curve(0.4, 0.5, 0.6),
    "frac_reward_zero_std": curve(0.2, 0.3),
    "entropy": curve(0.6, 0.5),
    "kl": curve(0.0, 0.1),
    "clip_ratio/region_mean": curve(0.01),
    "completions/mean_length": curve(6, 7),
    "completions/clipped_ratio": curve(0.0),
    "rollout/logp_gap": curve(1e-5),
    "rollout/ess": curve(0.99),
    "terms/kl": curve(0.0, 0.01),
    "rewards/countdown/errors": curve(0),
    "loss": curve(0.1, -0.1),
    "grad_norm": curve(1.0, 0.7),
    "entropy/first": curve(0.8, 0.6),
    "entropy/middle": curve(0.6, 0.5),
    "entropy/last": curve(0.4, 0.4),
    "ratio/max": curve(1.5, 2.5),
    "ratio/far": curve(0.0, 0.001),
    "rollout/ratio": curve(1.001, 0.999),
    "rollout/ratio_completion": curve(1.01, 0.99),
    "strength/kl": curve(0.0, 0.5),
    "hidden/gold/errors": curve(0),
    "rewards/gold/mean": curve(0.3, 0.4, 0.5),
}


def only(changes, **evaluations):
    """The findings that are no good news."""
    found = diagnose(HEALTHY | changes, CONFIG, **evaluations)
    return [finding for finding in found if finding.level is not Level.GOOD]


@pytest.mark.parametrize("recipe", ["ppo", "reinforce", "reinforce_pp", "remax", "par", "curated", "copo"])
def test_equal_rewards_teach_where_no_group_is_compared(recipe):
    """With one completion a prompt every group is tied; a critic and a baseline of the batch need no other."""
    config = resolve(Request(recipe)).to_dict()
    assert diagnose(HEALTHY | {"frac_reward_zero_std": curve(1.0)}, config)[0].level is Level.GOOD
    compared = resolve(Request("rloo")).to_dict()
    assert "taught nothing" in diagnose(HEALTHY | {"frac_reward_zero_std": curve(1.0)}, compared)[0].sentence


def test_a_healthy_run_has_nothing_to_report():
    found = diagnose(HEALTHY, CONFIG)
    assert [f.level for f in found] == [Level.GOOD]
    assert found[0].sentence == "Nothing unusual in the metrics of 100 steps."
    short = diagnose({"loss": [(1, 0.1)]}, CONFIG)
    assert [f.sentence for f in short] == ["Nothing unusual in the metrics of 1 step."]


def test_no_metrics_at_all():
    assert [f.sentence for f in diagnose({}, {})] == ["No metrics were logged."]


@pytest.mark.parametrize(
    ("changes", "level", "words", "setting"),
    [
        ({"frac_reward_zero_std": curve(0.2, 0.6)}, "warning", ["60%", "`num_generations` (now 8)"], "num_generations"),
        ({"frac_reward_zero_std": curve(0.2, 0.9)}, "problem", ["last 10 steps 90%"], "num_generations"),
        (
            {"frac_reward_zero_std": curve(0.9), "reward": curve(0.0, 0.05)},
            "problem",
            ["too hard (reward 0.05)"],
            "num_generations",
        ),
        (
            {"frac_reward_zero_std": curve(0.9), "reward": curve(0.5, 0.95)},
            "problem",
            ["become easy (reward 0.95)"],
            "num_generations",
        ),
        (
            {"entropy": curve(0.6, 0.2)},
            "warning",
            ["from 0.6 to 0.2 nats", "raise `beta` (now 0)", "or lower `train.learning_rate` (now 7e-05)"],
            "beta",
        ),
        ({"entropy": curve(0.6, 0.01)}, "problem", ["from 0.6 to 0.01 nats"], "beta"),
        ({"entropy": curve(0.6, 3.0)}, "warning", ["rose from 0.6 to 3"], "train.learning_rate"),
        (
            {"clip_ratio/region_mean": curve(0.01, 0.6)},
            "problem",
            ["60% of the tokens", "`train.learning_rate` (now 7e-05)"],
            "train.learning_rate",
        ),
        (
            {"completions/clipped_ratio": curve(0.0, 0.25)},
            "warning",
            ["25% of the completions", "`rollout.max_completion_length` (now 24)"],
            "rollout.max_completion_length",
        ),
        ({"completions/mean_length": curve(6, 13)}, "note", ["from 6 to 13 tokens"], "rollout.max_completion_length"),
        ({"rollout/logp_gap": curve(0.05)}, "warning", ["0.05 nats", "`model.dtype` (now bfloat16)"], "model.dtype"),
        ({"rollout/ess": curve(1.0, 0.2)}, "problem", ["sample size of 20%"], "model.dtype"),
        (
            {"target/ess": curve(2.0)},
            "warning",
            ["2.0 completions of a group", "larger beta"],
            "num_generations",
        ),
        ({"reference_share/ess": curve(0.2)}, "problem", ["sample size of 20%"], "train.learning_rate"),
        (
            {"terms/kl": curve(0.0)},
            "warning",
            ["kl was exactly 0 in all 100 batches, so that it did nothing", "(now 0.1)"],
            "terms.kl.coef",
        ),
        (
            {"rewards/countdown/errors": curve(0, 0, 0, 2)},
            "warning",
            ["countdown failed for 50 groups, on 25 of 100 steps"],
            "task.rewards",
        ),
        ({"rewards/countdown/errors": curve(1)}, "problem", ["failed for 100 groups"], "task.rewards"),
        ({"loss": curve(0.1, math.nan)}, "problem", ["loss", "50 steps, first at step 51"], "train.learning_rate"),
        (
            {"grad_norm": [*curve(1.0), (101, math.inf)]},
            "warning",
            ["grad_norm was not a finite number on 1 step, first at step 101"],
            "train.learning_rate",
        ),
        (
            {"loss": curve(0.1), "updates/skipped": [*curve(0.0), (101, 1.0)]},
            "warning",
            ["1 update on 1 step, first at step 101", "not finite and was skipped"],
            "train.learning_rate",
        ),
        ({"reward": curve(0.5, 0.3)}, "problem", ["fell from 0.5 to 0.3"], "train.learning_rate"),
        ({"reward": curve(0.5, 0.505)}, "note", ["hardly moved, from 0.5 to 0.505"], "train.learning_rate"),
    ],
)
def test_one_finding_each(changes, level, words, setting):
    (found,) = only(changes)
    assert found.level == level and found.setting == setting
    for word in words:
        assert word in found.sentence
    assert found.sentence.endswith(".") and "\n" not in found.sentence


def test_a_policy_that_the_first_update_ruined_is_not_told_of_hard_prompts():
    (found,) = only({"frac_reward_zero_std": curve(1.0), "reward": [(1, 0.4), *curve(0.0)[1:]]})
    assert found.level == "problem" and found.setting == "train.learning_rate"
    assert found.sentence.endswith(
        "the policy has lost what it could (reward 0.40 at best, 0.00 now): lower `train.learning_rate` (now 7e-05)."
    )


FELL = {"entropy": curve(0.6, 0.1)}


def test_it_is_told_where_the_entropy_fell():
    thirds = {"entropy/first": curve(0.8, 0.72), "entropy/middle": curve(0.6, 0.3), "entropy/last": curve(0.4, 0.004)}
    (found,) = only(FELL | thirds)
    words = "hardly differ any more, most of all in the last third of the completions (from 0.4 to 0.004; the first "
    assert words + "third kept 90%): raise `beta`" in found.sentence


def test_entropy_that_fell_everywhere():
    thirds = {f"entropy/{name}": curve(0.6, 0.1) for name in ("first", "middle", "last")}
    (found,) = only(FELL | thirds)
    assert "hardly differ any more, in all parts of the completions alike: raise" in found.sentence


def test_of_several_turns_the_turn_is_told():
    turns = {"entropy/turn_1": curve(0.6, 0.5), "entropy/turn_2": curve(0.6, 0.01)}
    (found,) = only(FELL | turns)
    assert "most of all in turn 2 of the completions (from 0.6 to 0.01; turn 1 kept 83%)" in found.sentence


def test_ratios_that_explode():
    (found,) = only({"ratio/far": curve(0.0, 0.05), "ratio/max": curve(2.0, 40.0)})
    assert (found.level, found.setting, found.kind) == ("warning", "train.learning_rate", "ratios")
    assert "5.0% of the tokens" in found.sentence and "largest ratio 40: lower `train.learning_rate` (now 7e-05)." in (
        found.sentence
    )
    config = CONFIG | {"train": {"learning_rate": 7e-5, "num_iterations": 4, "num_minibatches": 1}}
    found = diagnose(HEALTHY | {"ratio/far": curve(0.3)}, config)[0]
    assert found.level is Level.PROBLEM
    assert "lower `train.learning_rate` (now 7e-05) or `train.num_iterations` (now 4)." in found.sentence
    (found,) = only({"ratio/max": curve(2.0, 1e5)})  # a few tokens only, but far
    assert found.level is Level.WARNING and "largest ratio 1e+05" in found.sentence


@pytest.mark.parametrize(("name", "value", "off"), [("top_p", 0.9, "null"), ("top_k", 4, "null"), ("min_p", 0.1, "0")])
def test_filters_that_shrink_the_ratios(name, value, off):
    config = CONFIG | {"method": {"rollout": {"temperature": 1.0, name: value}}}
    low = {"rollout/ratio": curve(0.95), "rollout/ratio_completion": curve(0.7)}
    found = diagnose(HEALTHY | low, config)[0]
    assert (found.level, found.setting, found.kind) == ("warning", f"rollout.{name}", "filtered_ratios")
    assert "0.950 a token on average, of a whole completion 0.7," in found.sentence
    assert f"`rollout.{name}` (now {value})" in found.sentence and f"to {off} for training." in found.sentence
    assert [f.level for f in diagnose(HEALTHY, config)] == [Level.GOOD]  # a filter that leaves out next to nothing


def test_low_ratios_without_a_filter_are_no_matter_of_filters():
    config = CONFIG | {"method": {"rollout": {"top_p": 1.0, "top_k": None, "min_p": 0.0}}}
    assert [f.level for f in diagnose(HEALTHY | {"rollout/ratio": curve(0.9)}, config)] == [Level.GOOD]


def test_a_penalty_that_hardly_acts():
    (found,) = only({"strength/kl": curve(0.0, 0.004)})
    assert (found.level, found.setting) == ("warning", "terms.kl.coef")
    assert "never was more than 0.004 of the noise" in found.sentence
    assert "raise `terms.kl.coef` (now 0.1) some 25-fold" in found.sentence
    (found,) = only({"strength/kl": curve(0.0, 0.05)})
    assert found.level is Level.NOTE
    assert only({"strength/kl": curve(0.2, 0.004)}) == []  # it did act once


def test_a_proxy_that_rises_while_the_hidden_reward_falls():
    changes = {"reward": curve(0.4, 0.5, 0.6, 0.7), "rewards/gold/mean": curve(0.3, 0.4, 0.35, 0.1)}
    (found,) = only(changes)
    assert (found.level, found.setting, found.kind) == ("problem", "beta", "hidden_rewards")
    assert "From step 35 on the reward rose by 0.2 while gold" in found.sentence
    assert "fell from 0.4 to 0.1" in found.sentence and "Raise `beta` (now 0)" in found.sentence
    (found,) = only(changes | {"rewards/gold/mean": curve(0.3, 0.4, 0.4, 0.32)})
    assert found.level is Level.WARNING  # still above where it began


def test_a_hidden_reward_that_falls_with_the_reward_is_no_exploit():
    changes = {"reward": curve(0.5, 0.6, 0.4), "rewards/gold/mean": curve(0.3, 0.4, 0.1)}
    assert "hidden_rewards" not in [f.kind for f in only(changes)]


def test_a_hidden_reward_that_only_wavers():
    noisy = [(step, 0.4 + 0.05 * (-1) ** (step // 3) * (step % 4)) for step in range(1, 101)]
    assert only({"rewards/gold/mean": noisy}) == []


def test_a_reward_that_is_trained_on_is_not_hidden():
    assert only({"hidden/gold/errors": [], "rewards/gold/mean": curve(0.4, 0.1)}) == []


def test_clip_shares_are_added_where_the_region_is_missing():
    changes = {"clip_ratio/low_mean": curve(0.2), "clip_ratio/high_mean": curve(0.15), "clip_ratio/region_mean": []}
    (found,) = only(changes)
    assert "35% of the tokens" in found.sentence


def test_what_the_last_update_clips_counts():
    """The first one clips nothing: until then the policy has not moved."""
    (found,) = only({"clip_ratio/region_mean": curve(0.0), "ratio/clipped": curve(0.1, 0.3)})
    assert (found.kind, found.level) == ("clipping", "warning") and "30% of the tokens" in found.sentence


def test_a_term_that_is_off_is_not_dead():
    config = CONFIG | {"method": {"terms": {"kl": {"coef": 0.0}}}}
    assert [f.level for f in diagnose(HEALTHY | {"terms/kl": curve(0.0)}, config)] == [Level.GOOD]


def test_a_distance_from_the_old_policy_is_zero_at_the_first_update():
    config = CONFIG | {"train": {"num_iterations": 2}}
    (found,) = diagnose(HEALTHY | {"terms/kl": curve(0.0), "terms/policy": curve(0.0)}, config)[:1]
    assert found.level is Level.NOTE and "at the first update of all 100 batches" in found.sentence


def test_settings_that_are_not_set_are_named_without_a_value():
    config = {"recipe": None, "method": {"claim": {"beta": 0.5}, "f": {"beta": None}}}
    found = diagnose({"entropy": curve(0.6, 0.01)}, config)[0]
    assert "raise `beta`, the penalty" in found.sentence and "lower `learning_rate`." in found.sentence


def test_single_bad_values_do_not_hide_the_course():
    holes = [(step, math.nan if step % 7 == 0 else value) for step, value in curve(0.6, 0.01)]
    (found,) = only({"entropy": holes})
    assert "from 0.6 to 0.01" in found.sentence


def test_few_steps_say_nothing_about_a_course():
    assert [f.level for f in diagnose({"reward": curve(0.5, 0.1, steps=4)}, CONFIG)] == [Level.GOOD]


def test_lost_coverage_is_told(wide, narrow):
    (found,) = only({}, before=wide, after=narrow)
    assert found.level is Level.WARNING and found.setting == "beta"
    assert "pass@1 rose by 0.252" in found.sentence and "pass@16 fell by 0.250" in found.sentence
    (found,) = only({}, before=narrow, after=wide)
    assert found.level is Level.PROBLEM and "pass@1 fell by 0.252" in found.sentence
    (found,) = only({}, before=wide, after=wide)
    assert found.level is Level.NOTE and "no more than chance" in found.sentence


def test_coverage_lost_for_nothing_is_told(wide, halves):
    (found,) = only({}, before=wide, after=halves)
    assert "pass@1 changed by 0.002" in found.sentence and "pass@16 fell by 0.500" in found.sentence


def test_noise_is_no_fall():
    # Means of 0.5 and 0.45 with a standard deviation of 0.2 in windows of 10: two standard errors are 0.18.
    noisy = [(step, (0.5 if step < 50 else 0.45) + (0.2 if step % 2 else -0.2)) for step in range(100)]
    assert [f.level for f in only({"reward": noisy})] == [Level.NOTE]


def test_findings_come_by_gravity():
    found = only({"reward": curve(0.5, 0.3), "entropy": curve(0.6, 0.2), "completions/mean_length": curve(6, 13)})
    assert [f.level for f in found] == [Level.PROBLEM, Level.WARNING, Level.NOTE]
