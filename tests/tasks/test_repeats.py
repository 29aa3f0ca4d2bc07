"""Prompts by how often they come: OREAL's bands, their edges, and data that do not fit."""

import json

import pytest

from keel.core.errors import ConfigError, DataError
from keel.tasks.data import load_data
from keel.tasks.repeats import repeated, with_options
from keel.tasks.task import Example
from keel.train.settings import TaskSettings
from keel.train.setup import open_task

OREAL = [[0.2, 6], [0.6, 4], [0.8, 2]]


def prompts(*rates, column="pass_rate") -> list[Example]:
    return [Example(f"{i}+1=", {column: rate, "answer": str(i)}, i, "sums") for i, rate in enumerate(rates)]


def counts(found: list[Example], size: int) -> list[int]:
    return [sum(e.columns["answer"] == str(i) for e in found) for i in range(size)]


def test_hard_prompts_come_more_often():
    """Pass rate 0 to .2 six times, .2 to .6 four times, .6 to .8 twice, and not at all from .8 on."""
    rates = (0.0, 0.19, 0.2, 0.59, 0.6, 0.79, 0.8, 1.0)
    found = repeated(prompts(*rates), OREAL)
    assert counts(found, 8) == [6, 6, 4, 4, 2, 2, 0, 0]
    assert [e.index for e in found] == list(range(24)) and {e.domain for e in found} == {"sums"}
    assert found[0].prompt == found[5].prompt == "0+1=" and found[6].prompt == "1+1="


def test_edges():
    """A rate that was rounded belongs where it was meant to be; a bound of 1 takes in all."""
    assert counts(repeated(prompts(0.1 + 0.2 + 0.3, 0.6 - 1e-12, 1 - 0.4), OREAL), 3) == [2, 2, 2]
    assert counts(repeated(prompts(0.0, 0.5, 1.0), [(0.5, 2), (1, 1)]), 3) == [2, 1, 1]
    assert counts(repeated(prompts(0.0, 0.5, 1.0), [(0.5, 0), (1.0, 1)]), 3) == [0, 1, 1]
    assert repeated(prompts(0.3, 0.4), [(1.0, 1)]) == prompts(0.3, 0.4)


@pytest.mark.parametrize("rate", [None, "0.5", True, -0.1, 1.1, float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(DataError, match=r"1 of 2 examples have no number in .* `pass_rate`: 1"):
        repeated(prompts(0.5, rate), OREAL)


def test_nothing_is_left():
    with pytest.raises(DataError, match="every example is left out"):
        repeated(prompts(0.9, 1.0), OREAL)


@pytest.mark.parametrize(
    ("bands", "what"),
    [
        ([], "list of"),
        ("oreal", "list of"),
        ([[0.2, 6, 1]], "list of"),
        ([0.2, 6], "list of"),
        ([[0.0, 6]], "bound"),
        ([[1.5, 6]], "bound"),
        ([["a", 6]], "bound"),
        ([[0.2, 1.5]], "count"),
        ([[0.2, -1]], "count"),
        ([[0.2, True]], "count"),
        ([[0.6, 4], [0.2, 6]], "ascend"),
        ([[0.2, 4], [0.2, 6]], "ascend"),
        ([[0.2, 0]], "leaves every"),
    ],
)
def test_bands_that_are_none(bands, what):
    with pytest.raises(ConfigError, match=what):
        with_options(load_data([{"prompt": "1+1=", "pass_rate": 0.1}], held_out=0.0), {"repeats": bands})


def test_as_options_of_data(tmp_path):
    """By the column that is named; what is held out is as it was."""
    rows = [{"prompt": f"{i}+1=", "ease": i / 20, "answer": str(i)} for i in range(20)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = open_task(TaskSettings(data=str(file), held_out=0.25), None, 3)
    options = {"repeats": OREAL, "repeats_by": "ease"}
    task = open_task(TaskSettings(data=str(file), held_out=0.25, options=options), None, 3)
    assert list(task.held_out) == list(plain.held_out) and len(plain.train) == 15
    wanted = {e.prompt: 6 if e.columns["ease"] < 0.2 else 4 if e.columns["ease"] < 0.6 else 2 for e in plain.train}
    wanted = {prompt: n for prompt, n in wanted.items() if float(prompt.split("+")[0]) < 16}
    found = [e.prompt for e in task.train]
    assert {prompt: found.count(prompt) for prompt in found} == wanted
    with pytest.raises(DataError, match="`pass_rate`"):
        open_task(TaskSettings(data=str(file), options={"repeats": OREAL}), None, 3)
    with pytest.raises(ConfigError, match=r"unknown option of data.*repeats"):
        open_task(TaskSettings(data=str(file), options={"repeat": OREAL}), None, 3)
    with pytest.raises(ConfigError, match="repeats_by"):
        open_task(TaskSettings(data=str(file), options={"repeats_by": "ease"}), None, 3)


def test_a_run_on_them(tmp_path):
    """One pass over two prompts, one of which comes three times: by `--set`, as written to the configuration."""
    from tests.promises.runs import start, write_model

    model = write_model(tmp_path / "model")
    data = [{"prompt": "1 2 3>6=", "pass_rate": 0.1}, {"prompt": "2 3 3>8=", "pass_rate": 0.7},
            {"prompt": "3 4 3>9=", "pass_rate": 0.9}]  # fmt: skip
    seen: list[str] = []

    def reward(completions, prompts, **_):
        seen.extend(prompts[::2])  # two completions each
        return [float(len(c)) for c in completions]

    settings = {"data": data, "reward": reward, "task.options.repeats": [[0.2, 3], [0.8, 1]], "max_steps": 2}
    run = start(model, tmp_path, **settings)
    assert sorted(seen) == ["1 2 3>6="] * 3 + ["2 3 3>8="]
    assert "repeats" in (run.path / "config.yaml").read_text()
