import ast
import operator
import re
import time
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.core.errors import ConfigError
from keel.tasks import Task, load_task
from keel.tasks.countdown import correct, evaluate, is_correct, leaves, normal_form, parse, solutions


@pytest.fixture(scope="module")
def task():
    return load_task("countdown")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(text):
    """The value by the task's parser; None where there is none."""
    tree = parse(text)
    if tree is None:
        return None
    numerator, denominator = evaluate(tree)
    return None if denominator == 0 else Fraction(numerator, denominator)


def python_value(text):
    """The value of what Python's own grammar reads, as an oracle; nothing is executed."""

    def fold(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATORS[type(node.op)](fold(node.left), fold(node.right))

    try:
        return fold(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return None


# Parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2+3*4", 14),
        ("2*3+4", 10),
        ("(2+3)*4", 20),
        ("20-5-3", 12),
        ("20-(5-3)", 18),
        ("16/4/2", 2),
        ("16/(4/2)", 8),
        ("16/4*2", 8),
        ("1/3*3", 1),
        ("10/4", Fraction(5, 2)),
        ("3/(1-2/3)", 9),
        ("((((7))))", 7),
        (" 6 - 3\t+ 17 ", 20),
    ],
)
def test_value(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize("text", ["6/(3-3)", "1/(2/(3-3))", "0/0", "(1/0)*0", "1/0-1/0"])
def test_division_by_zero_has_no_value(text):
    assert value(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "-3+6",
            "+3",
            "3*-2",
            "3-(-2)",
            "(3",
            "3)",
            ")3(",
            "()",
            "3++2",
            "3+",
            "*3",
            "1 7",
            "2(3)",
            "(2)(3)",
        ),
        *("3^2", "3**2", "3//2", "3%2", "x", "3x", "6-3+17=20", "3.5", "1e3", "٣+٤", "３", "²", "3\x00", "6−3"),
        *("(" * 64, "1" + "+1" * 32, "9" * 100_000),
    ],
)
def test_is_no_expression(text):
    assert parse(text) is None


def expressions(largest=20):
    leaf = st.integers(0, largest).map(str)
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join), inner.map(lambda text: f"({text})")
        ),
        max_leaves=8,
    ).filter(lambda text: len(text) <= 64)


@settings(deadline=None)
@given(expressions())
def test_value_agrees_with_pythons_grammar(text):
    expected = python_value(text)
    assert value(text) == expected
    assert leaves(parse(text)) == [int(n) for n in re.findall(r"\d+", text)]


@settings(deadline=None)
@given(st.one_of(st.text(max_size=80), st.text(alphabet="0123456789+-*/() ", max_size=80)))
def test_never_raises(text):
    assert is_correct(text, [1, 2, 3], 6) in (True, False)
    if parse(text) is None:
        assert not is_correct(text, [1, 2, 3], 6)


# Verifier


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("6-3+17", 1.0),
        ("17+(6-3)", 1.0),
        (" 6 - 3 + 17\n", 1.0),
        ("17+3", 0.0),  # 6 is missing
        ("17+3+6-6", 0.0),  # 6 twice
        ("20", 0.0),
        ("6+17+3", 0.0),  # 26
        ("6-3+17=20", 0.0),
        ("6-3+17 6", 0.0),
        ("", 0.0),
        ([{"role": "assistant", "content": "6-3+17"}], 1.0),
    ],
)
def test_reward(completion, reward):
    assert correct(["3 6 17>20="], [completion], numbers=[[3, 6, 17]], target=[20]) == [reward]


def test_reward_counts_repeated_numbers():
    assert is_correct("5+5*2", [5, 2, 5], 15)
    assert not is_correct("5*2+2+5-2", [5, 2, 5], 15)
    assert not is_correct("5+2*2", [5, 2, 5], 9)


def test_reward_uses_exact_fractions():
    assert is_correct("1/3*18", [1, 3, 18], 6)
    assert is_correct("3/(1/20)", [3, 1, 20], 60)
    assert not is_correct("10/3*3", [10, 3, 3], 9)


# Solutions


def every_tree(numbers):
    """All expressions of three numbers, fully parenthesised, with their values."""
    for a, b, c in set(permutations(numbers)):
        for p, q in product("+-*/", repeat=2):
            for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
                yield text, python_value(text)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=3, max_size=3), st.data())
def test_solutions_are_all_ways(numbers, data):
    trees = list(every_tree(numbers))
    reachable = sorted({int(v) for _, v in trees if v is not None and v.denominator == 1 and 1 <= v <= 60})
    target = data.draw(st.sampled_from(reachable or [1]))
    found = solutions(tuple(numbers), target)
    assert {normal_form(parse(text)) for text in found} == {
        normal_form(parse(text)) for text, v in trees if v == target
    }
    assert all(is_correct(text, numbers, target) for text in found)
    assert len(set(found)) == len(found)


def test_solutions_of_one_instance():
    # 17 + 6 - 3 is the only way; its three terms in the four orders that do not begin with a minus
    assert solutions((3, 6, 17), 20) == ("17+6-3", "17-3+6", "6+17-3", "6-3+17")
    assert solutions((1, 1, 1), 59) == ()
    assert solutions((2, 3, 4), 20) == ("(2+3)*4", "(3+2)*4", "4*(2+3)", "4*(3+2)")
    assert "6/(1-3/4)" not in solutions((6, 3, 4), 24)  # needs a 1


def test_solution_is_uniform_and_reproducible(task):
    example = next(e for e in task.train if sorted(e.columns["numbers"]) == [3, 6, 17] and e.columns["target"] == 20)
    drawn = [task.solution(example, seed) for seed in range(2000)]
    assert drawn == [task.solution(example, seed) for seed in range(2000)]
    counts = [drawn.count(text) for text in solutions((3, 6, 17), 20)]
    assert sum((n - 500) ** 2 / 500 for n in counts) < 16.3  # chi squared with 3 degrees of freedom, p = 0.001


def test_every_solution_is_rewarded_and_fits(task):
    for example in [*task.held_out, *task.train[:2000]]:
        text = task.solution(example, 1)
        assert is_correct(text, example.columns["numbers"], example.columns["target"])
        assert len(text) + 1 <= task.max_completion_length
        assert set(text + example.prompt) <= set(task.characters)
    assert task.max_completion_length == 11  # (20-18)*20 and the end of sequence


# Normal form


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("6-3+17", "17-(3-6)"),
        ("6-3+17", "17+6-3"),
        ("2*(3+4)", "(4+3)*2"),
        ("8/(2/4)", "8*4/2"),
        ("8/2/4", "8/(4*2)"),
        ("(((1)))+2", "2+1"),
    ],
)
def test_same_way(one, other):
    assert normal_form(parse(one)) == normal_form(parse(other))


@pytest.mark.parametrize(("one", "other"), [("2*3", "2+4"), ("17*1+3", "17/1+3"), ("2+2*3", "(2+2)*3"), ("4-2", "2")])
def test_different_ways(one, other):
    assert normal_form(parse(one)) != normal_form(parse(other))


@settings(deadline=None)
@given(expressions())
def test_normal_form_keeps_the_value_and_is_its_own(text):
    form = normal_form(parse(text))
    assert sorted(leaves(parse(form))) == sorted(leaves(parse(text)))
    assert normal_form(parse(form)) == form
    if value(text) is not None:
        assert value(form) == value(text)


def test_answer(task):
    example = task.held_out[0]
    assert task.answer("17 + 6 - 3", example) == "6+17-3"
    assert task.answer("1/(3-3)", example) is None
    assert task.answer("no idea", example) is None


# Split


def unordered(example):
    return tuple(sorted(example.columns["numbers"])), example.columns["target"]


def test_split_does_not_leak_through_permutations(task):
    trained = {example.prompt for example in task.train}
    for example in task.held_out:
        for a, b, c in permutations(example.columns["numbers"]):
            assert f"{a} {b} {c}>{example.columns['target']}=" not in trained


def test_instances_set_aside_are_never_trained_on():
    small, large = load_task("countdown", held_out=16), load_task("countdown", held_out=600)
    assert small.held_out[:] == large.held_out[:16]
    aside = {unordered(e) for e in load_task("countdown", held_out=1000, hard=True).held_out}
    for task in (small, large, load_task("countdown", hard=True)):
        assert {unordered(e) for e in task.train}.isdisjoint(aside | {unordered(e) for e in large.held_out})


def test_hard_instances_are_taken_on_demand(task):
    def is_hard(example):
        found = solutions(tuple(example.columns["numbers"]), example.columns["target"])
        assert found
        return all(set(text) & set("(/") for text in found)

    assert not any(is_hard(example) for example in (*task.held_out, *task.train[:3000]))
    both = load_task("countdown", hard=True)
    assert {example.prompt for example in both.train} > {example.prompt for example in task.train}
    assert 0.3 < sum(is_hard(example) for example in both.train[:3000]) / 3000 < 0.45


def test_examples(task):
    assert isinstance(task, Task)
    assert len(task.held_out) == 512
    assert len({unordered(example) for example in task.held_out}) == 512
    assert len({example.prompt for example in task.train}) == len(task.train)
    assert [example.index for example in task.train[5:8]] == [5, 6, 7]
    assert task.train[-1].index == len(task.train) - 1
    with pytest.raises(IndexError):
        task.train[len(task.train)]
    example = task.held_out[3]
    a, b, c = example.columns["numbers"]
    assert example.prompt == f"{a} {b} {c}>{example.columns['target']}="


def test_train_has_every_order_of_an_instance(task):
    orders = {}
    for example in task.train:
        orders.setdefault(unordered(example), set()).add(tuple(example.columns["numbers"]))
    for (numbers, _), seen in orders.items():
        assert len(seen) == {3: 6, 2: 3, 1: 1}[len(set(numbers))]
    # a hash sets aside eight instances in a hundred
    assert 0.9 < len(orders) / (len(orders) + len(load_all())) < 0.94


def load_all():
    with pytest.raises(ConfigError, match="from 1 to") as error:
        load_task("countdown", held_out=10**6)
    return load_task("countdown", held_out=int(re.search(r"1 to (\d+)", str(error.value))[1])).held_out


def test_beginnings_of_held_out_are_equally_hard(task):
    ways = [len(solutions(tuple(e.columns["numbers"]), e.columns["target"])) for e in load_all()]
    mean = sum(ways) / len(ways)
    deviation = (sum((n - mean) ** 2 for n in ways) / len(ways)) ** 0.5
    for size in (64, 128, 256):
        assert abs(sum(ways[:size]) / size - mean) < 0.5 * deviation / size**0.5  # random samples: below 2 of these


def test_is_deterministic(task):
    again = load_task("countdown")
    assert again.held_out[:] == task.held_out[:]
    assert again.train[:100] == task.train[:100]
    # a change of the split would silently invalidate every earlier comparison
    assert [e.prompt for e in task.held_out[:3]] == ["7 10 20>23=", "7 9 12>51=", "9 10 16>35="]


def test_is_fast(task):
    started = time.perf_counter()
    load_task("countdown")
    assert time.perf_counter() - started < 1.0
    examples = task.train[:10_000]
    texts = [task.solution(example, example.index) for example in examples]
    columns = {key: [example.columns[key] for example in examples] for key in ("numbers", "target")}
    parse.cache_clear()
    started = time.perf_counter()
    assert sum(correct([], texts, **columns)) == 10_000
    assert time.perf_counter() - started < 1.0


def test_preset_fits_the_model_that_the_task_brings(task):
    assert task.preset["rollout.max_completion_length"] == task.max_completion_length
    assert task.preset["rollout.num_prompts"] * task.preset["rollout.num_generations"] == 512
