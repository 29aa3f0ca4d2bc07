"""Tasks by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.core.errors import ConfigError, UserError, describe, nearest
from keel.tasks.task import Task

_GYM = "reasoning_gym:"
_VERIFIERS = "verifiers:"
_BUILT_IN = {
    "countdown": "keel.tasks.countdown:Countdown",
    "countdown_calculator": "keel.tasks.countdown_calculator:CountdownCalculator",
    "number_guessing": "keel.tasks.number_guessing:NumberGuessing",
    "proxy": "keel.tasks.proxy:Proxy",
    "saturated": "keel.tasks.saturated:Saturated",
    "sparse": "keel.tasks.sparse:Sparse",
}
_MEMBERS = (
    "name",
    "train",
    "held_out",
    "rewards",
    "preset",
    "max_completion_length",
    "characters",
    "solution",
    "answer",
)


def task_names() -> list[str]:
    """Names that `load_task` knows, without the `reasoning_gym:` that may precede all but the first."""
    from keel.tasks.gym import gym_names

    return [*_BUILT_IN, *(name for name in gym_names() if name not in _BUILT_IN)]


def load_task(name: str, **options: Any) -> Task:
    """A task by name.

    Args:
        name: `countdown`; a data set of reasoning-gym, as `reasoning_gym:NAME` or as plain NAME; `verifiers:ID` for
            an environment of the package `verifiers`; or one's own, as `file.py:NAME` or `module:NAME`, where NAME
            is a class or a function that gives a task, or a task.
        options: `held_out` for all of Keel's; for reasoning-gym also `size`, `seed`, ... , the keys of the data set's
            configuration, and `attempts` for a task of several turns; for one's own, what it takes.

    Raises:
        ConfigError: an unknown task or option, or a file or module that gives no task.
    """
    if name in _BUILT_IN:
        place, _, attribute = _BUILT_IN[name].partition(":")
        built_in = getattr(importlib.import_module(place), attribute)
        allowed = list(inspect.signature(built_in).parameters)
        for key in options:
            if key not in allowed:
                raise ConfigError(
                    f"unknown option; allowed: {', '.join(allowed)}.",
                    where=f"task {name}, {key}",
                    fix=nearest(key, allowed).strip() or None,
                )
        return built_in(**options)
    if name.startswith(_VERIFIERS):
        from keel.tasks.verifiers import verifiers_task

        return verifiers_task(name.removeprefix(_VERIFIERS), **options)
    if ":" in name and not name.startswith(_GYM):
        return _own(name, options)

    from keel.tasks.gym import GymTask, gym_names

    bare = name.removeprefix(_GYM)
    if bare in gym_names():
        if "attempts" in options:
            from keel.tasks.attempts import GymAttempts

            return GymAttempts(bare, **options)
        return GymTask(bare, **options)
    known = gym_names() if name.startswith(_GYM) else task_names()
    raise ConfigError(
        f"unknown task {name!r}.{nearest(bare, known)}",
        where="task",
        fix="Known are `countdown`, the data sets of reasoning-gym, `verifiers:ID`, and one's own as `file.py:NAME` "
        "or `module:NAME`; files are given as data.",
    )


def _own(name: str, options: dict[str, Any]) -> Task:
    """A task of one's own: `file.py:NAME` or `module:NAME`."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"got {name!r}.", "task", "Write file.py:NAME, or module:NAME.")
    module = _file(place) if place.endswith(".py") else _module(place)
    if not hasattr(module, attribute):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{place} has no {attribute!r}.{nearest(attribute, offered)}", f"task {name}")
    found = getattr(module, attribute)
    if callable(found):
        found = _built(found, name, options)
    elif options:
        fix = "Give a class or a function that takes them."
        raise ConfigError(f"it is no class and takes no options, but got {', '.join(options)}.", f"task {name}", fix)
    if not isinstance(found, Task):
        lacking = ", ".join(member for member in _MEMBERS if not hasattr(found, member))
        what = f"{type(found).__name__} is no task; it lacks {lacking}."
        raise ConfigError(what, f"task {name}", "A task has the members of keel.tasks.Task.")
    return found


def _signature(make: Any) -> inspect.Signature | None:
    """What it takes; None of a built-in class that does not tell, whose call says what is wrong."""
    try:
        return inspect.signature(make)
    except ValueError:
        return None


def _built(make: Any, name: str, options: dict[str, Any]) -> Any:
    """What a class or function of one's own gives, its options checked before it runs."""
    signature = _signature(make)
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            takes = ", ".join(map(str, signature.parameters.values())) or "nothing"
            raise ConfigError(f"its options do not fit: {error}.", f"task {name}", f"It takes {takes}.") from error
    try:
        return make(**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"it refused its options: {describe(error)}", f"task {name}") from error


def _module(name: str) -> ModuleType:
    _make_importable(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        what = f"there is no module {error.name!r}." if error.name else f"{error}."
        fix = "Modules are looked for in the current directory and among the installed packages; files end in .py."
        raise ConfigError(what, f"task {name}", fix) from error
    except Exception as error:
        raise ConfigError(f"cannot be imported: {describe(error)}", f"task {name}") from error


def _file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise ConfigError(f"no such file: {place}.", "task")
    _make_importable(str(path.parent))  # so that the file can import its neighbours
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(f"keel_task_{path.stem}_{mark}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"cannot be imported: {describe(error)}", f"task {place}") from error
    return module


def _make_importable(directory: str) -> None:
    if directory not in sys.path:
        sys.path.insert(0, directory)
