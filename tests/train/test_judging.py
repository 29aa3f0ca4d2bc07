"""`keel judge`: from prompts with completions to preferences; nothing is dropped."""

import json

import pytest
from tests.train.judged import ROWS, apart, by_length, lines, without_key
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, RewardError
from keel.tasks import preference_forms
from keel.tasks.preference_data import load_preferences
from keel.train.judgements import JUDGEMENTS
from keel.train.judging import judge, read_items


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


def test_equal_items_are_two_items(tmp_path):
    out = tmp_path / "out.jsonl"
    assert judge([ROWS[0], ROWS[0]], out, by_length)["decided"] == 2
    assert len({row["judged"] for row in lines(out)}) == 2
    keys = [item.key for item in read_items(ROWS)]
    assert [item.key for item in read_items(ROWS[::-1])] == keys[::-1]


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
