"""Broken data: every bad line is reported with number and reason before anything is trained; nothing is skipped."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.core.errors import DataError
from keel.tasks.data import load_data

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RESERVED = {"prompt", "messages", "completion", "prompts", "completions", "completion_ids"}
COLUMNS = st.dictionaries(TEXT.filter(lambda key: key not in RESERVED), JSON, max_size=3)
PROMPT = TEXT.filter(bool)
USER = PROMPT.map(lambda text: [{"role": "user", "content": text}])
ANSWER = TEXT.map(lambda text: [{"role": "assistant", "content": text}])
GOOD = st.one_of(
    st.builds(lambda prompt, columns: {**columns, "prompt": prompt}, PROMPT, COLUMNS),
    st.builds(lambda prompt, text: {"prompt": prompt, "completion": text, "messages": None}, PROMPT, TEXT),
    st.builds(lambda prompt, columns: {"prompt": prompt, **columns}, USER, COLUMNS),
    st.builds(lambda user, answer: {"prompt": user, "completion": answer}, USER, ANSWER),
    st.builds(lambda user, answer: {"messages": user + answer}, USER, ANSWER),
    st.builds(lambda text: {"prompt": text * 20_000}, PROMPT),
)


def line(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@st.composite
def bad(draw) -> bytes:
    """A line with one fault."""
    good = line(draw(GOOD))
    how = draw(st.integers(0, 7))
    if how == 0:  # cut
        return good[: draw(st.integers(1, len(good) - 1))]
    if how == 1:  # bytes that are no text
        place = draw(st.integers(1, len(good)))
        return good[:place] + draw(st.sampled_from([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x80"])) + good[place:]
    if how == 2:  # something that is no row
        return line(draw(st.one_of(st.none(), st.integers(), TEXT, st.just([{"prompt": "a"}]))))
    if how == 3:  # a key twice, outside or inside
        return draw(st.sampled_from([b'{"prompt": "a", "prompt": "a"}', b'{"prompt": "a", "x": [{"k": 1, "k": 1}]}']))
    if how == 4:  # a value of the wrong type
        wrong = draw(st.sampled_from([None, 3, True, {}, [], "", [None], ["text"], [{"role": 1, "content": "a"}]]))
        return line({"prompt": wrong})
    if how == 5:
        return draw(
            st.sampled_from(
                [
                    b'{"prompt": "a", "x": NaN}',
                    b'{"prompt": "a", "x": {"y": [1e999]}}',
                    b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}",
                    b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
                    b'{"prompt": "a", "x": ' + b'{"k":' * 900 + b"1" + b"}" * 900 + b"}",
                    b"[" * 100_000,
                    b'{"prompt": "a"} {"prompt": "b"}',
                    b'{"prompt": "a"},',
                    b"{'prompt': 'a'}",
                    b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}',
                    b"\xff\xfe{\x00}\x00",
                    b"\x00",
                ]
            )
        )
    if how == 6:  # what is to be learnt is no text of the assistant
        question = {"role": "user", "content": "a"}
        call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
        return line(
            draw(
                st.sampled_from(
                    [
                        {"messages": [question, call]},
                        {"messages": [question, {**call, "content": None}]},
                        {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
                        {"prompt": [question], "completion": [call]},
                        {"prompt": [question], "completion": [question]},
                        {"prompt": [question], "completion": []},
                        {"prompt": [question], "completion": [{"role": "assistant", "content": "b"}, question]},
                        {"prompt": "a", "completion": 3},
                    ]
                )
            )
        )
    return draw(
        st.sampled_from(
            [
                b'{"prompt": "\\ud800"}',
                b'{"prompt": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
                b'{"promt": "a"}',
                b'{"prompt": "a", "completions": 1}',
                b"{}",
            ]
        )
    )


@st.composite
def files(draw):
    """Lines, the numbers of the bad ones, and the rows of a file without any."""
    lines, faults, rows = [], set(), []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            lines.append(draw(bad()))
            faults.add(len(lines))
        elif kind == 1:
            lines.append(draw(st.sampled_from([b"", b"  ", b"\t"])))
            faults.add(len(lines))
        else:
            rows.append(draw(GOOD))
            lines.append(line(rows[-1]))
    rows.append({"prompt": "last"})
    lines.append(line(rows[-1]))
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    content = mark + end.join(lines) + draw(st.sampled_from([b"", end, end * 3, b" \t"]))
    return content, faults, rows


def check(folder, example):
    content, faults, rows = example
    path = folder / "any.jsonl"
    path.write_bytes(content)
    try:
        found = load_data(path, held_out=0.0)
    except DataError as error:
        said = str(error).splitlines()
        if "an array; write one object a line" in said[1]:
            assert content.lstrip(b"\xef\xbb\xbf").startswith(b"[")
            return
        assert faults, f"valid lines were refused: {error}"
        assert said[0].startswith(str(path)) and "problem" in said[0]
        told = {int(re.match(r"  line (\d+): .", text).group(1)) for text in said[1:] if text.startswith("  line")}
        assert told == faults
        return
    assert not faults, f"lines {sorted(faults)} were accepted"
    assert len(found.train) == len(rows)
    for example, row in zip(found.train, rows, strict=True):
        if row.get("messages"):
            assert (example.prompt, example.completion) == (row["messages"][:-1], row["messages"][-1:])
        else:
            assert (example.prompt, example.completion) == (row["prompt"], row.get("completion"))
        kept = {key: value for key, value in example.columns.items() if value is not None}
        assert kept == {k: v for k, v in row.items() if k not in RESERVED and v is not None}


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **QUIET)
@given(files())
def test_every_bad_line_is_reported_and_every_good_one_is_kept(tmp_path_factory, example):
    check(tmp_path_factory.getbasetemp(), example)


@pytest.mark.slow
@settings(max_examples=5000, **QUIET)
@given(files())
def test_five_thousand_files(tmp_path_factory, example):
    check(tmp_path_factory.getbasetemp(), example)


def test_nothing_is_trained_on_broken_data(train, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "1+1="}\r\n{"prompt": 1}\r\n\r\n{"prompt": "1+2="')
    with pytest.raises(DataError) as error:
        train(data=path)
    told = str(error.value)
    assert all(f"line {n}: " in told for n in (2, 3, 4)) and "line 1:" not in told and str(path) in told
    assert not (tmp_path / "runs").exists()


def test_a_column_twice_in_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table([pa.array(["a"]), pa.array(["x"]), pa.array(["y"])], names=["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: .*answer"):
        load_data(tmp_path / "twice.parquet")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match=r"loop\.jsonl"):
        load_data(tmp_path / "loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl"):
        load_data(tmp_path / "folder.jsonl")


@pytest.mark.parametrize("name", ["self", "function", "reward", "group", "args", "", "class", "a b"])
def test_columns_of_any_name_reach_the_reward(train, name):
    """Also those that are names of Keel's own arguments."""
    seen = []

    def reward(completions, **columns):
        seen.append(columns[name])
        return [float(i) for i in range(len(completions))]

    train(reward=reward, max_steps=1, data=[{"prompt": "1+1=", name: 7}, {"prompt": "1+2=", name: 7}])
    assert seen == [[7] * 4]
