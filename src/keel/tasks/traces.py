"""Which of several traces of a prompt to learn from: long ones where it is hard, short ones where it is easy."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from keel.core.errors import DataError
from keel.tasks.data import identity
from keel.tasks.task import Example, completion_text

RIGHT, PASS_RATE = "correct", "pass_rate"  # columns of a trace, and of a prompt
EASY, HARD = 2 / 3, 1 / 3  # pass rates from which on, and below which, a prompt is called so


@dataclass(frozen=True)
class Traces:
    """The traces that were chosen.

    Args:
        examples: one prompt after the other in the order of the data, each with a column `pass_rate`.
        easy_length, hard_length: the lengths that prompts of pass rate 1 and 0 call for.
        prompts: distinct ones in the data.
        left_out: prompts without a right trace.
    """

    examples: tuple[Example, ...]
    easy_length: float
    hard_length: float
    prompts: int
    left_out: int


def choose_traces(
    examples: Sequence[Example],
    pass_rates: Mapping[Hashable, float] | None = None,
    *,
    length: Callable[[str], int] = len,
    per_prompt: int = 1,
    easy_length: float | None = None,
    hard_length: float | None = None,
) -> Traces:
    """For each prompt the right traces whose length is nearest to (1 - p) L_hard + p L_easy, p its pass rate.

    A trace is right if its column `correct` is true or above 0.5, or if there is no such column. Of traces that are
    equally near the shorter one is taken.

    Args:
        examples: prompts with completions, several of a prompt as several examples.
        pass_rates: by `identity` of the prompt, in [0, 1]; without them the column `pass_rate` says, or else the share
            of the prompt's traces that are right.
        length: of a completion; the lengths below are in its unit.
        per_prompt: traces of a prompt at most.
        easy_length, hard_length: L_easy and L_hard; None takes the mean length of the right traces of prompts with a
            pass rate of 2/3 or more, and below 1/3.

    Raises:
        ValueError: per_prompt below 1.
        DataError: an example without a completion; no pass rate, or none in [0, 1]; no prompt that is easy, or hard, to
            take a length from; L_hard below L_easy.

    Source: "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", 2025, its adaptive
    cold start. The code for it is not in the authors' repository: the two lengths follow the reward's classes of
    difficulty, and the nearest trace stands for "near".

    >>> texts = ("ab", "abcdef", "abcdefghij")
    >>> data = [Example("1+1=", {"pass_rate": 0.5}, i, "", text) for i, text in enumerate(texts)]
    >>> [found.completion for found in choose_traces(data, easy_length=2, hard_length=10).examples]
    ['abcdef']
    """
    if per_prompt < 1:
        raise ValueError(f"per_prompt must be at least 1, not {per_prompt}")
    prompts: dict[Hashable, list[Example]] = {}
    for example in examples:
        if example.completion is None:
            raise DataError("has no completion", f"example {example.index}", "Give a column `completion`.")
        prompts.setdefault(identity(example), []).append(example)
    rates = {key: _rate(group, None if pass_rates is None else pass_rates.get(key)) for key, group in prompts.items()}
    sizes = {example.index: length(completion_text(example.completion or "")) for example in examples}
    right = {key: [example for example in group if _is_right(example)] for key, group in prompts.items()}

    def mean_length(kind: str, belongs: Callable[[float], bool]) -> float:
        known = [sizes[e.index] for key, group in right.items() for e in group if belongs(rates[key])]
        if not known:
            fix = f"Give {kind}_length."
            raise DataError(f"no prompt with a right trace is {kind}, so that nothing tells its length", "traces", fix)
        return fmean(known)

    easy = mean_length("easy", lambda p: p >= EASY) if easy_length is None else float(easy_length)
    hard = mean_length("hard", lambda p: p < HARD) if hard_length is None else float(hard_length)
    if hard < easy:
        what = f"hard prompts call for {hard:g}, which is less than the {easy:g} of easy ones"
        raise DataError(what, "traces", "Give easy_length and hard_length.")
    chosen: list[Example] = []
    for key, group in right.items():
        wanted = (1 - rates[key]) * hard + rates[key] * easy
        near = sorted(group, key=lambda e: (abs(sizes[e.index] - wanted), sizes[e.index], e.index))
        chosen += [replace(e, columns={**e.columns, PASS_RATE: rates[key]}) for e in near[:per_prompt]]
    return Traces(tuple(chosen), easy, hard, len(prompts), sum(not group for group in right.values()))


def _is_right(example: Example) -> bool:
    value = example.columns.get(RIGHT)
    return value is None or float(value) > 0.5


def _rate(group: Sequence[Example], known: float | None) -> float:
    """The pass rate of a prompt: as measured, as its rows say, or the share of its traces that are right."""
    where = f"example {group[0].index}"
    if known is None:
        said = {example.columns.get(PASS_RATE) for example in group} - {None}
        if len(said) > 1:
            raise DataError(f"the traces of its prompt name {len(said)} pass rates", where, "Keep one.")
        known = said.pop() if said else None
    if known is None and all(example.columns.get(RIGHT) is not None for example in group):
        known = fmean(float(_is_right(example)) for example in group)
    if known is None:
        fix = "Give a column `pass_rate` or `correct`, or a model to measure it."
        raise DataError("nothing tells the pass rate of its prompt", where, fix)
    if not isinstance(known, int | float) or not 0 <= known <= 1:
        raise DataError(f"`pass_rate` must be a number in [0, 1], not {known!r}", where)
    return float(known)
