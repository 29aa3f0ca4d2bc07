import asyncio
import math

import pytest
import torch

from keel.core.errors import UserError
from keel.parts.rewards.functions import call_reward
from keel.parts.rewards.score import score
from keel.parts.rewards.worker import RewardThread, RewardTimeout, RewardWorker, RewardWorkerDied, isolate

GROUP = [5, 5, 2, 2, 9, 9]  # in the order in which they come, under numbers that mean nothing


class Recorded:
    """A reward function that notes the completions of each call."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, completions, **columns):
        self.calls.append("".join(completions))
        return self.function(completions)


def scored(functions, completions="abcdef", group=GROUP, **columns):
    completions = list(completions)
    ids = [torch.tensor([ord(c)]) for c in completions]
    return score(functions, ["p"] * len(completions), completions, ids, columns, group)


def same(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected), equal_nan=True)


NAN = math.nan


def position(completions):
    return [float(ord(c) - ord("a")) for c in completions]


def test_columns_of_values():
    def vowel(completions, prompts, completion_ids, hint):
        assert completion_ids == [[ord(c)] for c in completions]
        return [None if h == "skip" else c in "ae" for c, h in zip(completions, hint, strict=True)]

    scores = scored({"position": position, "vowel": vowel}, hint=["", "skip", "", "", "", "skip"])
    assert scores.names == ("position", "vowel")
    same(scores.values, [[0, 1], [1, NAN], [2, 0], [3, 0], [4, 1], [5, NAN]])
    assert not scores.failed.any()
    assert scores.errors == {"position": 0, "vowel": 0}
    assert scores.messages == {}


def test_no_functions():
    scores = scored({})
    assert scores.values.shape == (6, 0)
    assert not scores.failed.any()


@pytest.mark.parametrize("group", [GROUP, torch.tensor(GROUP)])
def test_only_the_guilty_group_leaves(group):
    def reward(completions):
        if "d" in completions:
            raise ValueError("a d")
        return position(completions)

    recorded = Recorded(reward)
    scores = scored({"own": recorded, "other": position}, group=group)
    same(scores.values[:, 0], [0, 1, NAN, NAN, 4, 5])
    same(scores.values[:, 1], [0.0, 1, 2, 3, 4, 5])
    assert scores.failed.tolist() == [False, False, True, True, False, False]
    assert scores.errors == {"own": 1, "other": 0}
    assert recorded.calls == ["abcdef", "ab", "cd", "ef"]
    assert len(scores.messages["own"]) == 1 and scores.messages["own"][0].startswith("ValueError: a d (")


def test_what_a_function_does_to_its_arguments_stays_with_it():
    """The second function, the next batch and the data see what was there."""

    def clears(prompts, completions, completion_ids, tests):
        found = [float(len(ids)) for ids in completion_ids]
        for entry in (*prompts, *completions, *completion_ids, *tests):
            entry.clear()
        completions.clear()
        return found

    def counts(prompts, completions, completion_ids, tests):
        every = zip(prompts, completions, completion_ids, tests, strict=True)
        return [float(100 * len(p) + 10 * len(c[0]["content"]) + len(i) + len(t["in"])) for p, c, i, t in every]

    prompts = [[{"role": "user", "content": "?"}]] * 2
    said = [[{"role": "assistant", "content": text}] for text in ("a", "bc")]
    data = {"tests": [{"in": [1, 2, 3]}, {"in": [4]}]}
    for _ in range(2):
        found = score({"clears": clears, "counts": counts}, prompts, said, [[5], [6, 7]], data, [0, 1])
        assert found.values.tolist() == [[1.0, 114.0], [2.0, 123.0]] and found.errors == {"clears": 0, "counts": 0}


def test_groups_may_be_scattered():
    def reward(completions):
        if "b" in completions:
            raise ValueError
        return position(completions)

    scores = scored({"own": reward}, group=[0, 1, 0, 1, 2, 2])
    same(scores.values[:, 0], [0, NAN, 2, NAN, 4, 5])
    assert scores.failed.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (NAN, "returned nan; return None if the reward does not apply"),
        (math.inf, "returned inf"),
        (-math.inf, "returned -inf"),
    ],
)
def test_a_value_that_is_no_number_costs_its_group_only(returned, message):
    recorded = Recorded(lambda completions: [returned if c == "e" else 1.0 for c in completions])
    scores = scored({"own": recorded})
    same(scores.values[:, 0], [1, 1, 1, 1, NAN, NAN])
    assert scores.failed.tolist() == [False] * 4 + [True] * 2
    assert scores.errors == {"own": 1}
    assert scores.messages == {"own": [message]}
    assert len(recorded.calls) == 1


def test_wrong_count_everywhere():
    scores = scored({"own": lambda completions: [1.0]})
    assert scores.failed.all()
    assert scores.values.isnan().all()
    assert scores.errors == {"own": 3}
    assert "returned 1 values for 6 completions" in scores.messages["own"][0]
    assert "returned 1 values for 2 completions" in scores.messages["own"][1]


def test_one_group_is_not_tried_twice():
    recorded = Recorded(lambda completions: 1 / 0)
    scores = scored({"own": recorded}, completions="ab", group=[0, 0])
    assert recorded.calls == ["ab"]
    assert scores.errors == {"own": 1}


def test_a_failure_of_the_whole_batch_only_is_told():
    def reward(completions):
        if len(completions) > 2:
            raise MemoryError("too many")
        return position(completions)

    scores = scored({"own": reward})
    same(scores.values[:, 0], [0.0, 1, 2, 3, 4, 5])
    assert scores.errors == {"own": 0}
    assert scores.messages["own"][0].startswith("MemoryError: too many")


@pytest.mark.parametrize("error", [RewardTimeout("no result after 1 s."), RewardWorkerDied("exited.")])
def test_patience_ends_after_three_time_outs(error):
    def reward(completions):
        if set(completions) & set("bcegi"):
            raise error
        return position(completions)

    recorded = Recorded(reward)
    scores = scored({"own": recorded}, completions="abcdefghij", group=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert recorded.calls == ["abcdefghij", "ab", "cd"]  # three time-outs; the other groups leave untried
    assert scores.failed.all()
    assert scores.errors == {"own": 5}
    assert scores.messages["own"][-1].startswith("not tried further after 3 time-outs")


def test_two_time_outs_are_borne():
    def reward(completions):
        if "a" in completions:
            raise RewardTimeout("no result after 1 s.")
        return position(completions)

    scores = scored({"own": reward})
    assert scores.failed.tolist() == [True, True, False, False, False, False]
    assert scores.errors == {"own": 1}


def test_a_hang_in_a_thread_ends_the_run():
    import threading

    release = threading.Event()
    with pytest.raises(RewardTimeout) as error:
        scored({"own": RewardThread(lambda completions: release.wait(30), timeout=0.1)})
    assert error.value.fatal
    release.set()


def test_mistakes_that_no_second_attempt_mends():
    with pytest.raises(UserError, match="column 'prompts'"):
        scored({"own": position}, prompts=["p"] * 6)
    with pytest.raises(ValueError, match="answer has 1 entries for 6 rows"):
        scored({"own": position}, answer=["x"])


def test_with_a_worker_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "import os, time\n"
        "def reward(completions, **columns):\n"
        "    if 'a' in completions:\n"
        "        time.sleep(30)\n"
        "    if 'd' in completions:\n"
        "        os._exit(1)\n"
        "    return [ord(c) - ord('a') if c != 'f' else None for c in completions]\n"
    )
    with RewardWorker("own_rewards:reward", timeout=1.0) as worker:
        scores = scored({"own": worker}, completions="abbbcdef", group=[0, 0, 1, 1, 2, 2, 3, 3])
        # the batch and the first group time out, the second is scored; the third dies, and then patience is at its end
        same(scores.values[:, 0], [NAN, NAN, 1, 1, NAN, NAN, NAN, NAN])
        assert scores.errors == {"own": 3}
        scores = scored({"own": worker}, completions="bcdfef", group=[0, 0, 1, 1, 2, 2])
        same(scores.values[:, 0], [1, 2, NAN, NAN, 4, NAN])
        assert scores.failed.tolist() == [False, False, True, True, False, False]


async def slowly(completions, **_):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_an_asynchronous_reward_is_awaited():
    """Also under a loop that runs, as in a notebook."""

    async def notebook():
        return call_reward(slowly, ["p", "p"], ["a", "bcd"], [[1], [2]], {})

    assert call_reward(slowly, ["p", "p"], ["a", "bcd"], [[1], [2]], {}) == [1.0, 3.0] == asyncio.run(notebook())
    thread = isolate(slowly)
    assert thread(prompts=["p"], completions=["ab"], completion_ids=[[1]]) == [2.0]
    thread.close()
