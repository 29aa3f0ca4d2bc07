"""One's own data: JSON lines, Parquet, data sets of `datasets`, and lists of dictionaries.

Every row is checked before anything else happens; all that is wrong is reported at once, and nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from keel.core.errors import ConfigError, nearest
from keel.tasks.reading import (
    HELD_OUT_SPLITS,
    Row,
    answer_problems,
    checked_rows,
    data_label,
    has_nan,
    is_splits,
    message_problems,
    opened,
    prompt_identity,
    role_of,
    set_aside,
    shown_identity,
    text_problems,
    train_split,
)
from keel.tasks.task import Example, RewardFunction, Text, check_disjoint, completion_text, final_answer

_TEXT_COLUMNS = ("prompt", "messages", "completion")
_RESERVED = (
    "prompts",
    "completions",
    "completion_ids",
)  # what reward functions are given under these names is not a column


class DataTask:
    """Rows of one's own data as a task, without verifiers of its own.

    Args:
        name: for messages.
        train, held_out: the examples.

    Raises:
        DataError: a prompt is in both.
    """

    def __init__(self, name: str, train: Sequence[Example], held_out: Sequence[Example]):
        check_disjoint(name, map(identity, train), map(identity, held_out), shown_identity)
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
    data = opened(data)
    rows, test = data, held_out
    if isinstance(held_out, bool) or held_out is None:
        raise ConfigError(f"must be a share in [0, 1) or data, got {held_out!r}.", where="held_out")
    if is_splits(data):
        rows = data[train_split(data)]
        own = [split for split in HELD_OUT_SPLITS if split in data]
        if isinstance(held_out, float | int) and own:
            test = data[own[0]]
    label = data_label(data)
    examples = _examples(rows, label)
    if isinstance(test, float | int):
        train, held = _split(examples, float(test), seed)
    else:
        test = opened(test)
        if is_splits(test):
            test = test[train_split(test) if len(test) > 1 else next(iter(test))]
        train, held = examples, _examples(test, f"held-out {data_label(test)}")
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


# Checking


def _examples(data: Any, label: str) -> list[Example]:
    rows = [row for _, row in checked_rows(data, label, _problems)]
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
        hint = ". Pairs are for methods such as dpo." if {"chosen", "rejected"} <= set(row) else _misspelt(row)
        yield f"neither `prompt` nor `messages`; the columns are {names}{hint}"
    elif prompt is not None and messages is not None:
        yield "both `prompt` and `messages`; keep one"
    if prompt is not None:
        yield from text_problems("prompt", prompt)
    if messages is not None:
        yield from message_problems("messages", messages)
        if isinstance(messages, list) and len(messages) == 1 and role_of(messages[0]) == "assistant":
            yield "`messages` has nothing before the assistant's message"
        if completion is not None:
            yield "both `messages` and `completion`; keep one"
        if isinstance(messages, list) and messages and role_of(messages[-1]) == "assistant":
            yield from answer_problems("messages", messages[-1:])
    elif completion is not None:
        yield from text_problems("completion", completion, empty=True)
        yield from answer_problems("completion", completion)
        if isinstance(prompt, str) and isinstance(completion, list):
            yield "`completion` is messages but `prompt` is text; both must be of one kind"
    for key, value in row.items():
        if not isinstance(key, str):
            yield f"column name {key!r} is no text"
        elif key in _RESERVED:
            yield f"a column cannot be named `{key}`: reward functions get something else under that name"
        elif key not in _TEXT_COLUMNS and has_nan(value):
            yield f"`{key}` is NaN or infinite; use null"


def _misspelt(row: Row) -> str:
    if "prompt" in row or "messages" in row:
        return ", where there is nothing"
    hints = {key: nearest(key, ("prompt", "messages")) for key in row if isinstance(key, str)}
    return next((f". For {key!r}:{hint}" for key, hint in hints.items() if hint), ".")


# Splitting


def identity(example: Example) -> Hashable:
    """What makes two prompts the same: their text, white space around it apart."""
    return prompt_identity(example.prompt)


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    keys = [identity(example) for example in examples]
    aside = set_aside(keys, share, seed)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for key, example in zip(keys, examples, strict=True):
        side = sides[key in aside]
        side.append(Example(example.prompt, example.columns, len(side), example.domain, example.completion))
    return sides
