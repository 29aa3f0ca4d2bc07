"""A generator over a server that speaks OpenAI's completions API: Keel's, vLLM's, or anybody's.

What a server can do is its dialect:

    keel    tokens in and out; a seed for each completion of a request; log-probabilities of what was really sampled
    vllm    tokens in and out; one request for each completion
    plain   OpenAI's API and nothing else: text in, tokens named by their text, one request for each completion
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import torch

from keel.core.errors import ConfigError, KeelError, UserError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.rollouts.decoding import Prompts, text_of
from keel.rollouts.reported import Reported, drawn
from keel.rollouts.sampling import Sampling

Dialect = Literal["keel", "vllm", "plain"]
ADDRESS, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
BATCH = 64  # completions that Keel's server is asked for in one request
SEEDS = (1 << 53) - 1  # whole numbers that every reader of JSON takes exactly


@dataclass(frozen=True)
class Vocabulary:
    """What must be known here of a model that runs elsewhere.

    Args:
        tokenizer: the served model's.
        eos_ids: tokens that end a completion.
        pad_id: stands after the end.
        start_id: stands for an empty prompt.
        vocabulary_size: V.
        context_length: tokens that fit, prompt and completion together; None leaves it to the server.
        device: of the rows.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    start_id: int
    vocabulary_size: int
    context_length: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def of(known: Any) -> "Vocabulary":
        """From a local model of the same kind, or from its tokenizer alone."""
        if isinstance(known, Vocabulary):
            return known
        if isinstance(known, LanguageModel):
            size, context = known.vocabulary_size, known.context_length
            return Vocabulary(known.tokenizer, known.eos_ids, known.pad_id, known.start_id, size, context)
        eos, pad, bos = known.eos_token_id, known.pad_token_id, known.bos_token_id
        ends = () if eos is None else (eos,)
        pad = pad if pad is not None else eos or 0
        start = bos if bos is not None else eos if eos is not None else pad
        return Vocabulary(known, ends, pad, start, len(known))

    @cached_property
    def by_text(self) -> dict[str, int | None]:
        """Tokens by their text; None for a text that several have."""
        found: dict[str, int | None] = {}
        size = min(len(self.tokenizer), self.vocabulary_size)
        for token, text in enumerate(self.tokenizer.batch_decode([[i] for i in range(size)])):
            found[text] = None if text in found else token
        return found

    def token(self, name: str) -> int:
        """The token that a server calls by this name: `token_id:7`, or its text.

        Raises:
            UserError: no token of the local tokenizer has this text, or several have.
        """
        if name.startswith("token_id:"):
            return int(name.removeprefix("token_id:"))
        token = self.by_text.get(name)
        if token is None:
            reason = "several tokens of the local tokenizer have" if name in self.by_text else "no local token has"
            raise UserError(
                f"the server names a token by its text {name!r}, which {reason}",
                "tokenizer",
                "Give the tokenizer of the served model, or a server that returns token ids.",
            )
        return token

    def sendable(self, tokens: Sequence[int]) -> str:
        """The text from which the server makes these tokens, special ones included unless it adds them by itself."""
        whole = text_of(self.tokenizer, tokens)
        bare = text_of(self.tokenizer, tokens, skip_special_tokens=True)
        return bare if list(self.tokenizer(bare).input_ids) == list(tokens) else whole


class Endpoint:
    """A server and a model on it.

    Args:
        base_url: such as http://127.0.0.1:8000/v1; of the environment (OPENAI_BASE_URL) without it. Without a path it
            is taken to be /v1.
        served: name of the model on the server; its first one without it.
        dialect: asked of the server without it (`owned_by` in its list of models).
        key: name of the environment variable with the key; local servers need none.
        concurrency: requests at a time.
        retries: further tries after a failure that may pass, with a pause that doubles.
        timeout: seconds that a request may take.

    Raises:
        ConfigError: no address, one without http:// or https://, or an unknown dialect.
        UserError: the client library is not installed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        served: str | None = None,
        *,
        dialect: Dialect | None = None,
        key: str = KEY,
        concurrency: int = 8,
        retries: int = 4,
        timeout: float = 300.0,
    ):
        address = base_url or os.environ.get(ADDRESS)
        if not address:
            raise ConfigError("no server is named", "base_url", f"Give base_url=, or set {ADDRESS}.")
        if dialect not in (None, *get_args(Dialect)):
            raise ConfigError(f"must be one of {', '.join(get_args(Dialect))}, not '{dialect}'", "dialect")
        self.url, self.timeout, self.concurrency = _address(address), timeout, concurrency
        self._served, self._dialect = served, dialect
        library = _library()
        self.client = library.OpenAI(
            base_url=self.url, api_key=os.environ.get(key) or "none", max_retries=retries, timeout=timeout
        )

    @property
    def served(self) -> str:
        """Name of the model on the server."""
        return self._served or str(self._model["id"])

    @property
    def dialect(self) -> Dialect:
        """What the server understands."""
        owner = self._dialect or self._model.get("owned_by")
        return owner if owner in ("keel", "vllm") else "plain"

    def prefer(self, name: str) -> None:
        """Take the model of this name if the server has it, or else the only one that it has.

        Raises:
            UserError: it has several, and none of this name.
        """
        names = [model["id"] for model in self._listed]
        if name not in names and len(names) != 1:
            raise UserError(
                f"the server has no model '{name}'",
                self.url,
                f"It has: {', '.join(names) or 'none'}. Name one of them.",
            )
        self._served = name if name in names else names[0]

    @cached_property
    def _listed(self) -> list[dict[str, Any]]:
        return self._call(lambda: self.client.models.list().model_dump())["data"]

    @cached_property
    def _model(self) -> dict[str, Any]:
        wanted = [model for model in self._listed if self._served in (None, model["id"])]
        if not wanted:
            names = ", ".join(model["id"] for model in self._listed) or "none"
            raise UserError(f"the server has no model '{self._served}'", self.url, f"It has: {names}.")
        return wanted[0]

    def complete(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to requests, in their order.

        Raises:
            KeelError: the server cannot be reached, does not answer in time, or answers with an error; `UserError`
                where the request is at fault. The address is named.
        """
        return self._each(self._complete, bodies)

    def chat(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to requests with `messages`, in their order.

        Raises:
            KeelError: as of `complete`.
        """
        return self._each(self._chat, bodies)

    def _each(
        self, ask: Callable[[dict[str, Any]], dict[str, Any]], bodies: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            tasks = [pool.submit(ask, body) for body in bodies]
            try:
                return [task.result() for task in tasks]
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        create = self.client.chat.completions.create
        return self._answered(self._call(lambda: create(model=self.served, **body).model_dump()))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in body.items() if name not in EXTRA}
        extra = {name: value for name, value in body.items() if name in EXTRA}
        create = self.client.completions.create
        return self._answered(
            self._call(lambda: create(model=self.served, extra_body=extra or None, **own).model_dump())
        )

    def _answered(self, found: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(found.get("choices"), list):
            raise KeelError("the answer holds no completions", self.url, "Is this a server of OpenAI's API?")
        return found

    def _call(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        library = _library()
        try:
            return call()
        except library.APITimeoutError as error:
            raise KeelError(f"no answer within {self.timeout:g} seconds", self.url, "Raise timeout=.") from error
        except library.APIConnectionError as error:
            reason = error.__cause__ or error
            raise KeelError(f"the server cannot be reached ({reason})", self.url, "Is it running?") from error
        except library.APIStatusError as error:
            raise self._refused(error) from error
        except (library.OpenAIError, ValueError, AttributeError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise KeelError(f"the answer cannot be read ({said})", self.url, "Is this OpenAI's API?") from error

    def _refused(self, error: Any) -> KeelError:
        said = " ".join(str(error.message).split())[:400]
        if error.status_code in (401, 403):
            return UserError(f"the server wants another key: {said}", self.url, f"Set {KEY}.")
        if error.status_code in (400, 404, 405, 413, 422):
            return UserError(f"the server refuses the request: {said}", self.url)
        return KeelError(f"the server answers with {error.status_code}: {said}", self.url)


EXTRA = (  # no part of OpenAI's API
    "top_k",
    "min_p",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logprobs_mode",
    "seed",  # a list, where each completion has its own
)


class OpenAIGenerator:
    """Draws completions on a server; see `Generator` for what it promises, and the module for the dialects.

    Every completion has a seed of its own, made of its row's identity: a server that keeps to seeds gives the same rows
    again, whatever else it is asked for. Keel's server takes the identities themselves and draws what the local
    generator draws. The weights are the server's: they do not follow a model that is trained here.

    The behaviour log-probability is never guessed. Keel's server is asked for that of the distribution really sampled.
    Other servers report the model's own (temperature 1, no filter), which is the same only without temperature and
    filters, or for greedy decoding, where Keel records it too; anything else is refused unless `processed` says that
    the server reports what it samples (vLLM started with `--logprobs-mode processed_logprobs`). A server that returns
    no log-probabilities is refused.

    A plain server gets prompts as text, of which it makes its own tokens, and is told of no stop strings, because it
    would take them out of the text: the completion is cut here, after the token that completes one. If it hides the end
    token, the row ends without it (`Stop.EOS`), and its log-probability is that of the tokens shown.

    Args:
        known: what is known of the served model: a local model of the same kind, its tokenizer, or a `Vocabulary`.
        endpoint: the server, or its address.
        processed: the server's log-probabilities are those of what it samples.

    Raises:
        ConfigError: see `Endpoint`.
    """

    def __init__(self, known: Any, endpoint: Endpoint | str | None = None, *, processed: bool = False):
        self.vocabulary: Any = Vocabulary.of(known)
        self.endpoint = endpoint if isinstance(endpoint, Endpoint) else Endpoint(endpoint)
        self.processed = processed

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        data_index: Sequence[int] | None = None,
    ) -> Rows:
        """Completions for tokenised prompts; see `Generator`.

        Raises:
            UserError: prompts that do not fit, a request that the server refuses, or log-probabilities that would not
                be those of the distribution sampled.
            KeelError: the server fails, or is not there.
        """
        self._check(sampling)
        room = sampling.max_completion_length
        asked = Prompts.of(self.vocabulary, prompts, num_generations, room, seed=seed, step=step, data_index=data_index)
        size = BATCH if self.endpoint.dialect == "keel" else 1
        parts = asked.parts(size)
        answers = self.endpoint.complete([self._body(part, sampling) for part in parts])
        found = [self._read(choice) for answer in answers for choice in in_order(answer)]
        if len(found) != len(asked.row):
            raise KeelError(f"{len(found)} completions for {len(asked.row)} asked for", self.endpoint.url)
        return asked.rows(drawn(found, self.vocabulary, sampling), self.vocabulary.pad_id)

    def _body(self, part: Prompts, sampling: Sampling) -> dict[str, Any]:
        dialect, pad = self.endpoint.dialect, part.mask
        texts = [part.ids[i][pad[i]].tolist() for i in part.index.tolist()]
        body: dict[str, Any] = {
            "prompt": texts[0] if dialect == "vllm" else texts,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "seed": part.row.tolist() if dialect == "keel" else int(part.row[0]) & SEEDS,
            "logprobs": 1,
        }
        if dialect == "plain":
            return body | {"prompt": self.vocabulary.sendable(texts[0])}
        body |= {"return_token_ids": True, "include_stop_str_in_output": True, "skip_special_tokens": False}
        if sampling.stop_strings:
            body["stop"] = list(sampling.stop_strings)
        if dialect == "keel":
            body["logprobs_mode"] = "processed"
        filters = {"top_k": sampling.top_k, "min_p": sampling.min_p}
        return body | {name: value for name, value in filters.items() if value}

    def _check(self, sampling: Sampling) -> None:
        dialect = self.endpoint.dialect
        if dialect == "plain" and (sampling.top_k or sampling.min_p):
            raise UserError("the server knows neither top_k nor min_p", self.endpoint.url, "Leave them out.")
        as_it_is = sampling.temperature == 0 or (sampling.temperature == 1 and sampling.filter is None)
        if dialect != "keel" and not as_it_is and not self.processed:
            raise UserError(
                "the server reports log-probabilities at temperature 1 without filters, not those of what is sampled",
                self.endpoint.url,
                "Sample at temperature 1 without filters; or give processed=True if the server does otherwise (vLLM's "
                "--logprobs-mode processed_logprobs).",
            )

    def _read(self, choice: dict[str, Any]) -> Reported:
        marks = choice.get("logprobs") or {}
        logp, tokens = marks.get("token_logprobs"), choice.get("token_ids")
        if logp is None or any(value is None for value in logp):
            raise UserError(
                "the server returns no log-probabilities, so that of what was sampled is not known",
                self.endpoint.url,
                "Take a server that returns them (`logprobs`).",
            )
        if tokens is None:
            tokens = [self.vocabulary.token(name) for name in marks.get("tokens") or []]
        if len(tokens) != len(logp):
            raise KeelError(f"{len(logp)} log-probabilities for {len(tokens)} tokens", self.endpoint.url)
        return Reported(list(tokens), [float(value) for value in logp], choice.get("finish_reason") == "length")


def in_order(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The completions of an answer by their index."""
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def _address(text: str) -> str:
    """With the path that nearly all servers have, where none is given.

    >>> _address("http://127.0.0.1:8000"), _address("https://example.org/api/v1/")
    ('http://127.0.0.1:8000/v1', 'https://example.org/api/v1')
    """
    if not re.match(r"https?://[^/]", text, re.IGNORECASE):  # the client would try again and again
        fix = f"It begins with http:// or https://, such as http://127.0.0.1:8000/v1; or set {ADDRESS}."
        raise ConfigError(f"{text!r} is no address", "server", fix)
    parts = urlsplit(text)
    return (parts if parts.path.strip("/") else parts._replace(path="/v1")).geturl().rstrip("/")


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError("the package openai is not installed", "openai", "pip install 'keel-rl[openai]'") from error
    return openai
