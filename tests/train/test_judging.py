"""`keel judge`: from prompts with completions to preferences; nothing is dropped, and a killed run goes on."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from tests.serve.running import running
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, KeelError, RewardError
from keel.models.tiny import SMALL, build_tiny
from keel.parts.rewards.worker import RewardTimeout
from keel.tasks import preference_forms
from keel.tasks.preference_data import load_preferences
from keel.train.judgements import JUDGEMENTS
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
        {"prompt": "q1", "topic": "x", "completions": ["bbbb", "aa"], "scores": [4.0, 2.0]},
        {"prompt": "q3", "completions": ["ccc", "c"], "scores": [3.0, 1.0]},
        {"prompt": "q4", "completions": ["ddd", "d"], "scores": [3.0, 1.0]},
        {"prompt": "q5", "completions": ["eee", "ee", "e"], "scores": [3.0, 2.0, 1.0]},
    ]
    assert [without_key(row) for row in apart(out)] == [
        {"prompt": "q2", "completions": ["aa", "bb"], "scores": [2.0, 2.0], "reason": "tie", "said": []}
    ]
    pairs = tmp_path / "pairs.jsonl"
    assert judge(ROWS[:3], pairs, by_length)["agrees"] == 1.0
    assert [without_key(row) for row in lines(pairs)] == [
        {"prompt": "q1", "topic": "x", "chosen": "bbbb", "rejected": "aa", "score_chosen": 4.0, "score_rejected": 2.0},
        {"prompt": "q3", "chosen": "ccc", "rejected": "c", "score_chosen": 3.0, "score_rejected": 1.0},
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


def test_an_earlier_judgement_is_not_carried_over(tmp_path):
    """The judge turns the pair around: its old margin would be learnt of the wrong side. The judge itself sees them."""
    seen: dict[str, list] = {}

    def turned(prompts, completions, **columns):
        seen.update(columns)
        return [float(-len(text)) for text in completions]

    old = {name: 0.25 for name in ("score_chosen", "score_rejected", "margin", "probability", "rating", "rank")}
    old |= {"scores": [1, 2], "ratings": [1, 2], "ranks": [2, 1], "label": True, "score": 1, "reason": "r", "said": []}
    kept = {"weight": 2.0, "domain": "sums", "topic": "x"}
    said = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "aaa"}]}
    pairs = tmp_path / "pairs.jsonl"
    judge([{"prompt": "q", "chosen": "aaa", "rejected": "a", **old, **kept, **said}], pairs, turned)
    assert {"margin": [0.25, 0.25], "label": [True, True], "scores": [[1, 2]] * 2}.items() <= seen.items()
    assert [without_key(row) for row in lines(pairs)] == [
        {"prompt": "q", **kept, "chosen": "a", "rejected": "aaa", "score_chosen": -1.0, "score_rejected": -3.0}
    ]
    (found,) = load_preferences(str(pairs), "pairs", 0.0).train
    assert (found.completions, found.margin, found.probability) == (("a", "aaa"), 0.0, 1.0)
    assert (found.weight, found.domain) == (2.0, "sums")
    many = tmp_path / "lists.jsonl"
    judge([{"prompt": "q", "completions": ["aaa", "a", "aa"], "ranks": [1, 2, 3], "ratings": [3, 2, 1]}], many, turned)
    assert load_preferences(str(many), "lists", 0.0).train[0].scores == (-1.0, -2.0, -3.0)
    single = tmp_path / "single.jsonl"
    judge([{"prompt": "q", "completion": text, "label": True} for text in ("a", "aa")], single, turned)
    assert [set(row) for row in lines(single)] == [{"prompt", "completion", "score", "judged"}] * 2
    judge([{"prompt": "q", "completions": ["a", "b"], "margin": 0.5}], tmp_path / "ties.jsonl", turned)
    assert set(apart(tmp_path / "ties.jsonl")[0]) == {"prompt", "completions", "scores", "reason", "said", "judged"}


def test_all_that_the_forms_read_as_a_judgement_is_left_out():
    read = {*preference_forms._OF_PAIRS, *preference_forms._SETTINGS, "label"}
    read |= {name for names in preference_forms._NUMBERS.values() for name in names}
    assert read - {"weight", "domain"} <= set(JUDGEMENTS) and not {"weight", "domain"} & set(JUDGEMENTS)


@pytest.mark.parametrize("ties", ["apart", "half"])
def test_items_of_two_and_of_three_are_one_data_set(tmp_path, ties):
    """All are lists, which list methods read as they are and DPO as pairs; ties are equal to both."""
    out = tmp_path / "out.jsonl"
    rows = [*ROWS, {"prompt": "q6", "completions": ["x", "y", "zz"]}]
    facts = judge(rows, out, by_length, ties=ties, least_gap=0.0)
    assert (facts["ties"], facts["decided"]) == (1.0, 5.0)
    tied = {"q2": (("aa", "bb"), (2.0, 2.0))} if ties == "half" else {}
    assert [row["prompt"] for row in apart(out)] == ([] if tied else ["q2"])
    found = load_preferences(str(out), "lists", 0.0).train
    assert {p.prompt: (p.completions, p.scores) for p in found} == {
        "q1": (("bbbb", "aa"), (4.0, 2.0)), "q3": (("ccc", "c"), (3.0, 1.0)), "q4": (("ddd", "d"), (3.0, 1.0)),
        "q5": (("eee", "ee", "e"), (3.0, 2.0, 1.0)), "q6": (("zz", "x", "y"), (2.0, 1.0, 1.0)), **tied,
    }  # fmt: skip
    assert [p.completions for p in load_preferences(str(out), "pairs", 0.0).train] == [
        ("bbbb", "aa"), ("ccc", "c"), ("ddd", "d"), ("eee", "e"), ("zz", "x")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="exists already"):
        judge(rows[:4], out, by_length, ties=ties)
    near = tmp_path / "near.jsonl"
    judge(rows[4:], near, by_length, ties=ties, least_gap=1.0)
    assert [row["scores"] for row in lines(near)][1:] == ([[4 / 3] * 3] if ties == "half" else [])


def test_equal_texts_are_never_better_than_themselves(tmp_path):
    """The loader refuses both a pair of equal texts and a list that scores one text twice."""
    out, values = tmp_path / "out.jsonl", iter([1.0, 2.0, 5.0, 3.0, 4.0])
    rows = [{"prompt": "q", "completions": ["a", "a"]}, {"prompt": "p", "completions": ["a", "b", "a"]}]
    judge(rows, out, lambda completions, **columns: [next(values) for _ in completions], ties="half")
    assert [p.scores for p in load_preferences(str(out), "lists", 0.0).train] == [(1.5, 1.5), (4.5, 4.5, 3.0)]
    pairs = tmp_path / "pairs.jsonl"
    judge([*ROWS[:2], rows[0]], pairs, by_length, ties="half")
    assert [row["reason"] for row in apart(pairs)] == ["tie"]
    assert [p.probability for p in load_preferences(str(pairs), "pairs", 0.0).train] == [1.0, 0.5]


def test_single_completions_stand_in_a_file_of_their_own(tmp_path):
    with pytest.raises(DataError, match="1 items have one completion, and 2 have more"):
        judge([*ROWS[:2], {"prompt": "q", "completion": "a"}], tmp_path / "out.jsonl", by_length)
    assert list(tmp_path.iterdir()) == []


def test_ties_that_are_written_are_said_to_be(tmp_path):
    texts: list[str] = []

    def told(rows, name, **settings) -> str:
        texts.clear()
        report = {"report": lambda event, said: texts.append(said["text"]) if event == "warning" else None}
        judge(rows, tmp_path / name, by_length, **settings, **report)
        return texts[0]

    assert told(ROWS[:4], "a", ties="half") == "1 of 4 items are undecided: 1 tied, written with probability 0.5"
    assert told(ROWS, "b", ties="half") == "1 of 5 items are undecided: 1 tied, written with equal scores"
    assert told(ROWS[:4], "c") == "1 of 4 items are undecided: 1 tied (c.undecided.jsonl)"
    same = {"prompt": "q6", "completions": ["a", "a"]}
    said = "2 of 5 items are undecided: 1 tied, written with probability 0.5; 1 tied (d.undecided.jsonl)"
    assert told([*ROWS[:4], same], "d", ties="half") == said


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


def nothing_in(folder) -> bool:
    return list(folder.iterdir()) == []


def test_a_mistake_in_the_call_leaves_no_files(tmp_path):
    with pytest.raises(ConfigError, match="gold"):
        judge(ROWS, tmp_path / "out.jsonl", lambda completions, gold: [0.0])
    with pytest.raises(ConfigError, match="no such file"):
        judge(ROWS, tmp_path / "out.jsonl", "nowhere.py:size")
    with pytest.raises((ConfigError, DataError, KeelError)):
        judge(ROWS, tmp_path / "out.jsonl", model=str(tmp_path / "nowhere"))
    assert nothing_in(tmp_path)


def test_files_without_lines_are_taken_over(tmp_path):
    """Here the first judge was stopped before it had said anything."""
    out = tmp_path / "out.jsonl"

    def stopped(prompts, completions, **columns):
        raise RewardTimeout("no result", fatal=True)

    for resume in (False, True):
        with pytest.raises(RewardTimeout):
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


def _refused(*arguments, **settings):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("address", ["notaurl", "127.0.0.1:8000/v1", "ftp://127.0.0.1/v1", "http://", "http:/x"])
def test_what_is_no_address_is_refused_at_once(tmp_path, address):
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=f"{address!r} is no address. It begins with http:// or https://"):
        judge(ROWS, tmp_path / "out.jsonl", server=address, served="judge")
    assert time.perf_counter() - start < 5 and nothing_in(tmp_path)


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
        {"prompt": "q1", "topic": "x", "completions": ["bbbb", "aa"], "scores": [1.0, 0.0]},
        {"prompt": "q4", "completions": ["ddd", "d"], "scores": [1.0, 0.0]},
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
    assert lines(out)[0]["scores"] == [4.0, 2.0] and len(apart(out)[0]["said"]) == 3


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
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    given = [str(tmp_path / "data.jsonl"), "--model", folder, "--how", "digit", "--template", str(short), "--json"]
    for path in (out, again):
        found = CliRunner().invoke(app, ["judge", given[0], str(path), *given[1:]])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["items"] == 4
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
