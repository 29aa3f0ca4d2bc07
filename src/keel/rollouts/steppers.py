"""Steppers: how a model is run token by token over a key-value cache."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from keel.models.language import LanguageModel

OWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
FUSED_BYTES = 256 << 20  # weights up to this size are copied into fused matrices for each call
KEPT_BYTES = 256 << 20  # buffers up to this size are kept from call to call
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

    def _run(self, ids: Int[Tensor, "n W"], position: Int[Tensor, "n W"]) -> Float[Tensor, "n D"]:
        inputs = {"position_ids": position} if self.takes_positions else {}
        out = self.base(input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **inputs)
        return out[0][:, -1]


class DecoderStepper:
    """The Llama family (Llama, Mistral, Qwen2, Qwen3), without what a forward pass of transformers costs each token.

    Prompts are read by the model itself; keys and values of a prompt are kept once for all its rows. Small fp32 models
    run on fused weights with the norm folded in, others on their own submodules (adapters included).
    """

    def __init__(self, model: LanguageModel, workspace: "Workspace | None" = None):
        base = model.transformer.base_model
        self.base, self.workspace = base, workspace or Workspace()
        attention = base.layers[0].self_attn
        self.least = -(-SMALL_PRODUCT // (attention.num_key_value_groups * attention.head_dim))
        fused = _fusible(model)
        self.layers = [Fused(layer, self.workspace) if fused else Unfused(layer) for layer in base.layers]

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
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return states[:, -1]

    def expand(self, index: Int[Tensor, "n"]) -> None:
        """See `Stepper`."""
        self.position = self.position[index]
        shared = Shared.of(index, len(self.prompts.layers[0].keys), self.hidden)
        self.caches = [
            LayerCache(layer.keys, layer.values, shared, self.room, self.least, self.workspace, i)
            for i, layer in enumerate(self.prompts.layers)
        ]
        self.shared, self.prompts = shared, None
        self.length = 0

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """See `Stepper`; `index` is as `survivors` gives it, so only rows that change their place are moved."""
        moved = (index != torch.arange(len(index), device=index.device)).nonzero(as_tuple=True)[0]
        for cache in self.caches:
            cache.move(index[moved], moved, self.length)
        self.shared.keep(index)
        self.position = self.position[index]

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """See `Stepper`."""
        place = self.width + self.length if self.hidden is None else self.position[:, None]
        cos, sin = self.cos[place], self.sin[place]
        x = self.base.embed_tokens(tokens)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            query, key, value = layer.project(x, cos, sin)
            cache.append(key, value, self.length)
            x = layer.finish(x, cache.attend(query, self.length + 1))
        self.length, self.position = self.length + 1, self.position + 1
        return self.base.norm(x)


class Workspace:
    """Buffers that small models on CPUs keep between calls: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory in the dtype and on the device of `like`; what was taken under this name is lost."""
        size = math.prod(shape)
        old = self.kept.get(name)
        if old is None or old.numel() < size or old.dtype != like.dtype or old.device != like.device:
            self.kept.pop(name, None)
            old = like.new_empty(size)
            others = sum(tensor.numel() * tensor.element_size() for tensor in self.kept.values())
            if like.device.type == "cpu" and others + size * like.element_size() <= KEPT_BYTES:
                self.kept[name] = old
        return old[:size].view(shape)


class Shared:
    """Which rows continue which prompt: each prompt has the same number of slots, each row one of them.

    Args:
        slot: place of each row among the slots of all prompts, shape [n].
        prompts: number of prompts.
        size: slots of a prompt.
        bias: -inf where a prompt is padded, shape [N, 1, 1, P], or None.
    """

    def __init__(self, slot: Int[Tensor, "n"], prompts: int, size: int, bias: Tensor | None):
        self.slot, self.prompts, self.size, self.bias = slot, prompts, size, bias
        self.full = len(slot) == prompts * size and bool((slot == torch.arange(len(slot), device=slot.device)).all())

    @staticmethod
    def of(index: Int[Tensor, "n"], prompts: int, hidden: Bool[Tensor, "N P"] | None) -> "Shared":
        """From the prompt of each row."""
        order = index.argsort(stable=True)
        ordered = index[order]
        first = torch.searchsorted(ordered, ordered)
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=index.device) - first
        size = int(place.max()) + 1
        bias = None
        if hidden is not None:
            bias = torch.zeros(hidden.shape, device=index.device).masked_fill_(hidden, float("-inf"))[:, None, None]
        return Shared(index * size + place, prompts, size, bias)

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """Go on with these rows."""
        self.slot, self.full = self.slot[index], False

    def spread(self, x: Float[Tensor, "n K g d"]) -> Float[Tensor, "NK Gg d"]:
        """Rows to slots, a matrix for each prompt and key head; empty slots are zero."""
        if not self.full:
            x = x.new_zeros(self.prompts * self.size, *x.shape[1:]).index_copy_(0, self.slot, x)
        heads, group, dim = x.shape[1:]
        return (
            x.view(self.prompts, self.size, heads, group, dim)
            .transpose(1, 2)
            .reshape(self.prompts * heads, self.size * group, dim)
        )

    def gather(self, x: Float[Tensor, "NK Gg d"], heads: int) -> Float[Tensor, "n K g d"]:
        """The inverse of `spread`."""
        x = x.view(self.prompts, heads, self.size, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if self.full else x[self.slot]


class LayerCache:
    """Keys and values of one layer: those of each prompt once, and a growing buffer for the tokens of each row.

    Attention of one query is two batched products on either part and one softmax over both. On CPUs this is faster than
    the fused kernel at these shapes, and a prompt is read once for its whole group.

    Args:
        keys, values: of the prompts, shape [N, K, P, d].
        shared: which rows continue which prompt.
        room: tokens at most that will follow.
        least: columns at least in a product on CPUs; those not yet written are zero.
        workspace, layer: where the buffers come from.
    """

    CHUNK = 64  # columns by which a buffer grows, or half of what it has

    def __init__(
        self,
        keys: Float[Tensor, "N K P d"],
        values: Float[Tensor, "N K P d"],
        shared: Shared,
        room: int,
        least: int,
        workspace: Workspace,
        layer: int,
    ):
        self.shared, self.room, self.heads = shared, room, keys.shape[1]
        self.prompt_keys = keys.flatten(0, 1).transpose(1, 2)
        self.prompt_values = values.flatten(0, 1)
        self.least = least if keys.device.type == "cpu" else 1
        shape = (len(shared.slot) * self.heads, max(self.least, min(self.CHUNK, room)), keys.shape[-1])
        self.keys = workspace.take(f"keys {layer}", shape, keys)
        self.values = workspace.take(f"values {layer}", shape, values)
        self.keys[:, : self.least] = 0
        self.values[:, : self.least] = 0

    def append(self, key: Float[Tensor, "n K d"], value: Float[Tensor, "n K d"], length: int) -> None:
        """Column `length` of each row."""
        rows = len(key) * self.heads
        if length == self.keys.shape[1]:
            self.keys, self.values = self._grown(self.keys, rows), self._grown(self.values, rows)
        self.keys[:rows, length] = key.reshape(rows, -1)
        self.values[:rows, length] = value.reshape(rows, -1)

    def attend(self, query: Float[Tensor, "n H d"], length: int) -> Float[Tensor, "n A"]:
        """What a scaled query reads from its prompt and from `length` tokens of its row."""
        rows, dim = len(query), query.shape[-1]
        query = query.contiguous().view(rows, self.heads, -1, dim)
        own, width = rows * self.heads, self.prompt_keys.shape[-1]
        reach = max(length, self.least)
        scores = self.shared.gather(self._on_prompt(query), self.heads)
        new = torch.bmm(query.view(own, -1, dim), self.keys[:own, :reach].transpose(1, 2))
        new = new.view(rows, self.heads, -1, reach)[..., :length]
        weights = softmax(torch.cat([scores, new], -1)).to(query.dtype)
        read = torch.bmm(self.shared.spread(weights[..., :width]), self.prompt_values)
        tail = F.pad(weights[..., width:], (0, reach - length)).view(own, -1, reach)
        tail = torch.bmm(tail, self.values[:own, :reach])
        return self.shared.gather(read, self.heads).reshape(rows, -1) + tail.view(rows, -1)

    def _on_prompt(self, query: Float[Tensor, "n K g d"]) -> Float[Tensor, "NK Gg P"]:
        scores = torch.bmm(self.shared.spread(query), self.prompt_keys)
        if self.shared.bias is None:
            return scores
        return (scores.view(self.shared.prompts, self.heads, -1, scores.shape[-1]) + self.shared.bias).view(
            scores.shape
        )

    def move(self, source: Int[Tensor, "m"], target: Int[Tensor, "m"], length: int) -> None:
        """Copy rows to other places."""
        for buffer in (self.keys, self.values):
            rows = buffer.view(-1, self.heads, *buffer.shape[1:])
            rows[target, :, :length] = rows[source, :, :length]

    def _grown(self, old: Tensor, rows: int) -> Tensor:
        columns = min(self.room, old.shape[1] + max(self.CHUNK, old.shape[1] // 2))
        new = old.new_empty(rows, columns, old.shape[2])
        new[:, : old.shape[1]] = old[:rows]
        return new


class Unfused:
    """One layer through its own submodules, adapters and hooks included."""

    def __init__(self, layer: Any):
        self.layer, self.attention = layer, layer.self_attn
        self.dim = layer.self_attn.head_dim

    def project(self, x: Float[Tensor, "n D"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, scaled, key and value of one token, [n, H, d]."""
        attention, rows = self.attention, len(x)
        h = self.layer.input_layernorm(x)
        query = attention.q_proj(h).view(rows, -1, self.dim)
        key = attention.k_proj(h).view(rows, -1, self.dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        value = attention.v_proj(h).view(rows, -1, self.dim)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        return rotate(query, cos, sin) * attention.scaling, rotate(key, cos, sin), value

    def finish(self, x: Float[Tensor, "n D"], attended: Float[Tensor, "n A"]) -> Float[Tensor, "n D"]:
        """The rest of the layer after attention."""
        x = x + self.attention.o_proj(attended)
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))


class Fused:
    """One layer on copies of its weights: three projections in one product, two in another, norm and scale inside."""

    def __init__(self, layer: Any, workspace: Workspace):
        attention, mlp = layer.self_attn, layer.mlp
        self.dim, self.norm_eps = attention.head_dim, layer.input_layernorm.variance_epsilon
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads, self.kv_heads = query.out_features // self.dim, key.out_features // self.dim
        self.wide = (query.in_features,)
        self.normed = hasattr(attention, "q_norm")
        scale = 1.0 if self.normed else attention.scaling
        before = layer.input_layernorm.weight
        self.qkv = torch.cat([query.weight * scale, key.weight, value.weight]) * before
        self.qkv_bias = None
        if query.bias is not None:
            self.qkv_bias = torch.cat([query.bias * scale, key.bias, value.bias])
        if self.normed:
            self.qk_eps = attention.q_norm.variance_epsilon
            self.qk_weight = torch.cat(
                [
                    (attention.q_norm.weight * attention.scaling).expand(self.heads, -1),
                    attention.k_norm.weight.expand(self.kv_heads, -1),
                ]
            )
        self.out, self.act = attention.o_proj, mlp.act_fn
        gate, up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.hidden = gate.out_features
        self.gate_up = torch.cat([gate.weight, up.weight]) * layer.post_attention_layernorm.weight
        self.gate_up_bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
        self.workspace = workspace

    def project(self, x: Float[Tensor, "n D"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, scaled, key and value of one token, [n, H, d]."""
        h = self._linear("qkv", x, self.qkv, self.qkv_bias)
        h = h.view(len(x), -1, self.dim)
        both = self.heads + self.kv_heads
        qk = h[:, :both]
        if self.normed:
            qk = F.rms_norm(qk, (self.dim,), None, self.qk_eps).mul_(self.qk_weight)
        qk = rotate(qk, cos, sin)
        return qk[:, : self.heads], qk[:, self.heads :], h[:, both:]

    def finish(self, x: Float[Tensor, "n D"], attended: Float[Tensor, "n A"]) -> Float[Tensor, "n D"]:
        """The rest of the layer after attention."""
        x = _add_linear(x, attended, self.out)
        h = self._linear("gate_up", x, self.gate_up, self.gate_up_bias)
        return _add_linear(x, self.act(h[:, : self.hidden]).mul_(h[:, self.hidden :]), self.down)

    def _linear(self, name: str, x: Float[Tensor, "n D"], weight: Tensor, bias: Tensor | None) -> Tensor:
        """Norm and product, into memory that all layers share."""
        out = self.workspace.take(name, (len(x), len(weight)), x)
        h = F.rms_norm(x, self.wide, None, self.norm_eps)
        return torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)


def rotate(x: Float[Tensor, "n H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n H d"]:
    """The rotary embedding; the first half of `sin` carries the sign of `rotate_half`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def softmax(scores: Float[Tensor, "*n S"]) -> Float[Tensor, "*n S"]:
    """In fp32; on CPUs the library's own is scalar, ten times slower, below 16 entries."""
    if scores.shape[-1] >= 16 or scores.device.type != "cpu":
        return scores.softmax(-1, dtype=torch.float32)
    weights = (scores.float() - scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def _add_linear(x: Tensor, h: Tensor, layer: nn.Linear) -> Tensor:
    out = torch.addmm(x, h, layer.weight.t())
    return out if layer.bias is None else out.add_(layer.bias)


def _fusible(model: LanguageModel) -> bool:
    """Whether the layers are small, in fp32, and nothing but plain linear ones."""
    if model.autocast is not None or model.adapted:
        return False
    size = 0
    for module in model.transformer.base_model.layers.modules():
        linear = hasattr(module, "in_features") or hasattr(module, "base_layer")
        if module._forward_hooks or module._forward_pre_hooks or (linear and type(module) is not nn.Linear):
            return False
        size += sum(p.numel() for p in module.parameters(recurse=False))
    return 4 * size <= FUSED_BYTES and all(
        p.dtype == torch.float32 for p in model.transformer.base_model.layers.parameters()
    )
