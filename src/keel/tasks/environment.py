"""Tasks of several turns: an environment that answers each message of the model, and says why an episode ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from keel.tasks.task import Example, Task


class Ended(IntEnum):
    """Why an episode ended."""

    ENVIRONMENT = 0  # the environment said so: solved, lost, or given up
    TURNS = 1  # the limit of turns was reached
    TOKENS = 2  # the completion, answers of the environment included, has no room for another turn
    CONTEXT = 3  # the model's context has none
    FAILED = 4  # the environment raised an error; the group leaves the batch


@dataclass(frozen=True)
class Answer:
    """What an environment says to one message of the model.

    Args:
        text: what the model reads next; it is never learnt. Nothing is shown after the last turn.
        reward: of this turn; an episode's reward is the sum.
        done: whether the episode is over.
        reason: in a word or two, for logs: "solved", "out of guesses".
        role: of the message where the prompt is messages: "user", or "tool" where the chat template knows it.
    """

    text: str = ""
    reward: float = 0.0
    done: bool = False
    reason: str = ""
    role: str = "user"


@runtime_checkable
class Environment(Protocol):
    """One episode; its whole randomness comes from the seed that it was opened with.

    It may have a third method, `finish(ended: Ended) -> float`. That is called once where a limit of turns, tokens or
    context ends the episode, and its reward counts as one of the last turn; without it such an episode keeps what its
    turns have earned.
    """

    def reset(self) -> str:
        """What the model reads first, after the prompt of the example; mostly nothing."""
        ...

    def step(self, text: str) -> Answer:
        """The answer to one message of the model, which is given without stop strings and special tokens."""
        ...


@runtime_checkable
class InteractiveTask(Task, Protocol):
    """A task whose examples open an environment each.

    `rewards` may hold functions that judge the whole episode beside the environment's own reward, which comes first and
    is named `environment`. `max_turns` limits an episode, `turn_ends` are the stop strings that end a turn (an end
    token does so, too), `max_turn_length` is in tokens, `max_completion_length` in tokens of the whole episode, the
    environment's answers included.
    """

    max_turns: int
    max_turn_length: int
    turn_ends: tuple[str, ...]

    def environment(self, example: Example, seed: int) -> Environment:
        """An episode of its own."""
        ...

    def demonstration(self, example: Example, seed: int) -> Sequence[tuple[str, bool]] | None:
        """A good episode in pieces (text, whether the model wrote it), drawn by `seed`; None where none is known.

        A piece of the model holds the stop string that ends its turn; without one it ends with the end token.
        """
        ...
