"""Which generator serves a model."""

from keel.core.errors import ConfigError, nearest
from keel.models.language import LanguageModel
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Generator
from keel.rollouts.steppers import CacheStepper

KINDS = ("auto", "local", "transformers", "vllm", "openai")


def choose_generator(model: LanguageModel, kind: str = "auto", *, batch_rows: int | None = None) -> Generator:
    """A generator for a model.

    Args:
        model: the policy.
        kind: "local", "transformers" (on `generate`), "vllm", "openai" (a server, whose weights do not follow the
            model's; OPENAI_BASE_URL says where), or "auto": the local one where it serves the architecture.
        batch_rows: completions that are decoded together at most; None takes all. vLLM and servers decide themselves.

    Raises:
        ConfigError: an unknown kind, or no server is named.
        UserError: `local` is asked for, and the architecture keeps its memory in another form than a key-value cache;
            or what the kind needs is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"unknown generator '{kind}'.{nearest(kind, KINDS)}", "rollout.generator", f"One of {', '.join(KINDS)}."
        )
    if kind == "local" or (kind == "auto" and CacheStepper.serves(model)):
        return LocalGenerator(model, batch_rows=batch_rows)
    if kind == "vllm":
        from keel.rollouts.vllm import VLLMGenerator

        return VLLMGenerator(model)
    if kind == "openai":
        from keel.rollouts.openai import OpenAIGenerator

        return OpenAIGenerator(model)
    from keel.rollouts.transformers import TransformersGenerator

    return TransformersGenerator(model, batch_rows=batch_rows)
