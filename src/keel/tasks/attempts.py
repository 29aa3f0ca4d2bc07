"""Several attempts at each question of reasoning-gym: what was wrong is said, and the model may try again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from keel.core.errors import ConfigError, nearest
from keel.tasks.environment import Answer
from keel.tasks.gym import GymTask
from keel.tasks.task import Example, RewardFunction

Keep = Literal["best", "last"]
FEEDBACK = "\nThat is not right. Attempts left: {left}.\n"
_CLOSED = "</answer>"
_FEEDBACK_TOKENS = 64  # room for one feedback in the default length of an episode


class GymAttempts(GymTask):
    """A data set of reasoning-gym in which the model may answer several times.

    With s_t the data set's score of attempt t, and v_t = discount^(t-1) s_t, an episode's reward is

        max_t v_t   (keep "best"),      v_T of the last attempt   (keep "last").

    Each turn brings what it adds to that (v_t - max_{u<t} v_u where it is positive, or v_t - v_{t-1}), so that the sum
    is right wherever an episode is cut. An episode ends with a score of 1, or when the attempts are used up.

    Args:
        name: the data set.
        attempts: how many answers a question may be given, at least 1.
        keep: whether the best or the last attempt counts.
        discount: factor for each further attempt, in (0, 1]; 1 makes a late success worth as much as an early one.
        feedback: what the model reads after an attempt that does not reach a score of 1; `{left}` is the number of
            attempts left, `{score}` the score of this one.
        max_turn_length: in tokens, of one attempt.
        max_completion_length: in tokens, of an episode; by default room for all attempts and 64 tokens of feedback
            each.
        options: those of `GymTask`: `size`, `held_out`, `seed`, `system_prompt`, `level`, and the keys of the data
            set's configuration.

    Raises:
        ConfigError: a wrong option.
        DataError: the data set has too few different questions.
    """

    def __init__(
        self,
        name: str,
        attempts: int = 3,
        keep: Keep = "best",
        discount: float = 1.0,
        feedback: str = FEEDBACK,
        max_turn_length: int = 512,
        max_completion_length: int | None = None,
        **options: Any,
    ):
        where = f"task reasoning_gym:{name}"
        for key, value in (("attempts", attempts), ("max_turn_length", max_turn_length)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"got {value!r}.", where=f"{where}, {key}", fix="It must be a whole number, 1 or more."
                )
        if keep not in get_args(Keep):
            raise ConfigError(f"got {keep!r}.{nearest(str(keep), get_args(Keep))}", f"{where}, keep", "best or last.")
        if isinstance(discount, bool) or not isinstance(discount, float | int) or not 0 < discount <= 1:
            raise ConfigError(f"got {discount!r}.", where=f"{where}, discount", fix="It must be in (0, 1].")
        try:
            feedback.format(left=1, score=0.0)
        except (AttributeError, LookupError, ValueError) as error:
            fix = "It may hold {left} and {score}; other braces are doubled."
            raise ConfigError(f"{feedback!r} is no template: {error}.", f"{where}, feedback", fix) from error
        length = max_completion_length or attempts * (max_turn_length + _FEEDBACK_TOKENS)
        super().__init__(name, max_completion_length=length, **options)
        self.rewards: dict[str, RewardFunction] = {}  # the environment's own reward is the score
        self.attempts, self.keep, self.discount, self.feedback = attempts, keep, float(discount), feedback
        self.max_turns = attempts
        self.max_turn_length = max_turn_length
        self.turn_ends: tuple[str, ...] = (_CLOSED,)

    def environment(self, example: Example, seed: int) -> Attempts:
        """An episode of its own; nothing in it is random."""
        return Attempts(self, example)

    def demonstration(self, example: Example, seed: int) -> Sequence[tuple[str, bool]] | None:
        """The data set's own answer, at once; None where it has none."""
        solution = self.solution(example, seed)
        return None if solution is None else [(solution, True)]

    def score_of(self, text: str, example: Example) -> float:
        """The data set's score of one attempt, in [0, 1]."""
        columns = {key: [value] for key, value in example.columns.items()}
        score = self.score([example.prompt], [text], **columns)[0]
        assert score is not None
        return score


class Attempts:
    """One question with as many attempts as its task allows.

    Args:
        task: says how attempts are scored and counted.
        example: the question.
    """

    def __init__(self, task: GymAttempts, example: Example):
        self.task, self.example = task, example
        self.used, self.value = 0, 0.0

    def reset(self) -> str:
        """Nothing: the prompt is the question."""
        self.used, self.value = 0, 0.0
        return ""

    def step(self, text: str) -> Answer:
        """Score one attempt.

        A stop string is not part of the text; an `<answer>` that it left open is closed.
        """
        task = self.task
        if text.rfind("<answer>") > text.rfind(_CLOSED):
            text += _CLOSED
        score = task.score_of(text, self.example)
        value = task.discount**self.used * score
        self.used += 1
        gain = value - self.value
        if task.keep == "best":
            gain = max(0.0, gain)
        self.value += gain
        if score >= 1:
            return Answer(reward=gain, done=True, reason="solved")
        left = task.attempts - self.used
        if left <= 0:
            return Answer(reward=gain, done=True, reason="out of attempts")
        return Answer(task.feedback.format(left=left, score=score), gain)
