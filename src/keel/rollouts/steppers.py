"""Steppers: how a model is run token by token over a key-value cache."""

import contextlib
import copy
import inspect
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.products import fast_products, worth
from keel.models.language import LanguageModel
from keel.rollouts.caches import SHORT, Cache, RowCache, Shared, SharedCache, Workspace
from keel.rollouts.layers import Angles, Fused, Norm, Unfused, fusible

OWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
SMALL_PRODUCT = 400  # below this many multiplications a matrix of a batched product goes through a scalar loop on CPUs


class CacheStepper:
    """Any architecture whose forward pass takes a `DynamicCache`."""

    def __init__(self, model: LanguageModel):
        self.model, self.base = model, model.transformer.base_model
        accepted = inspect.signature(self.base.forward).parameters
        self.takes_positions = "position_ids" in accepted

    @staticmethod
    def serves(model: LanguageModel) -> bool:
        """Whether the architecture keeps all that it remembers in such a cache."""
        accepted = inspect.signature(model.transformer.base_model.forward).parameters
        stateful = getattr(model.transformer, "_is_stateful", False) or model.transformer.config.is_encoder_decoder
        return "past_key_values" in accepted and not stateful

    def prefill(self, ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"], room: int) -> Float[Tensor, "N D"]:
        """See `Stepper`."""
        from transformers import DynamicCache  # slow to import; whoever has a model has it by now

        self.cache = DynamicCache(config=self.model.transformer.config)
        self.mask = mask.long()
        self.position = mask.sum(1)
        return self._run(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def expand(self, index: Int[Tensor, "n"]) -> None:
        """See `Stepper`."""
        self.keep(index)

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """See `Stepper`."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        states = self._run(tokens[:, None], self.position[:, None])
        self.position = self.position + 1
        return states

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """See `Stepper`."""
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]

    def fork(self, index: Int[Tensor, "m"]) -> Self:
        """See `Stepper`."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        other.keep(index)
        return other

    def _run(self, ids: Int[Tensor, "n W"], position: Int[Tensor, "n W"]) -> Float[Tensor, "n D"]:
        inputs = {"position_ids": position} if self.takes_positions else {}
        out = self.base(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **inputs)
        return out[0][:, -1]


class DecoderStepper:
    """The Llama family (Llama, Mistral, Qwen2, Qwen3), without what a forward pass of transformers costs each token.

    Prompts are read by the model itself; keys and values of a long prompt are kept once for all its rows. Small fp32
    models run on fused weights with the norm folded in, others on their own submodules (adapters included).
    """

    def __init__(self, model: LanguageModel, workspace: Workspace | None = None):
        base = model.transformer.base_model
        self.base, self.workspace = base, workspace or Workspace()
        attention = base.layers[0].self_attn
        self.least = -(-SMALL_PRODUCT // (attention.num_key_value_groups * attention.head_dim))
        self.fused = fusible(model)
        self.layers: list[Fused | Unfused] = [
            Fused(layer, model.autocast) if self.fused else Unfused(layer) for layer in base.layers
        ]
        self.norm = Norm(base.norm) if self.fused else base.norm

    @staticmethod
    def serves(model: LanguageModel, length: int) -> bool:
        """Whether it is of the family, with full attention over `length` tokens and a static rotary embedding."""
        config = model.config
        if model.architecture not in OWN or config.rope_parameters.get("rope_type", "default") not in STATIC_ROPE:
            return False
        if len(getattr(model.transformer, "hf_device_map", None) or ()) > 1:  # layers on several devices
            return False
        window = getattr(config, "sliding_window", None)
        return window is None or length <= window

    def prefill(self, ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"], room: int) -> Float[Tensor, "N D"]:
        """See `Stepper`."""
        from transformers import DynamicCache

        padded = not bool(mask.all())
        self.prompts, self.room = DynamicCache(), room
        self.position, self.width = mask.sum(1), ids.shape[1]
        self.hidden = ~mask if padded else None
        out = self.base(
            input_ids=ids,
            attention_mask=mask.long() if padded else None,
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=self.prompts,
            use_cache=True,
        )
        states = out.last_hidden_state
        cos, sin = self.base.rotary_emb(states.float(), torch.arange(self.width + room, device=ids.device)[None])
        self.angles = Angles(cos[0], sin[0])
        return states[:, -1]

    def expand(self, index: Int[Tensor, "n"]) -> None:
        """See `Stepper`."""
        self.position = self.position[index]
        self.shared = Shared.of(index, len(self.prompts.layers[0].keys), self.hidden)
        kind = RowCache if self.shared.size == 1 or self.width <= SHORT else SharedCache
        self.caches: list[Cache] = []
        for i, (layer, memory) in enumerate(zip(self.layers, self.prompts.layers, strict=True)):
            keys, values = memory.keys, memory.values
            if isinstance(layer, Fused):
                keys, values = keys[..., layer.order].float(), values.float()
            self.caches.append(kind(keys, values, self.shared, self.room, self.least, self.workspace, i))
        self.prompts, self.length = None, 0

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """See `Stepper`; `index` is as `survivors` gives it, so only rows that change their place are moved."""
        moved = (index != torch.arange(len(index), device=index.device)).nonzero(as_tuple=True)[0]
        for cache in self.caches:
            cache.keep(index[moved], moved, len(index), self.length)
        self.shared.keep(index)
        self.position = self.position[index]

    def fork(self, index: Int[Tensor, "m"]) -> Self:
        """See `Stepper`."""
        other = copy.copy(self)
        other.position, other.shared = self.position[index], self.shared.fork(index)
        other.caches = [cache.fork(index, other.shared, self.length) for cache in self.caches]
        return other

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """See `Stepper`."""
        angles = self.angles.at(self.width + self.length if self.hidden is None else self.position[:, None])
        x = self.base.embed_tokens(tokens)
        with fast_products(worth(x, self.base.layers[0].mlp.down_proj)), self._precision(x):
            for layer, cache in zip(self.layers, self.caches, strict=True):
                query, key, value = layer.project(x, angles)
                cache.append(key, value, self.length)
                x = layer.finish(x, cache.attend(query, self.length + 1))
        self.length, self.position = self.length + 1, self.position + 1
        return self.norm(x)

    def _precision(self, x: Tensor) -> contextlib.AbstractContextManager:
        """Fused layers choose the precision of each product themselves."""
        return torch.autocast(x.device.type, enabled=False) if self.fused else contextlib.nullcontext()
