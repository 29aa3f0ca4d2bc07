"""The tasks that tell methods apart: what they hold is checked against a search of its own."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from keel.core.errors import ConfigError, DataError
from keel.tasks import Task, load_task, task_names
from keel.tasks.countdown import is_correct, normal_form, parse
from keel.tasks.proxy import PartialCredit
from keel.tasks.saturated import is_expression_of, uses_all
from keel.tasks.task import hidden_rewards
from keel.train.setup import _base_task

NAMES = ("sparse", "saturated", "proxy")


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return load_task(request.param)


@pytest.fixture(scope="module")
def sparse():
    return load_task("sparse")


def reachable(numbers, operators):
    """Every value that three numbers give with some operators, by both groupings of all orders."""

    def join(a, b, operator):
        if operator == "/":
            return a / b if b else None
        return {"+": a + b, "-": a - b, "*": a * b}[operator]

    found = set()
    for x, y, z in permutations(map(Fraction, numbers)):
        for p in operators:
            for q in operators:
                left = join(x, y, p)
                right = join(y, z, q)
                found.add(None if left is None else join(left, z, q))
                found.add(None if right is None else join(x, right, p))
    return found - {None}


def same(examples):
    """Each instance as one number, in whatever order its numbers stand."""
    rows = examples.rows.astype(np.int64)
    return set((np.sort(rows[:, :3], axis=1) @ [10**6, 10**4, 10**2] + rows[:, 3]).tolist())


def test_they_are_tasks_by_name(task):
    assert isinstance(task, Task) and task.name in task_names()
    assert {"rollout.num_prompts", "rollout.num_generations", "train.learning_rate"} <= set(task.preset)


def test_solutions_are_right_and_can_be_written(task):
    for i in range(0, len(task.train), len(task.train) // 300):
        example = task.train[i]
        text = task.solution(example, i)
        assert is_correct(text, example.columns["numbers"], example.columns["target"])
        assert set(example.prompt + text) <= set(task.characters) and len(text) < task.max_completion_length
    for example in task.held_out:
        assert Fraction(example.columns["target"]) in reachable(example.columns["numbers"], "+-*/")


def test_nothing_held_out_is_trained_on_nor_known_to_the_base(task):
    held_out = same(task.held_out)
    assert not held_out & same(task.train)
    base = _base_task(task)
    assert base.name == "countdown" and base.characters == task.characters
    assert not held_out & same(base.train)


def test_the_base_is_the_same_whatever_is_held_out():
    base = _base_task(load_task("proxy", held_out=8))
    assert base.held_out[:] == load_task("countdown").held_out[:]


def test_sparse_instances_need_a_division(sparse):
    examples = [*sparse.held_out[:60], *sparse.train[:: len(sparse.train) // 60]]
    for example in examples:
        numbers, target = example.columns["numbers"], Fraction(example.columns["target"])
        assert target not in reachable(numbers, "+-*")
        assert target in reachable(numbers, "+-*/")


def test_sparse_has_the_numbers_that_are_documented(sparse):
    assert (len(sparse.train), len(sparse.held_out)) == (13489, 200)
    with pytest.raises(ConfigError, match="from 1 to 220, got 221"):
        load_task("sparse", held_out=221)


def test_needs_that_no_instance_has():
    with pytest.raises(ConfigError, match="no instance needs one of '/' where hard ones are left out"):
        load_task("countdown", needs="/")


def test_countdown_without_needs_is_as_before():
    plain, same_again = load_task("countdown"), load_task("countdown", needs="")
    assert plain.held_out[:] == same_again.held_out[:] and len(plain.train) == len(same_again.train)


@pytest.mark.parametrize(
    ("text", "right"),
    [("3*6+17", True), ("17/(6-3)", True), ("6-3", False), ("6/(3-3)", False), ("3+6+17+3", False), ("x", False)],
)
def test_saturated_asks_for_the_numbers_only(text, right):
    assert is_expression_of(text, [3, 6, 17]) is right
    assert uses_all([""], [text], numbers=[[3, 6, 17]]) == [float(right)]


def test_a_number_that_occurs_once_may_not_be_used_twice():
    assert not is_expression_of("6/(6-17)", [3, 6, 17])


def test_saturated_counts_ways_and_measures_countdown():
    task = load_task("saturated")
    example = task.train[0]
    assert task.answer("2*3+1", example) == normal_form(parse("1+3*2")) != task.answer("2+3+1", example)
    assert list(task.rewards) == ["uses_all"] and list(hidden_rewards(task)) == ["correct"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("6-3+17", 1.9),  # right: 1, and three numbers
        ("17+3", 1.6),  # the right value with two of them
        ("6+17", 0.6),
        ("10+10", 1.0),  # the right value, but with none of the numbers
        ("6+6+6+6+6+6+6+6+6+6+6+6", 3.6),  # the loophole
        ("6/(3-3)", 0.9),  # no value, three numbers
        ("6+", 0.0),
    ],
)
def test_the_proxy_by_hand(text, reward):
    assert PartialCredit(0.3)([""], [text], numbers=[[3, 6, 17]], target=[20]) == [pytest.approx(reward)]


def test_gold_is_hidden_and_tells_right_from_wrong():
    task = load_task("proxy")
    assert list(task.rewards) == ["proxy"] and task.verdict == "gold"
    hack = "6+6+6+6+6+6+6+6+6+6+6+6"
    assert len(hack) < task.max_completion_length
    gold = hidden_rewards(task)["gold"]
    assert gold([""] * 2, ["6-3+17", hack], numbers=[[3, 6, 17]] * 2, target=[20] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("credit", [0.0, -1.0, float("nan")])
def test_credit_must_be_positive(credit):
    with pytest.raises(ConfigError, match="must be positive"):
        load_task("proxy", credit=credit)


def test_a_hidden_function_may_not_be_a_reward_too():
    task = load_task("proxy")
    task.hidden = {"proxy": task.hidden["gold"]}
    with pytest.raises(DataError, match="'proxy' is a reward and hidden, too"):
        hidden_rewards(task)
