"""Asking a language model: prompts in, texts out, from a model that is loaded here or from a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from keel.core.errors import ConfigError, KeelError
from keel.models.language import LanguageModel
from keel.models.load import load
from keel.rollouts.choose import choose_generator
from keel.rollouts.decoding import text_of
from keel.rollouts.openai import Endpoint
from keel.rollouts.sampling import Sampling
from keel.tasks.task import Text


@runtime_checkable
class Asker(Protocol):
    """Answers prompts; an answer depends on its own prompt and seed alone."""

    def __call__(self, prompts: Sequence[Text], seeds: Sequence[int]) -> list[str]:
        """One answer for each prompt."""
        ...


@lru_cache(maxsize=2)
def opened(path: str, device: str | None = None) -> LanguageModel:
    """A model by folder or hub name, loaded once."""
    return load(path, device=device)


def prompt_tokens(model: LanguageModel, prompt: Text) -> list[int]:
    """Tokens of a prompt: text as one message of the user where the tokenizer has a chat template, else as it is.

    Raises:
        ConfigError: messages for a tokenizer without a chat template, or a prompt without tokens.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        shown = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = list(tokenizer(shown, add_special_tokens=False).input_ids)
    elif isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
    else:
        what = "the prompts are messages, and the judge's tokenizer has no chat template"
        raise ConfigError(what, "judge", "Give plain text prompts, or another judge.")
    if not ids:
        raise ConfigError("this prompt has no tokens", "judge", "Give the judge something to answer.")
    return ids


@dataclass(frozen=True)
class LocalAsker:
    """A model of a folder or of the hub.

    Args:
        path: of the model.
        temperature: 0 is greedy.
        max_completion_length: tokens of an answer at most.
        device: None takes the best there is.

    Raises:
        ValueError: a setting out of its range.
    """

    path: str
    temperature: float = 0.0
    max_completion_length: int = 512
    device: str | None = None

    def __post_init__(self) -> None:
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.temperature, max_completion_length=self.max_completion_length)

    def __call__(self, prompts: Sequence[Text], seeds: Sequence[int]) -> list[str]:
        if not len(prompts):
            return []
        model = opened(self.path, self.device)
        ids = [prompt_tokens(model, prompt) for prompt in prompts]
        rows = choose_generator(model, "auto", batch_rows=64).generate(
            ids, 1, self.sampling, seed=0, data_index=[seed & 0x7FFFFFFF for seed in seeds]
        )
        texts = [tokens[mask].tolist() for tokens, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
        return [text_of(model.tokenizer, ids, skip_special_tokens=True) for ids in texts]


@dataclass(frozen=True)
class ServerAsker:
    """A model on a server that speaks OpenAI's chat API.

    Args:
        url: such as http://127.0.0.1:8000/v1; None takes OPENAI_BASE_URL.
        served: name of the model there; None takes the first one.
        temperature: 0 is greedy.
        max_completion_length: tokens of an answer at most.
        concurrency: requests at a time.

    Raises:
        ValueError: a setting out of its range.
    """

    url: str | None = None
    served: str | None = None
    temperature: float = 0.0
    max_completion_length: int = 512
    concurrency: int = 8

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")
        Sampling(self.temperature, max_completion_length=self.max_completion_length)

    def prepare(self) -> "ServerAsker":
        """Itself, once the model there is known, so that a mistake shows before anything is asked.

        Raises:
            ConfigError: no address.
            KeelError: the server cannot be reached.
        """
        assert _endpoint(self.url, self.served, self.concurrency).served
        return self

    def __call__(self, prompts: Sequence[Text], seeds: Sequence[int]) -> list[str]:
        endpoint = _endpoint(self.url, self.served, self.concurrency)
        bodies = [
            {
                "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                "temperature": self.temperature,
                "max_tokens": self.max_completion_length,
                "seed": seed & 0x7FFFFFFF,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = endpoint.chat(bodies)
        if not all(answer["choices"] for answer in answers):
            raise KeelError("an answer holds no completion", endpoint.url, "Is this a server of OpenAI's API?")
        return [str((answer["choices"][0].get("message") or {}).get("content") or "") for answer in answers]


@lru_cache(maxsize=4)
def _endpoint(url: str | None, served: str | None, concurrency: int) -> Endpoint:
    return Endpoint(url, served, concurrency=concurrency)
