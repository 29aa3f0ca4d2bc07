import sys

import numpy as np
import pytest
import torch

from keel.core.errors import ConfigError
from keel.parts.rewards.functions import (
    ExactMatch,
    MathVerify,
    as_numbers,
    call_reward,
    check_columns,
    load_reward,
    parameters,
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, whose modules can be imported and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# Finding


def test_module_in_the_current_directory(here):
    (here / "my_rewards.py").write_text(
        "def length(completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    assert load_reward("my_rewards:length")(completions=["a", "bcd"]) == [1, 3]


def test_file_with_a_neighbour(here):
    folder = here / "inner"
    folder.mkdir()
    (folder / "neighbour.py").write_text("FACTOR = 10\n")
    (folder / "mine.py").write_text(
        "from neighbour import FACTOR\n"
        "class Scaled:\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [FACTOR * len(c) for c in completions]\n"
        "    def halved(completions, **columns):\n"
        "        return [len(c) / 2 for c in completions]\n"
    )
    assert load_reward("inner/mine.py:Scaled")(completions=["abc"]) == [30]
    assert load_reward("inner/mine.py:Scaled.halved")(completions=["abc"]) == [1.5]


def test_callable_is_itself():
    def reward(completions):
        return [0.0] * len(completions)

    assert load_reward(reward) is reward
    assert load_reward(ExactMatch) == ExactMatch()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("broken", "Write module:function"),
        ("my_rewards:lenght", "Did you mean 'length'"),
        ("my_rewards:VALUE", "is int, not a function"),
        ("absent_module:length", r"cannot be imported: ModuleNotFoundError.*current directory"),
        ("absent.py:length", "no such file: absent.py"),
        ("faulty:length", r"cannot be imported: ZeroDivisionError: division by zero \(.*faulty\.py, line 2\)"),
        ("faulty.py:length", r"cannot be imported: ZeroDivisionError"),
    ],
)
def test_not_found(here, reward, message):
    (here / "my_rewards.py").write_text("VALUE = 3\ndef length(completions):\n    return []\n")
    (here / "faulty.py").write_text("\n1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        load_reward(reward)


# Calling


def call(function, completions=("a", "b"), **columns):
    return call_reward(function, ["p"] * len(completions), list(completions), [[1]] * len(completions), columns)


def test_only_accepted_arguments_are_passed():
    def everything(prompts, completions, completion_ids, **columns):
        assert (prompts, completion_ids) == (["p", "p"], [[1], [1]])
        assert columns == {"answer": ["x", "y"], "level": [1, 2]}
        return [1, 1]

    def completions_only(completions):
        return [len(c) for c in completions]

    def by_keyword(*, answer, completions):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    columns = {"answer": ["x", "y"], "level": [1, 2]}
    assert call(everything, **columns) == [1, 1]
    assert call(completions_only, **columns) == [1, 1]
    assert call(by_keyword, ("x", "z"), **columns) == [1, 0]


def test_missing_column_is_found_before_training():
    def reward(completions, anwser, strict=False):
        return []

    assert parameters(reward).required == {"completions", "anwser"}
    with pytest.raises(ConfigError, match=r"reward own.*'anwser', which the data lacks \(it has answer\).*'answer'"):
        check_columns("own", reward, ["answer"])
    check_columns("own", reward, ["anwser"])


def test_a_module_has_parameters_of_another_kind():
    class Model(torch.nn.Module):
        def forward(self, completions):
            return [1.0] * len(completions)

        def __call__(self, completions):
            return self.forward(completions)

    assert call(Model()) == [1.0, 1.0]


@pytest.mark.parametrize(
    "returned", [[1, None], (1, None), np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]), [np.float32(1), True]]
)
def test_numbers(returned):
    values = as_numbers(returned, 2)
    assert values[0] == 1.0 and type(values[0]) is float
    assert values[1] in (None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "returned 1 values for 2 completions"),
        ([1.0] * 3, ValueError, "returned 3 values for 2 completions"),
        (None, TypeError, "returned NoneType, not a list"),
        (1.0, TypeError, "returned float, not a list"),
        ("10", TypeError, "returned str, not a list"),
        (["1", "0"], TypeError, "returned str '1' as a reward"),
        ([[1.0], [0.0]], TypeError, "returned list"),
        ([1j, 0], TypeError, "returned complex"),
    ],
)
def test_no_numbers(returned, error, message):
    with pytest.raises(error, match=message):
        as_numbers(returned, 2)


# Verifiers


def test_exact_match():
    completions = ["4", " 4\n", "so <answer>4</answer>.", "5", "x", "Paris"]
    answer = [4, "4", "4 ", 4, None, "paris"]
    assert call(ExactMatch(), completions, answer=answer) == [1, 1, 1, 0, None, 0]
    assert call(ExactMatch(ignore_case=True), completions, answer=answer) == [1, 1, 1, 0, None, 1]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The result is $\\frac{1}{2}$.", "0.5", 1),
        ("The result is \\boxed{0.5}", "\\frac{1}{2}", 1),
        ("<answer>\\frac{2}{4}</answer>", "1/2", 1),
        ("1 or 2? <answer>1</answer>", 2, 0),
        ("Natalia sold 48 + 24 = 72 clips. The answer is 72", "48/2 = 24 and 48 + 24 = 72\n#### 72", 1),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        ("\\boxed{x^2 + 1}", "(x+1)^2", 0),
        ("I do not know", "3", 0),
        ("", 3, 0),
        ("3", None, None),
        ([{"role": "assistant", "content": "\\boxed{3}"}], 3, 1),
    ],
)
def test_math_verify(completion, answer, reward):
    assert call(MathVerify(), [completion], answer=[answer]) == [reward]


def test_math_verify_refuses_an_answer_that_is_no_mathematics():
    with pytest.raises(ValueError, match="'' holds nothing"):
        call(MathVerify(), ["3"], answer=[""])
