"""Episodes: the model and an environment in turns, whole groups of them in lock-step.

Each round continues every live episode by one turn of the model, with any generator; the environment answers, and its
text is appended as tokens that the model did not choose. A turn's randomness comes from the episode's row identity and
the number of the turn, an environment's from its group, so that an episode is the same in any order and company.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from keel.core.choice import counter_seed, row_ids
from keel.core.errors import ConfigError, UserError, describe
from keel.core.rows import Rows, Stop
from keel.rollouts.sampling import Generator, Sampling
from keel.tasks.environment import Answer, Ended, Environment, InteractiveTask
from keel.tasks.task import Example, Text

REWARD, ENDED, TURNS = "episode_reward", "episode_ended", "episode_turns"
COLUMNS = (REWARD, ENDED, TURNS)  # what reward functions may ask for besides the columns of the data
_NAMED = 200  # characters of an environment's complaint


class Speaker(Protocol):
    """Text to tokens and back."""

    def prompt(self, prompt: Text) -> list[int]:
        """Tokens of a prompt."""
        ...

    def answer(self, prompt: Text, text: str, role: str, said: Sequence[int]) -> list[int]:
        """Tokens of what follows a turn `said` of the model, up to where the model goes on."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        ...


@dataclass(frozen=True)
class Limits:
    """What ends an episode that the environment does not end.

    Args:
        max_turns: of the model.
        max_turn_length: tokens of a turn.
        max_completion_length: tokens of an episode after its prompt, the environment's answers included.
        context: tokens that the model reads, prompt included; None is no limit.
        turn_ends: texts that end a turn, beside the end token.

    Raises:
        ConfigError: a limit below 1.
    """

    max_turns: int
    max_turn_length: int
    max_completion_length: int
    context: int | None = None
    turn_ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_turn_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", f"rollout.{name}")

    @staticmethod
    def of(
        task: InteractiveTask,
        context: int | None,
        *,
        max_turns: int | None = None,
        max_turn_length: int | None = None,
        max_completion_length: int | None = None,
    ) -> "Limits":
        """Those of the task, where nothing else is asked for."""
        return Limits(
            task.max_turns if max_turns is None else max_turns,
            task.max_turn_length if max_turn_length is None else max_turn_length,
            task.max_completion_length if max_completion_length is None else max_completion_length,
            context,
            tuple(task.turn_ends),
        )

    def room(self, prompt: int, written: int) -> tuple[int, Ended]:
        """Tokens for the next turn, and what ends the episode where there are none."""
        left = self.max_completion_length - written
        reading = math.inf if self.context is None else self.context - prompt - written
        return int(min(left, reading, self.max_turn_length)), Ended.TOKENS if left <= reading else Ended.CONTEXT


@dataclass(frozen=True)
class Played:
    """Episodes as rows, and as what reward functions read.

    Args:
        rows: the tokens of the model and, masked out, those of the environment; columns `turn` and `turn_reward` [B, T]
            (the turn's reward on its last chosen token), `ended` (an `Ended`) and `num_turns` [B].
        replies: of each row its text, or its messages where the prompt is messages.
        columns: `episode_reward` (or what went wrong in the row's group, as text), `episode_ended`, `episode_turns`.
        seconds: spent in the environments.
    """

    rows: Rows
    replies: list[Text]
    columns: dict[str, list[Any]]
    seconds: float


@dataclass
class _Episode:
    """One episode while it is played."""

    example: Example
    group: int
    row: int
    prompt: list[int]
    environment: Environment | None
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0
    stop: Stop = Stop.LENGTH
    ended: Ended | None = None

    def append(self, tokens: Sequence[int], chosen: bool, logp: Sequence[float] | None = None) -> None:
        """Tokens of the turn in progress."""
        self.tokens += tokens
        self.chosen += [chosen] * len(tokens)
        self.logp += [0.0] * len(tokens) if logp is None else logp
        self.turn += [self.turns] * len(tokens)
        self.reward += [0.0] * len(tokens)

    def end(self, ended: Ended, stop: Stop | None = None) -> None:
        """It is over."""
        self.ended, self.stop = ended, self.stop if stop is None else stop


def play(
    generator: Generator,
    task: InteractiveTask,
    examples: Sequence[Example],
    num_generations: int,
    sampling: Sampling,
    limits: Limits,
    speaker: Speaker,
    *,
    seed: int,
    step: int = 0,
    data_index: Sequence[int] | None = None,
    first_sample: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Played:
    """Play `num_generations` episodes of each example.

    The episodes of a group share the seed of their environments, so that they differ by the model's choices alone. A
    turn that is cut off by its own limit is answered like any other; one that the episode's limits cut off is not.

    Args:
        generator: continues the episodes, whatever it is.
        task: opens the environments.
        examples: prompts.
        num_generations: the group size G.
        sampling: how tokens are drawn; its stop strings end turns beside the task's own.
        limits: of turns and tokens; those of `sampling` do not matter.
        speaker: text to tokens and back.
        seed, step, data_index: decide all randomness, as in `Generator`.
        first_sample: number of the first episode of each group, for identities.
        progress: called with (episodes over, all episodes).

    Raises:
        UserError: a prompt that leaves no room for an answer.
    """
    index = list(range(len(examples))) if data_index is None else list(data_index)
    table = _Table(task, speaker, limits, tuple(dict.fromkeys((*limits.turn_ends, *sampling.stop_strings))))
    table.open(examples, num_generations, seed, step, index, first_sample)
    device = torch.device("cpu")
    for number in range(limits.max_turns):
        if not (live := table.live()):
            break
        for room, some in _by_room(live, limits).items():
            asked = replace(sampling, max_completion_length=room, stop_strings=table.stops)
            texts = [[*episode.prompt, *episode.tokens] for episode in some]
            who = [episode.row for episode in some]
            found = generator.generate(texts, 1, asked, seed=seed, step=number, data_index=who)
            device = found.device
            table.take(some, found, room)
        if progress is not None:
            progress(len(table.episodes) - len(table.live()), len(table.episodes))
    return table.played(index, num_generations, device)


def _by_room(live: Sequence[_Episode], limits: Limits) -> dict[int, list[_Episode]]:
    """Episodes by the tokens that their next turn may have, for a generator has one limit for all."""
    found: dict[int, list[_Episode]] = {}
    for episode in live:
        found.setdefault(limits.room(len(episode.prompt), len(episode.tokens))[0], []).append(episode)
    return found


@dataclass
class _Table:
    """All episodes of a round, and what went wrong in which group."""

    task: InteractiveTask
    speaker: Speaker
    limits: Limits
    stops: tuple[str, ...]
    episodes: list[_Episode] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def open(
        self, examples: Sequence[Example], count: int, seed: int, step: int, index: Sequence[int], first: int
    ) -> None:
        """An environment for each episode."""
        samples = torch.arange(first, first + count)
        for group, example in enumerate(examples):
            rows = row_ids(seed, step, torch.full_like(samples, index[group]), samples).tolist()
            shared = counter_seed(seed, "environment", step, index[group])
            prompt = self.speaker.prompt(example.prompt)
            for row in rows:
                episode = _Episode(example, group, row, prompt, None)
                self.episodes.append(episode)
                begin = self._ask(episode, partial(self._begin, episode, shared))
                if isinstance(begin, str) and begin:
                    episode.prompt = self.speaker.prompt(opening(example.prompt, begin))
                room, _ = self.limits.room(len(episode.prompt), 0)
                if room < 1:
                    raise UserError(
                        f"a prompt of {len(episode.prompt)} tokens leaves no room in the context of "
                        f"{self.limits.context}",
                        "rollout.max_prompt_length",
                        "Lower it, or take a model with a longer context.",
                    )

    def live(self) -> list[_Episode]:
        """Those that go on."""
        return [episode for episode in self.episodes if episode.ended is None]

    def take(self, some: Sequence[_Episode], found: Rows, room: int) -> None:
        """Append a drawn turn to each episode, and what its environment says to it."""
        lengths, stops = found.lengths.tolist(), found.stop.tolist()
        tokens, logp = found.tokens.tolist(), found.logp["behaviour"].tolist()
        for i, episode in enumerate(some):
            if episode.ended is None:  # another of its group may have failed in this round
                said = tokens[i][: lengths[i]]
                episode.append(said, True, logp[i][: lengths[i]])
                self._answer(episode, said, Stop(stops[i]))

    def _answer(self, episode: _Episode, said: list[int], stop: Stop) -> None:
        text = without_stop(self.speaker.decode(said), self.stops)
        episode.messages.append({"role": "assistant", "content": text})
        episode.turns, last = episode.turns + 1, len(episode.tokens) - 1
        room, reason = self.limits.room(len(episode.prompt), len(episode.tokens))
        if stop == Stop.LENGTH and room < 1:
            return self._cut(episode, last, reason)
        answer = self._ask(episode, partial(_step, episode, text))
        if not isinstance(answer, Answer):
            return None
        episode.reward[last] = float(answer.reward)
        if answer.done:
            return episode.end(Ended.ENVIRONMENT, Stop.ENVIRONMENT)
        if episode.turns >= self.limits.max_turns:
            return self._cut(episode, last, Ended.TURNS, stop)
        ids = self.speaker.answer(episode.example.prompt, answer.text, answer.role, said)
        room, reason = self.limits.room(len(episode.prompt), len(episode.tokens) + len(ids))
        if room < 1:
            return self._cut(episode, last, reason)
        episode.turns -= 1  # the answer belongs to the turn that it answers
        episode.append(ids, False)
        episode.turns += 1
        episode.messages.append({"role": answer.role, "content": answer.text})
        return None

    def _cut(self, episode: _Episode, last: int, reason: Ended, stop: Stop | None = None) -> None:
        """A limit ends it; what its environment says to that is paid to the last token of the model."""
        episode.end(reason, stop)
        finish = getattr(episode.environment, "finish", None)
        if finish is not None and (earned := self._ask(episode, partial(_finish, finish, reason))) is not None:
            episode.reward[last] += earned

    def _begin(self, episode: _Episode, seed: int) -> str:
        episode.environment = self.task.environment(episode.example, seed)
        begin = episode.environment.reset()
        if not isinstance(begin, str):
            raise TypeError(f"reset() returned {type(begin).__name__}, not a text")
        return begin

    def _ask(self, episode: _Episode, what: Callable[[], Any]) -> Any:
        """Something of an environment; None if that fails, and then the whole group is over."""
        if episode.group in self.failed:
            return episode.end(Ended.FAILED)
        begun = time.monotonic()
        try:
            return what()
        except (Exception, SystemExit) as error:  # the environment is the user's
            self.failed[episode.group] = describe(error, longest=_NAMED)
            for other in self.episodes:
                if other.group == episode.group:
                    other.end(Ended.FAILED)
            return None
        finally:
            self.seconds += time.monotonic() - begun

    def played(self, index: Sequence[int], count: int, device: torch.device) -> Played:
        """The episodes as rows."""
        of = self.episodes
        ended = [e.ended for e in of if e.ended is not None]  # all of them
        prompt = _matrix([e.prompt for e in of], left=True)
        mask = _matrix([e.chosen for e in of], torch.bool)
        turn = _matrix([e.turn for e in of])
        rows = Rows.build(
            prompt,
            _matrix([[True] * len(e.prompt) for e in of], torch.bool, left=True),
            _matrix([e.tokens for e in of]),
            mask,
            stop=torch.tensor([int(e.stop) for e in of]),
            row=torch.tensor([e.row for e in of]),
            group=torch.tensor([e.group for e in of]),
            data_index=torch.tensor([index[e.group] for e in of]),
            logp={"behaviour": _matrix([e.logp for e in of], torch.float32)},
            segment=turn,
            columns={
                "turn": turn,
                "turn_reward": _matrix([e.reward for e in of], torch.float32),
                "ended": torch.tensor([int(e) for e in ended]),
                "num_turns": torch.tensor([e.turns for e in of]),
            },
        ).to(device)
        told: dict[str, list[Any]] = {
            REWARD: [self.failed.get(e.group, math.fsum(e.reward)) for e in of],
            ENDED: [reason.name.lower() for reason in ended],
            TURNS: [e.turns for e in of],
        }
        texts = [e.messages if not isinstance(e.example.prompt, str) else self.speaker.decode(e.tokens) for e in of]
        return Played(rows, texts, told, self.seconds)


def opening(prompt: Text, begin: str) -> Text:
    """A prompt with what an environment says first.

    >>> opening("Go. ", "The door is shut."), opening([{"role": "user", "content": "Go."}], "It rains.")
    ('Go. The door is shut.', [{'role': 'user', 'content': 'Go.'}, {'role': 'user', 'content': 'It rains.'}])
    """
    return prompt + begin if isinstance(prompt, str) else [*prompt, {"role": "user", "content": begin}]


def without_stop(text: str, stops: Sequence[str]) -> str:
    r"""A turn up to the first stop string.

    >>> without_stop("25\n>", ("\n", "END"))
    '25'
    """
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def checked(answer: Any) -> Answer:
    """An answer that can be trained on.

    Raises:
        TypeError: it is no `Answer`, or a field of it has another type.
        ValueError: the reward is no number, NaN or infinite.
    """
    if not isinstance(answer, Answer):
        raise TypeError(f"step() returned {type(answer).__name__}, not an Answer")
    if not isinstance(answer.text, str):
        raise TypeError(f"the text of an answer is {type(answer.text).__name__}")
    try:
        reward = math.nan if isinstance(answer.reward, str) else float(answer.reward)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several numbers
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(f"the reward of a turn is {answer.reward!r}")
    return answer


def _step(episode: _Episode, text: str) -> Answer:
    assert episode.environment is not None
    return checked(episode.environment.step(text))


def _finish(finish: Callable[[Ended], float], ended: Ended) -> float:
    earned = finish(ended)
    if isinstance(earned, str) or not math.isfinite(float(earned)):
        raise ValueError(f"finish() returned {earned!r}, not a reward")
    return float(earned)


def _matrix(rows: Sequence[Sequence[Any]], dtype: torch.dtype = torch.long, left: bool = False) -> Tensor:
    """Rows of different lengths as one matrix, zeros where there is nothing."""
    width = max(1, *(len(row) for row in rows))
    out = torch.zeros(len(rows), width, dtype=dtype)
    for i, row in enumerate(rows):
        if len(row):
            out[i, slice(width - len(row), width) if left else slice(0, len(row))] = torch.tensor(row, dtype=dtype)
    return out
