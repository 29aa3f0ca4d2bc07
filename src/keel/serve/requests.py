"""What may be asked of the server: OpenAI's fields, some of vLLM's, and nothing that would be ignored in silence."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from keel.core.errors import UserError

Token = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]

# Fields that are taken as long as they ask for nothing: their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class Options(BaseModel):
    """What both kinds of request share.

    `logprobs_mode` says of which distribution log-probabilities are: "raw", the model's own at temperature 1 without
    filters (OpenAI's, and the default), or "processed", the one that is sampled from. Echoed prompts have the raw ones
    only, and greedy decoding has no others. `seed` may be a list with one identity for each completion: then each is
    drawn as Keel's own generators draw the row of that identity.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = 1
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | list[Seed] | None = None
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(string for string in strings if string)

    @property
    def usage_at_the_end(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.get("include_usage"))

    def check(self) -> None:
        """Refuse what is not served.

        Raises:
            UserError: a field that asks for something.
        """
        for name, neutral in NEUTRAL.items():
            if getattr(self, name, None) not in neutral:
                raise UserError("is not served", name, "Leave it out.")


class CompletionRequest(Options):
    """Of /v1/completions."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = False


class ChatRequest(Options):
    """Of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
