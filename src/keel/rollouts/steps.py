"""A chain by steps over any generator: a step is what is written up to a delimiter.

    p_0(s_{k+1} | x_k) = prod_t p_0(y_t | x_k, y_<t),   y_t the tokens up to the one that completes the delimiter

Cutting a completion into steps changes nothing of its law, so the prior is that of the generator. A step costs one call
for all states, in which the prompt and what was written so far are the new prompt: no cache is kept between the steps
(a server may keep one of its own), and `meter.read` counts what was read again.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Meter, Prefix, Reward, estimate
from keel.core.chance import Choice
from keel.core.rows import Rows, Stop
from keel.rollouts.decoding import text_of
from keel.rollouts.sampling import Generator, Sampling
from keel.rollouts.states import rows_of

SLOTS = 1 << 24  # states of one prompt that have identities of their own
StepValue = Callable[["StepChain", Prefix, Choice], Float[Tensor, "B"]]


@dataclass(frozen=True, eq=False)
class Steps:
    """Continuations, to be indexed like a tensor.

    Args:
        tokens, logp: right-padded, shape [n, L]; 0 after the end.
        length: tokens of each, shape [n]; 0 for states that are finished.
        stop: why the completion ends with this step (`Stop`), -1 where it goes on, shape [n].
    """

    tokens: Int[Tensor, "n L"]
    logp: Float[Tensor, "n L"]
    length: Int[Tensor, "n"]
    stop: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: Any) -> "Steps":
        return Steps(*(getattr(self, name)[index] for name in ("tokens", "logp", "length", "stop")))


class StepChain:
    """See the module. A `Chain`, but no `TokenChain`: the probability of a step is known of drawn ones only.

    What a state draws depends on the seed of the request, the identity of its prompt and its place among the prompt's
    states, nothing else: copies of one state go on differently, and other prompts change nothing. A completion ends at
    EOS, at a stop string of `sampling`, after `sampling.max_completion_length` tokens or after `max_steps` steps (both
    `Stop.LENGTH`), never at the delimiter. States live on the CPU. Their memory is the number of steps so far, [B].

    Args:
        prompts: tokens of each.
        generator: draws.
        sampling: how; its log-probabilities are those of the prior.
        delimiter: text after which a step ends; it belongs to the step.
        max_steps: steps at most; None sets no limit.
        reward: of finished states; zero without it.
        value: estimate of V for unfinished states; zero without it.
        pad: token that stands after the end.
        tokenizer: needed where `sampling` has stop strings, to tell them from the delimiter.
        data_index: identity of each prompt; their places without it.
        context: tokens that the model takes, prompt and completion together; taken from the generator's model if it
            has one.

    Raises:
        ValueError: no prompts, an empty delimiter, `max_steps` below 1, stop strings without a tokenizer, or a stop
            string that begins within the delimiter, where a chain by steps could not see it.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        generator: Generator,
        sampling: Sampling,
        *,
        delimiter: str = "\n\n",
        max_steps: int | None = None,
        reward: Reward | None = None,
        value: StepValue | None = None,
        pad: int = 0,
        tokenizer: Any = None,
        data_index: Sequence[int] | None = None,
        context: int | None = None,
    ):
        _check(prompts, sampling, delimiter, max_steps, tokenizer, data_index)
        self.texts, self.generator, self.sampling = [list(prompt) for prompt in prompts], generator, sampling
        self.delimiter, self.max_steps, self.pad, self.tokenizer = delimiter, max_steps, pad, tokenizer
        self.reward_of, self.value_of = reward, value
        self.data_index = list(range(len(prompts))) if data_index is None else list(data_index)
        self.context = context or getattr(getattr(generator, "model", None), "context_length", None)
        self.prompts, self.horizon = len(prompts), sampling.max_completion_length
        self.meter = Meter(self.prompts)

    # -- the protocol ----------------------------------------------------------------------------------------------

    def init(self, n: int) -> Prefix:
        """See `Chain`."""
        prompt = torch.arange(self.prompts).repeat_interleave(n)
        zeros = torch.zeros_like(prompt)
        tokens = torch.full((len(prompt), self.horizon), self.pad)
        return Prefix(tokens, torch.zeros(tokens.shape), zeros, zeros - 1, prompt, zeros)

    def propose(self, x: Prefix, m: int, rng: Choice, name: str = "action") -> tuple[Steps, Float[Tensor, "B m"]]:
        """See `Chain`: one call of the generator, which stops at the delimiter; the name is of no use to it."""
        delimited = replace(self.sampling, stop_strings=(*self.sampling.stop_strings, self.delimiter))
        steps = self._draw(x, m, delimited, rng.seed("steps"))
        return steps, steps.logp.double().sum(1).view(len(x), m)

    def extend(self, x: Prefix, action: Steps) -> Prefix:
        """See `Chain`."""
        column = torch.arange(action.tokens.shape[1])
        written = (column < action.length[:, None]) & ~x.done[:, None]
        row, source = written.nonzero(as_tuple=True)
        place = x.length[row] + source
        tokens, logp = x.tokens.clone(), x.logp.clone()
        tokens[row, place], logp[row, place] = action.tokens[row, source], action.logp[row, source]
        length, count = x.length + written.sum(1), x.memory + (~x.done).long()
        stop = torch.where((action.stop < 0) & (length >= self.horizon), int(Stop.LENGTH), action.stop)
        if self.max_steps is not None:
            stop = torch.where((stop < 0) & (count >= self.max_steps), int(Stop.LENGTH), stop)
        return Prefix(tokens, logp, length, torch.where(x.done, x.stop, stop), x.prompt, count)

    def select(self, x: Prefix, index: Int[Tensor, "n"]) -> Prefix:
        """See `Chain`."""
        rest = {name: getattr(x, name)[index] for name in ("tokens", "logp", "length", "stop", "prompt")}
        return Prefix(**rest, memory=None if x.memory is None else x.memory[index])

    def is_done(self, x: Prefix) -> Bool[Tensor, "B"]:
        """See `Chain`."""
        return x.done

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`: one call that stops at no delimiter; with `max_steps`, step by step."""
        rng, rows = rng.scope("complete"), torch.arange(len(x))
        if where is not None:
            place = where.nonzero(as_tuple=True)[0]
            x = replace(self.select(x, place).spread(place, x.prompt, self.pad), memory=x.memory)
        many = self.select(x, rows.repeat_interleave(m))
        if self.max_steps is None:
            return self.extend(many, self._draw(x, m, self.sampling, rng.seed("rest")))
        while not bool(many.done.all()):
            many = self.extend(many, self.propose(many, 1, rng)[0])
        return many

    def reward(self, x: Prefix, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`."""
        wanted = x.done if where is None else x.done & where
        self.meter.add("rewards", wanted)
        found = torch.zeros(len(x), dtype=torch.float64)
        if self.reward_of is None or not bool(wanted.any()):
            return found
        index = wanted.nonzero(as_tuple=True)[0]
        return found.index_copy(0, index, self.reward_of(replace(self.select(x, index), memory=None)).to(found))

    def value(self, x: Prefix, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """See `Chain`; the value is called with all states, and may be masked."""
        asked = torch.ones_like(x.done) if where is None else where
        found = self.reward(x, asked)
        wanted = ~x.done & asked
        if self.value_of is None or not bool(wanted.any()):
            return found
        return torch.where(wanted, estimate(self.value_of, self, x, rng, wanted).to(found), found)

    def key(self, x: Prefix) -> list[Hashable]:
        """See `Chain`: the prompt's number and the tokens."""
        return [(int(p), *x.text(i)) for i, p in enumerate(x.prompt.tolist())]

    def rows(self, x: Prefix) -> Rows:
        """Prompts and completions as rows, a group for each prompt."""
        return rows_of(x, self.texts, self.pad, self.data_index)

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _draw(self, x: Prefix, m: int, sampling: Sampling, seed: int) -> Steps:
        """m continuations of each state, cut at the horizon; nothing for finished ones."""
        total = len(x) * m
        found = Steps(
            torch.full((total, self.horizon), self.pad),
            torch.zeros(total, self.horizon),
            torch.zeros(total, dtype=torch.long),
            x.stop.repeat_interleave(m),
        )
        texts = [self.texts[p] + x.text(i) for i, p in enumerate(x.prompt.tolist())]
        identity = self._identities(x)
        for some in self._calls(x, texts):
            room = int((self.horizon - x.length[some]).max())
            rows = self.generator.generate(
                [texts[i] for i in some],
                m,
                replace(sampling, max_completion_length=room),
                seed=seed,
                data_index=[identity[i] for i in some],
            ).to("cpu")
            into = (torch.tensor(some)[:, None] * m + torch.arange(m)).flatten()
            self._write(found, into, rows, (self.horizon - x.length[some]).repeat_interleave(m))
        self._count(x, texts, found, m)
        width = max(1, int(found.length.max()))
        return Steps(found.tokens[:, :width], found.logp[:, :width], found.length, found.stop)

    def _write(self, found: Steps, into: Int[Tensor, "n"], rows: Rows, room: Int[Tensor, "n"]) -> None:
        """Rows as steps; those that had less room than the others are cut to it."""
        width = rows.tokens.shape[1]
        cut = rows.lengths > room
        length = torch.minimum(rows.lengths, room)
        kept = torch.arange(width) < length[:, None]
        found.tokens[into, :width] = rows.tokens.masked_fill(~kept, self.pad)
        found.logp[into, :width] = rows.logp["behaviour"].float().masked_fill(~kept, 0.0)
        found.length[into] = length
        goes_on = (rows.stop == int(Stop.STOP_STRING)) & ~self._final(rows)
        ends = torch.where(cut, int(Stop.LENGTH), torch.where(goes_on, -1, rows.stop))
        found.stop[into] = ends

    def _final(self, rows: Rows) -> Bool[Tensor, "n"]:
        """Rows in which a stop string of the completion has appeared, not the delimiter."""
        strings = self.sampling.stop_strings
        if not strings:
            return torch.zeros(len(rows), dtype=torch.bool)
        texts = [
            text_of(self.tokenizer, tokens[mask].tolist()) for tokens, mask in zip(rows.tokens, rows.mask, strict=True)
        ]
        return torch.tensor([any(string in text for string in strings) for text in texts])

    def _identities(self, x: Prefix) -> list[int]:
        """A number for each state, of its prompt and its place among the prompt's states."""
        before = Counter[int]()
        found = []
        for p in x.prompt.tolist():
            found.append(self.data_index[p] * SLOTS + before[p])
            before[p] += 1
        return found

    def _calls(self, x: Prefix, texts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Unfinished states, in as few calls as the model's context allows (the longest prompt meets the most room)."""
        alive = (~x.done).nonzero(as_tuple=True)[0].tolist()
        if self.context is None:
            yield from [alive] if alive else []
            return
        room = (self.horizon - x.length).tolist()
        call: list[int] = []
        longest = most = 0
        for i in sorted(alive, key=lambda i: room[i]):
            together = max(longest, len(texts[i])) + max(most, room[i])
            if call and together > self.context:
                yield call
                call, longest, most = [], 0, 0
            call.append(i)
            longest, most = max(longest, len(texts[i])), max(most, room[i])
        yield from [call] if call else []

    def _count(self, x: Prefix, texts: Sequence[list[int]], found: Steps, m: int) -> None:
        """Tokens drawn, and those of each distinct state that was sent."""
        self.meter.add("generated", found.length.view(len(x), m).sum(1))
        seen: set[Hashable] = set()
        sent = torch.zeros(len(x), dtype=torch.long)
        for i, key in enumerate(self.key(x)):
            if not bool(x.done[i]) and key not in seen:
                seen.add(key)
                sent[i] = len(texts[i])
        self.meter.add("read", sent)


def _check(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    delimiter: str,
    max_steps: int | None,
    tokenizer: Any,
    data_index: Sequence[int] | None,
) -> None:
    if not len(prompts):
        raise ValueError("prompts must not be empty")
    if not delimiter:
        raise ValueError("delimiter must not be empty")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    if data_index is not None and len(data_index) != len(prompts):
        raise ValueError(f"data_index must name {len(prompts)} prompts, not {len(data_index)}")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("tokenizer must be given where sampling has stop_strings")
    for string in sampling.stop_strings:
        if delimiter in string or any(string.startswith(delimiter[i:]) for i in range(len(delimiter))):
            raise ValueError(f"stop_strings must not begin within the delimiter, as {string!r} does")
