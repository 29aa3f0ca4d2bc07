"""A chain over tokens on a server that shows only the likeliest next ones: value-augmented sampling on black boxes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix, Reward, TokenChain, Value
from keel.core.chance import Choice
from keel.core.errors import UserError
from keel.core.rows import Rows, Stop
from keel.rollouts.openai import OpenAIGenerator, in_order
from keel.rollouts.sampling import Sampling
from keel.rollouts.states import rows_of
from keel.rollouts.steps import StepChain


class OpenAIChain(TokenChain):
    """A chain over tokens on a server that shows the k likeliest next tokens only.

        p_0(y | x) = p(y | x)^(1 / temperature) / sum over the k likeliest,   0 for all others

    The prior is the model restricted to those tokens at every place; `outside` is the mass that was left out of it, and
    `most_outside` the greatest so far of each prompt. One request for each distinct state; answers are kept.

    A completion is one request for the whole rest. Where the server cannot do as `restricts` says it is drawn from all
    tokens: its law then differs from that of the chain by the mass outside, and the temperature must be 1.

    Args:
        prompts: tokens of each.
        generator: knows server and vocabulary.
        horizon: tokens at most.
        top: k, at most what the server gives (OpenAI's 5, vLLM's 20 unless it is told otherwise).
        temperature: of the prior.
        data_index: identity of each prompt, for the randomness of whole completions; its place without it.
        reward, value: as of `TokenChain`.

    Raises:
        ValueError: `top` below 1, or a temperature not above 0.

    Source: the black-box decoding of "Value Augmented Sampling for Language Model Alignment and Personalization", 2024.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        generator: OpenAIGenerator,
        horizon: int,
        *,
        top: int = 5,
        temperature: float = 1.0,
        data_index: Sequence[int] | None = None,
        reward: Reward | None = None,
        value: Value | None = None,
    ):
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        vocabulary = generator.vocabulary
        super().__init__(len(prompts), horizon, vocabulary.pad_id, reward, value)
        self.data_index = list(range(len(prompts))) if data_index is None else list(data_index)
        self.texts = [list(prompt) or [vocabulary.start_id] for prompt in prompts]
        self.generator, self.vocabulary, self.temperature = generator, vocabulary, temperature
        self.top = min(top, vocabulary.vocabulary_size)
        self.most_outside = torch.zeros(len(prompts), dtype=torch.float64)
        self.known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def log_probs(self, x: Prefix) -> Float[Tensor, "B V"]:
        """See `TokenChain`; -inf outside of the k likeliest."""
        ids, values = self._shown(x)
        found = torch.full((len(x), self.vocabulary.vocabulary_size), -math.inf)
        return found.scatter(1, ids, values)

    def outside(self, x: Prefix) -> Float[Tensor, "B"]:
        """Probability, at temperature 1, of all tokens that the server does not show; 0 for finished states."""
        self._ask(x)
        shown = [math.fsum(map(math.exp, self.known[self._state(x, i)][1])) for i in range(len(x)) if not x.done[i]]
        found = torch.zeros(len(x), dtype=torch.float64)
        found[~x.done] = (1 - torch.tensor(shown, dtype=torch.float64)).clamp(min=0)
        return found

    def propose(
        self, x: Prefix, m: int, rng: Choice, name: str = "action", log_q: Float[Tensor, "B V"] | None = None
    ) -> tuple[Int[Tensor, "Bm"], Float[Tensor, "B m"]]:
        """See `TokenChain`; without `log_q` no row of length V is made."""
        if log_q is not None:
            return super().propose(x, m, rng, name, log_q)
        ids, values = self._shown(x)
        grid = values.view(self.prompts, -1, values.shape[1])
        place = (rng.categorical(grid, name) if m == 1 else rng.categorical(grid, name, m)).reshape(len(x), m)
        self.meter.add("generated", (~x.done).long() * m)
        return ids.gather(1, place).flatten(), values.gather(1, place)

    def successors(self, x: Prefix, k: int | None = None) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """See `TokenChain`; the k shown are all there are."""
        ids, values = self._shown(x)
        return ids[:, :k], values[:, :k]

    def logp(self, x: Prefix, action: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """See `TokenChain`."""
        ids, values = self._shown(x)
        return values.masked_fill(ids != action[:, None], -math.inf).amax(1)

    def complete(self, x: Prefix, m: int, rng: Choice, where: Bool[Tensor, "B"] | None = None) -> Prefix:
        """See `Chain`: one request for the whole rest of each."""
        steps = StepChain(
            self.texts,
            self.generator,
            self.sampling,
            pad=self.pad,
            data_index=self.data_index,
            context=self.vocabulary.context_length,
        )
        steps.meter = self.meter
        return replace(steps.complete(replace(x, memory=torch.zeros_like(x.length)), m, rng, where), memory=None)

    def rows(self, x: Prefix) -> Rows:
        """Prompts and completions as rows, a group for each prompt."""
        return rows_of(x, self.texts, self.pad, self.data_index)

    @property
    def sampling(self) -> Sampling:
        """How whole completions are drawn."""
        top = self.top if self.restricts else None
        return Sampling(self.temperature, top_k=top, max_completion_length=self.horizon)

    @property
    def restricts(self) -> bool:
        """Whether the server can draw whole completions from the k likeliest tokens, and say with what probability."""
        dialect = self.generator.endpoint.dialect
        return dialect == "keel" or (dialect == "vllm" and self.generator.processed)

    def _ended(self, x: Prefix, tokens: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        ends = torch.isin(tokens, torch.tensor(self.vocabulary.eos_ids, dtype=torch.long))
        return torch.where(ends, int(Stop.EOS), -1)

    def _start(self, prompt: Int[Tensor, "B"]) -> Any:
        return None

    def _moved(self, memory: Any, index: Int[Tensor, "n"], x: Prefix) -> Any:
        return None

    def _stepped(self, memory: Any, tokens: Int[Tensor, "B"], x: Prefix) -> Any:
        return None

    # -- asking ----------------------------------------------------------------------------------------------------

    def _state(self, x: Prefix, i: int) -> tuple[int, ...]:
        return (int(x.prompt[i]), *x.text(i))

    def _shown(self, x: Prefix) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """The k likeliest next tokens, likeliest first, and log p_0 of each; finished states go on with `pad`."""
        self._ask(x)
        ids = torch.arange(self.top).repeat(len(x), 1)
        values = torch.full((len(x), self.top), -math.inf)
        for i, done in enumerate(x.done.tolist()):
            if done:
                ids[i], values[i] = self._certain()
                continue
            tokens, logp = self.known[self._state(x, i)]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            values[i, : len(logp)] = (torch.tensor(logp) / self.temperature).log_softmax(0)
        return ids, values

    def _certain(self) -> tuple[Int[Tensor, "k"], Float[Tensor, "k"]]:
        others = [token for token in range(self.top + 1) if token != self.pad]
        values = torch.full((self.top,), -math.inf)
        values[0] = 0.0
        return torch.tensor([self.pad, *others][: self.top]), values

    def _ask(self, x: Prefix) -> None:
        """One request for each distinct unfinished state that was not asked about before."""
        new: dict[tuple[int, ...], list[int]] = {}
        sent = torch.zeros(len(x), dtype=torch.long)
        for i, done in enumerate(x.done.tolist()):
            key = self._state(x, i)
            if not done and key not in self.known and key not in new:
                new[key] = self.texts[key[0]] + list(key[1:])
                sent[i] = len(new[key])
        if not new:
            return
        self.meter.add("read", sent)
        answers = self.generator.endpoint.complete([self._question(text) for text in new.values()])
        for key, answer in zip(new, answers, strict=True):
            self.known[key] = self._read(answer)
            left = 1 - math.fsum(map(math.exp, self.known[key][1]))
            self.most_outside[key[0]] = max(float(self.most_outside[key[0]]), left)

    def _question(self, text: list[int]) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": text, "max_tokens": 1, "temperature": 1.0, "seed": 0, "logprobs": self.top}
        if self.generator.endpoint.dialect == "plain":
            return body | {"prompt": self.vocabulary.sendable(text)}
        return body | {"return_tokens_as_token_ids": True}

    def _read(self, answer: dict[str, Any]) -> tuple[list[int], list[float]]:
        marks = (in_order(answer) or [{}])[0].get("logprobs") or {}
        shown = (marks.get("top_logprobs") or [None])[0]
        if not shown:
            raise UserError("the server shows no likeliest tokens", self.generator.endpoint.url, "Take another server.")
        likeliest = sorted(shown.items(), key=lambda item: -item[1])[: self.top]
        return [self.vocabulary.token(name) for name, _ in likeliest], [float(value) for _, value in likeliest]
