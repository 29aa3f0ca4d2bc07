"""Budgets of tokens and of seconds: where a run ends, how the schedule follows, and how it goes on after a stop."""

import math

import pytest

from keel.core.errors import ConfigError, RunError
from keel.train.lifecycle import Stopped
from keel.train.optimiser import Optimiser
from keel.train.settings import TrainSettings


def tokens(run):
    return [int(value) for _, value in run.metrics["num_tokens"]]


def test_tokens_end_a_run_with_the_step_that_reaches_them(train):
    """The same run without the limit says where each step ends."""
    whole = tokens(train("grpo", name="whole", max_steps=4))
    said = []
    budget = whole[1] + 1  # reached in the third step, and passed
    run = train(
        "grpo",
        name="short",
        max_steps=50,
        report=lambda event, facts: said.append(facts["text"]) if event == "note" else None,
        **{"train.max_train_tokens": budget},
    )
    assert run.summary["status"] == "finished"
    assert tokens(run) == whole[:3]
    assert said == [
        f"ended after step 3 with {whole[2]:,} tokens, {whole[2] - budget:,} beyond the budget of {budget:,}"
    ]


def test_a_budget_that_is_met_exactly_needs_no_word(train):
    whole = tokens(train("grpo", name="whole", max_steps=2))
    said = []
    run = train(
        "grpo",
        name="exact",
        max_steps=50,
        report=lambda event, facts: said.append(event),
        **{"train.max_train_tokens": whole[-1]},
    )
    assert (tokens(run), "note" in said) == (whole, False)


def test_max_steps_still_ends_a_run(train):
    run = train("grpo", max_steps=2, **{"train.max_train_tokens": 10**9, "train.max_train_seconds": 1e6})
    assert run.summary["steps"] == 2


def test_seconds_are_those_of_training(train, monkeypatch):
    """A clock of our own: 10 s a step; measuring takes 1000 s and does not count."""
    clock = [0.0]
    monkeypatch.setattr("keel.train.online.time.monotonic", lambda: clock[0])

    def report(event, facts):
        if event == "step":
            clock[0] += 10.0
            facts["metrics"]["seen"] = clock[0]
        if event == "evaluation":
            clock[0] += 1000.0

    settings = {"evaluate.num_prompts": 2, "evaluate.num_generations": 1, "train.eval_steps": 1}
    run = train("grpo", max_steps=50, report=report, **{"train.max_train_seconds": 25.0, **settings})
    # the time of a step is taken before it is reported: 0, 10, 20, 30 s
    assert run.summary["steps"] == 4
    assert run.summary["seconds"] == 30.0


def test_a_stopped_run_goes_on_with_what_is_left_of_the_budget(train):
    whole = train("grpo", name="whole", max_steps=50, **{"train.max_train_tokens": 900, "train.lr_scheduler": "linear"})

    def stop(event, facts):
        if event == "start":
            stop.session = facts["session"]
        if event == "step" and facts["step"] == 2:
            stop.session.stopping = lambda: True

    settings = {"max_steps": 50, "train.max_train_tokens": 900, "train.lr_scheduler": "linear", "name": "run"}
    with pytest.raises(Stopped, match="step 2"):
        train("grpo", report=stop, **settings)
    run = train("grpo", resume=True, **settings)
    assert len(tokens(whole)) > 3
    assert tokens(run) == tokens(whole)
    assert run.metrics["learning_rate"] == whole.metrics["learning_rate"]
    assert run.summary["checksum"] == whole.summary["checksum"]


def test_a_schedule_ends_with_the_budget(train):
    """Linear: the share of the learning rate at a step is what was left of the tokens before it."""
    budget = 900
    run = train("grpo", max_steps=10**6, **{"train.max_train_tokens": budget, "train.lr_scheduler": "linear"})
    before = [0, *tokens(run)[:-1]]
    rates = [value for _, value in run.metrics["learning_rate"]]
    assert rates == pytest.approx([1e-3 * (1 - used / budget) for used in before], rel=1e-5)


def test_the_further_of_steps_and_budget_decides():
    settings = TrainSettings(learning_rate=1.0, lr_scheduler="cosine", max_train_tokens=1)
    optimiser = _bare(settings, 10)
    optimiser.spent = 0.5
    assert optimiser.factor(2) == pytest.approx(0.5)
    assert optimiser.factor(8) == pytest.approx((1 + math.cos(0.8 * math.pi)) / 2)


def _bare(settings, updates):
    import torch

    return Optimiser({"w": torch.nn.Parameter(torch.zeros(1))}, {}, settings, updates)


@pytest.mark.parametrize(("key", "value"), [("max_train_tokens", 0), ("max_train_seconds", 0.0)])
def test_an_empty_budget_is_refused(train, key, value):
    with pytest.raises(ConfigError, match=f"train.{key}"):
        train("grpo", **{f"train.{key}": value})


def test_another_budget_is_another_configuration(train):
    train("grpo", name="run", max_steps=1)
    with pytest.raises(RunError, match="max_train_tokens"):
        train("grpo", name="run", max_steps=1, resume=True, **{"train.max_train_tokens": 5})


def test_other_held_out_prompts(train):
    """`skip` passes over the first ones: nothing is measured twice, and nothing is left out."""
    settings = {"evaluate.after": True, "evaluate.num_generations": 1, "max_steps": 1}
    both = train("grpo", name="both", **settings, **{"evaluate.num_prompts": 6}).evaluations["after"]
    last = train("grpo", name="last", **settings, **{"evaluate.num_prompts": 4, "evaluate.skip": 4}).evaluations[
        "after"
    ]
    assert both.index == (0, 1, 2, 3, 4, 5)
    assert last.index == (4, 5, 6, 7)
    assert last.values["reward"][:2] == both.values["reward"][4:]


def test_the_completions_of_a_measurement_have_a_seed_of_their_own(train):
    """Two seeds with the same policy, before training: the same numbers where the draws are the same."""
    settings = {"evaluate.before": True, "evaluate.num_prompts": 16, "evaluate.num_generations": 4, "max_steps": 1}

    def before(name, **more):
        return train("grpo", name=name, **settings, **more).evaluations["before"].values["entropy"]

    one, two = before("a", seed=0), before("b", seed=1)
    same = [before(name, seed=seed, **{"evaluate.draw_seed": 7}) for name, seed in (("c", 0), ("d", 1))]
    assert one != two
    assert same[0] == same[1]


def test_what_is_held_out_of_data_has_a_seed_of_its_own():
    from keel.train.settings import TaskSettings
    from keel.train.setup import prepare_setup

    data = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(40)]

    def held(seed, **task):
        values = {"task.held_out": 0.25, **{f"task.{k}": v for k, v in task.items()}}
        found = prepare_setup(
            "grpo", "tiny-not-read", None, None, data, None, seed=seed, name=None, config=None, settings=values
        )
        return [example.prompt for example in found.task.held_out]

    assert TaskSettings().split_seed is None
    assert held(0) != held(1)
    assert held(0, split_seed=3) == held(1, split_seed=3)
