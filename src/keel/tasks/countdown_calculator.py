"""Countdown with a calculator: make a target from three numbers, with exact values on request.

A line that begins with `?` asks the calculator, and its answer is the next line; any other line is the final answer:

    8 7 3>31=?8*7-3
    53
    ?8*3+7
    31
    8*3+7
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any

from keel.core.errors import ConfigError
from keel.tasks.countdown import Countdown, evaluate, is_correct, normal_form, parse, solutions, templates
from keel.tasks.environment import Answer
from keel.tasks.task import Example, RewardFunction, Text, completion_text

ASK, END = "?", "\n"
ERROR = "error"  # what the calculator says of what it cannot read, and of a division by zero
LONGEST_TURN = 14  # characters: `?`, ten for an expression of two-digit numbers with parentheses, some in reserve, END
LONGEST_VALUE = 8  # characters of an answer, END included; a longer value is not shown
AIM = 0.5  # share of the demonstrations' questions that ask for a solution


class Calculator:
    """One episode; nothing in it is random.

    Args:
        numbers, target: of the instance.
        turns: lines allowed, the final one included.
    """

    def __init__(self, numbers: Sequence[int], target: int, turns: int):
        self.numbers, self.target, self.turns = list(numbers), target, turns
        self.used = 0

    def reset(self) -> str:
        """The prompt says it all."""
        return ""

    def step(self, text: str) -> Answer:
        """The value of an expression, or the verdict on an answer."""
        self.used += 1
        if not text.startswith(ASK):
            correct = is_correct(text, self.numbers, self.target)
            return Answer(reward=float(correct), done=True, reason="right" if correct else "wrong")
        if self.used >= self.turns:
            return Answer(done=True, reason="out of turns")
        return Answer(calculated(text.removeprefix(ASK)) + END)


def calculated(text: str) -> str:
    """The exact value of an expression as a whole number or a fraction in lowest terms, or `error`.

    >>> calculated("8*3+7"), calculated("3-8"), calculated("8/6"), calculated("8/(3-3)"), calculated("8*")
    ('31', '-5', '4/3', 'error', 'error')
    """
    tree = parse(text)
    if tree is None:
        return ERROR
    above, below = evaluate(tree)
    if below == 0:
        return ERROR
    shared = gcd(above, below) * (1 if below > 0 else -1)
    above, below = above // shared, below // shared
    if max(abs(above), below) >= 10**LONGEST_VALUE:
        return ERROR
    value = str(above) if below == 1 else f"{above}/{below}"
    return value if len(value) < LONGEST_VALUE else ERROR


class CountdownCalculator:
    """The instances of countdown, with a calculator that the model may ask before it answers.

    The demonstrations try expressions of the three numbers, half of them right, until the calculator shows the
    target, and answer with the one that did.

    Args:
        turns: lines allowed, the final one included; at least 1.
        held_out, hard: as in `Countdown`, but the hard instances are taken, too, unless told otherwise.

    Raises:
        ConfigError: a value out of its range.
    """

    name = "countdown_calculator"
    characters: str | None = "0123456789 >=+-*/()?\nero"
    turn_ends: tuple[str, ...] = (END,)

    def __init__(self, turns: int = 8, held_out: int = 512, hard: bool = True):
        if not isinstance(turns, int) or isinstance(turns, bool) or not 1 <= turns <= 1000:
            raise ConfigError(f"must be from 1 to 1000, got {turns!r}.", "task countdown_calculator, turns")
        plain = Countdown(held_out, hard)
        self.train: Sequence[Example] = plain.train
        self.held_out: Sequence[Example] = plain.held_out
        self.turns = self.max_turns = turns
        self.rewards: dict[str, RewardFunction] = {}
        self.max_turn_length = LONGEST_TURN
        self.max_completion_length = turns * LONGEST_TURN + (turns - 1) * LONGEST_VALUE
        self.preset: dict[str, Any] = {
            "rollout.num_prompts": 16,
            "rollout.num_generations": 8,
            "rollout.max_completion_length": self.max_completion_length,
            "train.learning_rate": 3e-4,
            "train.adam_beta2": 0.95,
            "train.max_steps": 100,
        }
        self.base_recipe: dict[str, Any] = {
            "shape": {"dim": 64, "layers": 3, "heads": 4, "feed_forward": 128},
            "steps": 600,
            "batch_size": 48,
            "learning_rate": 3e-3,
        }

    def environment(self, example: Example, seed: int) -> Calculator:
        """An episode with the example's numbers, whatever the seed."""
        return Calculator(example.columns["numbers"], example.columns["target"], self.turns)

    def demonstration(self, example: Example, seed: int) -> list[tuple[str, bool]] | None:
        """Expressions tried until one is right; None where no turn is left for a question."""
        draw = random.Random(f"{seed} {example.prompt}")
        numbers, target = example.columns["numbers"], example.columns["target"]
        right = solutions(tuple(numbers), target)
        pieces: list[tuple[str, bool]] = []
        found = ""
        for turn in range(self.turns - 1):
            last = turn == self.turns - 2
            text = draw.choice(right) if last or draw.random() < AIM else draw.choice(_every()).format(*numbers)
            pieces += [(f"{ASK}{text}{END}", True), (calculated(text) + END, False)]
            if is_correct(text, numbers, target):
                found = text
                break
        return [*pieces, (f"{found or draw.choice(right)}{END}", True)]

    def solution(self, example: Example, seed: int) -> str | None:
        """A correct expression, without a question."""
        found = solutions(tuple(example.columns["numbers"]), example.columns["target"])
        return random.Random(f"{seed} {example.prompt}").choice(found) + END if found else None

    def answer(self, completion: Text, example: Example) -> str | None:
        """The normal form of the final expression; None where the last line is a question or cannot be read."""
        lines = completion_text(completion).splitlines()
        tree = parse(lines[-1].strip()) if lines else None
        return None if tree is None or evaluate(tree)[1] == 0 else normal_form(tree)


@lru_cache(maxsize=1)
def _every() -> tuple[str, ...]:
    return tuple(templates())
