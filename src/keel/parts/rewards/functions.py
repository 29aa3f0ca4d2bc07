"""Reward functions: how they are found and called, and two verifiers for data with a column `answer`."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.core.errors import ConfigError, describe, nearest
from keel.core.registry import part
from keel.tasks.task import RewardFunction, Text, completion_text, final_answer

__all__ = [
    "ExactMatch",
    "MathVerify",
    "Parameters",
    "RewardFunction",
    "call_reward",
    "check_columns",
    "load_reward",
    "parameters",
]

GIVEN = ("prompts", "completions", "completion_ids")  # what every reward function may ask for besides columns


# Finding


def load_reward(reward: str | Callable[..., Any]) -> RewardFunction:
    """A reward function from `module:function`, `path/to/file.py:function`, or a callable.

    Modules in the current directory are found. A class is instantiated without arguments.

    Raises:
        ConfigError: there is no such module or function, or importing the module fails.

    >>> load_reward("keel.parts.rewards.functions:ExactMatch")(completions=["4", "5"], answer=["4", "4"])
    [1.0, 0.0]
    """
    if isinstance(reward, str):
        place, _, name = reward.rpartition(":")
        if not place or not name:
            raise ConfigError(f"got {reward!r}.", where="reward", fix="Write module:function, or file.py:function.")
        module = _file(place, reward) if place.endswith(".py") else _module(place, reward)
        found: Any = module
        for part in name.split("."):
            if not hasattr(found, part):
                raise ConfigError(f"{place} has no {name!r}.{nearest(name, _callables(module))}", where="reward")
            found = getattr(found, part)
    else:
        found = reward
    if inspect.isclass(found):
        found = found()
    if not callable(found):
        raise ConfigError(f"{reward!r} is {type(found).__name__}, not a function.", where="reward")
    return found


def _module(name: str, reward: str) -> ModuleType:
    if name.split(".")[0] != "keel":  # verifiers of Keel import nothing from the current directory
        _make_importable(os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        fix = "Modules are looked for in the current directory and among the installed packages."
        raise _unimportable(reward, error, fix if isinstance(error, ModuleNotFoundError) else None) from error


def _file(place: str, reward: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise ConfigError(f"no such file: {place}.", where="reward")
    _make_importable(str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(f"keel_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _unimportable(reward, error) from error
    return module


def _make_importable(directory: str) -> None:
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _unimportable(reward: str, error: Exception, fix: str | None = None) -> ConfigError:
    return ConfigError(f"{reward} cannot be imported: {describe(error)}.", where="reward", fix=fix)


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


# Calling


@dataclass(frozen=True)
class Parameters:
    """What a function's signature accepts (None: anything) and what it cannot do without."""

    accepted: frozenset[str] | None
    required: frozenset[str]


def parameters(function: Callable[..., Any]) -> Parameters:
    """The keywords that a reward function takes; one that knows them itself has an attribute `parameters`.

    >>> sorted(parameters(lambda completions, answer, strict=False: None).required)
    ['answer', 'completions']
    """
    known = getattr(function, "parameters", None)
    if isinstance(known, Parameters):
        return known
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return Parameters(None, frozenset())
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    required = frozenset(p.name for p in named if p.default is p.empty)
    return Parameters(None if anything else frozenset(p.name for p in named), required)


def check_columns(name: str, function: Callable[..., Any], columns: Iterable[str]) -> None:
    """Refuse a reward function that asks for a column which the data lacks.

    Raises:
        ConfigError: with the column, and the nearest that there is.
    """
    columns = list(columns)
    for missing in sorted(parameters(function).required - {*columns, *GIVEN}):
        have = ", ".join(columns) or "none"
        raise ConfigError(
            f"asks for the column {missing!r}, which the data lacks (it has {have}).{nearest(missing, columns)}",
            where=f"reward {name}",
        )


def call_reward(
    function: Callable[..., Any],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """Call a reward function with what its signature accepts, and check what it returns; one that is async is awaited.

    Raises:
        ValueError: not one value for each completion.
        TypeError: a value that is neither a number nor None.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    accepted = parameters(function).accepted
    if accepted is not None and hasattr(function, "parameters"):
        accepted |= {"completions"}  # who calls on behalf of another counts the answers by them
    keywords = {key: value for key, value in {**columns, **given}.items() if accepted is None or key in accepted}
    count = len(completions)  # before the function, which may change its arguments
    values = function(**keywords)
    return as_numbers(_awaited(values) if inspect.isawaitable(values) else values, count)


def _awaited(values: Awaitable[Any]) -> Any:
    """In an event loop of its own, in a thread of its own: this one may have a loop that runs, as in a notebook."""

    async def result() -> Any:
        return await values

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, result()).result()


def as_numbers(values: Any, count: int) -> list[float | None]:
    """What a reward function returned, as floats and None.

    >>> as_numbers([1, None, True], 3)
    [1.0, None, 1.0]
    """
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise TypeError(f"returned {type(values).__name__}, not a list with one value for each completion")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} completions")
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | complex) or not hasattr(value, "__float__"):
        raise TypeError(f"returned {type(value).__name__} {value!r:.40} as a reward; return a number, or None")
    return float(value)


# Verifiers

_MARKS = ("$", r"\boxed", r"\(", r"\[")  # of mathematics within a text
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # and no command of LaTeX


@part("exact_match")
@dataclass(frozen=True)
class ExactMatch:
    """Reward: 1 if the completion's answer is the text of the column `answer`, 0 if not, None where that is None.

    The completion's answer is what stands in the last `<answer>...</answer>`, or all of it; white space around it and
    around the column's text does not matter.

    Args:
        ignore_case: compare without regard to case.
    """

    ignore_case: bool = False

    def __call__(self, completions: Sequence[Text], answer: Sequence[Any], **columns: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [None if a is None else float(self._plain(final_answer(c)) == self._plain(str(a))) for c, a in pairs]

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


@part("math_verify")
@dataclass(frozen=True)
class MathVerify:
    r"""Reward: 1 if the completion's result equals the column `answer` as mathematics, else 0; None where that is None.

    Math-Verify extracts and compares: `0.5`, `\frac{1}{2}` and `1/2` are equal. The column may hold a number, LaTeX
    with or without `$`, or a worked solution that ends with `#### 72`. Math-Verify's own time limits, which are
    signals and work in
    the main thread only, are off: a comparison can take very long, so that this belongs in a worker process, as
    `keel.parts.rewards.functions:MathVerify`.

    Raises:
        ValueError: an `answer` in which Math-Verify finds nothing to compare with.
    """

    def __call__(self, completions: Sequence[Text], answer: Sequence[Any], **columns: Any) -> list[float | None]:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the absent time limits
        from math_verify import parse, verify

        rewards: list[float | None] = []
        for completion, gold in zip(completions, answer, strict=True):
            if gold is None:
                rewards.append(None)
                continue
            expected = _mathematics(str(gold).rpartition("####")[2])
            if not expected:
                raise ValueError(f"the answer {str(gold)[:80]!r} holds nothing that Math-Verify can compare with")
            text = completion_text(completion)
            tagged = final_answer(text)
            found = parse(text, parsing_timeout=None) if tagged == text.strip() else _mathematics(tagged)
            rewards.append(float(verify(expected, found, timeout_seconds=None)))
        return rewards


def _mathematics(text: str) -> list[Any]:
    """What Math-Verify reads in an answer that stands by itself, which may be LaTeX without `$`."""
    from math_verify import parse

    bare = text.strip() and not any(mark in text for mark in _MARKS) and not _WORD.search(text)
    found = parse(f"${text.strip()}$", parsing_timeout=None) if bare else []
    return found or parse(text, parsing_timeout=None)
