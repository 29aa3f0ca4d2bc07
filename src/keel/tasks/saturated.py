"""Saturated: nearly every completion is right before training, so that only what a method takes away can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.tasks.countdown import Countdown, correct, evaluate, leaves, parse
from keel.tasks.task import Example, RewardFunction, Task, Text, completion_text


def uses_all(
    prompts: Sequence[Text], completions: Sequence[Text], *, numbers: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """Reward: 1 for an expression that has a value and uses each number exactly once, whatever the target.

    >>> uses_all(["3 6 17>20="] * 3, ["3*6+17", "6-3", "6/(3-3)*17"], numbers=[[3, 6, 17]] * 3)
    [1.0, 0.0, 0.0]
    """
    return [float(is_expression_of(completion_text(c), n)) for c, n in zip(completions, numbers, strict=True)]


def is_expression_of(text: str, numbers: Sequence[int]) -> bool:
    """Whether the text is an expression with a value that uses each number exactly once."""
    tree = parse(text.strip())
    return tree is not None and sorted(leaves(tree)) == sorted(numbers) and evaluate(tree)[1] != 0


class Saturated:
    """The prompts of countdown, with a reward for any expression of the three numbers, whatever its value.

    The built-in model of countdown does this in 95% of its completions, so that two thirds of the groups of eight are
    tied at 1 and little is left to learn. What a method does besides can be seen: entropy, length, `distinct_answers`
    (the ways of writing an expression among the samples of a prompt; 5.2 of 16 before training), and the hidden
    function `correct`, countdown's own reward (0.36 before training), which nothing but the reference keeps up.

    Args:
        held_out: number of held-out examples.

    Raises:
        ConfigError: `held_out` below 1 or above the number of instances set aside.
    """

    name = "saturated"
    characters: str | None = Countdown.characters

    def __init__(self, held_out: int = 512):
        self._countdown = Countdown(held_out)
        self.train: Sequence[Example] = self._countdown.train
        self.held_out: Sequence[Example] = self._countdown.held_out
        self.rewards: dict[str, RewardFunction] = {"uses_all": uses_all}
        self.hidden: dict[str, RewardFunction] = {"correct": correct}
        self.max_completion_length = self._countdown.max_completion_length
        self.preset: dict[str, Any] = self._countdown.preset

    def base_task(self) -> Task:
        """Countdown, as it is by default: what is held out here is set aside there, too."""
        return Countdown()

    def solution(self, example: Example, seed: int) -> str | None:
        """A correct expression of countdown, which uses all numbers."""
        return self._countdown.solution(example, seed)

    def answer(self, completion: Text, example: Example) -> str | None:
        """The normal form of the expression, whatever its value; None where it has none."""
        return self._countdown.answer(completion, example)
