"""A task of which a model of some thousand parameters learns a little in a few steps."""

from keel.tasks.task import Example

ALPHABET = "0123456789 >=+-*/()"


def digit(completions, **_):
    """1 for a completion that begins with a digit."""
    return [float(text[:1].isdigit()) for text in completions]


class Lengths:
    """Sixty-four prompts to train on, and as many held out."""

    name = "lengths"
    characters = ALPHABET
    rewards = {"digit": digit}  # noqa: RUF012 (a task's, as Keel reads it)
    preset = {"train.learning_rate": 1e-2}  # noqa: RUF012
    max_completion_length = 4

    def __init__(self, held_out: int = 64):
        prompts = [f"{n} {n + 1} 3>{2 * n + 4}=" for n in range(1, 65 + held_out)]
        self.train = [Example(prompt, {}, i) for i, prompt in enumerate(prompts[:64])]
        self.held_out = [Example(prompt, {}, i) for i, prompt in enumerate(prompts[64:])]

    def solution(self, example, seed):
        """Any digit."""
        return str(seed % 10)

    def answer(self, completion, example):
        """The completion."""
        return completion or None
