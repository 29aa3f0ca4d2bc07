"""One row of preferences in any of its written forms: what is wrong with it, and what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, Literal

from keel.core.errors import nearest
from keel.tasks.preferences import COLUMNS, Kind, Preference
from keel.tasks.reading import (
    Row,
    answer_problems,
    has_nan,
    kind_of,
    message_problems,
    role_of,
    text_problems,
)
from keel.tasks.task import Text, completion_text

Form = Literal["pairs", "labels", "lists", "ratings"]
RATINGS = "`prompt`, `completion` and `score`, several rows of each prompt"
SAID = {**COLUMNS, "ratings": RATINGS}  # the columns of each form, in words
_NUMBERS = {"lists": ("scores", "ratings", "ranks"), "ratings": ("score", "rating")}
_OF_PAIRS = ("score_chosen", "score_rejected")
_TEXTS = {
    "pairs": ("chosen", "rejected"),
    "lists": ("completions", *_NUMBERS["lists"]),
    "labels": ("completion", "label"),
    "ratings": ("completion", *_NUMBERS["ratings"]),
}
MISSPELT = 0.75  # similarity from which a column is taken for a slip: `promt`, but not `source` for `score`
_SETTINGS = ("weight", "margin", "probability", "domain")
_RESERVED = ("prompts", "completion_ids")  # what reward functions are given under these names is not a column
_ORDER: dict[Kind, tuple[Form, ...]] = {  # which form is read where a row has the columns of several
    "pairs": ("pairs", "lists", "ratings", "labels"),
    "labels": ("labels", "pairs", "ratings", "lists"),
    "lists": ("lists", "ratings", "pairs", "labels"),
}


def form_of(row: Row, kind: Kind) -> Form | None:
    """What a row is, for a method that reads data of a kind; None where it compares nothing."""
    for form in _ORDER[kind]:
        if form == "pairs" and _has(row, "chosen") and _has(row, "rejected"):
            return form
        if form == "lists" and _has(row, "completions"):
            return form
        said = _has(row, "completion") or _has(row, "messages")
        if form == "labels" and said and _has(row, "label"):
            return form
        if form == "ratings" and said and any(_has(row, key) for key in _NUMBERS["ratings"]):
            return form
    return None


def problems(row: Row, kind: Kind) -> Iterator[str]:
    """All that is wrong with a row, in words."""
    form = form_of(row, kind)
    if form is None:
        names = ", ".join(map(repr, row)) or "none"
        yield f"compares nothing: it needs {COLUMNS[kind]}; the columns are {names}.{_misspelt(row)}"
        return
    found = [*_elementary(row, form), *_numbers(row, form), *_other_columns(row)]
    yield from found
    if found:
        return
    try:
        prompt, completions = sides(row, form)
    except ValueError as error:
        yield str(error)
        return
    for completion in completions:
        yield from answer_problems("completion", completion)
    yield from _equal_sides([completion_text(c) for c in completions], scores_of(row, form), form)
    yield from text_problems("prompt", prompt)


def preference_of(row: Row, form: Form, columns: Sequence[str], index: int) -> Preference:
    """What a sound row says; a list of one completion where it rates or labels one."""
    prompt, completions = sides(row, form)
    known = {"weight": 1.0, "margin": 0.0, "probability": 1.0}
    settings = {key: float(row[key]) if _has(row, key) else neutral for key, neutral in known.items()}
    domain = row.get("domain")
    ratings = tuple(float(row[key]) for key in _OF_PAIRS) if form == "pairs" and _has(row, _OF_PAIRS[0]) else None
    return Preference(
        prompt,
        completions,
        scores_of(row, form),
        index,
        domain="" if domain is None else str(domain),
        columns={key: row.get(key) for key in columns},
        ratings=ratings,
        **settings,
    )


def further_columns(rows: Sequence[Row], form: Form) -> list[str]:
    """Names of the columns that say nothing of the comparison."""
    read = {"prompt", "messages", *_TEXTS[form], *_SETTINGS, *(_OF_PAIRS if form == "pairs" else ())}
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in read]


def scores_of(row: Row, form: Form) -> tuple[float, ...]:
    """One number for each completion, larger is better."""
    if form == "pairs":
        return (1.0, 0.0)
    if form == "labels":
        return (float(row["label"]),)
    if form == "ratings":
        return (float(next(row[key] for key in _NUMBERS["ratings"] if _has(row, key))),)
    count = len(row["completions"])
    name = next((key for key in _NUMBERS["lists"] if _has(row, key)), None)
    if name is None:  # from the best to the worst
        return tuple(float(count - 1 - place) for place in range(count))
    numbers = [float(number) for number in row[name]]
    return tuple(max(numbers) - number for number in numbers) if name == "ranks" else tuple(numbers)


def sides(row: Row, form: Form) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and completions, all texts or all messages; of whole conversations the common beginning is the prompt.

    Raises:
        ValueError: they do not fit each other.
    """
    prompt: Any = row.get("prompt") if _has(row, "prompt") else row.get("messages")
    if form in ("labels", "ratings") and not _has(row, "completion"):
        return prompt[:-1], (prompt[-1:],)
    given: list[Any] = (
        [row["chosen"], row["rejected"]]
        if form == "pairs"
        else [row["completion"]]
        if (form in ("labels", "ratings"))
        else list(row["completions"])
    )
    if prompt is None:
        prompt, given = _without_prompt(given)
    conversations = [isinstance(completion, list) for completion in given]
    if isinstance(prompt, str) and any(conversations):
        if not all(conversations):
            raise ValueError("some completions are messages and some are text; all must be of one kind")
        prompt = _opening(prompt, given)
    if isinstance(prompt, list):
        given = [_answer(prompt, completion) for completion in given]
    return prompt, tuple(given)


def _without_prompt(given: list[Any]) -> tuple[Any, list[Any]]:
    """The common beginning of whole conversations, or of whole texts, and what follows it."""
    if all(isinstance(text, str) for text in given):
        shared = _common_beginning(given)
        shared = shared[: max(shared.rfind(" "), shared.rfind("\n"), shared.rfind("\t"), shared.rfind(":")) + 1]
        prompt = shared.rstrip(" ")  # the space before a word belongs to it
        if not prompt.strip():
            raise ValueError("there is no `prompt`, and the completions have no common beginning")
        return prompt, [text[len(prompt) :] for text in given]
    if not all(isinstance(messages, list) for messages in given):
        raise ValueError("some completions are messages and some are text; all must be of one kind")
    shortest = min(len(messages) for messages in given)
    count = next((i for i in range(shortest - 1) if any(m[i] != given[0][i] for m in given)), shortest - 1)
    if not count:
        raise ValueError("there is no `prompt`, and the conversations have no common beginning")
    return given[0][:count], [messages[count:] for messages in given]


def _common_beginning(texts: Sequence[str]) -> str:
    """
    >>> _common_beginning(["Q: 1+1? A: 2", "Q: 1+1? A: 3"])
    'Q: 1+1? A: '
    """
    first, last = min(texts), max(texts)  # whatever these two share all the others do
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _opening(prompt: str, given: list[Any]) -> list[dict[str, Any]]:
    """The messages of a prompt that is text beside completions that are messages."""
    if all(len(messages) == 1 for messages in given):
        return [{"role": "user", "content": prompt}]
    before = given[0][:-1]
    same = all(messages[:-1] == before for messages in given)
    if not same or not before or str(before[-1].get("content")).strip() != prompt.strip():
        raise ValueError("the conversations do not begin with `prompt`; give `prompt` as messages, or leave it out")
    return before


def _answer(prompt: list[dict[str, Any]], completion: Any) -> Any:
    """The message of the assistant that follows a prompt."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    follows = len(completion) > len(prompt) and completion[: len(prompt)] == prompt
    return completion[len(prompt) :] if follows else completion


def _elementary(row: Row, form: Form) -> Iterator[str]:
    """What is wrong with the texts by themselves."""
    if _has(row, "prompt") and _has(row, "messages"):
        yield "both `prompt` and `messages`; keep one"
    if _has(row, "prompt"):
        yield from text_problems("prompt", row["prompt"])
    if _has(row, "messages"):
        yield from message_problems("messages", row["messages"])
        answered = isinstance(row["messages"], list) and row["messages"] and role_of(row["messages"][-1]) == "assistant"
        own = form in ("labels", "ratings") and not _has(row, "completion")
        if own and not (answered and len(row["messages"]) > 1):
            yield "`messages` must hold a prompt and end with the assistant's message, or there must be a `completion`"
        if answered and not own:
            yield f"`messages` ends with the assistant's message, but {_texts_named(form)} follow"
    if form in ("labels", "ratings") and not _has(row, "messages") and not _has(row, "prompt"):
        yield "no `prompt`"
    if form == "lists":
        completions = row["completions"]
        if not isinstance(completions, list):
            yield f"`completions` must be a list, not {kind_of(completions)}"
            return
        if len(completions) < 2:
            yield f"`completions` needs at least two to compare, not {len(completions)}"
        for number, completion in enumerate(completions, start=1):
            yield from text_problems(f"completions[{number}]", completion, empty=True)
    for key in ("chosen", "rejected") if form == "pairs" else ("completion",):
        if form != "lists" and _has(row, key):
            yield from text_problems(key, row[key], empty=True)


def _numbers(row: Row, form: Form) -> Iterator[str]:
    """What is wrong with labels, scores, weights and the like."""
    if form == "labels" and row["label"] not in (True, False):
        yield f"`label` must be true or false, 1 or 0, not {row['label']!r}"
    for key in _NUMBERS["ratings"] if form == "ratings" else _OF_PAIRS if form == "pairs" else ():
        if _has(row, key) and not _is_number(row[key]):
            yield f"`{key}` must be a number, not {row[key]!r}"
    if form == "pairs" and _has(row, _OF_PAIRS[0]) != _has(row, _OF_PAIRS[1]):
        yield "only one of `score_chosen` and `score_rejected`; give both or none"
    if form == "lists":
        yield from _list_numbers(row)
    if _has(row, "weight") and not (_is_number(row["weight"]) and row["weight"] >= 0):
        yield f"`weight` must be a number from 0 on, not {row['weight']!r}"
    if _has(row, "margin") and not _is_number(row["margin"]):
        yield f"`margin` must be a number, not {row['margin']!r}"
    if _has(row, "probability") and not (_is_number(row["probability"]) and 0 <= row["probability"] <= 1):
        yield f"`probability` must be a number in [0, 1], not {row['probability']!r}"
    for key in ("margin", "probability"):
        if form == "labels" and _has(row, key):
            yield f"`{key}` is of pairs, and this row labels one completion"


def _list_numbers(row: Row) -> Iterator[str]:
    given = [key for key in _NUMBERS["lists"] if _has(row, key)]
    if len(given) > 1:
        yield f"both `{given[0]}` and `{given[1]}`; keep one"
    for key in given:
        numbers = row[key]
        if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
            yield f"`{key}` must be a list of numbers"
        elif isinstance(row["completions"], list) and len(numbers) != len(row["completions"]):
            yield f"`{key}` has {len(numbers)} numbers for {len(row['completions'])} completions"


def _other_columns(row: Row) -> Iterator[str]:
    for key, value in row.items():
        if not isinstance(key, str):
            yield f"column name {key!r} is no text"
        elif key in _RESERVED:
            yield f"a column cannot be named `{key}`: reward functions get something else under that name"
        elif key not in _SETTINGS and key not in _OF_PAIRS and has_nan(value):
            yield f"`{key}` is NaN or infinite; use null"


def _equal_sides(texts: list[str], scores: tuple[float, ...], form: Form) -> Iterator[str]:
    if form == "pairs" and texts[0] == texts[1]:
        yield "`chosen` and `rejected` are the same"
    for j in range(len(texts) if form == "lists" else 0):
        i = texts.index(texts[j])
        if scores[i] != scores[j]:
            yield f"completions {i + 1} and {j + 1} are the same, and one is better than the other"


def _texts_named(form: Form) -> str:
    return {"pairs": "`chosen` and `rejected`", "lists": "`completions`"}.get(form, "`completion`")


def _misspelt(row: Row) -> str:
    known = ("chosen", "rejected", "completions", "completion", "label", "score")
    other = (key for key in row if isinstance(key, str) and key not in (*known, "prompt", "messages"))
    missing = [key for key in known if key not in row]
    hints = {key: nearest(key, missing, MISSPELT) for key in other}
    return next((f" For {key!r}:{hint}" for key, hint in hints.items() if hint), "")


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None
