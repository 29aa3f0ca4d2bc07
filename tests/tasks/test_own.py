"""Tasks of one's own by `file.py:NAME` and `module:NAME`."""

import sys

import pytest

from keel.core.errors import ConfigError
from keel.tasks import Task, load_task
from keel.tasks.environment import InteractiveTask

OWN = '''
from dataclasses import dataclass
import neighbour
from keel.tasks import Example, load_data
from keel.tasks.environment import Answer

ran = []


class Echo:
    """Say the word again."""

    name, preset, rewards, characters = "echo", {}, {}, None
    max_completion_length, max_turns, max_turn_length, turn_ends = 16, 2, 8, ()

    def __init__(self, words: int = 3, held_out: int = 1):
        ran.append(words)
        if words < 2:
            raise ValueError(f"words must be at least 2, got {words}")
        made = [Example(f"word{i}", {}, i) for i in range(words)]
        self.train, self.held_out = made[held_out:], made[:held_out]

    def solution(self, example, seed):
        return example.prompt

    def answer(self, completion, example):
        return completion

    def environment(self, example, seed):
        return Room(example.prompt)

    def demonstration(self, example, seed):
        return None


@dataclass
class Room:
    word: str

    def reset(self):
        return ""

    def step(self, text):
        return Answer(reward=float(text == self.word), done=True)


def quick(*, words=4):
    return Echo(words)


def nothing():
    return neighbour.VALUE


finished = Echo(5)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_env.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("VALUE = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n in ("my_env", "neighbour", "broken") or n.startswith("keel_task_")]:
        del sys.modules[name]


def test_a_class_of_a_file(folder):
    task = load_task(f"{folder}/my_env.py:Echo", words=5, held_out=2)
    assert isinstance(task, Task) and isinstance(task, InteractiveTask)
    assert [e.prompt for e in task.train] == ["word2", "word3", "word4"]
    assert task.environment(task.train[0], 0).step("word2").reward == 1.0


def test_a_function_and_an_object(folder):
    assert len(load_task(f"{folder}/my_env.py:quick").train) == 3
    assert len(load_task(f"{folder}/my_env.py:finished").train) == 4


def test_a_module_of_the_current_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_task("my_env:Echo", words=2).name == "echo"
    assert load_task("my_env.py:Echo", words=2).name == "echo"


def test_only_what_is_named_is_imported(folder):
    load_task(f"{folder}/my_env.py:Echo")
    assert not [name for name in sys.modules if name == "broken" or name.startswith("keel_task_broken")]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("absent.py:Echo", {}, "no such file"),
        ("my_env.py:Ecko", {}, "has no 'Ecko'. Did you mean 'Echo'"),
        ("my_env.py:", {}, "Write file.py:NAME, or module:NAME"),
        (
            "my_env.py:Echo",
            {"wrods": 3},
            r"argument 'wrods'.*It takes words: int = 3, held_out: int = 1",
        ),
        ("my_env.py:Echo", {"words": 1}, "it refused its options: ValueError: words must be at least 2, got 1"),
        ("my_env.py:nothing", {}, "int is no task; it lacks name, train, held_out, rewards"),
        ("my_env.py:Room", {"word": "a"}, "Room is no task; it lacks name, train"),
        ("my_env.py:finished", {"words": 3}, "takes no options, but got words"),
        ("broken.py:Task", {}, "cannot be imported: ZeroDivisionError"),
    ],
)
def test_errors(folder, name, options, words):
    with pytest.raises(ConfigError, match=words):
        load_task(f"{folder}/{name}", **options)


def test_no_module(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match="there is no module 'not_there_at_all'"):
        load_task("not_there_at_all.inner:Task")
