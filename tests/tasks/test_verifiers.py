"""Environments of `verifiers`: with the package where it is installed, and with a stand-in everywhere."""

import gc
import importlib.util
import sys
import time
from pathlib import Path

import pytest

from keel.core.errors import ConfigError
from keel.tasks import Task, load_task
from keel.tasks.environment import Answer, Ended, Environment, InteractiveTask
from keel.tasks.verifiers_stage import message_of

HERE = Path(__file__).parent / "verifiers_environments"
OWN = ("keel_sums", "keel_guess", "keel_tools", "keel_former", "keel_two", "keel_conversation")
CALL = '<tool_call>{"name": "f"}</tool_call>'
NO_CALLS = [f"<tool_call>{text}</tool_call>" for text in ("f(1)", "[1]", '{"name": "f", "arguments": 3}', '{"a": 1}')]
INSTALLED = importlib.util.find_spec("verifiers") is not None


def swap(new):
    """Other modules under some names, and the ones that were there."""
    old = {name: sys.modules.pop(name, None) for name in new}
    sys.modules.update({name: module for name, module in new.items() if module is not None})
    return old


@pytest.fixture(scope="module", params=["stand-in", "package"])
def package(request):
    from tests.tasks import verifiers_standin

    if request.param == "package" and not INSTALLED:
        pytest.skip("verifiers is not installed")
    fresh = dict.fromkeys(OWN)
    old = swap(fresh | (verifiers_standin.modules() if request.param == "stand-in" else {}))
    sys.path.insert(0, str(HERE))
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(HERE), prepend=":")  # tools run in processes of their own
    yield verifiers_standin if request.param == "stand-in" else None
    patch.undo()
    sys.path.remove(str(HERE))
    swap(old)


@pytest.fixture(scope="module")
def sums(package):
    return load_task("verifiers:keel_sums", held_out=0.25, seed=1)


@pytest.fixture(scope="module")
def guess(package):
    return load_task("verifiers:keel_guess", size=10, max_turns=3)


def example_of(task, number):
    return next(e for e in (*task.train, *task.held_out) if e.columns["task"] == number)


def test_one_turn_is_a_task_with_a_reward(sums):
    assert isinstance(sums, Task) and not isinstance(sums, InteractiveTask)
    assert (sums.name, len(sums.train), len(sums.held_out)) == ("verifiers:keel_sums", 6, 2)
    assert example_of(sums, 3).prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4="}]


def test_reward_is_that_of_the_rubric(sums):
    # 2 for the right sum, and 0.5 for fewer than 5 characters: 0+1=1, 3+4=7
    said = ["1", "7", "7", "The sum is 7", [{"role": "assistant", "content": "7"}]]
    task = [0, 0, 3, 3, 3]
    assert sums.rewards["reward"](prompts=[""] * 5, completions=said, task=task) == [2.5, 0.5, 2.5, 0.0, 2.5]


def test_an_episode_for_each_completion(package, sums):
    if package is None:
        pytest.skip("the package does not count")
    before = package.calls["episodes"]
    sums.rewards["reward"](prompts=["", ""], completions=["1", "2"], task=[0, 0])
    assert package.calls["episodes"] - before == 2
    assert package.calls["gate"] == 0


def test_a_reward_that_fails_is_an_error(sums):
    with pytest.raises(RuntimeError, match=r"the episode failed: .*no number"):
        sums.rewards["reward"](prompts=[""], completions=["crash"], task=[0])


def test_options_of_the_taskset(package):
    task = load_task("verifiers:keel_sums", count=4, held_out=0.0, chat=False, max_turn_length=7)
    assert [e.prompt for e in task.train] == [f"Add.\n\n{i}+{i + 1}=" for i in range(4)]
    assert task.max_completion_length == 7


def test_turns(guess):
    assert isinstance(guess, InteractiveTask)
    assert (guess.max_turns, guess.rewards, len(guess.train), len(guess.held_out)) == (3, {}, 9, 1)
    episode = guess.environment(example_of(guess, 7), seed=0)  # the hidden number is 7
    assert isinstance(episode, Environment) and episode.reset() == ""
    assert [episode.step(said) for said in ("3", "9")] == [Answer("higher"), Answer("lower")]
    last = episode.step("7")
    assert (last.reward, last.done) == (1.0, True)
    assert episode.finished.rewards == {"won": 1.0}


def test_the_limit_of_turns_is_scored(guess):
    episode = guess.environment(example_of(guess, 7), seed=0)
    episode.reset()
    last = [episode.step(said) for said in ("1", "2", "3")][-1]
    assert last == Answer("", 0.0, True, "max_turns")


def test_a_cut_episode_is_scored(package, monkeypatch):
    """What is scored is a last message that says so; the score is the rubric's, shown by a message that it likes."""
    task = load_task("verifiers:keel_tools", held_out=0.0)
    call = '<tool_call>{"name": "calculator_double", "arguments": {"number": 21}}</tool_call>'
    for said, earned in (("[cut off]", 0.0), ("42", 1.0)):
        monkeypatch.setattr("keel.tasks.verifiers._CUT", said)
        episode = task.environment(task.train[0], 0)
        episode.reset()
        assert not episode.step(call).done
        assert episode.finish(Ended.TOKENS) == earned
        assert episode.finished.rewards == {"right": earned} and episode.asked is None


def test_a_cut_episode_that_cannot_be_scored_earns_nothing(guess):
    episode = guess.environment(example_of(guess, 7), seed=0)
    episode.reset()
    episode.step("3")
    assert episode.finish(Ended.TOKENS) == 0.0 and episode.finished is None  # `[cut off]` is no number


def test_episodes_play_side_by_side(guess):
    numbers = [2, 5, 8]
    episodes = [guess.environment(example_of(guess, number), 0) for number in numbers]
    for episode in episodes:
        episode.reset()
    assert [episode.step("5").text for episode in episodes] == ["lower", "", "higher"]
    assert episodes[1].finished.reward == 1.0
    assert [e.step(str(n)).reward for e, n in ((episodes[2], 8), (episodes[0], 2))] == [1.0, 1.0]


def test_an_environment_that_fails_says_so(guess):
    episode = guess.environment(example_of(guess, 1), 0)
    episode.reset()
    with pytest.raises(RuntimeError, match=r"the episode failed: .*invalid literal for int"):
        episode.step("one")


def test_an_abandoned_episode_is_left(guess):
    episode = guess.environment(example_of(guess, 1), 0)
    episode.reset()
    assert len(guess._stage.seats) >= 1
    del episode
    gc.collect()
    for _ in range(100):
        if not guess._stage.seats:
            break
        time.sleep(0.02)
    assert not guess._stage.seats


def test_tools(package):
    task = load_task("verifiers:keel_tools", held_out=0.0)
    assert isinstance(task, InteractiveTask)
    system, user = task.train[0].prompt
    assert system["role"] == "system" and '"name": "calculator_double"' in system["content"]
    assert user == {"role": "user", "content": "Question 0: what is twice 21?"}
    episode = task.environment(task.train[0], 0)
    assert episode.reset() == ""
    call = '<tool_call>{"name": "calculator_double", "arguments": {"number": 21}}</tool_call>'
    assert episode.step(f"I double it. {call}") == Answer("<tool_response>\n42\n</tool_response>")
    assert "unknown tool 'halve'" in episode.step(call.replace("calculator_double", "halve")).text
    if package is not None:
        assert "denied" in episode.step(call.replace("21", "13")).text
    assert (last := episode.step("42")).reward == 1.0 and last.done


def test_an_environment_in_memory(package, sums):
    import verifiers.v1 as vf

    from keel.tasks.verifiers import verifiers_task

    config = vf.env_config_type("keel_sums").model_validate({"taskset": {"id": "keel_sums", "count": 3}})
    task = verifiers_task(vf.load_environment(config), held_out=0.0)
    assert [e.prompt for e in task.train] == [e.prompt for e in map(lambda n: example_of(sums, n), range(3))]
    assert task.rewards["reward"](prompts=[""], completions=["5"], task=[2]) == [2.5]
    with pytest.raises(ConfigError, match="takes no count"):
        verifiers_task(vf.load_environment(config), count=3)


def test_what_is_no_environment(package):
    from keel.tasks.verifiers import verifiers_task

    with pytest.raises(ConfigError, match="int is neither the id of an environment"):
        verifiers_task(3)
    with pytest.raises(ConfigError, match="there is no environment of that name"):
        load_task("verifiers:keel_sumz")
    with pytest.raises(ConfigError, match="only the former `load_environment`"):
        load_task("verifiers:keel_former")
    with pytest.raises(ConfigError, match=r"Keel plays one agent, but .*: one, other"):
        load_task("verifiers:keel_two")
    with pytest.raises(ConfigError, match=r"options do not fit: .*cuont"):
        load_task("verifiers:keel_sums", cuont=3)
    with pytest.raises(ConfigError, match="max_turns: got 0"):
        load_task("verifiers:keel_guess", max_turns=0)
    with pytest.raises(ConfigError, match="no agent 'palyer'"):
        load_task("verifiers:keel_guess", agents={"palyer": {}})


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r'pip install "keel-rl\[verifiers\]"'):
        load_task("verifiers:anything")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", None),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', None, [("f", '{"a": 1}')]),
        (f"a {CALL} b {CALL}", "a  b", [("f", "{}"), ("f", "{}")]),
        *((text, text, None) for text in NO_CALLS),
    ],
)
def test_calls_are_read(text, content, calls):
    message = message_of(text, True, 4)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    assert (message["content"], found or None) == (content, calls)
    assert [call["id"] for call in message.get("tool_calls", [])] == [f"call_4_{i}" for i in range(len(calls or []))]
    assert message_of(text, False, 4) == {"role": "assistant", "content": text}
