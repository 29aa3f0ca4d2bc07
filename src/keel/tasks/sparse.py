"""Sparse: few prompts are ever solved before training, so that exploration and coverage decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.tasks.countdown import Countdown, correct
from keel.tasks.task import Example, RewardFunction, Task, Text


class Sparse:
    """The instances of countdown that cannot be solved without a division, `18 12 10>3=` -> `18/(18-12)`.

    The built-in model has seen such solutions among others. On held-out prompts it has pass@1 0.059 and pass@16 0.59,
    and about two thirds of the groups of eight are tied.

    Args:
        held_out: number of held-out examples, at most 220.

    Raises:
        ConfigError: `held_out` below 1 or above the number of instances set aside.
    """

    name = "sparse"
    characters: str | None = Countdown.characters

    def __init__(self, held_out: int = 200):
        self._countdown = Countdown(held_out, hard=True, needs="/")
        self.train: Sequence[Example] = self._countdown.train
        self.held_out: Sequence[Example] = self._countdown.held_out
        self.rewards: dict[str, RewardFunction] = {"correct": correct}
        self.max_completion_length = self._countdown.max_completion_length
        self.preset: dict[str, Any] = self._countdown.preset | {"train.learning_rate": 3e-4}

    def base_task(self) -> Task:
        """Countdown with its hard instances: what is held out here is set aside there, too."""
        return Countdown(hard=True)

    def solution(self, example: Example, seed: int) -> str | None:
        """One of the distinct correct expressions, each with the same probability."""
        return self._countdown.solution(example, seed)

    def answer(self, completion: Text, example: Example) -> str | None:
        """The normal form of the expression, correct or not; None where it has no value."""
        return self._countdown.answer(completion, example)
