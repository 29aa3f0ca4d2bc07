"""The data sets of reasoning-gym, with their own verifiers."""

from __future__ import annotations

import ast
import dataclasses
import random
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, overload

from keel.core.errors import ConfigError, DataError, nearest
from keel.tasks.task import Example, RewardFunction, Text, check_disjoint, final_answer

_HALF = 2**31  # training seeds lie below, held-out seeds above: data sets seed question i with seed + i
_TRIES = 100
_PROBED = 16  # training examples generated when the task is built
_LITERAL_ANSWERS = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")

Item = dict[str, Any]  # question, answer, metadata


@cache
def gym_names() -> list[str]:
    """Names of the data sets of reasoning-gym."""
    import reasoning_gym  # noqa: F401  registers them
    from reasoning_gym.factory import DATASETS

    return sorted(name for name in DATASETS if name != "composite")


class GymTask:
    """A data set of reasoning-gym as a task.

    Training and held-out questions come from different seeds. A training question that is also held out is replaced by
    another one. The training examples are generated when they are asked for, the held-out ones when the task is built.

    The reward is the data set's `score_answer`, in [0, 1], of what stands in the last `<answer>...</answer>`, or of
    the whole completion where there is no such tag. Verifiers are third-party code that reads what a model wrote;
    some parse it with SymPy. The four that call `eval` on it are given `ast.literal_eval` instead.

    Args:
        name: the data set.
        size: number of training examples.
        held_out: number of held-out examples, all different.
        seed: of the questions.
        system_prompt: if given, prompts are messages: this one, then the question.
        max_completion_length: in tokens.
        level: difficulty by the data set's own curriculum, 0 the easiest; it sets keys of the configuration, which
            `config` may override. None leaves the defaults of the data set.
        config: keys of the data set's configuration.

    Raises:
        ConfigError: an unknown data set, a wrong key or value, or a level of a data set without a curriculum.
        DataError: the data set has too few different questions.
    """

    def __init__(
        self,
        name: str,
        size: int = 5000,
        held_out: int = 100,
        seed: int = 0,
        system_prompt: str | None = None,
        max_completion_length: int = 512,
        level: int | None = None,
        **config: Any,
    ):
        for key, value, low in (("size", size, 1), ("held_out", held_out, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < _HALF // 4:
                fix = f"It must be a whole number from {low} to {_HALF // 4 - 1}."
                raise ConfigError(f"got {value!r}.", where=f"task {name}, {key}", fix=fix)
        if level is not None:
            config = {**_at_level(name, level), **config}
        self.name = f"reasoning_gym:{name}"
        self._system_prompt = system_prompt
        items = self._distinct(name, held_out, seed, config)
        self.held_out: Sequence[Example] = [self._example(item, index) for index, item in enumerate(items)]
        aside = {item["question"] for item in items}
        self._dataset = _create(name, seed, 2 * size + 256, config)
        self.train: Sequence[Example] = _Questions(self, size, seed, aside)
        probed = [self.train[i].columns["question"] for i in range(min(size, _PROBED))]
        check_disjoint(self.name, probed, aside)
        self.rewards: dict[str, RewardFunction] = {"score": self.score}
        self.preset: dict[str, Any] = {}
        self.max_completion_length = max_completion_length
        self.characters: str | None = None

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        question: Sequence[str],
        answer: Sequence[Any],
        metadata: Sequence[Item],
        **columns: Any,
    ) -> list[float | None]:
        """Reward: the data set's own score of each answer."""
        entries = (
            {"question": q, "answer": a, "metadata": m} for q, a, m in zip(question, answer, metadata, strict=True)
        )
        return [
            float(self._dataset.score_answer(final_answer(completion), entry))
            for completion, entry in zip(completions, entries, strict=True)
        ]

    def solution(self, example: Example, seed: int) -> str | None:
        """The data set's own answer; None where it has none."""
        answer = example.columns["answer"]
        return answer if isinstance(answer, str) and answer else None

    def answer(self, completion: Text, example: Example) -> str | None:
        """What the verifier would be given; None if that is empty."""
        return final_answer(completion) or None

    def _example(self, item: Item, index: int) -> Example:
        question = item["question"]
        prompt: Text = question
        if self._system_prompt is not None:
            prompt = [{"role": "system", "content": self._system_prompt}, {"role": "user", "content": question}]
        columns = {"question": question, "answer": item["answer"], "metadata": item["metadata"]}
        return Example(prompt, columns, index)

    def _distinct(self, name: str, count: int, seed: int, config: Item) -> list[Item]:
        """The first `count` different questions from the held-out seeds, in random order."""
        reach = 4 * count + 256
        dataset = _create(name, _HALF + seed, reach, config)
        found: dict[str, Item] = {}
        for position in random.Random(seed).sample(range(reach), reach):
            item = _generate(dataset, position)
            if item is not None:
                found.setdefault(item["question"], item)
            if len(found) == count:
                return list(found.values())
        raise DataError(
            f"only {len(found)} different questions among {reach}, but held_out is {count}.",
            where=self.name,
            fix="Lower held_out, or make the questions more varied by the data set's options.",
        )


class _Questions(Sequence[Example]):
    """Training examples, generated when asked for; question i is replaced by a spare one if it is held out."""

    def __init__(self, task: GymTask, size: int, seed: int, aside: set[str]):
        self.task, self.size, self.seed, self.aside = task, size, seed, aside

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        i = range(self.size)[index]
        for position in self._positions(i):
            item = _generate(self.task._dataset, position)
            if item is not None and item["question"] not in self.aside:
                return self.task._example(item, i)
        raise DataError(
            f"{_TRIES} questions in a row are held out, so that none is left to train on.",
            where=self.task.name,
            fix="Lower held_out, or make the questions more varied by the data set's options.",
        )

    def _positions(self, i: int) -> Iterator[int]:
        yield i
        draw = random.Random(f"{self.seed} {i}")
        for _ in range(_TRIES - 1):
            yield draw.randrange(self.size, 2 * self.size + 256)


def _generate(dataset: Any, position: int) -> Item | None:
    """The item at a position; None where the generator itself fails, as some do for a few seeds."""
    try:
        return dataset[position]
    except Exception:
        return None


def _at_level(name: str, level: Any) -> Item:
    """What the data set's curriculum sets at a level."""
    if name not in gym_names():
        return {}  # `_create` says so
    from reasoning_gym.coaching.base_curriculum import RangeAttributeDefinition
    from reasoning_gym.factory import create_curriculum, has_curriculum

    where = f"task {name}, level"
    if not has_curriculum(name):
        raise ConfigError("this data set has no curriculum.", where, "Give keys of its configuration instead.")
    curriculum = create_curriculum(name)
    attributes = curriculum.attributes.values()
    highest = max(len(attribute.levels) for attribute in attributes) - 1
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= highest:
        raise ConfigError(f"got {level!r}.", where, f"It must be a whole number from 0 to {highest}.")
    for attribute in attributes:
        curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
    config = curriculum.generate_configuration()
    keys = [
        key
        for attribute in attributes
        for key in (
            (attribute.lower_field_name, attribute.upper_field_name)
            if isinstance(attribute, RangeAttributeDefinition)
            else (attribute.field_name,)
        )
    ]
    return {key: getattr(config, key) for key in keys}


def _create(name: str, seed: int, size: int, config: Item) -> Any:
    """The data set, its configuration checked."""
    if name not in gym_names():
        raise ConfigError(f"unknown data set {name!r} of reasoning-gym.{nearest(name, gym_names())}", where="task")
    from reasoning_gym.factory import DATASETS, create_dataset

    allowed = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key in config:
        if key not in allowed:
            own = ["size", "held_out", "seed", "system_prompt", "max_completion_length", "level", "attempts"]
            raise ConfigError(
                f"unknown option.{nearest(key, own + allowed)}",
                where=f"task {name}, {key}",
                fix=f"Allowed: {', '.join(own + allowed)}.",
            )
    try:
        dataset = create_dataset(name, seed=seed, size=size, **config)
    except (AssertionError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"options refused by the data set: {reason}.", where=f"task {name}") from error
    if name in _LITERAL_ANSWERS:
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset
