"""Number guessing: find a secret number, told after each guess on which side of it the secret lies.

The prompt names the largest possible number, `100:`. Then guesses and hints take turns:

    100:50
    <20
    >31
    =

`<` says that the secret is lower than the guess before, `>` that it is higher, `?` that the line was no number in
range. The episode ends with the secret, or when the turns are used up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from keel.core.errors import ConfigError
from keel.tasks.environment import Answer
from keel.tasks.task import Example, RewardFunction, Text, check_disjoint, completion_text

LOWER, HIGHER, UNREADABLE = "<", ">", "?"
END = "\n"
SMALLEST, LARGEST = 4, 9999  # of `max_number`
CAREFUL = 0.1  # share of the games tried for a demonstration that are played with care; more of these are won
LOOKED_AT = 128  # held-out examples, unless told otherwise
SPARE = 5  # one instance of so many is set aside


class Guessing:
    """One episode; nothing in it is random.

    Args:
        secret: to be found.
        max_number: guesses beyond it are told to be unreadable.
        turns: guesses allowed.
        speed: share of the turns left that is added to the reward of 1.
    """

    def __init__(self, secret: int, max_number: int, turns: int, speed: float = 0.0):
        self.secret, self.max_number, self.turns, self.speed = secret, max_number, turns, speed
        self.used = 0

    def reset(self) -> str:
        """The prompt says it all."""
        return ""

    def step(self, text: str) -> Answer:
        """On which side of the guess the secret lies; reward 1 (and what speed adds) when it is found."""
        self.used += 1
        guess = _number(text, self.max_number)
        if guess == self.secret:
            left = (self.turns - self.used) / self.turns
            return Answer(reward=1.0 + self.speed * left, done=True, reason="found")
        if self.used >= self.turns:
            return Answer(done=True, reason="out of guesses")
        if guess is None:
            return Answer(UNREADABLE)
        return Answer(LOWER if self.secret < guess else HIGHER)


class NumberGuessing:
    """Guess a secret between 1 and the number in the prompt.

    An instance is a largest number N, from half of `max_number` on, and a secret. Every fifth instance, by lot,
    is set aside, some of which are `held_out`. Bisection finds a secret with certainty, within 4 turns below 16 and 7
    below 128.

    The demonstrations, from which the built-in model learns, are far from that. In nine of ten games each guess is
    drawn from all numbers on the right side of the guess before, and what was said earlier is forgotten: a secret is
    then found in 4 turns 54 times in 100. In the others it is drawn from the middle third of what all hints leave.
    Games that are lost are no demonstrations.

    The range is small because luck is noise: all episodes of a group have one secret, and those that hit on it teach
    the model to guess that number. With few numbers a batch has all of them.

    Args:
        max_number: N at most.
        turns: guesses allowed.
        speed: reward for speed: speed (turns left) / turns, on top of 1.
        held_out: number of held-out examples; None takes 128, or all that are set aside where they are fewer.

    Raises:
        ConfigError: a value out of its range.
    """

    name = "number_guessing"
    characters: str | None = "0123456789:<>?\n"
    turn_ends: tuple[str, ...] = (END,)

    def __init__(self, max_number: int = 16, turns: int = 4, speed: float = 0.0, held_out: int | None = None):
        _check("max_number", max_number, SMALLEST, LARGEST)
        _check("turns", turns, 1, 1000)
        if isinstance(speed, bool) or not 0 <= speed <= 10:
            raise ConfigError(f"must be from 0 to 10, got {speed!r}.", "task number_guessing, speed")
        self.max_number, self.turns, self.speed = max_number, turns, float(speed)
        every = [(n, secret) for n in range(max(2, max_number // 2), max_number + 1) for secret in range(1, n + 1)]
        random.Random("number guessing").shuffle(every)
        spare = max(1, len(every) // SPARE)
        held_out = min(LOOKED_AT, spare) if held_out is None else held_out
        _check("held_out", held_out, 1, spare)
        aside, rest = every[:spare], every[spare:]
        check_disjoint(self.name, rest, aside[:held_out])
        self.train: Sequence[Example] = [_example(i, *pair) for i, pair in enumerate(rest)]
        self.held_out: Sequence[Example] = [_example(i, *pair) for i, pair in enumerate(aside[:held_out])]
        self.rewards: dict[str, RewardFunction] = {}
        self.max_turns = turns
        self.max_turn_length = len(str(max_number)) + 1
        self.max_completion_length = turns * (self.max_turn_length + 1)
        self.preset: dict[str, Any] = {
            "rollout.num_prompts": 16,
            "rollout.num_generations": 8,
            "rollout.max_completion_length": self.max_completion_length,
            "train.learning_rate": 1e-3,
            "train.adam_beta2": 0.95,
            "train.max_steps": 100,
        }
        self.base_recipe: dict[str, Any] = {
            "shape": {"dim": 64, "layers": 3, "heads": 4, "feed_forward": 128},
            "steps": 300,
            "batch_size": 32,
            "learning_rate": 3e-3,
        }

    def environment(self, example: Example, seed: int) -> Guessing:
        """An episode with the example's secret, whatever the seed."""
        return Guessing(example.columns["secret"], example.columns["max_number"], self.turns, self.speed)

    def demonstration(self, example: Example, seed: int) -> list[tuple[str, bool]] | None:
        """A random search, mostly one that forgets all but the last hint, that succeeds in time."""
        draw = random.Random(f"{seed} {example.prompt} {example.columns['secret']}")
        secret, highest = example.columns["secret"], example.columns["max_number"]
        while True:
            pieces: list[tuple[str, bool]] = []
            low, high = 1, highest
            careful = draw.random() < CAREFUL
            for _ in range(self.turns):
                edge = (high - low) // 3 if careful else 0
                guess = draw.randint(low + edge, high - edge)
                pieces.append((f"{guess}{END}", True))
                if guess == secret:
                    return pieces
                before = (low, high) if careful else (1, highest)
                low, high = (guess + 1, before[1]) if guess < secret else (before[0], guess - 1)
                pieces.append((HIGHER if guess < secret else LOWER, False))

    def solution(self, example: Example, seed: int) -> str | None:
        """The episode of a player who knows."""
        return f"{example.columns['secret']}{END}"

    def answer(self, completion: Text, example: Example) -> str | None:
        """The last guess; None where it was no number in range."""
        lines = completion_text(completion).strip().splitlines()
        guess = _number(lines[-1].lstrip(LOWER + HIGHER + UNREADABLE), example.columns["max_number"]) if lines else None
        return None if guess is None else str(guess)


def bisection(secret: int, max_number: int) -> list[int]:
    """The guesses of a player who halves what is left.

    >>> bisection(31, 100)
    [50, 25, 37, 31]
    """
    low, high, guesses = 1, max_number, [(1 + max_number) // 2]
    while guesses[-1] != secret:
        low, high = (guesses[-1] + 1, high) if guesses[-1] < secret else (low, guesses[-1] - 1)
        guesses.append((low + high) // 2)
    return guesses


def _number(text: str, highest: int) -> int | None:
    """What a line says; None where it is no number from 1 to the highest."""
    text = text.strip()
    known = text.isascii() and text.isdigit() and len(text) <= len(str(highest)) and 1 <= int(text) <= highest
    return int(text) if known else None


def _example(index: int, highest: int, secret: int) -> Example:
    return Example(f"{highest}:", {"max_number": highest, "secret": secret}, index)


def _check(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"must be from {low} to {high}, got {value!r}.", f"task number_guessing, {name}")
