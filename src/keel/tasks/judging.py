"""Judging as a task: a prompt shows a question with its responses, and the model writes a critique and scores.

The responses stand in an order that the seed decides, so that no place earns more than another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from keel.core.choice import generator
from keel.core.errors import DataError
from keel.core.registry import part
from keel.tasks.data import DataTask
from keel.tasks.preference_data import load_preferences
from keel.tasks.preferences import Preference
from keel.tasks.task import Example, RewardFunction, Text, completion_text

LOWEST, HIGHEST = 1, 10  # scores of several responses; a single one is called right (1) or wrong (0)
TEMPLATE = """Judge the responses to a query. First write the principles that matter for this query, each with its \
weight, then a critique of every response by these principles. End with one line that gives each response a whole \
number from 1 (worst) to 10 (best), in their order:
Scores: [[a, b, ...]]

Query:
{query}
{responses}"""
SINGLE = """Judge a response to a query. First write the principles that matter for this query, each with its weight, \
then a critique of the response by these principles. End with one line, with 1 if the response is right and 0 if it is \
not:
Scores: [[a]]

Query:
{query}
{responses}"""
RESPONSE = "\nResponse {number}:\n{response}\n"
_LISTS = (
    re.compile(r"\[\[\s*([^\[\]]*?)\s*\]\]"),  # what the template asks for
    re.compile(r"\\boxed\{\s*\[?([^{}\[\]]*?)\]?\s*\}"),
    re.compile(r"scores?\b[^\[\]\n]{0,40}\[\s*([^\[\]]*?)\s*\]", re.IGNORECASE),
    re.compile(r"scores?\s*:\s*([^\[\]\n]*)", re.IGNORECASE),
)
_LABELLED = re.compile(r"(?:response|answer)\s*#?\s*\d+\s*[:=]\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def conversation(prompt: Text) -> str:
    """A prompt as text: itself, or its messages with their roles, a single one of the user as it is.

    >>> conversation([{"role": "user", "content": "1+1?"}])
    '1+1?'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return str(prompt[0].get("content") or "")
    return "\n\n".join(f"{message.get('role')}: {message.get('content') or ''}" for message in prompt)


def judging_prompt(prompt: Text, responses: Sequence[Text], template: str | None = None) -> str:
    """What a judge reads: a query and its responses, numbered from 1.

    Args:
        prompt: the query.
        responses: in the order in which they are shown.
        template: with {query} and {responses}; None takes the one for so many responses.

    Raises:
        ValueError: no response, or a template that lacks one of the two.
    """
    if not responses:
        raise ValueError("there is no response to judge")
    chosen = template if template is not None else SINGLE if len(responses) == 1 else TEMPLATE
    check_template(chosen, ("query", "responses"))
    shown = "".join(
        RESPONSE.replace("{number}", str(i)).replace("{response}", completion_text(r))
        for i, r in enumerate(responses, start=1)
    )
    return filled(chosen, query=conversation(prompt), responses=shown)


def check_template(template: str, names: Sequence[str]) -> None:
    """Refuse a template that lacks a place.

    Raises:
        ValueError: naming it.
    """
    for name in names:
        if f"{{{name}}}" not in template:
            raise ValueError(f"the template has no place {{{name}}}")


def filled(template: str, **texts: str) -> str:
    """A template with its places filled at once: braces within the texts mean nothing.

    >>> filled("{a}{b}", a="{b}", b="c")
    '{b}c'
    """
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in texts))
    return pattern.sub(lambda match: texts[match.group()[1:-1]], template)


def shuffled(count: int, *seed: int | str) -> list[int]:
    """An order of the responses: the i-th that is shown is number `shuffled(...)[i]`."""
    return torch.randperm(count, generator=generator("judging", *seed)).tolist()


def parse_scores(text: str, count: int, lowest: int = LOWEST, highest: int = HIGHEST) -> tuple[int, ...] | None:
    r"""The scores that a judgement ends with; None where they cannot be read.

    The last `[[8, 6]]`, else `\boxed{8, 6}`, else what follows the last `Scores:`. There must be as many as responses,
    all of them whole numbers within the range: anything else is unparsable, for a guess would be noise.

    >>> parse_scores("Clear, but ... Scores: [[8, 6]]", 2), parse_scores("8 and 6, I think", 2)
    ((8, 6), None)

    Args:
        text: of the judgement.
        count: responses.
        lowest, highest: of a score.
    """
    for form in _LISTS:
        found = form.findall(text)
        if found:
            return _read(found[-1], count, lowest, highest)
    return None


def _read(inner: str, count: int, lowest: int, highest: int) -> tuple[int, ...] | None:
    bare = re.sub(r"/\s*10\b", "", _LABELLED.sub("", inner))
    if re.search(r"[A-Za-z]", re.sub(r"\band\b", " ", bare, flags=re.IGNORECASE)):
        return None
    numbers = [float(number) for number in _NUMBER.findall(bare)]
    if len(numbers) != count or any(n != int(n) or not lowest <= n <= highest for n in numbers):
        return None
    return tuple(int(n) for n in numbers)


def judgement_reward(scores: Sequence[int] | None, label: int) -> float:
    """+1 if the best response, and it alone, has the highest score; -1 otherwise, and for what cannot be read.

    >>> judgement_reward((7, 6), 0), judgement_reward((8, 8), 0), judgement_reward((1,), 1)
    (1.0, -1.0, 1.0)

    Args:
        scores: of the responses; None is unparsable.
        label: the place of the best response; of a single response the score that it should have.
    """
    if scores is None:
        return -1.0
    if len(scores) == 1:
        return 1.0 if scores[0] == label else -1.0
    others = [score for i, score in enumerate(scores) if i != label]
    return 1.0 if scores[label] > max(others) else -1.0


@part("judgement_reward", paper=208)
@dataclass(frozen=True)
class JudgementReward:
    """Reward of a judgement: +1 if its scores put the best response alone at the top, else -1.

    Reads the columns `label` and `num_responses` that `Judging` makes. There is no reward for the form: what cannot be
    read earns -1.

    Args:
        lowest, highest: of a score.

    Source: "Inference-Time Scaling for Generalist Reward Modeling", 2025, eq. of the rule-based reward.
    """

    lowest: int = LOWEST
    highest: int = HIGHEST

    def __call__(
        self, completions: Sequence[Text], label: Sequence[int], num_responses: Sequence[int], **columns: Any
    ) -> list[float | None]:
        rows = zip(completions, label, num_responses, strict=True)
        return [judgement_reward(self.scores(completion_text(c), n), own) for c, own, n in rows]

    def scores(self, text: str, count: int) -> tuple[int, ...] | None:
        """Those of a judgement of so many responses."""
        return parse_scores(text, count, *((self.lowest, self.highest) if count > 1 else (0, 1)))


class Judging(DataTask):
    """Preferences as prompts for a judge, with the reward of its judgements.

    Each prompt with its responses is one example; pairs, lists with scores and ratings are read, or labels. An example
    whose best response is not the only best one is left out and counted in `notes`.

    Args:
        data: as in `keel.train("dpo", data=...)`.
        held_out: share that is set aside, or data of its own.
        seed: of the order in which responses are shown, and of what is set aside.
        template: with {query} and {responses}; None takes Keel's.
        kind: lists compares the responses of a prompt; labels judges each response by itself, right or wrong.

    Raises:
        DataError: malformed data, or no example with one best response.
        ValueError: a template that lacks a place.
    """

    def __init__(
        self,
        data: Any,
        held_out: Any = 0.05,
        seed: int = 0,
        template: str | None = None,
        kind: Literal["lists", "labels"] = "lists",
    ):
        if template is not None:
            check_template(template, ("query", "responses"))
        found = load_preferences(data, kind, held_out, seed)
        sides = [
            [example for p in split if (example := _example(p, i, seed, template)) is not None]
            for i, split in enumerate((found.train, found.held_out))
        ]
        if not sides[0]:
            raise DataError("no prompt has one best response, so that there is nothing to judge", found.name)
        numbered = [[_numbered(example, i) for i, example in enumerate(side)] for side in sides]
        super().__init__(f"judging {found.name}", *numbered)
        lost = len(found.train) + len(found.held_out) - sum(map(len, sides))
        self.notes = (*found.notes, *((f"{lost} prompts without one best response are left out",) if lost else ()))
        self.rewards: dict[str, RewardFunction] = {"judgement": JudgementReward()}
        self.max_completion_length = 1024


def _numbered(example: Example, index: int) -> Example:
    return Example(example.prompt, example.columns, index, example.domain)


def _example(preference: Preference, split: int, seed: int, template: str | None) -> Example | None:
    """None where the best response is not the only best one."""
    scores, count = preference.scores, len(preference.completions)
    order = shuffled(count, seed, split, preference.index)
    if count > 1:
        best = max(scores)
        if sum(score == best for score in scores) > 1:
            return None
        label = order.index(scores.index(best))
    else:
        label = int(scores[0] > 0)
    shown = [preference.completions[i] for i in order]
    columns = {**preference.columns, "label": label, "num_responses": count, "order": order}
    return Example(judging_prompt(preference.prompt, shown, template), columns, preference.index, preference.domain)
