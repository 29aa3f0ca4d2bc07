"""`keel judge`: from prompts with completions to preferences; nothing is dropped, and a killed run goes on."""

import json
import re

import pytest
from fastapi import FastAPI, Request
from tests.serve.running import running
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, RewardError
from keel.models.tiny import SMALL, build_tiny
from keel.tasks.preference_data import load_preferences
from keel.train.judging import judge, read_items

ROWS = [
    {"prompt": "q1", "completions": ["aa", "bbbb"], "topic": "x"},
    {"prompt": "q2", "completions": ["aa", "bb"]},
    {"prompt": "q3", "chosen": "ccc", "rejected": "c"},
    {"prompt": "q4", "chosen": "d", "rejected": "ddd"},
    {"prompt": "q5", "completions": ["e", "eee", "ee"]},
]


def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def apart(path) -> list[dict]:
    return lines(path.with_name(path.name + ".undecided.jsonl"))


def without_key(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "judged"}


def test_by_a_reward_function(tmp_path):
    out = tmp_path / "some" / "out.jsonl"
    facts = judge(ROWS, out, by_length)
    assert facts == {
        "items": 5, "decided": 4, "ties": 1, "unparsable": 0, "failed": 0, "resumed": 0, "agrees": 0.5
    }  # fmt: skip
    assert [without_key(row) for row in lines(out)] == [
        {"prompt": "q1", "topic": "x", "chosen": "bbbb", "rejected": "aa", "score_chosen": 4.0, "score_rejected": 2.0},
        {"prompt": "q3", "chosen": "ccc", "rejected": "c", "score_chosen": 3.0, "score_rejected": 1.0},
        {"prompt": "q4", "chosen": "ddd", "rejected": "d", "score_chosen": 3.0, "score_rejected": 1.0},
        {"prompt": "q5", "completions": ["eee", "ee", "e"], "scores": [3.0, 2.0, 1.0]},
    ]
    assert [without_key(row) for row in apart(out)] == [
        {"prompt": "q2", "completions": ["aa", "bb"], "scores": [2.0, 2.0], "reason": "tie", "said": []}
    ]
    wide = judge(ROWS, tmp_path / "wide.jsonl", by_length, least_gap=2.0)
    assert (wide["ties"], wide["decided"]) == (5.0, 0.0)


def test_what_is_written_is_what_preference_methods_read(tmp_path):
    out = tmp_path / "out.jsonl"
    facts = judge(ROWS[:4], out, by_length, ties="half")
    assert (facts["ties"], facts["decided"]) == (1.0, 3.0) and apart(out) == []
    found = load_preferences(str(out), "pairs", 0.0)
    assert [(p.completions, p.probability) for p in found.train] == [
        (("bbbb", "aa"), 1.0), (("aa", "bb"), 0.5), (("ccc", "c"), 1.0), (("ddd", "d"), 1.0)
    ]  # fmt: skip
    assert [p.margin for p in found.train] == [2.0, 0.0, 2.0, 2.0]
    judge(ROWS[:1], tmp_path / "apart.jsonl", by_length)
    assert load_preferences(str(tmp_path / "apart.jsonl"), "pairs", 0.0).train[0].ratings == (4.0, 2.0)
    lists = tmp_path / "lists.jsonl"
    judge(ROWS[4:], lists, by_length)
    assert load_preferences(str(lists), "lists", 0.0).train[0].scores == (3.0, 2.0, 1.0)
    single, labels = tmp_path / "single.jsonl", tmp_path / "labels.jsonl"
    alone = [{"prompt": "q", "completion": text} for text in ("a", "aaaa", "aa")]
    judge(alone, single, by_length)
    assert load_preferences(str(single), "lists", 0.0).train[0].scores == (1.0, 4.0, 2.0)
    judge(alone, labels, by_length, threshold=2.0)
    assert [p.scores for p in load_preferences(str(labels), "labels", 0.0).train] == [(0.0,), (1.0,), (1.0,)]


def test_failures_are_kept_with_their_reason(tmp_path):
    def moody(prompts, completions, **columns):
        if any(prompt == "q2" for prompt in prompts):
            raise RuntimeError("no q2 please")
        return [None if prompt == "q3" else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]

    out = tmp_path / "out.jsonl"
    texts: list[str] = []
    facts = judge(ROWS, out, moody, report=lambda event, said: texts.append(str(said.get("text"))))
    assert (facts["decided"], facts["failed"], facts["unparsable"]) == (3.0, 1.0, 1.0)
    (warning,) = [text for text in texts if "undecided" in text]
    assert warning.startswith("2 of 5 items are undecided: 1 failed: the judge said ") and "no q2 please" in warning
    assert "1 unparsable: the judge said 'the reward does not apply' (out.jsonl.undecided.jsonl)" in warning
    assert [(row["prompt"], row["reason"]) for row in apart(out)] == [("q2", "failed"), ("q3", "unparsable")]
    assert "no q2 please" in apart(out)[0]["said"][0]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    judge(ROWS, whole, by_length, batch_size=1)
    asked: list[str] = []

    def counted(prompts, completions, **columns):
        if len(asked) >= 3:
            raise KeyboardInterrupt
        asked.extend(set(prompts))
        return by_length(prompts, completions)

    with pytest.raises((KeyboardInterrupt, Exception)):
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


class _Dying:
    """Stands under one name, as a judge given as text would."""

    def __init__(self, function):
        self.function = function

    def __call__(self, prompts, completions, **columns):
        return self.function(prompts, completions, **columns)

    def __repr__(self):
        return "judge"


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


def test_equal_items_are_two_items(tmp_path):
    out = tmp_path / "out.jsonl"
    assert judge([ROWS[0], ROWS[0]], out, by_length)["decided"] == 2
    assert len({row["judged"] for row in lines(out)}) == 2
    keys = [item.key for item in read_items(ROWS)]
    assert [item.key for item in read_items(ROWS[::-1])] == keys[::-1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completions": ["a"]}, "no `prompt`"),
        ({"prompt": "q"}, "nothing to judge"),
        ({"prompt": "q", "chosen": "a"}, "without `rejected`"),
        ({"prompt": "q", "completions": "ab"}, "list of texts"),
        ({"prompt": "q", "completions": []}, "list of texts"),
        ({"prompt": "q", "completions": ["a", 3]}, "must be text"),
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
    with pytest.raises(Exception, match=said):
        judge(ROWS, tmp_path / "out.jsonl", **settings)


# -- language models as judges -----------------------------------------------------------------------------------------


def server_app(answer) -> FastAPI:
    application = FastAPI()

    @application.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "somebody"}]}

    @application.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        message = {"role": "assistant", "content": answer(body["messages"][0]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}

    return application


def longer(question: str) -> str:
    """Likes the longer answer, the first of equals; of q3 it says nothing."""
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n", question).groups()
    if "ccc" in (first, second):
        return "hard to say"
    return f"So it is [[{'A' if len(first) >= len(second) else 'B'}]]"


def test_by_a_server_in_both_orders(tmp_path):
    """Of equal answers it says the first in both orders: a tie, and an inconsistency; what it does not say is kept."""
    out = tmp_path / "out.jsonl"
    with running(server_app(longer)) as url:
        facts = judge(ROWS, out, server=url)
    assert facts == {
        "items": 5, "decided": 3, "ties": 1, "unparsable": 1, "failed": 0, "resumed": 0,
        "asked": 14, "first_wins": pytest.approx(7 / 14), "inconsistent": 1, "agrees": 0.0,
    }  # fmt: skip
    assert [without_key(row) for row in lines(out)] == [
        {"prompt": "q1", "topic": "x", "chosen": "bbbb", "rejected": "aa"},
        {"prompt": "q4", "chosen": "ddd", "rejected": "d"},
        {"prompt": "q5", "completions": ["eee", "ee", "e"], "scores": [1.0, 0.5, 0.0]},
    ]
    kept = {row["prompt"]: row for row in apart(out)}
    assert kept["q2"]["reason"] == "tie" and kept["q2"]["said"] == ["So it is [[A]]"] * 2
    assert kept["q3"]["reason"] == "unparsable" and kept["q3"]["said"] == ["hard to say"] * 2


def test_scores_of_a_server(tmp_path):
    def scored(question: str) -> str:
        lengths = [str(len(text)) for text in re.findall(r"Response \d+:\n(.*)", question)]
        return f"Scores: [[{', '.join(lengths)}]]"

    out = tmp_path / "out.jsonl"
    with running(server_app(scored)) as url:
        facts = judge(ROWS, out, server=url, how="scores", num_samples=3)
    assert (facts["decided"], facts["ties"]) == (4.0, 1.0)
    assert lines(out)[0]["score_chosen"] == 4.0 and len(apart(out)[0]["said"]) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    model = build_tiny("".join(chr(i) for i in range(32, 127)) + "\n", SMALL, seed=1)
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


def test_a_local_model_whose_digits_are_read(tmp_path, folder):
    out, again, short = tmp_path / "out.jsonl", tmp_path / "again.jsonl", tmp_path / "t.txt"
    short.write_text("{prompt} {completion}:")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = [str(tmp_path / "data.jsonl"), "--model", folder, "--how", "digit", "--template", str(short), "--json"]
    for path in (out, again):
        found = CliRunner().invoke(app, ["judge", given[0], str(path), *given[1:]])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["items"] == 5
    assert lines(out) == lines(again)
    assert all(0 <= row["score_rejected"] <= row["score_chosen"] <= 9 for row in lines(out) if "score_chosen" in row)


def test_a_local_model_that_says_nonsense_decides_nothing(tmp_path, folder):
    short = {"template": "{prompt}{first}{second}", "max_completion_length": 4}
    facts = judge(ROWS[:2], tmp_path / "out.jsonl", model=folder, **short)
    assert facts["unparsable"] == 2 and facts["decided"] == 0
    with pytest.raises(ConfigError, match="pairwise compares two"):
        judge([{"prompt": "q", "completion": "a"}], tmp_path / "one.jsonl", model=folder)


def test_on_the_command_line(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "own.py").write_text("def size(completions, **columns):\n    return [len(c) for c in completions]\n")
    out = tmp_path / "out.jsonl"
    given = ["judge", str(tmp_path / "data.jsonl"), str(out), "--reward", f"{tmp_path / 'own.py'}:size"]
    found = CliRunner().invoke(app, [*given, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["decided"] == 4
    assert isinstance(CliRunner().invoke(app, given).exception, ConfigError)
    resumed = CliRunner().invoke(app, [*given, "--resume", "--json"])
    assert json.loads(resumed.stdout)["resumed"] == 5
    missing = CliRunner().invoke(app, [*given, "--template", str(tmp_path / "none.txt")])
    assert isinstance(missing.exception, ConfigError)


def test_a_judge_that_scores_nothing_fails_with_its_reason(tmp_path):
    """Exit code 1, and why on the screen; where it scores anything, 0, and how many are undecided."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "ill.py").write_text(
        "def always(prompts, completions, **columns):\n    raise RuntimeError('the judge is ill')\n"
        "def tied(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )

    def run(name: str):
        given = ["judge", str(tmp_path / "data.jsonl"), str(tmp_path / f"{name}.jsonl")]
        return CliRunner().invoke(app, [*given, "--reward", f"{tmp_path / 'ill.py'}:{name}", "--json"])

    found = run("always")
    assert isinstance(found.exception, RewardError) and found.exception.exit_code == 1
    assert "the judge has scored none of the 5 items" in str(found.exception)
    assert "5 of 5 items are undecided: 5 failed" in found.stderr and "the judge is ill" in found.stderr
    assert json.loads(found.stdout)["failed"] == 5
    tied = run("tied")
    assert tied.exit_code == 0 and "5 of 5 items are undecided: 5 tied" in tied.stderr


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
