"""As many optimiser steps of a batch as were asked for, or a refusal."""

from types import SimpleNamespace

import pytest
import torch

import keel
from keel.core.errors import ConfigError
from keel.core.rows import Rows
from keel.tasks.load import load_task
from keel.train import online
from keel.train.configuration import Request, resolve


def parts(groups: int, steps: int) -> list[list[int]]:
    """The groups of each optimiser step, of a batch with two rows a group."""
    ids = torch.zeros(2 * groups, 1, dtype=torch.long)
    group = torch.arange(groups).repeat_interleave(2)
    rows = Rows.build(ids, ids == 0, ids, ids == 0, group=group)
    train = SimpleNamespace(num_minibatches=steps)
    session = SimpleNamespace(config=SimpleNamespace(train=train, seed=0), position=SimpleNamespace(step=0))
    return [group[index].unique().tolist() for index in online.minibatches(session, rows, 0)]


@pytest.mark.parametrize(
    ("groups", "steps", "sizes"),
    [(4, 3, [2, 1, 1]), (16, 7, [3, 3, 2, 2, 2, 2, 2]), (16, 10, [2] * 6 + [1] * 4), (8, 4, [2] * 4), (3, 5, [1] * 3)],
)
def test_groups_are_shared_evenly(groups, steps, sizes):
    found = parts(groups, steps)
    assert [len(part) for part in found] == sizes
    assert sorted(group for part in found for group in part) == list(range(groups))


@pytest.mark.parametrize(
    ("recipe", "values", "where"),
    [
        ("grpo", {"rollout.num_prompts": 4}, "rollout.num_prompts"),
        ("ppo", {"rollout.num_prompts": 4}, "rollout.num_prompts"),
        ("gkd", {"rollout.num_prompts": 4, "models.teacher.path": "tiny"}, "rollout.num_prompts"),
        ("sft", {"train.batch_size": 4}, "train.batch_size"),
        ("dpo", {"train.batch_size": 4}, "train.batch_size"),
    ],
)
def test_more_steps_than_a_batch_has_groups_are_refused(recipe, values, where):
    task = load_task("countdown")

    def ask(steps):
        return resolve(Request(recipe, {**values, "train.num_minibatches": steps}, model="tiny"), task)

    assert ask(4).train.num_minibatches == 4
    with pytest.raises(ConfigError, match=f"num_minibatches: .*5 .*4.*{where}"):
        ask(5)


def test_the_tasks_own_number_of_prompts_counts():
    """On the built-in model countdown draws 64 prompts, where the recipe says 16."""
    found = resolve(Request("grpo", {"train.num_minibatches": 64}, model="tiny"), load_task("countdown"))
    assert found.method.rollout.num_prompts == found.train.num_minibatches == 64


def test_steps_that_a_batch_has_lost_are_told_once(train):
    """Of each two groups one fails, and of two updates one is left."""
    said = []

    def failing(completions, prompts, **_):
        if len(set(prompts)) > 1 or prompts[0] in failing.bad:
            raise ValueError("no")
        failing.bad.add("")
        return [float(len(c) % 2) for c in completions]

    data = [{"prompt": f"{n} {n} {n}>{3 * n}="} for n in (2, 3)]
    failing.bad = {data[0]["prompt"]}
    settings = {"rollout.num_prompts": 2, "train.num_minibatches": 2, "train.max_rounds": 1, "task.held_out": 0.0}
    given = {"data": data, "reward": failing, "max_steps": 2, **settings}
    train("grpo", name="lost", **given, report=lambda *event: said.append(event))
    told = [facts["text"] for kind, facts in said if kind == "warning" and "num_minibatches" in facts["text"]]
    assert len(told) == 1 and "1 of 2 updates" in told[0]


def test_a_translation_asks_for_no_more_steps_than_groups():
    """TRL mixes the rows of groups: 16 rows in 8 steps are 2 groups of 8, which Keel keeps whole."""
    given = {"per_device_train_batch_size": 2, "steps_per_generation": 8, "num_generations": 8, "max_steps": 80}
    found = keel.from_trl(given)
    assert found.settings["rollout.num_prompts"] == found.settings["train.num_minibatches"] == 2
    assert found.settings["train.max_steps"] == 80 // 2
    assert "2 groups" in found.without_counterpart["steps_per_generation"]
