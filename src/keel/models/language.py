"""A causal language model seen as a policy: states for completion positions, and a head that makes logits of them."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.core.errors import UserError
from keel.core.policy import Head
from keel.core.rows import Rows
from keel.models.sharing import share_prompts

SHARING = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
Packed = tuple[Int[Tensor, "B W"], Int[Tensor, "B"]]


class LanguageModel:
    """A transformers causal LM, or a peft model around one, with its tokenizer.

    Rows are packed before the forward pass: prompt and completion become one sequence without padding on its left. So
    no attention mask is needed, positions count from 0, and no row attends to nothing. A prompt that is all padding
    counts as the single token `start_id`.

    Args:
        module: the model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        autocast: dtype of mixed precision (`torch.bfloat16`), or None for the dtype of the weights.
        gradient_checkpointing: recompute each layer in the backward pass, dropout on or off.

    Raises:
        UserError: the architecture's logits are not a linear head of its last hidden states (with a scale and a soft
            cap), the peft method is no adapter, or checkpointing is asked of an architecture without layers for it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.module, self.tokenizer = module.eval(), tokenizer
        self.autocast, self.gradient_checkpointing = autocast, gradient_checkpointing
        self.transformer = transformer(module)
        self._layers = _layers(self.transformer)
        if gradient_checkpointing and not self._layers:
            raise UserError(
                f"{self.architecture} has no layers that can be recomputed",
                "model.gradient_checkpointing",
                "Switch it off and lower train.max_tokens instead.",
            )
        self.eos_ids = _eos_ids(self.transformer, tokenizer)
        self.pad_id = _pad_id(tokenizer, self.eos_ids)
        bos = tokenizer.bos_token_id
        self.start_id: int = bos if bos is not None else self.eos_ids[0] if self.eos_ids else self.pad_id
        self.head = self._find_head()

    @property
    def architecture(self) -> str:
        """Class name of the transformers model."""
        return type(self.transformer).__name__

    @property
    def config(self) -> Any:
        """The transformers configuration, of the text part where there are several."""
        return self.transformer.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where the token embedding lives."""
        return self.transformer.get_input_embeddings().weight.device

    @property
    def adapted(self) -> bool:
        """Whether the model carries peft adapters."""
        return self.module is not self.transformer

    @property
    def context_length(self) -> int | None:
        """Tokens that fit, prompt and completion together; None without a limit."""
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
            length = getattr(self.config, name, None)
            if isinstance(length, int) and length > 0:
                return length
        return None

    @property
    def vocabulary_size(self) -> int:
        """Length of a row of logits."""
        return self.transformer.get_output_embeddings().weight.shape[0]

    @functools.cached_property
    def shares_prompts(self) -> bool:
        """Whether rows of one prompt may go through the model as one sequence under a block mask."""
        plain = not getattr(self.config, "sliding_window", None) or not getattr(self.config, "use_sliding_window", True)
        return self.architecture in SHARING and plain and self.config._attn_implementation == "sdpa"

    def trainable(self) -> list[nn.Parameter]:
        """Parameters with a gradient."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States from which the completion tokens were chosen; arbitrary off the mask, never NaN.

        Raises:
            UserError: the rows are longer than the model's context.
        """
        width = rows.tokens.shape[1]
        shared = share_prompts(rows, self.pad_id) if self.shares_prompts and not rows.inputs else None
        if shared is not None:
            states = self.states(shared.ids, position_ids=shared.positions, attention_mask=shared.mask())
            return states[shared.sequence[:, None], shared.source]
        ids, start = self.pack(rows)
        states = self.states(ids, **rows.inputs)
        return _window(states, start - 1, width)

    def states(self, ids: Int[Tensor, "B W"], **inputs: Tensor) -> Float[Tensor, "B W D"]:
        """Last hidden states of sequences without left padding (on the right it does no harm), in the head's dtype."""
        limit, positions = self.context_length, inputs.get("position_ids")
        length = ids.shape[1] if positions is None else int(positions.max()) + 1
        if limit is not None and length > limit:
            raise UserError(
                f"{length} tokens do not fit the model's context of {limit}",
                fix="Lower max_prompt_length, max_completion_length or max_length.",
            )
        with self._checkpointed(), self.mixed():
            states = self.transformer.base_model(input_ids=ids, use_cache=False, **inputs)[0]
        return self.for_head(states)

    def mixed(self) -> contextlib.AbstractContextManager:
        """The mixed precision of the body; the head runs outside of it."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def for_head(self, states: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """States in the dtype of the head's weights."""
        return states.to(_dtype(self.head.module))

    def pack(self, rows: Rows) -> Packed:
        """Prompt and completion as one sequence without padding on the left; and the length of each prompt."""
        ids, keep = torch.cat([rows.prompt_ids, rows.tokens], 1), torch.cat([rows.prompt_mask, rows.present], 1)
        prompt = rows.prompt_ids.shape[1]
        if prompt and bool(rows.prompt_mask.all()):
            return ids.masked_fill(~keep, self.pad_id), torch.full_like(rows.row, prompt)
        ids, keep = _with_start(ids, keep, rows.prompt_mask, self.start_id)
        place = keep.cumsum(1) - 1
        packed = torch.full_like(ids, self.pad_id)
        row, column = keep.nonzero(as_tuple=True)
        packed[row, place[row, column]] = ids[row, column]
        width = max(int(keep.sum(1).max()), 1) if len(ids) else 1
        return packed[:, :width], rows.prompt_mask.sum(1).clamp(min=1)

    def copy(self, share: Iterable[nn.Parameter] = ()) -> "LanguageModel":
        """A copy with parameters of its own, except those of `share`."""
        memo: dict[int, Any] = {id(p): p for p in share}
        module = copy.deepcopy(self.module, memo)
        new = copy.copy(self)
        new.module, new.transformer = module, transformer(module)
        new._layers = _layers(new.transformer)
        new.head = Head(new.transformer.get_output_embeddings(), self.head.scale, self.head.softcap)
        return new

    def _find_head(self) -> Head:
        output = self.transformer.get_output_embeddings()
        if output is None:
            raise UserError(f"{self.architecture} has no output embeddings", "model", "Keel needs a causal LM.")
        vocabulary = output.weight.shape[0]
        ids = (torch.arange(4, device=self.device) % vocabulary)[None]
        with torch.no_grad():
            logits = self.transformer(input_ids=ids, use_cache=False).logits[0].float()
            hidden = self.transformer.base_model(input_ids=ids, use_cache=False)[0][0].to(_dtype(output))
            for head in _candidates(self.config, output):
                found = head.logits(hidden)
                if found.shape == logits.shape and _close(found, logits):
                    return head
        raise UserError(
            f"the logits of {self.architecture} are not a linear head of its last hidden states",
            "model",
            "This architecture is not served.",
        )

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Every layer recomputed in the backward pass, whether or not the model is in training mode."""
        layers = self._layers if self.gradient_checkpointing and torch.is_grad_enabled() else []
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def transformer(module: nn.Module) -> Any:
    """The transformers model inside a peft model, or the model itself.

    Raises:
        UserError: prompt tuning and its like, which change the input instead of the layers.
    """
    adapters: Any = getattr(module, "peft_config", None)
    if adapters is None:
        return module
    if any(config.is_prompt_learning for config in adapters.values()):
        raise UserError("prompt tuning is not served", "model", "Use LoRA or another adapter of the layers.")
    inner = getattr(module, "get_base_model", None)
    return module if inner is None else inner()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # seconds, if no model was read before

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _candidates(config: Any, output: nn.Module) -> Iterator[Head]:
    """Heads that an architecture may have, the likeliest first; which one it has is seen by trying."""
    cap = getattr(config, "final_logit_softcapping", None)
    scaling = getattr(config, "logits_scaling", None)
    scales = [1 / scaling, scaling] if scaling else []  # Granite divides, HyperCLOVA X multiplies
    scale = getattr(config, "logit_scale", None)  # Cohere
    scales += [float(scale)] if isinstance(scale, (int, float)) and scale else []
    for softcap in dict.fromkeys((cap or None, None)):
        for factor in dict.fromkeys((*scales, 1.0)):
            yield Head(output, float(factor), softcap)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp(min=1e-6))


def _dtype(head: nn.Module | None) -> torch.dtype:
    weight = getattr(head, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


def _window(states: Float[Tensor, "B W D"], start: Int[Tensor, "B"], width: int) -> Float[Tensor, "B T D"]:
    """`width` states of each row from its own `start` on; beyond the last one it repeats."""
    if not len(states) or bool((start == start[0]).all()):
        first = int(start[0]) if len(states) else 0
        if first + width <= states.shape[1]:
            return states[:, first : first + width]
    place = (start[:, None] + torch.arange(width, device=start.device)).clamp(max=states.shape[1] - 1)
    offset = torch.arange(len(states), device=start.device)[:, None] * states.shape[1]
    flat = states.reshape(-1, states.shape[-1]).index_select(0, (place + offset).reshape(-1))
    return flat.view(len(states), width, states.shape[-1])


def _with_start(
    ids: Int[Tensor, "B W"], keep: Bool[Tensor, "B W"], prompt_mask: Bool[Tensor, "B P"], start: int
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """The start token as the last prompt token of rows without any."""
    if not prompt_mask.shape[1]:
        return nn.functional.pad(ids, (1, 0), value=start), nn.functional.pad(keep, (1, 0), value=True)
    empty, last = ~prompt_mask.any(1), prompt_mask.shape[1] - 1
    ids, keep = ids.clone(), keep.clone()
    ids[empty, last], keep[empty, last] = start, True
    return ids, keep


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All tokens that end a completion: the tokenizer's, and those of the model's own generation settings.

    The configuration, and settings derived from it, are asked only where the tokenizer is silent: they may hold the
    default of the architecture, which means nothing in another vocabulary.
    """
    found: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    settings = getattr(model, "generation_config", None)
    for source in (settings, model.config):
        derived = source is model.config or getattr(source, "_from_model_config", False)
        ids = getattr(source, "eos_token_id", None)
        if ids is not None and not (derived and found):
            found += [ids] if isinstance(ids, int) else list(ids)
    size = model.get_input_embeddings().weight.shape[0]
    ids = tuple(dict.fromkeys(i for i in found if 0 <= i < size))
    if not ids:
        warnings.warn(
            "neither tokenizer nor model names an end token: completions end at stop strings or at "
            "max_completion_length; set tokenizer.eos_token, or rollout.stop_strings",
            stacklevel=4,
        )
    return ids


def _pad_id(tokenizer: Any, eos: tuple[int, ...]) -> int:
    """The padding token; EOS where there is none (masks say what is padding, the id does not matter)."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return eos[0] if eos else 0
