"""One layer of the Llama family for one token of each row, through its own submodules or on fused copies of weights."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.models.language import LanguageModel

FUSED_BYTES = 256 << 20  # weights up to this size are copied into fused matrices for each call


class Angles:
    """The rotary embedding of all positions, in the two forms that layers read.

    Args:
        cos, sin: as transformers gives them, both halves alike, shape [S, d].
    """

    def __init__(self, cos: Float[Tensor, "S d"], sin: Float[Tensor, "S d"]):
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)
        self.turn = torch.complex(cos[:, :half].float(), sin[:, :half].float())

    def at(self, place: int | Int[Tensor, "n 1"]) -> "Angles":
        """Those of one position, or of one for each row."""
        found = object.__new__(Angles)
        found.cos, found.sin, found.turn = self.cos[place], self.sin[place], self.turn[place]
        return found


class Unfused:
    """One layer through its own submodules, adapters and hooks included."""

    def __init__(self, layer: Any):
        self.layer, self.attention = layer, layer.self_attn
        self.dim = layer.self_attn.head_dim

    def project(
        self, x: Float[Tensor, "n D"], angles: Angles
    ) -> tuple[Float[Tensor, "n H d"], Float[Tensor, "n K d"], Float[Tensor, "n K d"]]:
        """Query, scaled, key and value of one token."""
        attention, rows = self.attention, len(x)
        h = self.layer.input_layernorm(x)
        query = attention.q_proj(h).view(rows, -1, self.dim)
        key = attention.k_proj(h).view(rows, -1, self.dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        value = attention.v_proj(h).view(rows, -1, self.dim)
        cos, sin = angles.cos.to(query.dtype), angles.sin.to(query.dtype)
        return rotate(query, cos, sin) * attention.scaling, rotate(key, cos, sin), value

    def finish(self, x: Float[Tensor, "n D"], attended: Float[Tensor, "n A"]) -> Float[Tensor, "n D"]:
        """The rest of the layer after attention."""
        x = x + self.attention.o_proj(attended)
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))


class Fused:
    """One layer on copies of its weights: three projections in one product, two in another, norm and scale inside.

    The channels of queries and keys are reordered, so that the two which are rotated together stand side by side as one
    complex number; `order` brings the channels of other keys into the same order. In mixed precision the products are
    in bf16 and all else, the cache too, in fp32.

    Args:
        layer: of the Llama family, in fp32.
        dtype: of the products; None is that of the weights.
    """

    def __init__(self, layer: Any, dtype: torch.dtype | None = None):
        attention, mlp = layer.self_attn, layer.mlp
        self.dim = attention.head_dim
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads, self.kv_heads = self.counts = query.out_features // self.dim, key.out_features // self.dim
        self.order = torch.arange(self.dim, device=query.weight.device).view(2, -1).t().flatten()
        self.normed = hasattr(attention, "q_norm")
        scale = 1.0 if self.normed else attention.scaling
        before, after = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.before, self.after = before.scaled, after.scaled
        qkv = [self._ordered(query.weight) * scale, self._ordered(key.weight), value.weight]
        self.qkv = torch.cat(qkv) * before.weight
        self.qkv_bias = None
        if query.bias is not None:
            self.qkv_bias = torch.cat([self._ordered(query.bias) * scale, self._ordered(key.bias), value.bias])
        if self.normed:
            norms = [Norm(attention.q_norm), Norm(attention.k_norm)]
            rows = [n.weight[self.order].expand(heads, -1) for n, heads in zip(norms, self.counts, strict=True)]
            self.qk_norm, self.qk_weight = norms[0].scaled, torch.cat([rows[0] * attention.scaling, rows[1]])
        self.out, self.act = attention.o_proj, mlp.act_fn
        if type(self.act).__name__ in ("SiLU", "SiLUActivation"):
            self.act = F.silu
        gate, up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.hidden = gate.out_features, up.out_features
        self.gate_up = torch.cat([gate.weight, up.weight]) * after.weight
        self.gate_up_bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
        self.dtype = dtype
        weights = (self.qkv, self.out.weight, self.gate_up, self.down.weight)
        weights = tuple(weight.detach().to(dtype or weight.dtype).t() for weight in weights)
        self.qkv, self.out_weight, self.gate_up, self.down_weight = weights

    def project(
        self, x: Float[Tensor, "n D"], angles: Angles
    ) -> tuple[Float[Tensor, "n H d"], Float[Tensor, "n K d"], Float[Tensor, "n K d"]]:
        """Query, scaled, key and value of one token."""
        h = self._linear(self.before(x), self.qkv, self.qkv_bias).view(len(x), -1, self.dim)
        both = self.heads + self.kv_heads
        qk, value = h.split_with_sizes((both, self.kv_heads), 1)
        if self.normed:
            qk = self.qk_norm(qk).mul_(self.qk_weight)
        pairs = torch.view_as_complex(qk.view(len(x), both, -1, 2))
        query, key = torch.view_as_real(pairs * angles.turn).view(qk.shape).split_with_sizes(self.counts, 1)
        return query, key, value

    def finish(self, x: Float[Tensor, "n D"], attended: Float[Tensor, "n A"]) -> Float[Tensor, "n D"]:
        """The rest of the layer after attention."""
        x = self._added(x, attended, self.out_weight, self.out.bias)
        gate, up = self._linear(self.after(x), self.gate_up, self.gate_up_bias).split_with_sizes(self.hidden, 1)
        return self._added(x, self.act(gate).mul_(up), self.down_weight, self.down.bias)

    def _linear(self, x: Float[Tensor, "n D"], weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.dtype is not None:
            out = torch.mm(x.to(self.dtype), weight).float()
            return out if bias is None else out.add_(bias)
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)

    def _added(self, x: Float[Tensor, "n D"], h: Float[Tensor, "n h"], weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.dtype is None:
            out = torch.addmm(x, h, weight)
        else:
            out = x + torch.mm(h.to(self.dtype), weight)
        return out if bias is None else out.add_(bias)

    def _ordered(self, rows: Float[Tensor, "Hd *D"]) -> Float[Tensor, "Hd *D"]:
        return rows.view(-1, self.dim, *rows.shape[1:])[:, self.order].flatten(0, 1)


class Norm:
    """RMSNorm in three passes instead of seven: x / sqrt(mean x^2 + eps) = sqrt(D) x / hypot(|x|, sqrt(D eps)).

    Args:
        module: of the Llama family; `weight` holds its weight times sqrt(D).
    """

    def __init__(self, module: Any):
        size = len(module.weight)
        self.weight = module.weight * math.sqrt(size)
        self.floor = torch.tensor(math.sqrt(size * module.variance_epsilon), device=module.weight.device)

    def scaled(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """x / hypot(|x|, sqrt(D eps)), without the weight."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)

    def __call__(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return self.scaled(x).mul_(self.weight)


def rotate(x: Float[Tensor, "n H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n H d"]:
    """The rotary embedding; the first half of `sin` carries the sign of `rotate_half`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def fusible(model: LanguageModel) -> bool:
    """Whether the layers are small, in fp32 (with bf16 products or without), and nothing but plain linear ones."""
    mixed = model.autocast is not None and not (model.autocast == torch.bfloat16 and model.device.type == "cpu")
    if mixed or model.adapted:
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
