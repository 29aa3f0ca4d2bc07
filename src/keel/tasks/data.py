"""One's own data: JSON lines, Parquet, data sets of `datasets`, and lists of dictionaries.

Every row is checked before anything else happens; all that is wrong is reported at once, and nothing is skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keel.core.errors import ConfigError, DataError, nearest
from keel.tasks.task import Example, RewardFunction, Text, check_disjoint, completion_text, final_answer

_DEPTH = 100  # of lists and objects in a column; what comes after could not follow much further
_SHOWN = 20  # problems that one error shows
_LINES = (".jsonl", ".ndjson", ".json")
_TEXT_COLUMNS = ("prompt", "messages", "completion")
_RESERVED = (
    "prompts",
    "completions",
    "completion_ids",
)  # what reward functions are given under these names is not a column
_HELD_OUT_SPLITS = ("held_out", "test", "validation")

Row = dict[str, Any]


class DataTask:
    """Rows of one's own data as a task, without verifiers of its own.

    Args:
        name: for messages.
        train, held_out: the examples.

    Raises:
        DataError: a prompt is in both.
    """

    def __init__(self, name: str, train: Sequence[Example], held_out: Sequence[Example]):
        check_disjoint(name, map(identity, train), map(identity, held_out), _show)
        self.name = name
        self.train: Sequence[Example] = train
        self.held_out: Sequence[Example] = held_out
        self.rewards: dict[str, RewardFunction] = {}
        self.preset: dict[str, Any] = {}
        self.max_completion_length = 256
        self.characters: str | None = None

    def solution(self, example: Example, seed: int) -> str | None:
        """The example's completion, if the data has one."""
        return None if example.completion is None else completion_text(example.completion)

    def answer(self, completion: Text, example: Example) -> str | None:
        r"""What stands in the last `<answer>...</answer>`, or in the last `\boxed{...}`, or all of the completion."""
        text = final_answer(completion)
        return (boxed(text) or text) or None


def load_data(data: Any, held_out: Any = 0.05, seed: int = 0, name: str | None = None) -> DataTask:
    """Data of one's own as a task.

    A row has `prompt` (text or messages), or `messages` (the last message, if it is the assistant's, is the
    completion and what precedes it the prompt); it may have `completion`, `answer`, `domain` and any other columns,
    all of which except prompt, messages and completion reach the reward functions. A column that some rows lack is
    None there.

    Args:
        data: a path (`.jsonl`, `.ndjson`, `.json` with one object a line; `.parquet`; a directory written by
            `save_to_disk`), a `datasets.Dataset` or `DatasetDict`, or a list of dictionaries.
        held_out: the share of the distinct prompts to set aside, in [0, 1); or data of its own, in any of the forms of
            `data`. Rows with the same prompt stay on one side. Of a `DatasetDict` its split `held_out`, `test` or
            `validation` is taken, if it has one.
        seed: which prompts are set aside; the order of the rows does not matter.
        name: of the task, for messages.

    Raises:
        DataError: malformed rows (file, line and reason of each, the first 20 in full), no rows, or a prompt on both
            sides.
        ConfigError: `held_out` is no share and no data.

    >>> task = load_data([{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}], held_out=0.5)
    >>> len(task.train), len(task.held_out)
    (1, 1)
    """
    data = _opened(data)
    rows, test = data, held_out
    if isinstance(held_out, bool) or held_out is None:
        raise ConfigError(f"must be a share in [0, 1) or data, got {held_out!r}.", where="held_out")
    if _is_splits(data):
        rows = data[_train_split(data)]
        own = [split for split in _HELD_OUT_SPLITS if split in data]
        if isinstance(held_out, float | int) and own:
            test = data[own[0]]
    label = _label(data)
    examples = _examples(rows, label)
    if isinstance(test, float | int):
        train, held = _split(examples, float(test), seed)
    else:
        test = _opened(test)
        if _is_splits(test):
            test = test[_train_split(test) if len(test) > 1 else next(iter(test))]
        train, held = examples, _examples(test, f"held-out {_label(test)}")
    return DataTask(name or label, train, held)


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with its inner braces balanced.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    depth, begin = 0, start + len(r"\boxed{")
    for match in re.finditer(r"[{}]", text[begin:] if start >= 0 else ""):
        if match.group() == "}" and depth == 0:
            return text[begin : begin + match.start()].strip()
        depth += 1 if match.group() == "{" else -1
    return None


# Reading


def _opened(data: Any) -> Any:
    """A directory written by `save_to_disk` becomes what was saved; everything else stays."""
    if not isinstance(data, str | Path):
        return data
    path = Path(data)
    if not path.exists():
        fix = "Data of the hub: pass `datasets.load_dataset(...)`, or save it to a file."
        raise DataError("no such file or directory.", where=str(data), fix=fix)
    if not path.is_dir():
        return path
    if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json", "state.json")):
        fix = "Give a .jsonl or .parquet file, or a directory written by `save_to_disk`."
        raise DataError("the directory holds no data set.", where=str(path), fix=fix)
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error


def _is_splits(data: Any) -> bool:
    return isinstance(data, dict) and all(hasattr(split, "column_names") for split in data.values())


def _train_split(data: dict[str, Any]) -> str:
    if "train" in data:
        return "train"
    if len(data) == 1:
        return next(iter(data))
    raise DataError(f"the data set has no split `train`, only {', '.join(data)}.", fix="Pass one split.")


def _label(data: Any) -> str:
    return str(data) if isinstance(data, Path) else "data"


def _rows(data: Any, label: str, report: Callable[[str, str], None]) -> Iterator[tuple[str, Row]]:
    """Rows that are objects, each with where it stands; everything else goes to `report`."""
    if isinstance(data, Path) and data.suffix == ".parquet":
        import pyarrow.parquet

        try:
            found: Any = pyarrow.parquet.read_table(data).to_pylist()
        except Exception as error:
            raise DataError(f"no readable Parquet file: {error}", where=label) from error
    elif isinstance(data, Path) and data.suffix in _LINES:
        yield from _lines(data, report)
        return
    elif isinstance(data, Path):
        known = ", ".join((*_LINES, ".parquet"))
        raise DataError(f"unknown kind of file {data.suffix!r}.", where=label, fix=f"Known are {known}.")
    else:
        found = data
    if isinstance(found, str | bytes | dict) or not hasattr(found, "__iter__"):
        fix = "Give a path, a list of dictionaries, or a data set of `datasets`."
        raise DataError(f"{type(found).__name__} is no data.", where=label, fix=fix)
    for number, row in enumerate(found, start=1):
        if isinstance(row, dict):
            yield f"row {number}", row
        else:
            report(f"row {number}", f"not a dictionary but {_kind(row)}")


def _lines(path: Path, report: Callable[[str, str], None]) -> Iterator[tuple[str, Row]]:
    try:
        content = path.read_bytes().rstrip()  # white space after the last line is no line
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}.", where=str(path)) from error
    if content.startswith(b"["):
        report("line 1", "an array; write one object a line")
        return
    for number, line in enumerate(content.split(b"\n") if content else (), start=1):
        where = f"line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            report(where, f"invalid UTF-8 at byte {error.start + 1}")
            continue
        if not text.strip():
            report(where, "empty line")
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        except json.JSONDecodeError as error:
            report(where, f"invalid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            report(where, "invalid JSON: nested too deeply")
        except ValueError as error:
            report(where, str(error))
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                report(where, f"not an object but {_kind(row)}")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in an object")
    return row


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON; use null")


# Checking


def _examples(data: Any, label: str) -> list[Example]:
    problems: list[str] = []
    count = 0

    def report(where: str, reason: str) -> None:
        nonlocal count
        count += 1
        if count <= _SHOWN:
            problems.append(f"  {where}: {reason}")

    rows: list[Row] = []
    for where, row in _rows(data, label, report):
        try:
            reasons = list(_problems(row))
        except RecursionError:
            reasons = [f"nested more than {_DEPTH} levels deep"]
        for reason in reasons:
            report(where, reason)
        if not reasons:
            rows.append(row)
    if count:
        more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
        raise DataError(f"{count} problem{'s' * (count > 1)}\n" + "\n".join(problems) + more, where=label)
    if not rows:
        raise DataError("no rows; the data is empty.", where=label)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _TEXT_COLUMNS]
    return [_example(row, columns, index) for index, row in enumerate(rows)]


def _example(row: Row, columns: list[str], index: int) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages") is not None:
        prompt = row["messages"]
        if prompt[-1]["role"] == "assistant":
            prompt, completion = prompt[:-1], [prompt[-1]]
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    assert prompt is not None
    domain = row.get("domain")
    values = {key: row.get(key) for key in columns}
    return Example(prompt, values, index, "" if domain is None else str(domain), completion)


def _problems(row: Row) -> Iterator[str]:
    """All that is wrong with a row, in words."""
    prompt, messages, completion = (row.get(key) for key in _TEXT_COLUMNS)
    if prompt is None and messages is None:
        names = ", ".join(map(repr, row)) or "none"
        yield f"neither `prompt` nor `messages`; the columns are {names}.{_misspelt(row)}"
    elif prompt is not None and messages is not None:
        yield "both `prompt` and `messages`; keep one"
    if prompt is not None:
        yield from _text_problems("prompt", prompt)
    if messages is not None:
        yield from _message_problems("messages", messages)
        if isinstance(messages, list) and len(messages) == 1 and _role(messages[0]) == "assistant":
            yield "`messages` has nothing before the assistant's message"
        if completion is not None:
            yield "both `messages` and `completion`; keep one"
        if isinstance(messages, list) and messages and _role(messages[-1]) == "assistant":
            yield from _answer_problems("messages", messages[-1:])
    elif completion is not None:
        yield from _text_problems("completion", completion, empty=True)
        yield from _answer_problems("completion", completion)
        if isinstance(prompt, str) and isinstance(completion, list):
            yield "`completion` is messages but `prompt` is text; both must be of one kind"
    for key, value in row.items():
        if not isinstance(key, str):
            yield f"column name {key!r} is no text"
        elif key in _RESERVED:
            yield f"a column cannot be named `{key}`: reward functions get something else under that name"
        elif key not in _TEXT_COLUMNS and _has_nan(value):
            yield f"`{key}` is NaN or infinite; use null"


def _misspelt(row: Row) -> str:
    hints = {key: nearest(key, ("prompt", "messages")) for key in row if isinstance(key, str)}
    return next((f" For {key!r}:{hint}" for key, hint in hints.items() if hint), "")


def _text_problems(key: str, value: Any, empty: bool = False) -> Iterator[str]:
    if isinstance(value, list):
        yield from _message_problems(key, value)
    elif not isinstance(value, str):
        yield f"`{key}` must be text or messages, not {_kind(value)}"
    elif not value and not empty:
        yield f"`{key}` is empty"
    elif not _encodable(value):
        yield f"`{key}` holds half of a surrogate pair, which is no text"


def _message_problems(key: str, messages: Any) -> Iterator[str]:
    if not isinstance(messages, list):
        yield f"`{key}` must be a list of messages, not {_kind(messages)}"
        return
    if not messages:
        yield f"`{key}` is empty"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            yield f"`{key}`: message {number} is not an object but {_kind(message)}"
            continue
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            names = ", ".join(map(repr, message)) or "nothing"
            yield f"`{key}`: message {number} has no `role` that is text (it has {names})"
        called = content is None and bool(message.get("tool_calls"))
        if not isinstance(content, str | list) and not called:
            yield f"`{key}`: message {number} has no `content` that is text"
        elif not all(map(_encodable, _texts(message))):
            yield f"`{key}`: message {number} holds half of a surrogate pair, which is no text"


def _answer_problems(key: str, messages: Any) -> Iterator[str]:
    """What is wrong with messages that are to be learnt: one of the assistant, with text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return  # it has been said
    if len(messages) > 1:
        yield f"`{key}` must be one message of the assistant, not {len(messages)} messages"
    elif messages and _role(messages[0]) != "assistant":
        yield f"`{key}` must be a message of the assistant, not of {_role(messages[0])!r}"
    elif messages and not isinstance(messages[0].get("content"), str):
        yield f"`{key}`: the message of the assistant has no text to learn from"


def _texts(value: Any) -> Iterator[str]:
    """Every text inside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_nan(value: Any, depth: int = 0) -> bool:
    if depth > _DEPTH:
        raise RecursionError
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(_has_nan(item, depth + 1) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_nan(item, depth + 1) for item in value)


def _kind(value: Any) -> str:
    words = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return words.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


# Splitting


def identity(example: Example) -> Hashable:
    """What makes two prompts the same: their text, white space around it apart."""
    if isinstance(example.prompt, str):
        return example.prompt.strip()
    return json.dumps([[m["role"], m.get("content")] for m in example.prompt], sort_keys=True, default=str)


def _show(identity: Hashable) -> str:
    text = str(identity)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    if not 0 <= share < 1:
        raise ConfigError(f"must be a share in [0, 1) or data, got {share:g}.", where="held_out")
    keys = [identity(example) for example in examples]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    # at least one where there are two prompts, and never all
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1) if share else 0
    aside = set(ranked[:count])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for key, example in zip(keys, examples, strict=True):
        side = sides[key in aside]
        side.append(Example(example.prompt, example.columns, len(side), example.domain, example.completion))
    return sides
