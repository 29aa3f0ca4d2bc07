"""What a task is: examples to train on, examples held out, and functions that verify completions."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from keel.core.errors import DataError

Text = str | list[dict[str, Any]]  # plain text, or messages: [{"role": "user", "content": "..."}, ...]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NAMED = 5  # overlapping examples that an error names


class RewardFunction(Protocol):
    """`def reward(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    Everything is passed by keyword, one entry for each completion, and only what the signature accepts is passed at
    all. `prompts` and `completions` are texts, or messages where the data has messages; `columns` are the other
    columns of the data. None means that the reward does not apply to that completion. NaN and infinities are errors.
    """

    def __call__(self, *args: Any, **columns: Any) -> Sequence[float | None]: ...


@dataclass(frozen=True)
class Example:
    """One prompt with all that is known about it.

    Args:
        prompt: text, or messages (the tokenizer applies its chat template later).
        columns: every other column of the data; they reach reward functions as keyword lists.
        index: number of the example, unique within its split.
        domain: name of the part of the data that the example belongs to.
        completion: what is to be learnt, in supervised data.
    """

    prompt: Text
    columns: dict[str, Any]
    index: int
    domain: str = ""
    completion: Text | None = None


@runtime_checkable
class Task(Protocol):
    """Prompts with verifiers.

    `train` and `held_out` are map style (`len`, `[i]`), deterministic, and never overlap. `rewards` are the task's own
    verifiers by name. `preset` holds settings that suit the task, by dotted path. `max_completion_length` is in tokens,
    the end of sequence included. `characters` is an alphabet that suffices for prompts and solutions, or None.

    A task may further have `hidden`, functions like `rewards` that are measured and recorded under their names but
    never enter a loss; `verdict`, the name of the function of either kind that tells correct from wrong in
    evaluations (by default the sum of the rewards does); and `base_task()`, the task on whose solutions the built-in
    model was trained (by default itself).
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    rewards: dict[str, RewardFunction]
    preset: dict[str, Any]
    max_completion_length: int
    characters: str | None

    def solution(self, example: Example, seed: int) -> str | None:
        """One correct completion, drawn among several by `seed`; None where none is known."""
        ...

    def answer(self, completion: Text, example: Example) -> str | None:
        """Canonical form of the completion's answer, by which answers are counted; None if there is none."""
        ...


def hidden_rewards(task: Task) -> dict[str, RewardFunction]:
    """The functions of a task that are measured only, by name.

    Raises:
        DataError: one has the name of a reward.
    """
    hidden = dict(getattr(task, "hidden", None) or {})
    for name in hidden:
        if name in task.rewards:
            raise DataError(f"the function {name!r} is a reward and hidden, too.", task.name, "Give it another name.")
    return hidden


def check_disjoint(
    name: str, train: Iterable[Hashable], held_out: Iterable[Hashable], show: Callable[[Any], str] = repr
) -> None:
    """Refuse a held-out set that shares examples with the training set.

    Args:
        name: the task, for the message.
        train, held_out: what identifies each example.
        show: writes such an identity for the message.

    Raises:
        DataError: some example is in both; up to five are named.

    >>> check_disjoint("sums", ["1+1", "1+2"], ["2+2"])
    >>> check_disjoint("sums", ["1+1", "1+2"], ["1+2"])
    Traceback (most recent call last):
    keel.core.errors.DataError: sums: 1 of 1 held-out examples also in the training data: '1+2'. ...
    """
    wanted = list(dict.fromkeys(held_out))
    known = set(train)
    shared = [key for key in wanted if key in known]
    if shared:
        named = ", ".join(show(key) for key in shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
        raise DataError(
            f"{len(shared)} of {len(wanted)} held-out examples also in the training data: {named}.",
            where=name,
            fix="Remove them from one side, or give one set and let Keel split it.",
        )


def completion_text(completion: Text) -> str:
    """The text of a completion: the string itself, or the content of the last message.

    >>> completion_text([{"role": "assistant", "content": "42"}])
    '42'
    """
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def final_answer(completion: Text) -> str:
    """What stands in the last `<answer>...</answer>`, or all of the completion, without surrounding white space.

    >>> final_answer("First <answer>3</answer>, no: <answer> 4 </answer>.")
    '4'
    >>> final_answer(" 4 ")
    '4'
    """
    text = completion_text(completion)
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()
