"""Finished cells on disk: one small file each, what made it stale, and who is at work on it."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import fingerprint
from benchmarks.cells import BASE, Cell, configured, task_named
from benchmarks.measuring import ROOT
from keel.core.config import to_config
from keel.method import Claim
from keel.train.base import VERSION, base_recipe

FOLDER = ROOT / "benchmarks" / "results"
ENGINE = (
    "benchmarks.cells:run_cell",
    "keel.core.aggregate:Aggregation",
    "keel.method:Method",
    "keel.parts.terms.penalties:Summand",
    "keel.parts.terms.surrogate:Surrogate",
    "keel.rollouts.rollout:Rollout",
    "keel.train.settings:micro_batch_tokens",
)
MISSING, STALE, FRESH = "missing", "stale", "fresh"
Code = dict[str, str]


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Args:
        cell: what was run.
        code: digests of what decided its numbers; see `code_of`.
        numbers: the same again on the same machine; empty where it failed.
        times: seconds.
        machine: versions, and the processor.
        base: checksum of the weights that it began with; another processor rounds otherwise, and trains another.
        error: why there are no numbers.
        vouched: cells that were run again with the same numbers after a change of code, and what it changed.
    """

    cell: Cell
    code: Code
    numbers: Mapping[str, Any]
    times: Mapping[str, Any]
    machine: Mapping[str, str]
    base: str = ""
    error: str | None = None
    vouched: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}
        return {**self.cell.to_json(), **{k: v for k, v in plain.items() if v is not None}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Result":
        """The inverse of `to_json`."""
        known = {f.name for f in fields(Result)} - {"cell"}
        return Result(Cell.from_json(data), **{k: v for k, v in data.items() if k in known})


# -- what a result depends on ----------------------------------------------------------------------------------------


def key(cell: Cell) -> str:
    """Digest of what is run; code has no part in it, so that a cell keeps its file."""
    return _digest(cell.to_json())


def code_of(cell: Cell) -> Code:
    """Digests of all that decides the numbers of a cell.

    `engine`: the loop, the models, the statistics, the evaluation. `task`. `base`: how the model to start from is made.
    `parts`: the parts of the method, without what the engine has already. `composition`: how the recipe puts them
    together. `settings`: of the loop.
    """
    return dict(_code_of(replace(cell, seed=0)))  # the same for all seeds


@cache
def _code_of(cell: Cell) -> Code:
    config = configured(cell if cell.recipe != BASE else replace(cell, recipe="grpo"))
    task = task_named(cell.task)
    source = task.base_task() if hasattr(task, "base_task") else task
    engine = frozenset(_reached(ENGINE))
    parts = () if cell.recipe == BASE else tuple(sorted({fingerprint.place_of(p) for p in walk(config.method)}))
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("model", "train", "evaluate", "task")}
    return {
        "engine": fingerprint.digest(*ENGINE),
        "task": fingerprint.digest(fingerprint.place_of(task)),
        "base": _digest([VERSION, repr(base_recipe(source)), source.characters, fingerprint.place_of(source)]),
        "parts": fingerprint.digest(*parts, without=engine),
        "composition": _digest(composition(config.method) if parts else None),
        "settings": _digest(sections),
    }


@cache
def _reached(roots: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(fingerprint.reached(roots))


def walk(part: Any) -> Iterator[Any]:
    """A part and the parts within; what it claims decides no number."""
    if isinstance(part, Claim):
        return
    if is_dataclass(part) and not isinstance(part, type):
        yield part
        for item in fields(part):
            yield from walk(getattr(part, item.name))
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from walk(value)
    elif isinstance(part, (tuple, list)):
        for value in part:
            yield from walk(value)


def composition(part: Any) -> Any:
    """A method as plain values, defaults left out: they are code, and a new field at its default changes nothing."""
    if isinstance(part, Claim):
        return None
    if is_dataclass(part) and not isinstance(part, type):
        own = {f.name: getattr(part, f.name) for f in fields(part)}
        defaults = {f.name: f.default for f in fields(part)}
        return [fingerprint.place_of(part), {k: composition(v) for k, v in own.items() if not _same(v, defaults[k])}]
    if isinstance(part, Mapping):
        return {str(k): composition(v) for k, v in part.items()}
    if isinstance(part, (tuple, list)):
        return [composition(v) for v in part]
    return to_config(part) if not callable(part) else fingerprint.place_of(part)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _digest(data: Any) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


# -- files -----------------------------------------------------------------------------------------------------------


def path_of(cell: Cell, folder: Path = FOLDER) -> Path:
    """Where its result is."""
    return folder / f"{cell.recipe}-{cell.task}-{cell.seed}-{key(cell)}.json"


def stored(cell: Cell, folder: Path = FOLDER) -> Result | None:
    """The result of a cell, whatever code it is of; None if there is none."""
    path = path_of(cell, folder)
    try:
        return Result.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of a cell ({error}); remove it") from error


def everything(folder: Path = FOLDER) -> list[Result]:
    """All results, whatever code they are of."""
    return [Result.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def elsewhere(folder: Path = FOLDER) -> Path:
    """Holds a folder for each base with which few cells began: the baselines that these are compared with."""
    return folder / "elsewhere"


def state_of(cell: Cell, folder: Path = FOLDER) -> str:
    """missing, stale or fresh."""
    found = stored(cell, folder)
    if found is None:
        return MISSING
    return FRESH if found.code == code_of(cell) else STALE


def write(result: Result, folder: Path = FOLDER) -> None:
    """All of it or nothing: under another name first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(result.cell, folder)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(what: Cell | str, folder: Path = FOLDER) -> Iterator[bool]:
    """Whether this process may do what is named: no other is at it. One lock file serves all, a byte for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = what if isinstance(what, str) else key(what)
    place = int(hashlib.blake2b(name.encode()).hexdigest()[:7], 16)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
            return
        yield True
