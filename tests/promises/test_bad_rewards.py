"""A reward function that misbehaves costs its groups, is counted, and never becomes a silent zero."""

import math

import pytest

from keel.core.errors import TrainingError

# Each misbehaves for the prompts of one group only: those that begin with `1 `.
REWARDS = """
import os, signal, sys, threading, time

def bad(what):
    def reward(prompts, completions, **columns):
        good = [float(len(c)) + i % 2 for i, c in enumerate(completions)]
        if not any(p.startswith("1 ") for p in prompts):
            return good
        spoilt = [what if p.startswith("1 ") else g for p, g in zip(prompts, good)]
        return what(good) if callable(what) else spoilt
    return reward

def fail(*_):
    raise ValueError("cannot read this one")

def recurse(*_):
    return recurse()

class Odd:
    def __float__(self):
        raise RuntimeError("no number")

class Liar(list):
    def __len__(self):
        return 0

raises = bad(fail)
recursion = bad(recurse)
memory = bad(lambda *_: (_ for _ in ()).throw(MemoryError()))
hangs = bad(lambda *_: time.sleep(3600))
hangs_blocking_signals = bad(lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(3600)))
exits = bad(lambda *_: sys.exit(0))
dies = bad(lambda *_: os._exit(0))
crashes = bad(lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
closes_its_pipes = bad(lambda *_: (os.closerange(0, 50), 1)[:0])
answers_for_the_protocol = bad(lambda *_: print('{"values": [1.0, 1.0, 1.0, 1.0]}', flush=True))
too_few = bad(lambda good: good[:-1])
too_many = bad(lambda good: good + [1.0])
empty = bad(lambda good: [])
nothing = bad(lambda *_: None)
a_number = bad(lambda *_: 1.0)
a_dictionary = bad(lambda good: dict(enumerate(good)))
a_generator = bad(lambda good: (g for g in good))
liar = bad(Liar)
nan = bad(float("nan"))
infinite = bad(float("-inf"))
too_large = bad(1e39)
huge = bad(10**400)
text = bad("1.0")
in_lists = bad([1.0])
odd = bad(Odd())
complex_number = bad(1j)
"""

MESSAGES = {
    "raises": "cannot read this one",
    "recursion": "RecursionError",
    "memory": "MemoryError",
    "hangs": "no result after 1 s",
    "hangs_blocking_signals": "no result after 1 s",
    "exits": "SystemExit",
    "dies": "exited with status 0",
    "crashes": "killed by signal 11",
    "closes_its_pipes": "",
    "answers_for_the_protocol": "returned NoneType",
    "too_few": "returned 3 values for 4 completions",
    "too_many": "returned 5 values for 4 completions",
    "empty": "returned 0 values for 4 completions",
    "nothing": "returned NoneType",
    "a_number": "returned float",
    "a_dictionary": "returned dict",
    "a_generator": "returned generator",
    "liar": "returned 0 values",
    "nan": "returned nan; return None if the reward does not apply",
    "infinite": "returned -inf",
    "too_large": "too large",
    "huge": "OverflowError",
    "text": "returned str '1.0' as a reward",
    "in_lists": "returned list",
    "odd": "no number",
    "complex_number": "returned complex",
}
PROCESS_ONLY = {
    "hangs",
    "hangs_blocking_signals",
    "dies",
    "crashes",
    "closes_its_pipes",
    "answers_for_the_protocol",
    "exits",
}
DATA = [{"prompt": "1 2 3>6="}, {"prompt": "2 2 3>7="}]
SETTINGS = {
    "data": DATA,
    "max_steps": 1,
    "rollout.num_prompts": 2,
    "task.reward_timeout": 1.0,
    "train.log_completions": 1,
    "train.max_rounds": 1,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def check(run, name, said, message):
    """The group of two with the prompt `1 ...` is gone, counted and told; the other is as it was."""
    first = {key: curve[0][1] for key, curve in run.metrics.items()}
    assert first[f"rewards/{name}/errors"] == 1.0
    assert first["num_rows"] == 2.0
    assert first[f"rewards/{name}/mean"] >= 1.0 and math.isfinite(first["loss"])
    warnings = [facts["text"] for event, facts in said if event == "warning"]
    assert any(f"reward '{name}' failed for 1 group, which is left out" in w and message in w for w in warnings)


@pytest.mark.parametrize("name", sorted(set(MESSAGES) - PROCESS_ONLY))
def test_a_callable(train, here, name):
    import importlib

    module = importlib.import_module("bad_rewards")
    said = []
    run = train(
        reward={name: getattr(module, name)}, report=lambda event, facts: said.append((event, facts)), **SETTINGS
    )
    check(run, name, said, MESSAGES[name])


QUICK = ("hangs", "dies", "text")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(MESSAGES)]
)
def test_a_function_in_a_process_of_its_own(train, here, name):
    said = []
    run = train(reward=f"bad_rewards:{name}", report=lambda event, facts: said.append((event, facts)), **SETTINGS)
    check(run, name, said, MESSAGES[name])


def test_one_bad_function_takes_its_groups_from_all(train, here):
    """Two functions that fail for different groups: nothing is left, and that is an error."""

    def spoils(start):
        return lambda prompts, completions, **_: [math.nan if p.startswith(start) else 1.0 for p in prompts]

    with pytest.raises(TrainingError, match="no usable group"):
        train(reward={"one": spoils("1"), "two": spoils("2")}, **SETTINGS)


def test_none_is_no_error_and_no_zero(train):
    """A completion to which no reward applies does not pull the mean down, and learns nothing."""

    def half(completions, **_):
        return [3.0 if i % 2 else None for i in range(len(completions))]

    run = train(reward={"half": half}, **SETTINGS)
    first = {key: curve[0][1] for key, curve in run.metrics.items()}
    assert first["rewards/half/errors"] == 0.0 and first["rewards/half/mean"] == 3.0 and first["reward"] == 3.0
    assert first["grad_norm"] == 0.0  # the rewards that there are do not differ


def test_failures_while_measuring_are_no_zeros_either(model):
    """The average is that of the prompts that could be scored, and the others are counted."""
    import keel
    from keel.tasks.data import load_data

    def fails(prompts, **_):
        if any(p.startswith("1 ") for p in prompts):
            raise ValueError("cannot read this one")
        return [1.0] * len(prompts)

    task = load_data(
        [{"prompt": "9 9 9>9="}], held_out=[{"prompt": "1 2 3>6="}, {"prompt": "4 2 3>9="}, {"prompt": "5 2 3>9="}]
    )
    found = keel.evaluate(model, task=task, reward=fails, num_generations=2, max_completion_length=4)
    assert found.metrics["pass@1"].value == 1.0
    assert found.metrics["avg@2"].value == 1.0
