"""Reading rows of one's own data: JSON lines, Parquet, data sets of `datasets`, lists of dictionaries; and their texts.

Every row is checked before anything else happens; all that is wrong is reported at once, and nothing is skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from keel.core.errors import ConfigError, DataError
from keel.tasks.task import Text

_DEPTH = 100  # of lists and objects in a column; what comes after could not follow much further
_SHOWN = 20  # problems that one error shows
_LINES = (".jsonl", ".ndjson", ".json")
HELD_OUT_SPLITS = ("held_out", "test", "validation")

Row = dict[str, Any]


def checked_rows(data: Any, label: str, problems: Callable[[Row], Iterable[str]]) -> list[tuple[str, Row]]:
    """All rows with where they stand ("line 3", "row 3"), once `problems` finds nothing wrong with any of them.

    Args:
        data: what `opened` gives.
        label: of the data, for messages.
        problems: all that is wrong with a row, in words.

    Raises:
        DataError: malformed rows (place and reason of each, the first 20 in full), or no rows.
    """
    complaints = Complaints(label)
    found: list[tuple[str, Row]] = []
    for where, row in rows_of(data, label, complaints.add):
        try:
            reasons = list(problems(row))
        except RecursionError:
            reasons = [f"nested more than {_DEPTH} levels deep"]
        for reason in reasons:
            complaints.add(where, reason)
        if not reasons:
            found.append((where, row))
    complaints.check()
    if not found:
        raise DataError("no rows; the data is empty.", where=label)
    return found


class Complaints:
    """What is wrong with data, the first 20 in full and the rest counted.

    Args:
        label: of the data, for messages.
    """

    def __init__(self, label: str):
        self.label, self.count = label, 0
        self.shown: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= _SHOWN:
            self.shown.append(f"  {where}: {reason}")

    def check(self) -> None:
        """Go on only if there is none.

        Raises:
            DataError: there are some.
        """
        if self.count:
            more = f"\n  and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            said = "\n".join(self.shown) + more
            raise DataError(f"{self.count} problem{'s' * (self.count > 1)}\n{said}", where=self.label)


def opened(data: Any) -> Any:
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


def is_splits(data: Any) -> bool:
    return isinstance(data, dict) and all(hasattr(split, "column_names") for split in data.values())


def train_split(data: dict[str, Any]) -> str:
    if "train" in data:
        return "train"
    if len(data) == 1:
        return next(iter(data))
    raise DataError(f"the data set has no split `train`, only {', '.join(data)}.", fix="Pass one split.")


def data_label(data: Any) -> str:
    return str(data) if isinstance(data, Path) else "data"


def rows_of(data: Any, label: str, report: Callable[[str, str], None]) -> Iterator[tuple[str, Row]]:
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
    if hasattr(found, "iterrows"):  # of pandas; iterating over it gives the names of its columns
        fix = "Give its rows as dictionaries: df.to_dict('records')."
        raise DataError(f"a {type(found).__name__} is no list of rows.", where=label, fix=fix)
    for number, row in enumerate(found, start=1):
        if isinstance(row, dict):
            yield f"row {number}", row
        else:
            report(f"row {number}", f"not a dictionary but {kind_of(row)}")


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
                report(where, f"not an object but {kind_of(row)}")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in an object")
    return row


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON; use null")


def text_problems(key: str, value: Any, empty: bool = False) -> Iterator[str]:
    if isinstance(value, list):
        yield from message_problems(key, value)
    elif not isinstance(value, str):
        yield f"`{key}` must be text or messages, not {kind_of(value)}"
    elif not value and not empty:
        yield f"`{key}` is empty"
    elif not _encodable(value):
        yield f"`{key}` holds half of a surrogate pair, which is no text"


def message_problems(key: str, messages: Any) -> Iterator[str]:
    if not isinstance(messages, list):
        yield f"`{key}` must be a list of messages, not {kind_of(messages)}"
        return
    if not messages:
        yield f"`{key}` is empty"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            yield f"`{key}`: message {number} is not an object but {kind_of(message)}"
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


def answer_problems(key: str, messages: Any) -> Iterator[str]:
    """What is wrong with messages that are to be learnt: one of the assistant, with text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return  # it has been said
    if len(messages) > 1:
        yield f"`{key}` must be one message of the assistant, not {len(messages)} messages"
    elif messages and role_of(messages[0]) != "assistant":
        yield f"`{key}` must be a message of the assistant, not of {role_of(messages[0])!r}"
    elif messages and not isinstance(messages[0].get("content"), str):
        yield f"`{key}`: the message of the assistant has no text to learn from"


def _texts(value: Any) -> Iterator[str]:
    """Every text inside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_nan(value: Any, depth: int = 0) -> bool:
    if depth > _DEPTH:
        raise RecursionError
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(has_nan(item, depth + 1) for item in value.values())
    return isinstance(value, list | tuple) and any(has_nan(item, depth + 1) for item in value)


def kind_of(value: Any) -> str:
    words = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return words.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def prompt_identity(prompt: Text) -> Hashable:
    """What makes two prompts the same: their text, white space around it apart."""
    if isinstance(prompt, str):
        return prompt.strip()
    return json.dumps([[m["role"], m.get("content")] for m in prompt], sort_keys=True, default=str)


def shown_identity(identity: Hashable) -> str:
    """The same for messages to people."""
    text = str(identity)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def set_aside(identities: Iterable[Hashable], share: float, seed: int) -> set[Hashable]:
    """The prompts that are held out: a share of the distinct ones, whatever their order.

    Raises:
        ConfigError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"must be a share in [0, 1) or data, got {share:g}.", where="held_out")
    ranked = sorted(set(identities), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    # at least one where there are two prompts, and never all
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1) if share else 0
    return set(ranked[:count])
