"""The loop of the methods that compare the policy's own completions: sample, judge, pair, update."""

import pytest

from keel.core.errors import MethodError, TrainingError
from keel.method import Method
from keel.models.load import checksum
from keel.recipes.registry import recipe_named

RECIPES = ("online_dpo", "behaviour_dpo", "online_ipo", "inpo", "rebel", "sppo", "nash_md", "nash_mp")
HERE = "tests.train.judging"


def brief(completions):
    """A reward that no two completions of different lengths share."""
    return [1 / (1 + len(text)) for text in completions]


def told(run, name: str) -> list[float]:
    """A metric of every step."""
    return [value for _, value in run.metrics[name]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe, train):
    run = train(recipe, reward=brief, **{"rollout.num_generations": 4, "train.num_minibatches": 2})
    assert run.summary["steps"] == 3 and told(run, "updates/skipped")[-1] == 0
    assert max(told(run, "grad_norm")) > 0
    if recipe in ("sppo", "nash_md", "nash_mp"):
        assert 0.25 <= told(run, "win_rate/ess")[-1] <= 1.0
    else:
        assert "pairs/number" in run.metrics and "rewards/margins" in run.metrics


def test_snapshots_of_the_last_iteration(train):
    run = train("inpo", every=2, **{"rollout.num_generations": 4, "max_steps": 3})
    assert run.summary["steps"] == 3
    run = train("nash_mp", half_step=1, name="both", **{"rollout.num_generations": 4, "max_steps": 3})
    assert run.summary["steps"] == 3


def test_the_same_seed_gives_the_same_weights(train):
    runs = [train("online_ipo", name=f"run{i}", **{"rollout.num_generations": 4}) for i in range(2)]
    assert checksum(runs[0].model) == checksum(runs[1].model)


def test_a_judge_in_a_worker_process(train):
    run = train("online_dpo", judge=f"{HERE}:shorter", **{"rollout.num_generations": 4, "max_steps": 2})
    assert told(run, "judge/pairs")[-1] == 4 * 6
    assert told(run, "judge/errors")[-1] == 0
    assert told(run, "pairs/number")[-1] > 0
    assert 0.1 < told(run, "judge/order_gap")[-1] <= 0.2  # 0.9 against 1 - 0.3, and 0 for equals
    random = train("online_dpo", judge=f"{HERE}:shorter", pairs="random", name="random", max_steps=1,
                   **{"rollout.num_generations": 4})  # fmt: skip
    assert told(random, "judge/pairs")[-1] == 4 * 2  # asked for no more than these


@pytest.mark.parametrize("recipe", ["sppo", "nash_md", "online_ipo"])
def test_a_judge_serves_every_recipe(recipe, train):
    run = train(recipe, judge=f"{HERE}:shorter", **{"rollout.num_generations": 4, "max_steps": 1})
    assert told(run, "judge/pairs")[-1] == 24 and told(run, "grad_norm")[-1] > 0


@pytest.mark.parametrize(("judge", "said"), [("raises", "the judge is ill"), ("too_large", "2 is no probability")])
def test_a_judge_that_fails_costs_its_groups(judge, said, train):
    texts = []
    with pytest.raises(TrainingError, match="no usable group"):
        train("online_dpo", judge=f"{HERE}:{judge}", max_steps=1,
              report=lambda event, facts: texts.append(str(facts)))  # fmt: skip
    assert any(said in text for text in texts)


def test_two_judges_are_refused(train):
    method: Method = recipe_named("sppo")(judge=f"{HERE}:shorter")
    other = recipe_named("online_dpo")(judge=f"{HERE}:raises").transforms["pairs"]
    with pytest.raises(MethodError, match="two judges"):
        train(method.adding(transforms={"more": other}), max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reward_rises(recipe, train):
    """The built-in model on countdown, 40 batches: the mean reward of the last ten is above that of the first ten."""
    run = train(recipe, model="tiny", max_steps=40, learning_rate=3e-4, **{"rollout.num_prompts": 16})
    reward = told(run, "reward")
    assert sum(reward[-10:]) / 10 > sum(reward[:10]) / 10 + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["self_rewarding", "cream"])
def test_a_policy_moves_towards_what_it_scores_itself(recipe, train):
    """The chosen completion of its own pairs gains on the rejected one within an iteration."""
    run = train(recipe, model="tiny", max_steps=24, learning_rate=3e-4, every=24, **{"rollout.num_prompts": 16})
    margins = told(run, "rewards/margins")
    assert sum(margins[-6:]) > sum(margins[:6])


# -- policies that judge themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["self_rewarding", "cream"])
def test_self_rewarding_on_the_loop(recipe, train):
    """No reward is read: pairs are made of the policy's own scores from the first batch on."""
    run = train(recipe, reward=lambda completions: [0.0] * len(completions), every=2, **{"rollout.num_generations": 4})
    assert told(run, "pairs/groups")[0] == 1.0 and min(told(run, "grad_norm")) > 0
    if recipe == "cream":
        assert told(run, "pairs/consistency")[0] == 1.0  # both are the initial model
        assert all(0 <= c <= 1 for c in told(run, "pairs/consistency"))


def test_rounds_with_past_and_future(base, tmp_path):
    """Two rounds by a judge that likes what is short; every run begins from the model of its round."""
    from keel.train.self_rewarding import self_reward

    found = self_reward(
        base, "countdown", rounds=2, completions=3, num_prompts=6, reward=brief, runs=tmp_path, agreement="mean",
        max_steps=2, learning_rate=1e-3, **{"train.batch_size": 4, "evaluate.before": False, "evaluate.after": False},
    )  # fmt: skip
    assert [entry.path.name for entry in found] == ["self_rewarding-1", "self_rewarding-2"]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} >= {"self_rewarding-1-ahead", "self_rewarding-2-ahead"}
    for entry in found:
        assert entry.pairs and entry.gap > 0 and 0 <= entry.anchored <= 1 and 0 <= entry.ahead <= 1
        assert all(len(pair["chosen"]) < len(pair["rejected"]) for pair in entry.pairs)
        assert entry.agreement == 1.0  # one judge for all rounds
        assert (entry.model / "config.json").is_file()


def test_rounds_without_a_judge_are_repeatable(base, tmp_path):
    from keel.train.self_rewarding import self_reward

    def once(place):
        return self_reward(
            base, "countdown", rounds=2, completions=3, num_prompts=6, runs=place, look_ahead=False, agreement="prompt",
            max_steps=2, learning_rate=1e-2,
            **{"train.batch_size": 4, "evaluate.before": False, "evaluate.after": False},
        )  # fmt: skip

    first, again = once(tmp_path / "a"), once(tmp_path / "b")
    assert [entry.pairs for entry in first] == [entry.pairs for entry in again]
    assert first[0].ahead == 0 and {"prompt", "chosen", "rejected", "probability"} == set(first[0].pairs[0])
    assert first[0].agreement == 1.0 and 0 <= first[1].agreement <= 1.0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"completions": 1}, {"num_prompts": 0}])
def test_rounds_out_of_range(base, tmp_path, wrong):
    from keel.core.errors import ConfigError
    from keel.train.self_rewarding import self_reward

    with pytest.raises(ConfigError, match="at least"):
        self_reward(base, "countdown", runs=tmp_path, **wrong)
