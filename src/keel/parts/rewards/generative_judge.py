"""A generative judge scaled at inference: several judgements of shuffled responses, filtered and summed.

    S*_i = sum over the samples s of S_i^s,      the best response has the largest S*_i

A sample is a judgement as `keel.tasks.judging` reads it. What cannot be read is counted and in no sum.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.errors import DataError
from keel.core.registry import part
from keel.parts.rewards.asking import Asker
from keel.tasks.judging import conversation, judging_prompt, parse_scores, shuffled
from keel.tasks.task import Text, completion_text


@part("meta_filter", paper=208)
@dataclass(frozen=True)
class MetaFilter:
    """Keeps the judgements of which a meta reward model thinks most, of equal ones those that came first.

    Args:
        keep: k_meta, judgements that are kept; None keeps half of them, rounded up.

    Raises:
        ValueError: keep below 1.

    Source: "Inference-Time Scaling for Generalist Reward Modeling", 2025: k_meta = k / 2.
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be at least 1, not {self.keep}")

    def __call__(self, meta: Float[Tensor, "k"]) -> Bool[Tensor, "k"]:
        """Which are kept.

        >>> MetaFilter(2)(torch.tensor([0.9, 0.6, 0.2, 0.8])).tolist()
        [True, False, False, True]
        """
        count = (len(meta) + 1) // 2 if self.keep is None else min(self.keep, len(meta))
        kept = torch.zeros(len(meta), dtype=torch.bool)
        kept[torch.argsort(meta, descending=True, stable=True)[:count]] = True
        return kept


def vote(
    samples: Int[Tensor, "k n"], meta: Float[Tensor, "k"] | None = None, keep: MetaFilter | None = None
) -> Int[Tensor, "n"]:
    """The sum of the scores of each response, over the samples that are kept.

    >>> samples = torch.tensor([[7, 6], [8, 8], [5, 9], [9, 4]])
    >>> vote(samples).tolist(), vote(samples, torch.tensor([0.9, 0.6, 0.2, 0.8]), MetaFilter(2)).tolist()
    ([29, 27], [16, 10])

    Args:
        samples: scores of each judgement, in the order of the responses and not in that in which they were shown.
        meta: what a meta reward model says of each judgement; None keeps all.
        keep: how many are kept.

    Raises:
        ValueError: not one number of `meta` for each sample.
    """
    if meta is None:
        return samples.sum(0)
    if len(meta) != len(samples):
        raise ValueError(f"{len(meta)} scores of the meta reward model for {len(samples)} judgements")
    return samples[(keep or MetaFilter())(meta)].sum(0)


def rejective(right: Bool[Tensor, "B"], group: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """Which sampled judgements are learnt: right ones, but none of an item that was judged rightly every time.

    >>> rejective(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1])).tolist()
    [True, False, False, False]

    Args:
        right: whether the scores agree with the label (`judgement_reward` of 1).
        group: the item of each judgement.
    """
    _, index = group.unique(return_inverse=True)
    wrong = torch.zeros(int(index.max()) + 1 if len(index) else 0).index_add(0, index, (~right).float())
    return right & (wrong[index] > 0)


@dataclass
class Judgements:
    """What a judge said of the responses to one prompt.

    Args:
        samples: scores of each judgement that could be read, [k, n].
        texts: all judgements, those that could not be read included.
        unparsable: how many could not be read.
    """

    samples: Int[Tensor, "k n"]
    texts: list[str] = field(default_factory=list)
    unparsable: int = 0


@dataclass(frozen=True)
class GenerativeJudge:
    """Reward: the mean over k judgements of a completion's score among all completions of its prompt.

    Each judgement sees the completions in an order of its own. Sums are divided by the judgements that could be read,
    so that rewards of groups compare; a group without any gets None.

    Args:
        ask: the judge; `LocalAsker` or `ServerAsker`, at a temperature above 0 where `num_samples` is above 1.
        num_samples: k.
        template: with {query} and {responses}; None takes Keel's.
        meta: scores judgements, called with the prompts shown and the judgements; None filters nothing.
        keep: how many are kept.
        seed: of the orders and of the judgements.

    Raises:
        ValueError: num_samples below 1.

    Source: "Inference-Time Scaling for Generalist Reward Modeling", 2025.
    """

    ask: Asker
    num_samples: int = 8
    template: str | None = None
    meta: Callable[[Sequence[Text], Sequence[str]], Sequence[float]] | None = None
    keep: MetaFilter = MetaFilter()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {self.num_samples}")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        members: dict[Hashable, list[int]] = {}
        for i, prompt in enumerate(prompts):
            members.setdefault(conversation(prompt), []).append(i)
        out: list[float | None] = [None] * len(completions)
        groups = list(members.values())
        found = self.judge([(prompts[own[0]], [completions[i] for i in own]) for own in groups])
        for own, said in zip(groups, found, strict=True):
            if len(said.samples):
                for i, score in zip(own, said.samples.double().mean(0).tolist(), strict=True):
                    out[i] = score
        return out

    def judge(self, items: Sequence[tuple[Text, Sequence[Text]]]) -> list[Judgements]:
        """All judgements of prompts with their responses; those that the filter drops are left out of `samples`.

        Raises:
            DataError: an item without responses.
        """
        shown: list[str] = []
        orders: list[list[int]] = []
        seeds: list[int] = []
        for prompt, responses in items:
            if not responses:
                raise DataError("there is no response to judge", repr(prompt)[:80])
            name = "\x1e".join([conversation(prompt), *map(completion_text, responses)])
            for k in range(self.num_samples):
                orders.append(shuffled(len(responses), self.seed, name, k))
                seeds.append(counter_seed("judgement", self.seed, name, k))
                shown.append(judging_prompt(prompt, [responses[i] for i in orders[-1]], self.template))
        texts = self.ask(shown, seeds)
        meta = None if self.meta is None else [float(value) for value in self.meta(shown, texts)]
        out = []
        for g, (_, responses) in enumerate(items):
            own = slice(g * self.num_samples, (g + 1) * self.num_samples)
            out.append(self._read(texts[own], orders[own], len(responses), None if meta is None else meta[own]))
        return out

    def _read(
        self, texts: Sequence[str], orders: Sequence[Sequence[int]], count: int, meta: Sequence[float] | None
    ) -> Judgements:
        bounds = (0, 1) if count == 1 else (1, 10)
        rows: list[list[int]] = []
        said: list[float] = []
        for k, (text, order) in enumerate(zip(texts, orders, strict=True)):
            scores = parse_scores(text, count, *bounds)
            if scores is not None:
                place = {number: i for i, number in enumerate(order)}
                rows.append([scores[place[number]] for number in range(count)])
                said.append(0.0 if meta is None else meta[k])
        samples = torch.tensor(rows, dtype=torch.long).reshape(len(rows), count)
        if meta is not None and len(rows):
            samples = samples[self.keep(torch.tensor(said))]
        return Judgements(samples, list(texts), len(texts) - len(rows))
