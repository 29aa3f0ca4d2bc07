import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.core.errors import ConfigError, DataError
from keel.tasks import Task, load_data
from keel.tasks.data import boxed


def sums(count):
    return [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_data(path)
    return str(error.value)


# Forms


def test_json_lines(tmp_path):
    task = load_data(write(tmp_path / "sums.jsonl", sums(10)), held_out=0)
    assert isinstance(task, Task)
    assert [example.prompt for example in task.train] == [f"{n}+1=" for n in range(10)]
    assert task.train[4].columns == {"answer": "5", "level": 1}
    assert [example.index for example in task.train] == list(range(10))
    assert len(task.held_out) == 0


def test_all_forms_give_the_same(tmp_path):
    from datasets import Dataset, DatasetDict, load_from_disk

    rows = sums(10)
    expected = load_data(rows)
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "sums.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    forms = [
        write(tmp_path / "sums.jsonl", rows),
        str(tmp_path / "sums.parquet"),
        data,
        DatasetDict({"train": data}),
        tmp_path / "saved",
        tmp_path / "splits",
        load_from_disk(str(tmp_path / "saved")),
        tuple(rows),
    ]
    for form in forms:
        task = load_data(form)
        assert task.train == expected.train and task.held_out == expected.held_out


def test_messages_end_with_the_completion():
    question = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    reply = {"role": "assistant", "content": "2"}
    earlier = [*question, reply, {"role": "user", "content": "2+2"}]
    rows = [
        {"messages": [*question, reply], "answer": 2},
        {"messages": question[1:]},
        {"messages": earlier},
        {"messages": [*earlier, reply]},
    ]
    task = load_data(rows, held_out=0)
    assert [example.prompt for example in task.train[:2]] == [question, question[1:]]
    assert [example.completion for example in task.train] == [[reply], None, None, [reply]]
    assert task.train[3].prompt == earlier
    assert task.train[1].columns == {"answer": None}
    assert task.solution(task.train[0], 0) == "2"


def test_completion_takes_the_form_of_the_prompt():
    user = [{"role": "user", "content": "1+1"}]
    task = load_data([{"prompt": "1+1=", "completion": "2"}, {"prompt": user, "completion": "2"}], held_out=0)
    assert task.train[0].completion == "2"
    assert task.train[1].completion == [{"role": "assistant", "content": "2"}]


def test_domain_is_read():
    task = load_data([{"prompt": "a", "domain": "letters"}, {"prompt": "1"}], held_out=0)
    assert [example.domain for example in task.train] == ["letters", ""]


def test_byte_order_mark_and_line_ends_are_no_problem(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n{"prompt": "c"}\r\n\r\n')
    assert [example.prompt for example in load_data(path, held_out=0).train] == ["a\u2028b", "c"]


# Malformed lines


def test_every_malformed_line_is_reported(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"prompt": "fine"}',
        b'{"prompt": "open"',
        b'{"prompt": "\xff"}',
        b'["prompt"]',
        b'{"promt": "x"}',
        b'{"prompt": 3}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "score": NaN}',
        b"",
        b'{"prompt": ""}',
        b'{"prompt": "a", "x": {"k": 1, "k": 2}}',
        b'{"prompt": "a", "score": 1e999}',
        b'{"prompt": "a", "completions": "b"}',
        b'{"prompt": "\\ud800"}',
        b"null",
        b"[" * 100_000,
        b'{"prompt": "fine"}',
    ]
    said = refused(path, b"\n".join(lines)).splitlines()
    assert said[0] == f"{path}: 15 problems"
    assert [line.split(":")[0] for line in said[1:]] == [f"  line {n}" for n in range(2, 17)]
    reasons = [line.split(": ", 1)[1] for line in said[1:]]
    expected = [
        "invalid JSON: Expecting ',' delimiter at column 18",
        "invalid UTF-8 at byte 13",
        "not an object but a list",
        "neither `prompt` nor `messages`; the columns are 'promt'. For 'promt': Did you mean 'prompt'?",
        "`prompt` must be text or messages, not a number",
        "key 'prompt' appears twice in an object",
        "NaN is no JSON; use null",
        "empty line",
        "`prompt` is empty",
        "key 'k' appears twice in an object",
        "`score` is NaN or infinite; use null",
        "a column cannot be named `completions`: reward functions get something else under that name",
        "`prompt` holds half of a surrogate pair, which is no text",
        "not an object but null",
    ]
    assert reasons[:-1] == expected
    assert reasons[-1].startswith("invalid JSON")


def test_twenty_problems_are_shown(tmp_path):
    said = refused(tmp_path / "bad.jsonl", b"no\n" * 33)
    assert "33 problems" in said and said.endswith("and 13 more")
    assert said.count("invalid JSON") == 20


@pytest.mark.parametrize("content", [b"", b"\n", b" \n \n"])
def test_empty_file(tmp_path, content):
    assert "no rows" in refused(tmp_path / "empty.jsonl", content)


def test_array_instead_of_lines(tmp_path):
    assert "write one object a line" in refused(tmp_path / "array.json", b'[{"prompt": "a"}]')


def test_files_that_cannot_be_read(tmp_path):
    assert "unknown kind of file '.csv'" in refused(tmp_path / "data.csv", b"prompt\n")
    assert "no readable Parquet file" in refused(tmp_path / "data.parquet", b"prompt\n")
    with pytest.raises(DataError, match="no such file"):
        load_data(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="holds no data set"):
        load_data(tmp_path)
    with pytest.raises(DataError, match="int is no data"):
        load_data(3)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hello"}, "must be a list of messages, not text"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "message 1 has no `role` that is text (it has 'from', 'value')",
        ),
        ({"messages": [{"role": "user"}]}, "message 1 has no `content`"),
        ({"messages": ["hello"]}, "message 1 is not an object but text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing before the assistant's message"),
        ({"prompt": [{"role": "user", "content": 3}]}, "`prompt`: message 1 has no `content`"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "both `prompt` and `messages`"),
        ({"prompt": "a", "completion": 3}, "`completion` must be text or messages, not a number"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "must be of one kind"),
        ({"prompt": None}, "neither `prompt` nor `messages`; the columns are 'prompt', where there is nothing"),
        ({"prompt": "a", "scores": [1.0, math.nan]}, "`scores` is NaN or infinite"),
        ("a", "not a dictionary but text"),
    ],
)
def test_malformed_rows_of_a_list(row, reason):
    with pytest.raises(DataError) as error:
        load_data([{"prompt": "fine"}, row])
    assert f"row 2: {reason}" in str(error.value) or ("row 2" in str(error.value) and reason in str(error.value))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_data_or_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert len(load_data(path, held_out=0).train) > 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "", "{", "[]", '{"prompt": 3}']), max_size=3))
def test_lines_are_data_unless_one_of_them_is_wrong(tmp_path_factory, given_lines):
    """Letters are prompts; an empty line is one only where it ends the file."""
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text("\n".join(f'{{"prompt": "{line}"}}' if line.isalpha() else line for line in given_lines))
    prompts = given_lines[:-1] if given_lines[-1:] == [""] else given_lines
    if prompts and all(line.isalpha() for line in prompts):
        assert [example.prompt for example in load_data(path, held_out=0).train] == prompts
    else:
        with pytest.raises(DataError, match=r"lines\.jsonl"):
            load_data(path, held_out=0)


# Splitting


def test_split_is_by_prompt():
    rows = [{"prompt": f"{n % 20}+1=", "sample": n} for n in range(100)]  # each prompt five times
    task = load_data(rows, held_out=0.25, seed=1)
    assert (len(task.train), len(task.held_out)) == (75, 25)  # 5 of the 20 prompts
    assert {e.prompt for e in task.train}.isdisjoint(e.prompt for e in task.held_out)
    assert sorted(e.columns["sample"] for e in (*task.train, *task.held_out)) == list(range(100))


def test_split_depends_on_the_seed_and_not_on_the_order():
    def held(rows, seed):
        return {e.prompt for e in load_data(rows, held_out=0.3, seed=seed).held_out}

    assert held(sums(50), 0) == held(sums(50)[::-1], 0) != held(sums(50), 1)
    assert len(held(sums(50), 0)) == 15


def test_white_space_does_not_make_another_prompt():
    task = load_data([{"prompt": text} for text in ("1+1=", " 1+1=\n", "2+2=")], held_out=0.5)
    assert {len(task.train), len(task.held_out)} == {1, 2}


@pytest.mark.parametrize(
    ("rows", "share", "held"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5), (9, 0, 0)]
)
def test_size_of_the_split(rows, share, held):
    task = load_data(sums(rows), held_out=share)
    assert (len(task.train), len(task.held_out)) == (rows - held, held)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, True, None])
def test_no_share(share):
    with pytest.raises(ConfigError, match="held_out"):
        load_data(sums(4), held_out=share)


def test_held_out_data_of_its_own(tmp_path):
    path = write(tmp_path / "test.jsonl", [{"prompt": "100+1="}])
    for held_out in (path, [{"prompt": "100+1="}]):
        task = load_data(sums(4), held_out=held_out)
        assert [e.prompt for e in task.held_out] == ["100+1="]
        assert len(task.train) == 4


def test_overlap_with_held_out_data_is_named():
    with pytest.raises(DataError, match=r"1 of 2 held-out examples also in the training data: '3\+1='"):
        load_data(sums(4), held_out=[{"prompt": "100+1="}, {"prompt": "3+1= "}])


def test_problems_of_held_out_data_name_it(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "a"}\n{')
    with pytest.raises(DataError, match=r"held-out .*test\.jsonl: 1 problem\n  line 2: invalid JSON"):
        load_data(sums(4), held_out=path)


def test_splits_of_a_data_set():
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(sums(4)), Dataset.from_list([{"prompt": "100+1="}])
    task = load_data(DatasetDict({"train": train, "test": test}))
    assert (len(task.train), [e.prompt for e in task.held_out]) == (4, ["100+1="])
    with pytest.raises(DataError, match="no split `train`, only dev, test"):
        load_data(DatasetDict({"dev": train, "test": test}))


# Answers


def test_answer():
    task = load_data(sums(2), held_out=0)
    example = task.train[0]
    assert task.answer(r"so \boxed{1} or \boxed{\frac{1}{2}}", example) == r"\frac{1}{2}"
    assert task.answer("<answer>4</answer>", example) == "4"
    assert task.answer(" 4 ", example) == "4"
    assert task.answer(" ", example) is None


@pytest.mark.parametrize(
    ("text", "content"), [(r"\boxed{a{b}c}d}", "a{b}c"), (r"\boxed{a", None), ("a", None), (r"\boxed{}", "")]
)
def test_boxed(text, content):
    assert boxed(text) == content
