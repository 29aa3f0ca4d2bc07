"""`keel judge` and the files that it writes: a killed run goes on, mistakes leave nothing, and say what is wrong."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from tests.train.judged import ROWS, apart, by_length, lines
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, UserError
from keel.parts.rewards.worker import RewardTimeout
from keel.train.judging import judge


class _Dying:
    """Stands under one name, as a judge given as text would."""

    def __init__(self, function):
        self.function = function

    def __call__(self, prompts, completions, **columns):
        return self.function(prompts, completions, **columns)

    def __repr__(self):
        return "judge"


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    judge(ROWS, whole, by_length, batch_size=1)
    asked: list[str] = []

    def counted(prompts, completions, **columns):
        if len(asked) >= 3:
            raise KeyboardInterrupt
        asked.extend(set(prompts))
        return by_length(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        judge(ROWS, cut, _Dying(counted), batch_size=1)
    cut.write_text(cut.read_text() + '{"prompt": "q4", "cho')
    more: list[str] = []

    def noted(prompts, completions, **columns):
        more.extend(prompts)
        return by_length(prompts, completions)

    facts = judge(ROWS, cut, _Dying(noted), resume=True)
    assert facts["resumed"] == 3 and set(more) == {"q4", "q5"}
    assert lines(cut) == lines(whole) and apart(cut) == apart(whole)
    again = judge(ROWS, cut, _Dying(counted), resume=True)
    assert again["resumed"] == 5 and lines(cut) == lines(whole)


def test_resuming_asks_again_where_the_judge_failed_and_nowhere_else(tmp_path):
    """Also of an item whose text holds the characters that Unicode, but not JSON lines, takes for the end of a line."""
    rows = [*ROWS, {"prompt": "q\u2028\x856", "completions": ["a", "bbb"]}]
    out, whole, asked, ill = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", [], [True]

    def judged(prompts, completions, **columns):
        asked.extend(prompts)
        if ill[0] and "q2" in prompts:
            raise RuntimeError("the judge is ill")
        return by_length(prompts, completions)

    judge(rows, whole, by_length, batch_size=1)
    facts = judge(rows, out, _Dying(judged), batch_size=1)
    assert facts["failed"] == 1 and [line["reason"] for line in apart(out)].count("failed") == 1
    asked.clear()
    ill[0] = False
    facts = judge(rows, out, _Dying(judged), resume=True)
    assert set(asked) == {"q2"} and facts["failed"] == 0 and facts["resumed"] == 5
    key = {"key": lambda line: line["judged"]}
    assert sorted(lines(out), **key) == sorted(lines(whole), **key)
    assert sorted(apart(out), **key) == sorted(apart(whole), **key)


def test_files_that_are_there_are_safe(tmp_path):
    out = tmp_path / "out.jsonl"
    judge(ROWS[:1], out, _Dying(by_length))
    with pytest.raises(ConfigError, match="exists already"):
        judge(ROWS, out, _Dying(by_length))
    with pytest.raises(ConfigError, match="seed=0, not 1"):
        judge(ROWS, out, _Dying(by_length), seed=1, resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "mine"}\n')
    with pytest.raises(DataError, match="no file of `keel judge`"):
        judge(ROWS, other, _Dying(by_length), resume=True)
    assert other.read_text() == '{"prompt": "mine"}\n'


def nothing_in(folder) -> bool:
    return list(folder.iterdir()) == []


def test_a_mistake_in_the_call_leaves_no_files(tmp_path):
    with pytest.raises(ConfigError, match="gold"):
        judge(ROWS, tmp_path / "out.jsonl", lambda completions, gold: [0.0])
    with pytest.raises(ConfigError, match="no such file"):
        judge(ROWS, tmp_path / "out.jsonl", "nowhere.py:size")
    with pytest.raises(UserError, match="this path does not exist"):
        judge(ROWS, tmp_path / "out.jsonl", model=str(tmp_path / "nowhere"))
    assert nothing_in(tmp_path)


def test_files_without_lines_are_taken_over(tmp_path):
    """Here the first judge was stopped before it had said anything."""
    out = tmp_path / "out.jsonl"

    def stopped(prompts, completions, **columns):
        raise RewardTimeout("no result", fatal=True)

    for resume in (False, True):
        with pytest.raises(RewardTimeout, match="no result"):
            judge(ROWS, out, stopped)
        assert out.read_text() == "" and (tmp_path / "out.jsonl.judge.json").exists()
        assert judge(ROWS, out, by_length, seed=1, resume=resume)["decided"] == 4
        assert json.loads((tmp_path / "out.jsonl.judge.json").read_text())["seed"] == 1
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("how", "template", "lacks"),
    [
        ("pairwise", "{prompt}{first}", r"\{second\}.*\{prompt\}, \{first\}, \{second\}"),
        ("pairwise", "", r"\{prompt\}, \{first\}, \{second\}"),
        ("scores", "{query}", r"\{responses\}.*\{query\}, \{responses\}"),
        ("digit", "{completion}", r"\{prompt\}.*\{prompt\}, \{completion\}"),
    ],
)
def test_a_template_without_its_places(tmp_path, how, template, lacks):
    data, question, out = tmp_path / "data.jsonl", tmp_path / "t.txt", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    question.write_text(template)
    out.mkdir()
    given = ["judge", str(data), str(out / "x.jsonl"), "--model", "nowhere", "--how", how, "--template", str(question)]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, ConfigError) and error.where == "--template" and re.search(lacks, str(error))
    assert nothing_in(out)


def test_a_reward_is_asked_no_question(tmp_path):
    with pytest.raises(ConfigError, match="--template: is a question to a language model"):
        judge(ROWS, tmp_path / "out.jsonl", by_length, template="{prompt}{first}{second}")
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("name", ["file.py/x.jsonl", "file.py/deep/x.jsonl"])
def test_no_file_can_be_written_into_a_file(tmp_path, name):
    (tmp_path / "file.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"cannot be written: .*file.py is a file, not a folder"):
        judge(ROWS, tmp_path / name, by_length)
    assert (tmp_path / "file.py").read_text() == "x = 1\n"


def _refused(*arguments, **settings):
    raise PermissionError(13, "Permission denied")


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is a folder"):
        judge(ROWS, tmp_path, by_length, resume=True)
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        judge(ROWS, tmp_path / ("x" * 300), by_length)
    (tmp_path / "b.jsonl.undecided.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"exists already|cannot be written: Is a directory"):
        judge(ROWS, tmp_path / "b.jsonl", by_length)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(ConfigError, match="allows no new files"):
        judge(ROWS, tmp_path / "new" / "c.jsonl", by_length)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", _refused)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        judge(ROWS, tmp_path / "new" / "c.jsonl", by_length)


@pytest.mark.parametrize("address", ["notaurl", "127.0.0.1:8000/v1", "ftp://127.0.0.1/v1", "http://", "http:/x"])
def test_what_is_no_address_is_refused_at_once(tmp_path, address):
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=f"{address!r} is no address. It begins with http:// or https://"):
        judge(ROWS, tmp_path / "out.jsonl", server=address, served="judge")
    assert time.perf_counter() - start < 5 and nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completions": ["a"]}, "no `prompt`"),
        ({"prompt": "q"}, "nothing to judge"),
        ({"prompt": "q", "chosen": "a"}, "without `rejected`"),
        ({"prompt": "q", "completions": "ab"}, "list of texts"),
        ({"prompt": "q", "completions": []}, "list of texts"),
        ({"prompt": "q", "completions": ["a", 3]}, r"`completions\[2\]` must be text"),
        ({"prompt": "q", "chosen": "ok", "rejected": 5}, "`rejected` must be text"),
        (
            {"prompt": "q", "chosen": "ok", "rejected": [{"role": "user", "content": "x"}]},
            "`rejected` must be a message",
        ),
        ({"prompt": "q", "completion": 5}, "`completion` must be text"),
        ({"prompt": "q", "completions": ["a", "b"], "x": float("nan")}, "`x` is NaN"),
    ],
)
def test_malformed_rows(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        judge([row], tmp_path / "out.jsonl", by_length)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "name one judge"),
        ({"reward": by_length, "model": "tiny"}, "reward and model"),
        ({"reward": by_length, "how": "loudly"}, "how"),
        ({"reward": by_length, "ties": "kept"}, "ties"),
        ({"reward": by_length, "batch_size": 0}, "batch-size"),
        ({"reward": by_length, "least_gap": -1.0}, "least-gap"),
        ({"server": "http://127.0.0.1:1", "how": "digit"}, "local"),
        ({"reward": lambda completions, gold: [0.0]}, "gold"),
    ],
)
def test_bad_settings(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        judge(ROWS, tmp_path / "out.jsonl", **settings)
