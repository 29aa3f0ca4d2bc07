"""A local language model as a chain: token by token, with every next token's probability, and caches that can fork."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix, Reward, TokenChain, Value
from keel.core.chance import Choice
from keel.core.products import fast_products, worth
from keel.core.rows import Rows, Stop
from keel.rollouts.caches import Workspace
from keel.rollouts.decoding import Prompts, Stepper, StopStrings
from keel.rollouts.sampling import Sampling
from keel.rollouts.states import rows_of

if TYPE_CHECKING:
    from keel.rollouts.local import LocalGenerator

STALE = 0.125  # share of finished rows at which they leave the model's batch


@dataclass(frozen=True, eq=False)
class Memory:
    """What the model remembers of the unfinished states.

    Args:
        stepper: runs the model; None once all are finished.
        rows: height of the stepper's batch, in which finished states may linger.
        row: the stepper's row of each state, -1 of finished ones, shape [B].
        hidden: the model's state after the last token of each unfinished state, shape [n, D].
        log_probs: log p_0 of the next token of each unfinished state, shape [n, V].
    """

    stepper: Stepper | None
    rows: int
    row: Int[Tensor, "B"]
    hidden: Float[Tensor, "n D"]
    log_probs: Float[Tensor, "n V"]


class LocalChain(TokenChain):
    """The chain of a local model: p_0 is what the generator samples from, temperature and filters applied.

    Args:
        generator: holds the model, whose weights are read as they are now.
        prompts: tokens of each prompt.
        sampling: temperature (above 0), filters, length, stop strings.
        data_index: identity of each prompt, for the randomness of whole completions; its place without it.
        reward, value: see `TokenChain`.

    Raises:
        ValueError: temperature 0, whose prior is no distribution.
        UserError: prompts that do not fit the model.
    """

    def __init__(
        self,
        generator: "LocalGenerator",
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        data_index: Sequence[int] | None = None,
        reward: Reward | None = None,
        value: Value | None = None,
    ):
        if sampling.temperature == 0:
            raise ValueError("temperature must be positive: samplers need a distribution to start from")
        self.generator, self.model, self.sampling = generator, generator.model, sampling
        self.texts = [tuple(prompt) for prompt in prompts]
        self.data_index = list(range(len(prompts))) if data_index is None else list(data_index)
        super().__init__(len(prompts), sampling.max_completion_length, self.model.pad_id, reward, value)
        self.device = self.model.device
        self.ends = torch.zeros(self.model.vocabulary_size, dtype=torch.bool, device=self.device)
        self.ends[list(self.model.eos_ids)] = True
        self.stops = StopStrings.of(self.model, sampling.stop_strings)

    # -- where it stands -------------------------------------------------------------------------------------------

    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        """See `TokenChain`."""
        known: Memory = x.memory
        alive = ~x.done
        if bool(alive.all()):
            return known.log_probs
        found = torch.full((len(x), self.model.vocabulary_size), -math.inf, device=self.device)
        found[:, self.pad] = 0.0
        found[alive] = known.log_probs
        return found

    def hidden(self, x: Prefix) -> Float[Tensor, "B D"]:
        """The model's state after each prefix; 0 for finished ones."""
        known: Memory = x.memory
        found = known.hidden.new_zeros(len(x), known.hidden.shape[-1])
        found[~x.done] = known.hidden
        return found

    def at(self, tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"], prompt: Int[Tensor, "B"]) -> Prefix:
        """States that have written these tokens already (unfinished all of them), read in one forward pass."""
        texts = [
            (*self.texts[p], *row[:n])
            for p, row, n in zip(prompt.tolist(), tokens.tolist(), length.tolist(), strict=True)
        ]
        width = self.horizon - tokens.shape[1]
        padded = torch.nn.functional.pad(tokens, (0, width), value=self.pad)
        padded = torch.where(torch.arange(self.horizon, device=self.device) < length[:, None], padded, self.pad)
        logp = self._read(padded, length, prompt)
        goes_on = torch.full_like(length, -1)
        return Prefix(padded, logp, length, goes_on, prompt, self._prefilled(texts, self.horizon - int(length.min())))

    def rows(self, x: Prefix) -> Rows:
        """Prompts and completions as rows, a group for each prompt."""
        texts = [text or (self.model.start_id,) for text in self.texts]
        return rows_of(x, texts, self.pad, self.data_index)

    # -- completions -----------------------------------------------------------------------------------------------

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`; whole completions go through the generator, which is faster and drops finished rows.

        It draws for whole prompts: one with several states, any of which is asked for, draws for all of them.
        """
        if bool(x.length.any()) or bool(x.done.any()):
            return super().complete(x, m, rng, where)
        asked = torch.ones_like(x.done) if where is None else where
        prompts = asked.view(self.prompts, -1).any(1).nonzero(as_tuple=True)[0]
        if not len(prompts):
            return super().complete(x, m, rng, where)
        seed, count = rng.seed("complete"), m * len(x) // self.prompts
        rows = self.generator.generate(
            [self.texts[p] or (self.model.start_id,) for p in prompts.tolist()],
            count,
            self.sampling,
            seed=seed,
            data_index=[self.data_index[p] for p in prompts.tolist()],
        )
        extra = self.horizon - rows.tokens.shape[1]
        tokens = torch.nn.functional.pad(rows.tokens, (0, extra), value=self.pad)
        logp = torch.nn.functional.pad(rows.logp["behaviour"], (0, extra))
        prompt = prompts[rows.group]
        self.meter.add("generated", rows.lengths, prompt)
        found = Prefix(tokens, logp, rows.lengths, rows.stop, prompt)
        if len(prompts) == self.prompts:
            return found
        place = (prompts[:, None] * count + torch.arange(count, device=self.device)).flatten()
        return found.spread(place, x.prompt.repeat_interleave(m), self.pad)

    # -- the memory ------------------------------------------------------------------------------------------------

    def _start(self, prompt: Int[Tensor, "B"]) -> Memory:
        return self._prefilled([self.texts[p] for p in prompt.tolist()], self.horizon)

    def _prefilled(self, texts: Sequence[Sequence[int]], room: int) -> Memory:
        asked = self._asked(texts, room)
        with self._running():
            stepper = self.generator.stepper(asked.ids.shape[1] + room, Workspace())
            with self.model.mixed():
                states = stepper.prefill(asked.ids, asked.mask, room)[asked.index]
            stepper.expand(asked.index)
            row = torch.arange(len(asked.row), device=self.device)
            return self._memory(stepper, len(row), row, states)

    def _moved(self, memory: Memory, index: Int[Tensor, "n"], x: Prefix) -> Memory:
        if memory is None or memory.stepper is None:
            return memory if memory is None else self._finished(memory, len(index))
        row = memory.row[index]
        alive = row >= 0
        place = (~x.done).long().cumsum(0) - 1  # of a state among the unfinished ones
        kept = place[index][alive]
        if not len(kept):
            return self._finished(memory, len(index))
        with self._running():
            stepper = memory.stepper.fork(row[alive])
        return Memory(stepper, len(kept), _numbered(alive), memory.hidden[kept], memory.log_probs[kept])

    def _stepped(self, memory: Memory, tokens: Int[Tensor, "B"], x: Prefix) -> Memory:
        alive = ~x.done
        if memory.stepper is None or not bool(alive.any()):
            return self._finished(memory, len(x))
        stepper, rows, row = memory.stepper, memory.rows, torch.where(alive, memory.row, -1)
        left = int(alive.sum())
        with self._running():
            if left <= (1 - STALE) * rows:
                stepper, rows, row = stepper.fork(row[alive]), left, _numbered(alive)
            feed = torch.full((rows,), self.pad, device=self.device)
            feed[row[alive]] = tokens[alive]
            with self.model.mixed():
                states = stepper.step(feed)
            return self._memory(stepper, rows, row, states[row[alive]])

    def _memory(self, stepper: Stepper, rows: int, row: Int[Tensor, "B"], states: Float[Tensor, "n D"]) -> Memory:
        states = self.model.for_head(states)
        head = self.model.head
        with fast_products(worth(states, head.module)):
            logits = head.logits(states) / self.sampling.temperature
        if self.sampling.filter is not None:
            logits = self.sampling.filter(logits)
        return Memory(stepper, rows, row, states, logits.log_softmax(-1))

    def _finished(self, memory: Memory, count: int) -> Memory:
        row = torch.full((count,), -1, dtype=torch.long, device=self.device)
        return Memory(None, 0, row, memory.hidden[:0], memory.log_probs[:0])

    def _ended(self, x: Prefix, tokens: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        found = torch.where(self.ends[tokens], int(Stop.EOS), -1)
        if self.stops is not None:
            going = (found < 0) & ~x.done
            for length in x.length[going].unique().tolist():
                index = (going & (x.length == length)).nonzero(as_tuple=True)[0]
                hit = self.stops.found(x.tokens, index, tokens[index], length - 1)
                found[index[hit]] = int(Stop.STOP_STRING)
        return found

    def _read(
        self, tokens: Int[Tensor, "B T"], length: Int[Tensor, "B"], prompt: Int[Tensor, "B"]
    ) -> Float[Tensor, "B T"]:
        """log p_0 of tokens that are given."""
        found = torch.zeros(tokens.shape, device=self.device)
        if not bool(length.any()):
            return found
        rows = self.rows(Prefix(tokens, found, length, torch.zeros_like(length), prompt))
        with self._running():
            states = self.model.for_head(self.model.hidden(rows))[rows.mask]
            logits = self.model.head.logits(states) / self.sampling.temperature
            if self.sampling.filter is not None:
                logits = self.sampling.filter(logits)
            chosen = logits.log_softmax(-1).gather(1, rows.tokens[rows.mask][:, None])[:, 0]
        found[:, : rows.tokens.shape[1]][rows.mask] = chosen
        return found

    def _asked(self, texts: Sequence[Sequence[int]], room: int) -> Prompts:
        return Prompts.of(self.model, texts, 1, room, seed=0, step=0, data_index=None)

    def _running(self):
        from keel.rollouts.local import evaluating

        return evaluating(self.model)


def _numbered(alive: Bool[Tensor, "B"]) -> Int[Tensor, "B"]:
    """0, 1, 2 ... for the unfinished states, -1 for the others."""
    return torch.where(alive, alive.long().cumsum(0) - 1, -1)
