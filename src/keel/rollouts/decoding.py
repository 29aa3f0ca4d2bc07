"""The decoding loop: one for every architecture, over a stepper that knows how to run the model token by token.

The choice of a token depends on its row's identity and its position alone (one uniform for each), and finished rows
leave the batch, so that neither the order of rows nor their neighbours matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.choice import counter_seed, row_ids, uniforms
from keel.core.drawing import draw
from keel.core.errors import UserError
from keel.core.policy import Head
from keel.core.products import fast_products, worth
from keel.core.rows import Rows, Stop
from keel.models.language import LanguageModel
from keel.rollouts.sampling import Sampling


class Stepper(Protocol):
    """A model that continues sequences by one token at a time."""

    def prefill(self, ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"], room: int) -> Float[Tensor, "N D"]:
        """Read left-padded prompts; at most `room` tokens will follow. The states of their last tokens."""
        ...

    def expand(self, index: Int[Tensor, "n"]) -> None:
        """From now on row i continues prompt `index[i]`."""
        ...

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """Append one token to each row; their states."""
        ...

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """Go on with these rows only, in this order; the stepper may assume what `survivors` gives."""
        ...

    def fork(self, index: Int[Tensor, "m"]) -> Self:
        """A copy that goes on with these rows, any of them several times; this one stays as it is."""
        ...


@dataclass(frozen=True)
class Prompts:
    """What is to be continued: each distinct prompt once, and a row for each completion.

    Args:
        ids, mask: distinct prompts, left-padded, shape [N, P].
        index: prompt of each row, shape [B].
        group, data_index, row: of each row, shape [B].
    """

    ids: Int[Tensor, "N P"]
    mask: Bool[Tensor, "N P"]
    index: Int[Tensor, "B"]
    group: Int[Tensor, "B"]
    data_index: Int[Tensor, "B"]
    row: Int[Tensor, "B"]

    @staticmethod
    def of(
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        room: int,
        *,
        seed: int,
        step: int,
        data_index: Sequence[int] | None,
    ) -> "Prompts":
        """Each prompt `num_generations` times; an empty one is the model's start token.

        Raises:
            UserError: no prompts, a prompt that leaves no room for a completion, or a token outside the vocabulary.
        """
        if not prompts or num_generations < 1:
            raise UserError("there is nothing to generate", "prompts", "Give at least one prompt and one generation.")
        if data_index is not None and len(data_index) != len(prompts):
            raise UserError(f"{len(data_index)} indices for {len(prompts)} prompts", "data_index")
        texts = [tuple(prompt) or (model.start_id,) for prompt in prompts]
        _check_prompts(model, texts, room)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        width = max(map(len, place))
        ids = torch.tensor([[model.pad_id] * (width - len(text)) + list(text) for text in place])
        length = torch.tensor([len(text) for text in place])
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        index = torch.arange(len(prompts)) if data_index is None else torch.as_tensor(data_index, dtype=torch.long)
        sample = torch.arange(num_generations).repeat(len(prompts))
        found = Prompts(
            ids=ids,
            mask=torch.arange(width) >= width - length[:, None],
            index=torch.tensor([place[text] for text in texts])[group],
            group=group,
            data_index=index[group],
            row=row_ids(seed, step, index[group], sample),
        )
        return Prompts(**{name: value.to(model.device) for name, value in vars(found).items()})

    def parts(self, size: int | None) -> list["Prompts"]:
        """Batches of at most `size` rows; all in one without it."""
        if size is None or size >= len(self.row):
            return [self]
        return [self._part(start, start + size) for start in range(0, len(self.row), size)]

    def _part(self, start: int, stop: int) -> "Prompts":
        used, index = self.index[start:stop].unique(return_inverse=True)
        rest = {name: getattr(self, name)[start:stop] for name in ("group", "data_index", "row")}
        mask = self.mask[used]
        left = int((~mask.any(0)).sum())
        return Prompts(ids=self.ids[used][:, left:], mask=mask[:, left:], index=index, **rest)

    def rows(self, drawn: "Drawn", pad_id: int) -> Rows:
        """Rows of what was drawn for them, without columns that are padding in all."""
        width = max(1, int(drawn.length.max()))
        mask = torch.arange(width, device=drawn.length.device) < drawn.length[:, None]
        return Rows.build(
            self.ids[self.index],
            self.mask[self.index],
            drawn.tokens[:, :width].masked_fill(~mask, pad_id),
            mask,
            stop=drawn.stop,
            row=self.row,
            group=self.group,
            data_index=self.data_index,
            logp={"behaviour": drawn.logp[:, :width].masked_fill(~mask, 0.0)},
        )


@dataclass(frozen=True)
class Drawn:
    """Completions as they were drawn: tokens and log-probabilities [B, T], lengths and reasons to stop [B]."""

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    length: Int[Tensor, "B"]
    stop: Int[Tensor, "B"]


def decode(
    stepper: Stepper,
    model: LanguageModel,
    prompts: Prompts,
    sampling: Sampling,
    *,
    compact: float = 0.125,
    chooser: "Chooser | None" = None,
) -> Drawn:
    """Draw one completion for each row.

    Args:
        stepper: runs the model.
        model: its head, end tokens and tokenizer.
        prompts: what to continue.
        sampling: how.
        compact: finished rows leave the batch when they are this share of it; above 1 they never do.
        chooser: another one for these rows, that may look at what is drawn while it is drawn.
    """
    rows, limit, device = len(prompts.row), sampling.max_completion_length, prompts.row.device
    tokens = torch.full((rows, limit), model.pad_id, device=device)
    logp = torch.zeros(rows, limit, device=device)
    length = torch.full((rows,), limit, device=device)
    stop = torch.full((rows,), int(Stop.LENGTH), device=device)
    ends = _table(model, model.eos_ids)
    texts = StopStrings.of(model, sampling.stop_strings)
    chooser = chooser or Chooser(model.head, sampling, prompts.row, limit)

    with model.mixed():
        states = stepper.prefill(prompts.ids, prompts.mask, limit)[prompts.index]
    stepper.expand(prompts.index)
    alive = torch.arange(rows, device=device)  # where the rows of the batch belong
    done, gone = torch.zeros(rows, dtype=torch.bool, device=device), 0
    for t in range(limit):
        chosen, chosen_logp = chooser(model.for_head(states), alive, t)
        tokens[:, t].index_copy_(0, alive, chosen)
        logp[:, t].index_copy_(0, alive, chosen_logp)
        finished = [(ends[chosen], Stop.EOS)] if ends is not None else []
        if texts is not None:
            finished.append((texts.found(tokens, alive, chosen, t), Stop.STOP_STRING))
        for now, reason in finished:
            if bool(now.any()):
                now = now & ~done
                length[alive[now]], stop[alive[now]] = t + 1, int(reason)
                done |= now
                gone = int(done.sum())
        if t + 1 == limit or gone == len(done):
            break
        if gone >= max(1.0, compact * len(done)):
            index = survivors(done)
            alive, chosen, done, gone = alive[index], chosen[index], done[index], 0
            stepper.keep(index)
        with model.mixed():
            states = stepper.step(chosen)
    return Drawn(tokens, logp, length, stop)


def survivors(done: Bool[Tensor, "n"]) -> Int[Tensor, "m"]:
    """Rows that go on, each at its own place where possible: the last ones fill the holes, so that little moves."""
    count = len(done) - int(done.sum())
    index = torch.arange(count, device=done.device)
    index[done[:count]] = count + (~done[count:]).nonzero(as_tuple=True)[0]
    return index


class Chooser:
    """Draws the next token of each row with the uniform that belongs to its row and position.

    Args:
        head: from states to logits.
        sampling: temperature and filters. Greedy decoding takes the likeliest token and records its log-probability
            under the unfiltered distribution at temperature 1.
        row: identities of all rows, shape [B].
        limit: positions at most.
    """

    SPAN = 64  # positions for which uniforms are drawn at once

    def __init__(self, head: Head, sampling: Sampling, row: Int[Tensor, "B"], limit: int):
        self.head, self.sampling, self.filter = head, sampling, sampling.filter
        if row.device.type == "mps":  # it has no fp64
            row = row.cpu()
        self.row, self.limit = row ^ counter_seed("rollout"), limit
        self.start, self.numbers = 0, torch.empty(0)

    def __call__(
        self, states: Float[Tensor, "n D"], alive: Int[Tensor, "n"], position: int
    ) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """Tokens of the rows `alive`, and their log-probabilities under the distribution sampled."""
        with fast_products(worth(states, self.head.module)):
            logits = self.head.logits(states)
        return self.choose(logits, alive, position)

    def choose(
        self, logits: Float[Tensor, "n V"], alive: Int[Tensor, "n"], position: int
    ) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """The same from logits."""
        if self.sampling.temperature == 0:
            token = logits.argmax(-1)
            return token, _pick(logits, token) - logits.logsumexp(-1)
        probs = self.shaped(logits).softmax(-1)
        there = self.row.device
        token = draw(probs.to(there), self._uniform(position)[alive.to(there)]).to(probs.device)
        return token, _pick(probs, token).log()

    def shaped(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Logits whose log-probabilities are recorded: after temperature and filters, or as they are if greedy."""
        if self.sampling.temperature == 0:
            return logits
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        return logits if self.filter is None else self.filter(logits)

    def _uniform(self, position: int) -> Float[Tensor, "B"]:
        place = position - self.start
        if not 0 <= place < len(self.numbers):
            self.start, place = position, 0
            span = torch.arange(position, min(self.limit, position + self.SPAN), device=self.row.device)
            row = self.row.repeat(len(span))
            self.numbers = uniforms(row, span.repeat_interleave(len(self.row))).view(len(span), -1)
        return self.numbers[place]


def _pick(values: Float[Tensor, "n V"], token: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    return values.gather(-1, token[:, None])[:, 0]


def text_of(tokenizer: Any, tokens: Sequence[int], **options: Any) -> str:
    """Text of tokens; those that only the model has, because its vocabulary is padded, say nothing.

    Args:
        tokenizer: one of `tokenizers` leaves them out by itself; others raise errors of several kinds.
        tokens: of one completion.
        options: of the tokenizer's `decode`.
    """
    try:
        return tokenizer.decode(list(tokens), **options)
    except Exception:
        known = [token for token in tokens if token < len(tokenizer)]
        if len(known) == len(tokens):
            raise
        return tokenizer.decode(known, **options)


class StopStrings:
    """Finds rows in whose text a stop string has just appeared.

    Only rows whose last token could complete one are decoded: a table over the vocabulary says which tokens hold the
    last character of a stop string.

    Args:
        tokenizer: decodes.
        strings: what to look for.
        table: tokens that may complete one, shape [V].
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...], table: Bool[Tensor, "V"]):
        self.tokenizer, self.strings, self.table = tokenizer, strings, table
        self.window = 4 * max(map(len, strings)) + 16  # tokens; four bytes make a character at most

    @staticmethod
    def of(model: LanguageModel, strings: tuple[str, ...]) -> "StopStrings | None":
        """None without any."""
        strings = tuple(text for text in strings if text)
        if not strings:
            return None
        last = frozenset(text[-1] for text in strings)
        known = _may_complete(model.tokenizer, len(model.tokenizer), last)[: model.vocabulary_size]
        table = torch.zeros(model.vocabulary_size, dtype=torch.bool)
        table[: len(known)] = known
        return StopStrings(model.tokenizer, strings, table.to(model.device))

    def found(
        self, tokens: Int[Tensor, "B T"], alive: Int[Tensor, "n"], chosen: Int[Tensor, "n"], position: int
    ) -> Bool[Tensor, "n"]:
        """Rows of the batch in whose text a stop string ends within the token at `position`."""
        result = self.table[chosen]
        candidates = result.nonzero(as_tuple=True)[0]
        if len(candidates):
            start = max(0, position + 1 - self.window)
            recent = tokens[alive[candidates], start : position + 1].tolist()
            texts = [text_of(self.tokenizer, row) for row in recent]
            hits = [any(text in completion for text in self.strings) for completion in texts]
            result[candidates] = torch.tensor(hits, device=result.device)
        return result


@lru_cache(maxsize=8)
def _may_complete(tokenizer: Any, size: int, last: frozenset[str]) -> Bool[Tensor, "V"]:
    """For each token, whether its text holds one of the characters, or part of a character."""
    texts = tokenizer.batch_decode([[i] for i in range(size)])
    return torch.tensor(["\ufffd" in text or not last.isdisjoint(text) for text in texts])


def _table(model: LanguageModel, tokens: Sequence[int]) -> Bool[Tensor, "V"] | None:
    if not len(tokens):
        return None
    table = torch.zeros(model.vocabulary_size, dtype=torch.bool, device=model.device)
    table[torch.as_tensor(tokens, device=model.device)] = True
    return table


def _check_prompts(model: LanguageModel, texts: Sequence[tuple[int, ...]], room: int) -> None:
    longest, limit = max(map(len, texts)), model.context_length
    if limit is not None and longest + room > limit:
        raise UserError(
            f"a prompt of {longest} tokens and a completion of {room} do not fit the model's context of {limit}",
            "max_completion_length",
            "Lower max_completion_length or max_prompt_length.",
        )
    highest = max(max(text) for text in texts)
    if highest >= model.vocabulary_size or min(min(text) for text in texts) < 0:
        raise UserError(f"token {highest} is outside the vocabulary of {model.vocabulary_size}", "prompts")
