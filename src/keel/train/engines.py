"""What draws for samplers: the model in this process, vLLM, or a server of OpenAI's API."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from keel.core.errors import ConfigError, nearest
from keel.models.language import LanguageModel
from keel.models.load import outline
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.openai import Endpoint, OpenAIGenerator, Vocabulary
from keel.rollouts.openai_chain import OpenAIChain
from keel.rollouts.sampling import Generator, Sampling
from keel.rollouts.steps import StepChain
from keel.tasks.task import Task
from keel.train.configuration import TINY
from keel.train.session import Reporter, silent
from keel.train.setup import IN_MEMORY, model_source, open_model

Name = Literal["local", "server", "vllm"]
SHOWN = {"keel": 20, "vllm": 20, "plain": 5}  # likeliest tokens that servers give unless they are told otherwise


@dataclass(frozen=True)
class Engine:
    """A policy, or what is known here of one that runs elsewhere, and what draws from it.

    Args:
        known: the model, or tokenizer, end tokens and context of a served one.
        generator: draws completions.
        top: likeliest next tokens that a server is asked for.
    """

    known: LanguageModel | Vocabulary
    generator: Generator
    top: int = SHOWN["plain"]

    @property
    def is_local(self) -> bool:
        """Whether the probabilities of all next tokens, and the model's states, are at hand."""
        return isinstance(self.generator, LocalGenerator)

    def chain(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, data_index: Sequence[int], step: str | None = None
    ) -> LocalChain | OpenAIChain | StepChain:
        """The chain of tokenised prompts: by steps where their delimiter is given, else by tokens.

        Raises:
            ConfigError: the engine does not go by tokens, or not with these settings.
        """
        try:
            return self._chain(prompts, sampling, data_index, step)
        except ValueError as error:
            raise ConfigError(str(error), "sampling") from error

    def _chain(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, data_index: Sequence[int], step: str | None
    ) -> LocalChain | OpenAIChain | StepChain:
        if step is not None:
            known: dict[str, Any] = {"pad": self.known.pad_id, "tokenizer": self.known.tokenizer}
            known |= {"context": self.known.context_length, "data_index": data_index}
            return StepChain(prompts, self.generator, sampling, delimiter=step, **known)
        if isinstance(self.generator, LocalGenerator):
            return LocalChain(self.generator, prompts, sampling, data_index=data_index)
        if not isinstance(self.generator, OpenAIGenerator):
            raise ConfigError("goes by steps, not by tokens", "engine", "Give --step, such as '\\n\\n'.")
        if sampling.filter is not None or sampling.stop_strings:
            raise ConfigError(
                "neither filters nor stop strings are known to a chain over the tokens of a server",
                "sampling",
                "Leave them out (--top keeps the likeliest tokens), or go by steps (--step).",
            )
        limit, heat = sampling.max_completion_length, sampling.temperature
        return OpenAIChain(prompts, self.generator, limit, top=self.top, temperature=heat, data_index=data_index)


def open_engine(
    model: Any,
    task: Task,
    tokenizer: Any = None,
    device: str | None = None,
    *,
    name: str | None = None,
    server: Any = None,
    top: int | None = None,
    report: Reporter = silent,
) -> Engine:
    """What draws for a model.

    Args:
        model, tokenizer, device: as in `keel.evaluate`; with a server, `model` gives the tokenizer, its weights are not
            read, and its name tells which of several models on the server is meant.
        task: of the built-in model.
        name: local (the default), server (which one, OPENAI_BASE_URL says), or vllm.
        server: an address such as http://127.0.0.1:8000, an `Endpoint` or an `OpenAIGenerator`; means `server`.
        top: likeliest next tokens that a server is asked for; as many as servers of its kind give without it.
        report: called with (event, facts).

    Raises:
        ConfigError: settings that contradict each other, or no address.
        UserError: vLLM, or the client of servers, is not installed; the server lacks the model.
        KeelError: the server is not there.
    """
    name = name or ("local" if server is None else "server")
    if name not in get_args(Name):
        raise ConfigError(f"unknown engine '{name}'.{nearest(name, get_args(Name))}", "engine", "local, server, vllm.")
    if name != "server":
        given = [flag for flag, value in (("server", server), ("top", top)) if value is not None]
        if given:
            raise ConfigError(f"is for servers, not for the engine '{name}'", given[0])
        policy = open_model(model, task, tokenizer, device, report)
        if name == "local":
            return Engine(policy, LocalGenerator(policy))
        from keel.rollouts.vllm import VLLMGenerator

        return Engine(policy, VLLMGenerator(policy, live=False))
    if top is not None and top < 1:
        raise ConfigError(f"must be at least 1, not {top}", "top")
    known = _vocabulary(model, task, tokenizer, report)
    generator = server if isinstance(server, OpenAIGenerator) else OpenAIGenerator(known, _endpoint(server, model))
    return Engine(known, generator, top or SHOWN[generator.endpoint.dialect])


def _endpoint(server: Any, model: Any) -> Endpoint:
    if isinstance(server, Endpoint):
        return server
    found = Endpoint(None if server is None else str(server))
    found.prefer(TINY if model is None else str(model) if isinstance(model, str | Path) else IN_MEMORY)
    return found


def _vocabulary(model: Any, task: Task, tokenizer: Any, report: Reporter) -> Vocabulary:
    if isinstance(model, Vocabulary):
        return model
    source = model_source(model, task, report)
    if isinstance(source, str | Path):
        return Vocabulary.of(outline(source, tokenizer))
    return Vocabulary.of(open_model(source, task, tokenizer, None, report))
