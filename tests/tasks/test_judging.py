"""Judging: what is read of a judgement, what it earns, and the task that preferences make."""

import pytest

from keel.core.errors import DataError
from keel.tasks.judging import (
    JudgementReward,
    Judging,
    conversation,
    filled,
    judgement_reward,
    judging_prompt,
    parse_scores,
    shuffled,
)
from keel.tasks.load import load_task


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Principles ... Scores: [[7, 6]]", (7, 6)),
        ("[[1, 2]] was my first thought. Scores: [[ 10 ,1 ]]", (10, 1)),
        (r"so \boxed{8, 8}.", (8, 8)),
        (r"so \boxed{[8, 6]}.", (8, 6)),
        ("Final scores: [5, 9]", (5, 9)),
        ("The scores are therefore [5, 9].", (5, 9)),
        ("Scores: 9 and 4", (9, 4)),
        ("scores: Response 1: 9, Response 2: 4", (9, 4)),
        ("Scores: [[8/10, 7/10]]", (8, 7)),
        ("Scores: [[8, 7, 6]]", None),
        ("Scores: [[8]]", None),
        ("Scores: [[8.5, 7]]", None),
        ("Scores: [[8.0, 7]]", (8, 7)),
        ("Scores: [[0, 7]]", None),
        ("Scores: [[11, 7]]", None),
        ("Scores: [[-3, 7]]", None),
        ("Scores: [[a, b]]", None),
        ("Scores: [[8, seven 7]]", None),
        ("I give 8 and 7.", None),
        ("", None),
    ],
)
def test_scores_are_read_or_not(text, scores):
    assert parse_scores(text, 2) == scores


def test_what_a_judgement_earns():
    """A tie is no success for either label; a single response is right or wrong."""
    assert [judgement_reward((8, 8), label) for label in (0, 1)] == [-1, -1]
    assert [judgement_reward((7, 6), label) for label in (0, 1)] == [1, -1]
    assert [judgement_reward((3, 9, 5), label) for label in (0, 1, 2)] == [-1, 1, -1]
    assert [judgement_reward((s,), 1) for s in (0, 1)] == [-1, 1]
    assert judgement_reward(None, 0) == -1
    texts = ["[[7, 6]]", "[[6, 7]]", "[[7, 7]]", "no idea", "[[1]]", "[[0]]", "[[7]]"]
    found = JudgementReward()(texts, label=[0, 0, 0, 0, 1, 1, 1], num_responses=[2, 2, 2, 2, 1, 1, 1])
    assert found == [1, -1, -1, -1, 1, -1, -1]


PAIRS = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "topic": "t"} for i in range(40)]


def test_a_task_of_pairs():
    task = Judging(PAIRS, held_out=0.25)
    assert (len(task.train), len(task.held_out)) == (30, 10)
    places = []
    for example in [*task.train, *task.held_out]:
        lines = example.prompt.splitlines()
        shown = [lines[lines.index(f"Response {n}:") + 1] for n in (1, 2)]
        label = example.columns["label"]
        assert shown[label].startswith("good") and shown[1 - label].startswith("bad")
        assert example.columns["num_responses"] == 2 and example.columns["topic"] == "t"
        places.append(label)
    assert 10 < sum(places) < 30  # neither place is the good one's
    again = Judging(PAIRS, held_out=0.25)
    assert [e.prompt for e in again.train] == [e.prompt for e in task.train]
    other = Judging(PAIRS, held_out=0.25, seed=1)
    assert {e.columns["label"] for e in other.train} == {0, 1}
    assert [e.prompt for e in other.train] != [e.prompt for e in task.train]


def test_lists_and_labels_and_what_is_left_out():
    lists = [
        {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1.0, 3.0, 2.0]},
        {"prompt": "b", "completions": ["x", "y"], "scores": [1.0, 0.0]},
        {"prompt": "c", "completions": ["x", "y", "w"], "scores": [1.0, 1.0, 0.0]},
    ]
    task = Judging(lists, held_out=0.0)
    assert len(task.train) == 2 and "1 prompts without one best response" in " ".join(task.notes)
    first = task.train[0]
    assert first.columns["order"][first.columns["label"]] == 1
    labels = [{"prompt": "a", "completion": "x", "label": True}, {"prompt": "b", "completion": "x", "label": False}]
    assert [e.columns["label"] for e in Judging(labels, held_out=0.0, kind="labels").train] == [1, 0]
    with pytest.raises(DataError, match="nothing to judge"):
        Judging([{"prompt": "c", "completions": ["x", "y"], "scores": [1.0, 1.0]}], held_out=0.0)


def test_by_name_with_options(tmp_path):
    import json

    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    task = load_task("keel.tasks.judging:Judging", data=str(path), seed=3)
    assert list(task.rewards) == ["judgement"] and len(task.train) == 38


def test_texts_mean_nothing_to_the_template():
    found = judging_prompt("{responses}", ["{query}", "{number} {response}"], "Q {query} R {responses}")
    assert found == "Q {responses} R \nResponse 1:\n{query}\n\nResponse 2:\n{number} {response}\n"
    assert filled("{x} {y}", x="1") == "1 {y}"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    assert conversation(messages) == "system: be brief\n\nuser: 1+1?"


def test_bad_templates():
    with pytest.raises(ValueError, match="responses"):
        Judging(PAIRS, template="{query}")
    with pytest.raises(ValueError, match="no response"):
        judging_prompt("q", [])


def test_orders_are_fair():
    orders = [tuple(shuffled(3, 0, i)) for i in range(600)]
    assert all(70 < orders.count(order) < 130 for order in set(orders)) and len(set(orders)) == 6
