"""Parallel drafts, distilled into a bounded workspace that the next round starts from.

    C_0 = nothing;   round r:   S_r = { s_i ~ pi(. | x, C_{r-1}) }, i = 1 .. M_r;   C_r = distil(x, S_r), |C_r| <= kappa
    M_R = 1: the last draft is the answer.   M_r = 1 everywhere is sequential refinement; R = 1 is plain sampling.

Two budgets, in tokens read and written: B_seq along one path (of the drafts of a round, which are written side by
side, the costliest), B_tot of all calls. No call reads more than prompt + template + max(kappa, drafts of one round),
whatever R is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.choice import counter_seed, row_ids, uniforms
from keel.core.registry import part
from keel.core.rows import Rows, Stop
from keel.rollouts.sampling import Generator, Sampling

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """What stands around a workspace or drafts behind a prompt, in tokens: prompt before C between C ... after.

    Args:
        before, between, after: tokens; the same in training and at test.
    """

    before: Tokens = ()
    between: Tokens = ()
    after: Tokens = ()

    def joined(self, texts: Sequence[Tokens]) -> Tokens:
        """Texts with `between` between them."""
        found: list[int] = []
        for i, text in enumerate(texts):
            found += [*(self.between if i else ()), *text]
        return tuple(found)

    def around(self, prompt: Tokens, text: Tokens) -> Tokens:
        """The prompt of a call; without a text it is the plain prompt."""
        return (*prompt, *self.before, *text, *self.after) if text else prompt


@dataclass(frozen=True)
class Call:
    """Where the drafts of a round come from, and what the next round needs.

    Args:
        generator: the model.
        sampling: its settings.
        prompts: x, P of them.
        data_index: identity of each prompt.
        following: M of the next round, drafts that will read the workspace.
        room: kappa.
        seed, step: of this round.
    """

    generator: Generator
    sampling: Sampling
    prompts: Sequence[Tokens]
    data_index: Sequence[int]
    following: int
    room: int
    seed: int
    step: int


@dataclass(frozen=True, eq=False)
class Distilled:
    """Workspaces, and the call that made them, if one did.

    Args:
        workspaces: of each prompt, one for all drafts that follow, or one for each.
        read, written: tokens of the call for each prompt, 0 without one, shape [P].
    """

    workspaces: list[list[Tokens]]
    read: Int[Tensor, "P"]
    written: Int[Tensor, "P"]


@runtime_checkable
class Distil(Protocol):
    """Compresses the drafts of a round."""

    def __call__(self, drafts: Rows, texts: list[list[Tokens]], call: Call) -> Distilled:
        """Workspaces of at most `call.room` tokens from drafts, given as rows and as what is to be read of them."""
        ...


@part("best_drafts")
@dataclass(frozen=True)
class BestDrafts:
    """The k drafts with the highest score, best first, each cut to its last kappa / k tokens.

    Args:
        score: of drafts, by a verifier or by the model itself, shape [B]; NaN counts as the lowest.
        k: drafts to keep.
        template: what stands between them.

    Raises:
        ValueError: k below 1.
    """

    score: Callable[[Rows], Float[Tensor, "B"]]
    k: int = 1
    template: Template = Template()

    def __post_init__(self) -> None:
        _at_least_one(self.k)

    def __call__(self, drafts: Rows, texts: list[list[Tokens]], call: Call) -> Distilled:
        """See `Distil`."""
        score = self.score(drafts).double().nan_to_num(nan=float("-inf")).view(len(texts), -1)
        order = score.argsort(stable=True, dim=1, descending=True)[:, : self.k].tolist()
        kept = [[[found[i] for i in best]] for found, best in zip(texts, order, strict=True)]
        return _extracted(kept, self.template, call)


@part("random_drafts")
@dataclass(frozen=True)
class RandomDrafts:
    """For each draft that follows another k of the drafts, at random, each cut to its last kappa / k tokens.

    With independent drafts of which a share p is right, a reader that copies a right one when it sees one succeeds with
    probability 1 - (1 - p)^k.

    Args:
        k: drafts that each one sees.
        template: what stands between them.

    Raises:
        ValueError: k below 1.
    """

    k: int = 1
    template: Template = Template()

    def __post_init__(self) -> None:
        _at_least_one(self.k)

    def __call__(self, drafts: Rows, texts: list[list[Tokens]], call: Call) -> Distilled:
        """See `Distil`."""
        readers, count = call.following, len(texts[0])
        index = torch.tensor(list(call.data_index)).repeat_interleave(readers)
        seed = counter_seed(call.seed, "random_drafts")
        row = row_ids(seed, call.step, index, torch.arange(readers).repeat(len(texts)))
        number = uniforms(row.repeat_interleave(count), torch.arange(count).repeat(len(row)))
        order = number.view(len(texts), readers, count).argsort(2)[:, :, : self.k].tolist()
        kept = [[[found[i] for i in one] for one in each] for found, each in zip(texts, order, strict=True)]
        return _extracted(kept, self.template, call)


@part("summary")
@dataclass(frozen=True)
class Summary:
    """The model reads all drafts and writes the workspace, at most kappa tokens.

    Args:
        template: prompt before draft between draft ... after, the task of the distiller.
        temperature: of the distiller.
    """

    template: Template = Template()
    temperature: float = 1.0

    def __call__(self, drafts: Rows, texts: list[list[Tokens]], call: Call) -> Distilled:
        """See `Distil`."""
        given = [self.template.around(p, self.template.joined(t)) for p, t in zip(call.prompts, texts, strict=True)]
        sampling = replace(call.sampling, temperature=self.temperature, max_completion_length=call.room)
        seed = counter_seed(call.seed, "summary")
        rows = call.generator.generate(given, 1, sampling, seed=seed, step=call.step, data_index=call.data_index)
        return Distilled([[text] for text in written(rows)], rows.prompt_mask.sum(1).cpu(), rows.lengths.cpu())


@dataclass(frozen=True, eq=False)
class Refined:
    """The last drafts, and what they cost.

    Args:
        rows: the answers, those of a prompt together; workspaces are part of their prompts, which no loss counts.
        sequential: B_seq of each prompt, shape [P].
        total: B_tot, shape [P].
        context: tokens that the longest call read, shape [P].
    """

    rows: Rows
    sequential: Int[Tensor, "P"]
    total: Int[Tensor, "P"]
    context: Int[Tensor, "P"]


@part("refinement", paper=215)
@dataclass(frozen=True)
class ParallelDistilRefine:
    """Rounds of parallel drafts with a workspace between them; see the module.

    Args:
        rounds: M_1 .. M_R, drafts of each round; the last is 1.
        distil: how drafts become a workspace.
        room: kappa, tokens of a workspace at most.
        template: what stands around a workspace in the prompt of a draft.
        extract: what of a draft is to be read on, such as the answer without the reasoning; all of it without.

    Raises:
        ValueError: no rounds, a round without drafts, a last round that is not 1, or no room.

    Source: "Rethinking Thinking Tokens: LLMs as Improvement Operators", 2025.
    """

    distil: Distil
    rounds: tuple[int, ...] = (8, 1)
    room: int = 1024
    template: Template = Template()
    extract: Callable[[Tokens], Tokens] | None = None

    def __post_init__(self) -> None:
        if not self.rounds or min(self.rounds) < 1 or self.rounds[-1] != 1:
            raise ValueError(f"rounds must be numbers of drafts of which the last is 1, not {self.rounds}")
        if self.room < 1:
            raise ValueError(f"room must be at least 1 token, not {self.room}")

    def __call__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_generations: int = 1,
        seed: int,
        step: int = 0,
        data_index: Sequence[int] | None = None,
    ) -> Refined:
        """Refine answers to tokenised prompts.

        Args:
            generator, prompts, sampling, seed, step, data_index: see `Generator`.
            num_generations: answers of the last round to each prompt, a group; B_tot counts them all.
        """
        texts = [tuple(prompt) for prompt in prompts]
        index = list(range(len(texts))) if data_index is None else list(data_index)
        counts = [*self.rounds[:-1], num_generations]
        spaces: list[list[Tokens]] = [[()]] * len(texts)
        bill = _Bill(len(texts))
        for r, count in enumerate(counts):
            own = seed if r == 0 else counter_seed(seed, "refine", r)
            following = counts[r + 1] if r + 1 < len(counts) else 0
            call = Call(generator, sampling, texts, index, following, self.room, own, step)
            drafts = self._drafts(call, spaces, count)
            bill.drafts(drafts, count)
            if following:
                found = self.distil(drafts, self._readable(drafts, count), call)
                bill.call(found.read, found.written)
                spaces = [[space[: self.room] for space in each] for each in found.workspaces]
        return Refined(drafts, bill.sequential, bill.total, bill.context)

    def _drafts(self, call: Call, spaces: list[list[Tokens]], count: int) -> Rows:
        """`count` drafts of each prompt, all from its one workspace, or each from its own."""
        if all(len(each) == 1 for each in spaces):
            given = [self.template.around(prompt, each[0]) for prompt, each in zip(call.prompts, spaces, strict=True)]
            return self._generate(call, given, count, call.data_index)
        given = [self.template.around(p, space) for p, each in zip(call.prompts, spaces, strict=True) for space in each]
        apart = [i * count + m for i in call.data_index for m in range(count)]  # of one prompt, yet drawn independently
        rows = self._generate(call, given, 1, apart)
        group = torch.arange(len(call.prompts), device=rows.device).repeat_interleave(count)
        return rows.with_(group=group, data_index=torch.tensor(call.data_index, device=rows.device)[group])

    def _generate(self, call: Call, given: list[Tokens], count: int, index: Sequence[int]) -> Rows:
        return call.generator.generate(given, count, call.sampling, seed=call.seed, step=call.step, data_index=index)

    def _readable(self, drafts: Rows, count: int) -> list[list[Tokens]]:
        texts = written(drafts)
        texts = texts if self.extract is None else [self.extract(text) for text in texts]
        return [texts[start : start + count] for start in range(0, len(texts), count)]


class _Bill:
    """Tokens read and written so far, for each prompt."""

    def __init__(self, prompts: int):
        self.sequential = torch.zeros(prompts, dtype=torch.long)
        self.total, self.context = self.sequential.clone(), self.sequential.clone()

    def drafts(self, rows: Rows, count: int) -> None:
        read = rows.prompt_mask.sum(1).cpu().view(-1, count)
        cost = read + rows.lengths.cpu().view(-1, count)
        self.sequential = self.sequential + cost.amax(1)
        self.total = self.total + cost.sum(1)
        self.context = torch.maximum(self.context, read.amax(1))

    def call(self, read: Int[Tensor, "P"], written: Int[Tensor, "P"]) -> None:
        self.sequential = self.sequential + read + written
        self.total = self.total + read + written
        self.context = torch.maximum(self.context, read)


def written(rows: Rows) -> list[Tokens]:
    """What was written, without the token that ended it."""
    ends = (rows.stop == int(Stop.EOS)).tolist()
    texts = [tokens[mask].tolist() for tokens, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
    return [tuple(text[:-1] if end else text) for text, end in zip(texts, ends, strict=True)]


def success_of_copy(p: float, k: int) -> float:
    """1 - (1 - p)^k: one of k independent drafts is right, and the reader copies it.

    >>> round(success_of_copy(0.2, 4), 4)
    0.5904
    """
    return 1 - (1 - p) ** k


def _extracted(kept: list[list[list[Tokens]]], template: Template, call: Call) -> Distilled:
    """Workspaces of drafts that were picked, [P][readers][k]: of each draft the end, where the answer stands."""
    spaces = []
    for readers in kept:
        each = []
        for drafts in readers:
            room = max(0, (call.room - len(template.between) * (len(drafts) - 1)) // len(drafts))
            each.append(template.joined([text[len(text) - min(len(text), room) :] for text in drafts]))
        spaces.append(each)
    none = torch.zeros(len(kept), dtype=torch.long)
    return Distilled(spaces, none, none)


def _at_least_one(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
