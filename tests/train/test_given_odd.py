"""What looks like a run and teaches nothing is refused, or told."""

import pytest

import keel
from keel.core.errors import ConfigError, KeelError, TrainingError
from keel.train.configuration import Request, resolve

SMALL = {
    "max_steps": 2,
    "rollout.num_prompts": 2,
    "rollout.num_generations": 2,
    "evaluate.before": False,
    "evaluate.after": False,
}


@pytest.fixture
def train(base, tmp_path):
    def run(recipe="grpo", **options):
        return keel.train(recipe, model=base, runs=tmp_path, **{**SMALL, **options})

    return run


def nothing(prompts, completions, **columns):
    return [None] * len(completions)


def some(prompts, completions, **columns):
    return [1.0, *[None] * (len(completions) - 1)]


def test_a_reward_that_never_applies_ends_the_run(train):
    with pytest.raises(TrainingError, match="no completion of this batch has a reward: nothing returned None"):
        train(reward=nothing)


def test_completions_without_a_reward_are_told_once(train, capsys):
    run = train(reward=some, **{"num_generations": 3, "rollout.num_generations": 3})
    said = [event for event in run_events(train, some) if "have no reward" in event]
    assert run.summary["steps"] == 2 and len(said) == 1 and "are not learnt from: some returned None" in said[0]


def run_events(train, reward) -> list[str]:
    events: list[str] = []
    train(reward=reward, name="told", report=lambda event, facts: events.append(str(facts.get("text", ""))))
    return events


@pytest.mark.parametrize("given", [{"num_generations": 1}, {"rollout.num_generations": 1}])
@pytest.mark.parametrize("recipe", ["grpo", "rloo", "dapo"])
def test_groups_of_one_are_refused_under_either_name(recipe, given):
    with pytest.raises((ConfigError, ValueError), match="num_generations must be at least 2"):
        resolve(Request(recipe, given))


def test_one_completion_is_enough_where_nothing_is_compared():
    assert resolve(Request("reinforce", {"rollout.num_generations": 1})).method.rollout.num_generations == 1


@pytest.mark.parametrize("given", [{"beta": float("nan")}, {"terms.kl.coef": "nan"}])
def test_a_setting_that_is_no_number_is_refused(given):
    with pytest.raises(KeelError, match="must be a number"):
        resolve(Request("grpo", {"beta": 0.1, **given} if "beta" not in given else given))


@pytest.mark.parametrize("top_p", [0.0, 1.5, -0.1])
def test_a_nucleus_out_of_range_is_refused(top_p):
    with pytest.raises(ConfigError, match="top_p must be in"):
        resolve(Request("grpo", {"rollout.top_p": top_p}))


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\\b"])
def test_a_name_is_one_folder(name):
    if name:
        with pytest.raises(ConfigError, match="cannot be a folder's name"):
            resolve(Request("grpo", {}, name=name))


def test_a_short_run_keeps_its_last_completions(train, tmp_path):
    from keel.store.store import Store

    run = train(name="short")
    with Store(tmp_path / "keel.sqlite", readonly=True) as store:
        assert list(store.rollout_counts(store.run("short").id)) == [2]
    assert run.summary["steps"] == 2


def test_resuming_under_a_mistyped_name_names_the_run_that_is_there(train):
    events: list[str] = []
    train(name="first_run")
    train(name="first_rum", resume=True, report=lambda event, facts: events.append(str(facts.get("text", ""))))
    assert any("Did you mean 'first_run'?" in text for text in events)
