"""Tasks by name."""

from __future__ import annotations

import inspect
from typing import Any

from keel.core.errors import ConfigError, nearest
from keel.tasks.task import Task

_GYM = "reasoning_gym:"


def task_names() -> list[str]:
    """Names that `load_task` knows, without the `reasoning_gym:` that may precede all but the first."""
    from keel.tasks.gym import gym_names

    return ["countdown", *(name for name in gym_names() if name != "countdown")]


def load_task(name: str, **options: Any) -> Task:
    """A task by name.

    Args:
        name: `countdown`; or a data set of reasoning-gym, as `reasoning_gym:NAME` or as plain NAME.
        options: `held_out` for all; for reasoning-gym also `size`, `seed`, ... and the keys of the data set's
            configuration.

    Raises:
        ConfigError: an unknown task or option.
    """
    if name == "countdown":
        from keel.tasks.countdown import Countdown

        allowed = list(inspect.signature(Countdown).parameters)
        for key in options:
            if key not in allowed:
                raise ConfigError(
                    f"unknown option; allowed: {', '.join(allowed)}.",
                    where=f"task countdown, {key}",
                    fix=nearest(key, allowed).strip() or None,
                )
        return Countdown(**options)

    from keel.tasks.gym import GymTask, gym_names

    bare = name.removeprefix(_GYM)
    if bare in gym_names():
        return GymTask(bare, **options)
    known = gym_names() if name.startswith(_GYM) else task_names()
    raise ConfigError(
        f"unknown task {name!r}.{nearest(bare, known)}",
        where="task",
        fix="Known are `countdown` and the data sets of reasoning-gym; files are given as data.",
    )
