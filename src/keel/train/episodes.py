"""Tasks of several turns in the loop: how their rows are drawn, and what does not go with them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from keel.core.errors import ConfigError, DataError
from keel.core.rows import Stream, cat
from keel.method import Method
from keel.parts.rewards.turns import TurnReward
from keel.rollouts.episodes import Limits, Played, play
from keel.rollouts.rollout import Rollout
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example, Task

if TYPE_CHECKING:
    from keel.train.session import Session


def draw_episodes(session: "Session", examples: Sequence[Example], step: int, index: Sequence[int]) -> Played:
    """The episodes of a round, without what reward functions say of them; the arguments are those of `draw_rows`."""
    rollout, task = session.method.rollout, session.task
    assert rollout is not None and isinstance(task, InteractiveTask)
    limits = limits_of(task, rollout, session.policy.context_length)
    known: dict[str, Any] = {"seed": session.config.seed, "step": step, "data_index": index}
    common = (limits, session.encoder)
    played = play(session.generator, task, examples, rollout.num_generations, rollout.sampling, *common, **known)
    if rollout.greedy_baseline:
        greedy = replace(rollout.sampling, temperature=0.0, top_k=None, top_p=None, min_p=None)
        first = rollout.num_generations
        best = play(session.generator, task, examples, 1, greedy, *common, first_sample=first, **known)
        aside = best.rows.with_(stream=torch.full_like(best.rows.stream, int(Stream.BASELINE)))
        told = {name: [*values, *best.columns[name]] for name, values in played.columns.items()}
        rows = cat([played.rows, aside])
        played = Played(rows, [*played.replies, *best.replies], told, played.seconds + best.seconds)
    return played


def limits_of(task: InteractiveTask, rollout: Rollout | None, context: int | None) -> Limits:
    """What ends an episode in training: the rollout's settings, or else the task's."""
    if rollout is None:
        return Limits.of(task, context)
    return Limits.of(
        task,
        context,
        max_turns=rollout.max_turns,
        max_turn_length=rollout.max_turn_length,
        max_completion_length=rollout.max_completion_length,
    )


def evaluation_limits(
    task: Task, rollout: Rollout | None, context: int | None, max_completion_length: int
) -> Limits | None:
    """What ends an episode in an evaluation: as in training, but for the tokens; None on a task of a single turn."""
    if not isinstance(task, InteractiveTask):
        return None
    return replace(limits_of(task, rollout, context), max_completion_length=max_completion_length)


def check_episodes(method: Method, task: Task) -> None:
    """Refuse what goes with episodes only, or not with them.

    Raises:
        ConfigError: a sampler on a task of several turns; limits or rewards of turns on one without.
    """
    rollout = method.rollout
    if isinstance(task, InteractiveTask):
        if rollout is not None and rollout.sampler is not None:
            raise ConfigError(
                f"{type(rollout.sampler).__name__} copies and weighs unfinished texts, and an environment cannot be "
                f"copied in the middle of an episode of '{task.name}'",
                "rollout.sampler",
                "Leave it out, or take a task of a single turn.",
            )
        if rollout is not None and rollout.extra is not None:
            raise ConfigError(
                "extra completions are drawn of tasks of a single turn only",
                "rollout.extra",
                f"Leave them out, or take another task than '{task.name}'.",
            )
        if rollout is not None and rollout.writers:
            raise ConfigError(
                "other models write single completions, and this task has several turns",
                "rollout",
                f"Take a recipe whose completions are the policy's own, or another task than '{task.name}'.",
            )
        return
    for name in ("max_turns", "max_turn_length"):
        if rollout is not None and getattr(rollout, name) is not None:
            raise ConfigError(f"is for tasks of several turns, and '{task.name}' is none", f"rollout.{name}")
    for name, item in method.transforms.items():
        if isinstance(item, TurnReward):
            raise ConfigError(f"is for tasks of several turns, and '{task.name}' is none", f"transforms.{name}")


def demonstrations(task: InteractiveTask, examples: Sequence[Example], first: int) -> list[list[tuple[str, bool]]]:
    """A good episode of each example, the i-th drawn with seed first + i.

    Raises:
        DataError: the task knows none for some example.
    """
    found = []
    for i, example in enumerate(examples):
        pieces = task.demonstration(example, first + i)
        if not pieces or not any(own for _, own in pieces):
            raise DataError(
                "has no demonstration to learn from",
                f"{task.name}, example {example.index}",
                "Give the task a `demonstration`, or train another way.",
            )
        found.append([(text, own) for text, own in pieces])
    return found
