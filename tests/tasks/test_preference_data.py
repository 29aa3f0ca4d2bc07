"""Preferences of one's own: forms, conversions, what is refused, and what is noticed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.core.errors import ConfigError, DataError
from keel.tasks.mixture import mixed, sources_of
from keel.tasks.preference_data import load_preferences, prompts_of
from keel.tasks.preferences import Preference

USER, SYSTEM = {"role": "user", "content": "1+1="}, {"role": "system", "content": "Add."}


def answer(text):
    return {"role": "assistant", "content": text}


def pair(n=1, **more):
    return {"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n), **more}


def only(row, kind="pairs", **known):
    [found] = load_preferences([row], kind, held_out=0, **known).train
    return found


def refused(rows, kind="pairs", **known):
    with pytest.raises(DataError) as error:
        load_preferences(rows, kind, **{"held_out": 0, **known})
    return str(error.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Forms


def test_a_pair_with_all_that_can_be_said_of_it():
    found = only(
        pair(weight=2, margin=0.5, probability=0.9, domain="sums", score_chosen=8, score_rejected=3.5, source="x")
    )
    assert (found.prompt, found.completions, found.scores) == ("1+1=", ("2", "1"), (1.0, 0.0))
    assert (found.weight, found.margin, found.probability, found.domain) == (2.0, 0.5, 0.9, "sums")
    assert found.ratings == (8.0, 3.5)
    assert found.columns == {"source": "x"}


def test_all_forms_of_a_file_give_the_same(tmp_path):
    from datasets import Dataset, DatasetDict, load_from_disk

    rows = [pair(n, note=n) for n in range(10)]
    expected = load_preferences(rows, "pairs")
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "pairs.parquet")
    data.save_to_disk(tmp_path / "saved")
    forms = [
        write(tmp_path / "pairs.jsonl", rows),
        str(tmp_path / "pairs.parquet"),
        data,
        DatasetDict({"train": data}),
        tmp_path / "saved",
        load_from_disk(str(tmp_path / "saved")),
        [str(write(tmp_path / "one.jsonl", rows))],
    ]
    for form in forms:
        found = load_preferences(form, "pairs")
        assert (list(found.train), list(found.held_out)) == (list(expected.train), list(expected.held_out))
    assert len(expected.held_out) == 1


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": [USER], "chosen": [answer("2")], "rejected": [answer("3")]}, [USER], ("2", "3")),
        ({"prompt": [USER], "chosen": "2", "rejected": "3"}, [USER], ("2", "3")),
        ({"prompt": "1+1=", "chosen": [answer("2")], "rejected": [answer("3")]}, [USER], ("2", "3")),
        ({"chosen": [USER, answer("2")], "rejected": [USER, answer("3")]}, [USER], ("2", "3")),
        (
            {"prompt": "1+1=", "chosen": [SYSTEM, USER, answer("2")], "rejected": [SYSTEM, USER, answer("3")]},
            [SYSTEM, USER],
            ("2", "3"),
        ),
        ({"prompt": [USER], "chosen": [USER, answer("2")], "rejected": [USER, answer("3")]}, [USER], ("2", "3")),
        ({"messages": [USER], "chosen": "2", "rejected": "3"}, [USER], ("2", "3")),
        # the common beginning of texts ends where a word ends, and the space before a word belongs to it
        (
            {"chosen": "Human: hi\n\nAssistant: I think so", "rejected": "Human: hi\n\nAssistant: I thought so"},
            "Human: hi\n\nAssistant: I",
            (" think so", " thought so"),
        ),
    ],
)
def test_messages_and_whole_conversations(row, prompt, completions):
    found = only(row)
    assert found.prompt == prompt
    expected = [[answer(text)] if isinstance(prompt, list) else text for text in completions]
    assert list(found.completions) == expected


@pytest.mark.parametrize(
    ("more", "scores"),
    [
        ({}, (2.0, 1.0, 0.0)),
        ({"scores": [1, 5.5, -2]}, (1.0, 5.5, -2.0)),
        ({"ratings": [3, 3, 1]}, (3.0, 3.0, 1.0)),
        ({"ranks": [2, 1, 3]}, (1.0, 2.0, 0.0)),
    ],
)
def test_lists(more, scores):
    assert only({"prompt": "p", "completions": ["a", "b", "c"], **more}, "lists").scores == scores


def test_rated_rows_of_a_prompt_are_one_list():
    rows = [
        {"prompt": "p", "completion": "a", "score": 1},
        {"prompt": "q", "completion": "x", "score": 4},
        {"prompt": "p", "completion": "b", "score": 3},
    ]
    found = load_preferences(rows, "lists", held_out=0)
    assert [(p.prompt, p.completions, p.scores) for p in found.train] == [("p", ("a", "b"), (1.0, 3.0))]
    assert found.notes == ("data: 1 prompt with a single rated completion is left out (row 2).",)
    best = load_preferences(rows, "pairs", held_out=0).train
    assert [(p.completions, p.scores, p.ratings) for p in best] == [(("b", "a"), (1.0, 0.0), (3.0, 1.0))]


@pytest.mark.parametrize("label", [True, 1, 1.0])
def test_labels(label):
    found = only({"prompt": "p", "completion": "a", "label": label}, "labels")
    assert (found.completions, found.scores) == (("a",), (1.0,))
    found = only({"messages": [USER, answer("2")], "label": not label}, "labels")
    assert (found.prompt, found.completions, found.scores) == ([USER], ([answer("2")],), (0.0,))


# Conversions


def test_lists_become_pairs():
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [2, 4, 1, 2]}
    assert [p.completions for p in load_preferences([row], "pairs", held_out=0).train] == [("b", "c")]
    every = load_preferences([row], "pairs", held_out=0, options={"pairs": "all"}).train
    # a and d are rated the same
    assert [p.completions for p in every] == [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]
    assert [p.index for p in every] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="extremes, all"):
        load_preferences([row], "pairs", options={"pairs": "some"})
    with pytest.raises(ConfigError, match="Did you mean 'pairs'"):
        load_preferences([row], "pairs", options={"pair": "all"})


def test_lists_without_an_order_are_left_out_of_pairs_and_named():
    rows = [{"prompt": f"p{n}", "completions": ["a", "b"], "scores": [1, n]} for n in range(3)]
    found = load_preferences(rows, "pairs", held_out=0)
    assert [p.completions for p in found.train] == [("a", "b"), ("b", "a")]
    assert found.notes == ("data: 1 list whose completions are all rated the same is left out (row 2).",)
    assert "compares nothing" in refused(rows[1:2])


def test_pairs_become_labels_and_lists():
    found = load_preferences([pair(weight=2)], "labels", held_out=0).train
    assert [(p.completions, p.scores, p.weight) for p in found] == [(("2",), (1.0,), 2.0), (("1",), (0.0,), 2.0)]
    assert only(pair(), "lists").scores == (1.0, 0.0)
    assert only(pair(score_chosen=9, score_rejected=4), "lists").scores == (9.0, 4.0)


@pytest.mark.parametrize("kind", ["pairs", "lists"])
def test_labels_become_nothing_else(kind):
    said = refused([{"prompt": "p", "completion": "a", "label": True}], kind)
    assert "these are labels" in said
    assert ("`chosen` and `rejected`" if kind == "pairs" else "`completions`") in said


@pytest.mark.parametrize("name", ["colour", "source", "response", "category"])
def test_columns_that_are_no_slips_of_the_pen(name):
    assert "Did you mean" not in refused([{"prompt": "p", name: "a"}])
    assert "Did you mean 'rejected'?" in refused([{"prompt": "p", name: "a", "chosen": "b", "rejcted": "c"}])


def test_scores_are_no_labels():
    assert "from where on a completion is good" in refused([{"prompt": "p", "completions": ["a", "b"]}], "labels")


# What is wrong


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, "Did you mean 'chosen'?"),
        (pair(chosen=None), "compares nothing: it needs `prompt`, `chosen` and `rejected`"),
        (pair(chosen="1"), "`chosen` and `rejected` are the same"),
        (pair(chosen=3), "`chosen` must be text or messages, not a number"),
        (pair(prompt=""), "`prompt` is empty"),
        (pair(weight=-1), "`weight` must be a number from 0 on"),
        (pair(weight=float("inf")), "`weight` must be a number from 0 on"),
        (pair(margin="big"), "`margin` must be a number"),
        (pair(probability=1.5), "`probability` must be a number in [0, 1]"),
        (pair(score_chosen=1), "only one of `score_chosen` and `score_rejected`"),
        (pair(score_chosen=True, score_rejected=0), "`score_chosen` must be a number"),
        (pair(other=float("nan")), "`other` is NaN or infinite"),
        (pair(completion_ids=[1]), "cannot be named `completion_ids`"),
        (pair(messages=[USER]), "both `prompt` and `messages`"),
        ({"prompt": [USER], "chosen": [answer("2"), USER], "rejected": "3"}, "must be one message of the assistant"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "3"}, "must be a message of the assistant, not of 'user'"),
        ({"prompt": "p", "chosen": [USER, answer("2")], "rejected": [USER, answer("3")]}, "do not begin with `prompt`"),
        ({"prompt": "p", "chosen": [answer("2")], "rejected": "3"}, "all must be of one kind"),
        ({"chosen": [answer("2")], "rejected": [answer("3")]}, "no common beginning"),
        ({"chosen": "yes", "rejected": "no"}, "no common beginning"),
        ({"messages": [USER, answer("4")], "chosen": "2", "rejected": "3"}, "`chosen` and `rejected` follow"),
        ({"prompt": "p", "completions": "ab"}, "`completions` must be a list, not text"),
        ({"prompt": "p", "completions": ["a"]}, "needs at least two"),
        ({"prompt": "p", "completions": ["a", 1]}, "`completions[2]` must be text or messages"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "`scores` has 1 numbers for 2 completions"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, None]}, "`scores` must be a list of numbers"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "both `scores` and `ranks`"),
        ({"prompt": "p", "completions": ["a", "b", "a"]}, "completions 1 and 3 are the same"),
        ({"prompt": "p", "completion": "a", "label": 2}, "`label` must be true or false"),
        ({"prompt": "p", "completion": "a", "label": "yes"}, "`label` must be true or false"),
        ({"prompt": "p", "completion": "a", "label": True, "margin": 1}, "`margin` is of pairs"),
        ({"completion": "a", "label": True}, "no `prompt`"),
        ({"messages": [USER], "label": True}, "end with the assistant's message"),
        ({"prompt": "p", "completion": "a", "score": "5"}, "`score` must be a number"),
    ],
)
def test_what_is_wrong_with_a_row(row, reason):
    said = refused([row])
    assert reason in said
    assert "row 1" in said


def test_all_problems_are_named_at_once(tmp_path):
    lines = [json.dumps(pair(n, weight=-1)) for n in range(24)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["{", *lines, "[]"]))
    said = refused(path)
    assert said.startswith(f"{path}: 26 problems")
    assert "line 1: invalid JSON" in said
    assert "line 20:" in said
    assert "line 21" not in said
    assert said.endswith("and 6 more")


def test_one_data_set_has_one_form():
    assert "row 2: is one of labels, and the rows before it are pairs" in refused(
        [pair(), {"prompt": "p", "completion": "a", "label": True}]
    )
    assert "row 2: has no `score_chosen`" in refused([pair(1, score_chosen=2, score_rejected=1), pair(2)])


def test_ratings_that_contradict_each_other():
    rows = [{"prompt": "p", "completion": "a", "score": 1}, {"prompt": "p", "completion": "a", "score": 2}]
    assert "row 2: rates a completion that is rated otherwise" in refused(rows, "lists")
    rows = [{"prompt": "p", "completion": t, "score": 1, "weight": w} for t, w in (("a", 1), ("b", 2))]
    assert "row 2: `weight` is not that of the same prompt in row 1" in refused(rows, "lists")


cells = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=3),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=2)}),
             max_size=3),
)  # fmt: skip
names = ("prompt", "messages", "chosen", "rejected", "completion", "completions", "label", "score", "scores", "ranks",
         "weight", "margin", "probability", "score_chosen", "score_rejected", "domain", "other")  # fmt: skip


@settings(max_examples=300)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(names), cells, max_size=6), min_size=1, max_size=3),
    kind=st.sampled_from(["pairs", "labels", "lists"]),
)
def test_any_row_is_read_or_refused_with_its_place(rows, kind):
    try:
        found = load_preferences(rows, kind, held_out=0)
    except DataError as error:
        assert "row " in str(error) or "these are" in str(error), str(error)
    else:
        for p in found.train:
            assert len(p.completions) == len(p.scores)
            assert all(isinstance(c, type(p.prompt)) for c in p.completions)
            assert kind != "pairs" or (p.scores == (1.0, 0.0) and p.completions[0] != p.completions[1])


@settings(max_examples=100)
@given(
    texts=st.lists(st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=2), min_size=1, max_size=4),
    scores=st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=2),
    kind=st.sampled_from(["pairs", "labels", "lists"]),
)
def test_sound_rows_are_read_as_they_are(texts, scores, kind):
    """Each with a prompt of its own; refused, by its row, is a pair of equal texts, and a text with two scores."""
    rows, wanted = [], []
    for i, (one, other) in enumerate(texts):
        rows.append({
            "pairs": {"prompt": f"{i}", "chosen": one, "rejected": other},
            "labels": {"prompt": f"{i}", "completion": one, "label": scores[0] > 0},
            "lists": {"prompt": f"{i}", "completions": [one, other], "scores": scores},
        }[kind])  # fmt: skip
        wanted.append({
            "pairs": ((one, other), (1.0, 0.0)), "labels": ((one,), (float(scores[0] > 0),)),
            "lists": ((one, other), tuple(scores)),
        }[kind])  # fmt: skip
    refusing = kind == "pairs" or (kind == "lists" and scores[0] != scores[1])
    equal = [i for i, (one, other) in enumerate(texts, 1) if one == other and refusing]
    if equal:
        assert f"row {equal[0]}: " in refused(rows, kind)
    else:
        assert [(p.completions, p.scores) for p in load_preferences(rows, kind, held_out=0).train] == wanted


# What is noticed


def test_duplicates_and_contradictions_are_noticed():
    swapped = {"prompt": "1+1=", "chosen": "1", "rejected": "2"}
    found = load_preferences([pair(1), pair(2), pair(1), swapped], "pairs", held_out=0)
    assert found.notes == (
        "data: 1 pair is a duplicate (row 3).",
        "data: 1 pair contradicts another (row 4 and row 1).",
    )
    assert len(found.train) == 4
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False, True)]
    assert load_preferences(rows, "labels", held_out=0).notes == (
        "data: 1 labelled completion is a duplicate (row 3).",
        "data: 2 labelled completions contradict another (row 2 and row 1, row 3 and row 2).",
    )


def test_a_pair_that_is_rated_the_other_way_round_is_noticed():
    found = load_preferences([pair(score_chosen=3, score_rejected=3)], "pairs", held_out=0)
    assert "in 1 pair the chosen completion is not rated above the rejected one (row 1)" in found.notes[0]


# Held out


def test_a_prompt_is_on_one_side_only():
    rows = [{"prompt": f"{n // 4}", "chosen": f"{n}", "rejected": "x"} for n in range(80)]
    found = load_preferences(rows, "pairs", held_out=0.25, seed=3)
    sides = [{p.prompt for p in side} for side in (found.train, found.held_out)]
    assert [len(side) for side in sides] == [15, 5]
    assert not sides[0] & sides[1]
    assert [p.index for p in found.held_out] == list(range(20))
    again = load_preferences(rows[::-1], "pairs", held_out=0.25, seed=3)
    assert {p.prompt for p in again.held_out} == sides[1]
    task = prompts_of(found)
    assert (len(task.train), len(task.held_out)) == (15, 5)


def test_held_out_data_of_its_own(tmp_path):
    from datasets import Dataset, DatasetDict

    test = write(tmp_path / "test.jsonl", [pair(9)])
    assert [p.prompt for p in load_preferences([pair(1)], "pairs", held_out=str(test)).held_out] == ["9+1="]
    assert "also in the training data" in refused([pair(9)], held_out=str(test))
    both = DatasetDict({"train": Dataset.from_list([pair(1)]), "test": Dataset.from_list([pair(2)])})
    assert [p.prompt for p in load_preferences(both, "pairs").held_out] == ["2+1="]


# Several data sets


def test_data_sets_are_mixed_by_their_weights(tmp_path):
    one = write(tmp_path / "one.jsonl", [pair(n) for n in range(10)])
    other = write(tmp_path / "other.jsonl", [pair(n) for n in range(100, 108)])
    found = load_preferences({str(one): 3, str(other): 1}, "pairs", held_out=0, seed=1)
    # other has the most rows for its weight: it comes once, and one three times as often
    assert {name: sum(p.domain == name for p in found.train) for name in ("one", "other")} == {"one": 24, "other": 8}
    times = sorted(sum(p.prompt == f"{n}+1=" for p in found.train) for n in range(10))
    assert times == [2] * 6 + [3] * 4
    assert [p.index for p in found.train] == list(range(32))
    assert found.notes[-1] == (
        "2 data sets are mixed. one: 10 preferences, 75.0% of what is drawn; other: 8 preferences, 25.0% of what is "
        "drawn; a pass is 32."
    )
    assert load_preferences({str(one): 3, str(other): 1}, "pairs", held_out=0, seed=1).train == found.train
    # which rows come once more is drawn by seed and path: two seeds may agree, six hardly
    others = [load_preferences({str(one): 3, str(other): 1}, "pairs", held_out=0, seed=s).train for s in range(2, 8)]
    assert any(train != found.train for train in others)
    held = load_preferences([one, other], "pairs", held_out=0.2)
    assert not {p.prompt for p in held.train} & {p.prompt for p in held.held_out}


def test_weights_that_are_none():
    with pytest.raises(ConfigError, match="positive number"):
        sources_of({"a.jsonl": 0})
    with pytest.raises(ConfigError, match="given twice"):
        sources_of(["a.jsonl", "a.jsonl"])


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4))
def test_the_shares_of_a_mixture(sizes):
    parts = {str(k): [Preference("p", ("a", "b"), (1.0, 0.0), i) for i in range(n)] for k, (n, _) in enumerate(sizes)}
    weights = {str(k): w for k, (_, w) in enumerate(sizes)}
    parts = {name: [Preference(name, p.completions, p.scores, p.index) for p in rows] for name, rows in parts.items()}
    found = mixed(parts, weights, 0)
    whole = max(len(rows) / weights[name] for name, rows in parts.items())
    for name in parts:
        count = sum(p.prompt == name for p in found)
        assert abs(count - whole * weights[name]) <= 1
        assert count >= 1
