"""Numbers behind the diagnosis, worked out by hand, and what real runs do to them."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tests.parts.k8 import ALIKE, k8_method, k8_rows, k8_stats

from keel.core.errors import ConfigError
from keel.core.rows import Rows
from keel.method import Method
from keel.parts.advantages.group import GroupCentre
from keel.parts.terms.penalties import Summand
from keel.parts.terms.surrogate import CISPO, Clipped, Surrogate, Unclipped
from keel.report.diagnosis import Level, diagnose
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.train.online import last_ratios
from keel.train.progress import plain_reporter
from keel.train.symptoms import entropy_by_part, ratio_metrics, sampler_ratio, term_strength
from keel.train.watch import Watch

LIVE, OLD = LogProb(), LogProb(of=("old",))


def rows_of(lengths, **known):
    """Rows whose first tokens are chosen; all else is padding."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Rows.build(ids[:, :1], torch.ones(len(lengths), 1, dtype=torch.bool), ids, mask, **known)


def numbers(found):
    return {name: float(value) for name, value in found.items()}


# Entropy by part


def test_entropy_by_third():
    rows = rows_of([3, 1, 6])
    entropy = torch.tensor([[1.0, 2, 3, 99, 99, 99], [5, 99, 99, 99, 99, 99], [1, 1, 4, 4, 9, 9]])
    found = numbers(entropy_by_part(rows, entropy))
    # A single token stands in the middle; six tokens are two a third.
    assert found == {"entropy/first": 1.0, "entropy/middle": 15 / 4, "entropy/last": 7.0}


def test_parts_without_tokens_are_left_out():
    assert set(entropy_by_part(rows_of([1, 1]), torch.ones(2, 1))) == {"entropy/middle"}


def test_entropy_by_turn_skips_what_the_environment_said():
    mask = torch.tensor([[True, True, False, True, True]])
    rows = rows_of([5]).with_(mask=mask, columns={"turn": torch.tensor([[0, 0, 0, 1, 1]])})
    found = numbers(entropy_by_part(rows, torch.tensor([[1.0, 3.0, 50.0, 0.5, 0.1]])))
    assert found["entropy/turn_1"] == 2.0 and found["entropy/turn_2"] == pytest.approx(0.3)
    assert "entropy/turn_3" not in found
    assert found["entropy/first"] == 1.0 and found["entropy/last"] == pytest.approx(0.1)


# Ratios


def test_ratios_by_hand():
    log_ratio = torch.tensor([[math.log(4), 0.0, 30.0], [math.log(0.4), 0.6, 0.0]])
    found = numbers(ratio_metrics(rows_of([2, 3]), log_ratio))
    # 4 and 0.4 are beyond a factor of 2, e^0.6 = 1.82 is not; the third of the first row is padding.
    assert found == {"ratio/max": pytest.approx(4.0), "ratio/far": pytest.approx(2 / 5)}


def test_the_share_that_the_clip_silences_in_the_last_update():
    """Of the twenty tokens of K8 PPO's clip silences six; the other two silence none."""
    for form, share in ((Clipped(0.2), 0.3), (CISPO(0.8, 1.2), None), (Unclipped(), None)):
        method, stats = k8_method(form), k8_stats()
        rows = method.prepare(k8_rows(), stats, {})
        found = last_ratios(SimpleNamespace(method=method), rows, stats)
        assert found["ratio/max"] == pytest.approx(math.exp(1.3), abs=ALIKE)
        assert found.get("ratio/clipped") == (None if share is None else pytest.approx(share, abs=1e-7))


def test_a_filter_shrinks_every_ratio_by_the_probability_that_it_keeps():
    rows = rows_of([3, 1], logp={"behaviour": torch.tensor([[-1.0, -2.0, -0.5], [-0.1, 9.0, 9.0]])})
    log_prob = torch.where(rows.mask, rows.logp["behaviour"] + math.log(0.8), torch.tensor(7.0))
    found = numbers(sampler_ratio(rows, log_prob, torch.tensor([True, True])))
    assert found["rollout/ratio"] == pytest.approx(0.8)
    assert found["rollout/ratio_completion"] == pytest.approx((0.8**3 + 0.8) / 2)


# Strength of a term


@dataclass(frozen=True)
class Plain:
    """log pi(y_t): a penalty whose gradient is 1 at every token."""

    needs = (LogProb(),)
    additive = True

    def __call__(self, rows, stats):
        return stats[LIVE]


def two_rows(advantage):
    rows = rows_of([2, 2], group=torch.tensor([0, 0])).with_(advantage=torch.tensor(advantage)[:, None].expand(2, 2))
    return rows, Stats({LIVE: torch.full((2, 2), -1.0), OLD: torch.full((2, 2), -1.0)})


def with_term(coef):
    surrogate = Surrogate(Clipped())
    method = Method(rollout=Rollout(), advantage={"centre": GroupCentre()}, surrogate=surrogate)
    return method if coef is None else method.adding(terms={"plain": Summand(Plain(), coef)})


@pytest.mark.parametrize("coef", [1.0, 0.01])
def test_strength_by_hand(coef):
    # Four tokens: the policy term has gradient -A / 4 at each, the penalty coef / 4. In a row of two tokens these are
    # sqrt(2) / 4 and coef sqrt(2) / 4: noise sqrt(2 * 2 / 16) = 1 / 2, at most 2 coef sqrt(2) / 4 against it.
    rows, stats = two_rows([1.0, -1.0])
    assert term_strength(with_term(coef), rows, stats, {}) == {"strength/plain": pytest.approx(coef * 2**0.5)}


def test_no_strength_without_terms_or_where_all_groups_are_tied():
    rows, stats = two_rows([1.0, -1.0])
    assert term_strength(with_term(None), rows, stats, {}) == {}
    rows, stats = two_rows([0.0, 0.0])
    assert term_strength(with_term(1.0), rows, stats, {}) == {}


def test_strength_leaves_no_gradient_behind():
    rows, stats = two_rows([1.0, -1.0])
    term_strength(with_term(1.0), rows, stats, {})
    assert stats[LIVE].grad is None and not stats[LIVE].requires_grad


# The diagnosis while a run goes on


def course(watch, values, start=1):
    """(step, finding) of what is told on the way."""
    told = []
    for step, value in enumerate(values, start):
        told += [(step, f) for f in watch.step(step, {"frac_reward_zero_std": value, "reward": 0.5})]
    return told


def test_a_finding_is_told_when_it_begins_and_not_again():
    told = course(Watch({}), [0.2] * 30 + [0.7] * 60)
    assert [(step, f.kind, f.level) for step, f in told] == [(40, "tied_groups", Level.WARNING)]


def test_a_finding_that_becomes_graver_is_told_again():
    told = course(Watch({}), [0.7] * 30 + [0.95] * 60 + [0.7] * 30 + [0.95] * 30)
    assert [f.level for _, f in told] == [Level.WARNING, Level.PROBLEM]


def test_a_healthy_run_is_silent():
    assert course(Watch({}), [0.2] * 200) == []


def test_a_single_bad_look_is_not_told():
    assert course(Watch({}), [0.2] * 20 + [1.0] * 5 + [0.0] * 40) == []


def test_a_resumed_run_does_not_repeat_what_was_told():
    curves = {"frac_reward_zero_std": [(s, 0.7) for s in range(1, 31)], "reward": [(s, 0.5) for s in range(1, 31)]}
    assert course(Watch({}, curves), [0.7] * 40, start=31) == []
    assert [f.level for _, f in course(Watch({}, curves), [0.95] * 40, start=31)] == [Level.PROBLEM]


def test_what_the_loop_says_itself_is_not_said_twice():
    watch = Watch({})
    assert [f for step in range(1, 40) for f in watch.step(step, {"loss": math.nan})] == []


# Real runs


def findings(run):
    return {f.kind: f for f in diagnose(run.metrics, run.config.to_dict())}


def test_top_p_shrinks_the_ratios_of_a_real_run(train):
    settings = {"max_steps": 5, "learning_rate": 0.0, "rollout.num_prompts": 8}
    filtered = train("grpo", name="filtered", **settings, **{"rollout.top_p": 0.7})
    ratio = [value for _, value in filtered.metrics["rollout/ratio"]]
    assert max(ratio) < 0.95
    found = findings(filtered)["filtered_ratios"]
    assert found.setting == "rollout.top_p" and "`rollout.top_p` (now 0.7)" in found.sentence
    plain = train("grpo", name="plain", **settings)
    ratio = [value for _, value in plain.metrics["rollout/ratio"]]
    assert ratio == pytest.approx([1.0] * 5, abs=1e-4)  # the sampler is the trainer
    assert "filtered_ratios" not in findings(plain)


def untied(completions, **columns):
    """A reward that tells the completions of any model apart."""
    return [float(len(c) % 3) + 0.1 * (c.count("1") % 2) for c in completions]


def test_ratios_of_a_real_run_explode_with_many_updates_at_a_high_rate(train):
    settings = {"max_steps": 5, "rollout.num_prompts": 8, "num_iterations": 4, "reward": untied}
    wild = train("grpo", name="wild", **settings | {"learning_rate": 3e-2})
    assert findings(wild)["ratios"].level is Level.PROBLEM
    assert "outside the clip range" in findings(wild)["clipping"].sentence
    assert all(value > 0 for _, value in wild.metrics["ratio/clipped"])
    calm = train("grpo", name="calm", **settings | {"learning_rate": 1e-5})
    assert not {"ratios", "clipping"} & set(findings(calm))
    assert all(1 <= value < 1.5 for _, value in calm.metrics["ratio/max"])


def test_a_weak_penalty_of_a_real_run_is_told_from_a_strong_one(train):
    settings = {"max_steps": 12, "rollout.num_prompts": 4, "learning_rate": 1e-3, "reward": untied}
    weak = findings(train("grpo", name="weak", beta=1e-6, **settings))
    assert weak["weak_penalties"].setting == "terms.kl.coef" and "(now 1e-06)" in weak["weak_penalties"].sentence
    assert "weak_penalties" not in findings(train("grpo", name="strong", beta=0.1, **settings))


def test_a_hidden_reward_is_recorded_and_changes_no_weight(train, task):
    from keel.tasks.load import load_task

    def starts_with_its_first_number(completions, numbers, **columns):
        return [float(c.startswith(str(n[0]))) for c, n in zip(completions, numbers, strict=True)]

    watched = load_task("countdown")
    watched.hidden = {"first": starts_with_its_first_number}
    watched.verdict = "first"
    runs = [
        train("grpo", name=name, task=given, num_generations=4, **settings)
        for name, given, settings in (
            ("with", watched, {"evaluate.after": True, "evaluate.num_prompts": 16, "evaluate.num_generations": 4}),
            ("without", load_task("countdown"), {}),
        )
    ]
    assert runs[0].summary["checksum"] == runs[1].summary["checksum"]
    assert runs[0].metrics["reward"] == runs[1].metrics["reward"] == runs[0].metrics["rewards/correct/mean"]
    assert len(runs[0].metrics["rewards/first/mean"]) == 3 and "rewards/first/mean" not in runs[1].metrics
    after = runs[0].evaluations["after"].metrics
    assert after["pass@1"].value == after["rewards/first/mean"].value  # the verdict
    assert after["reward"].value == after["rewards/correct/mean"].value != after["pass@1"].value


def test_a_hidden_function_that_fails_costs_no_group(train):
    from keel.tasks.load import load_task

    def broken(completions, **columns):
        raise RuntimeError("no measure today")

    task = load_task("countdown")
    task.hidden = {"gold": broken}
    run = train("grpo", name="broken", task=task, max_steps=1)
    assert run.metrics["num_rows"] == [(1, 32.0)] and run.metrics["hidden/gold/errors"] == [(1, 4.0)]


def test_entropy_is_there_by_third(train):
    metrics = train("grpo", name="thirds", max_steps=1).metrics
    parts = [metrics[f"entropy/{name}"][0][1] for name in ("first", "middle", "last")]
    assert min(parts) < metrics["entropy"][0][1] < max(parts)


def test_a_function_of_ones_own_can_be_hidden_by_a_setting(train):
    run = train("grpo", name="own", max_steps=1, **{"task.hidden": ("keel.tasks.saturated:uses_all",)})
    assert run.metrics["hidden/uses_all/errors"] == [(1, 0.0)] and "rewards/uses_all/mean" in run.metrics
    assert run.metrics["reward"] == run.metrics["rewards/correct/mean"]
    with pytest.raises(ConfigError, match="'correct' is a reward and hidden, too"):
        train("grpo", name="twice", max_steps=1, **{"task.hidden": ("keel.tasks.countdown:correct",)})


def test_findings_are_printed_where_there_is_no_terminal(capsys):
    plain_reporter("finding", {"step": 5, "text": "step 5: it began."})
    assert capsys.readouterr().err == "finding: step 5: it began.\n"
