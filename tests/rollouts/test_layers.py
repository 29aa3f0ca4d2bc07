"""Fused layers give what transformers' own give, one token at a time."""

import pytest
import torch
from tests.rollouts.architectures import OWN, model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from keel.rollouts.caches import RowCache, Shared, SharedCache, Workspace
from keel.rollouts.layers import Angles, Fused, Norm, Unfused, fusible


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_the_norm_is_that_of_the_model_also_where_its_floor_counts(scale):
    module = LlamaRMSNorm(8, eps=1e-5)
    draws = torch.Generator().manual_seed(0)
    module.weight.data = torch.randn(8, generator=draws)
    x = scale * torch.randn(3, 8, generator=draws)
    with torch.no_grad():
        torch.testing.assert_close(Norm(module)(x), module(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OWN)
def test_a_fused_layer_gives_what_its_modules_give(name):
    policy = model(name)
    layer = policy.transformer.base_model.layers[0]
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=draws)
    cos, sin = policy.transformer.base_model.rotary_emb(x, torch.arange(9)[None])
    place = torch.tensor([[0], [3], [8], [3], [1]])
    with torch.no_grad():
        fused, plain = Fused(layer), Unfused(layer)
        angles = Angles(cos[0], sin[0]).at(place)
        for found, wanted in zip(fused.project(x, angles)[:2], plain.project(x, angles)[:2], strict=True):
            torch.testing.assert_close(found, wanted[..., fused.order], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused.project(x, angles)[2], plain.project(x, angles)[2], rtol=1e-5, atol=1e-5)
        attended = torch.randn(5, layer.self_attn.o_proj.in_features, generator=draws)
        torch.testing.assert_close(fused.finish(x, attended), plain.finish(x, attended), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_both_caches_read_what_attention_reads(width, padded):
    draws = torch.Generator().manual_seed(0)
    index = torch.tensor([1, 0, 1, 1])
    keys, values = torch.randn(2, 2, 2, width, 8, generator=draws)
    hidden = torch.arange(width) < torch.tensor([[0], [width - 1]]) if padded else None
    shared = Shared.of(index, 2, hidden)
    made = [kind(keys, values, shared, 20, 25, Workspace(), 0) for kind in (RowCache, SharedCache)]
    tokens = torch.randn(20, 2, 4, 2, 8, generator=draws)
    mask = torch.zeros(4, width) if hidden is None else torch.zeros(4, width).masked_fill(hidden[index], -torch.inf)
    for t in range(20):
        query = torch.randn(4, 4, 8, generator=draws)
        own_keys, own_values = tokens[: t + 1].permute(1, 2, 3, 0, 4)
        all_keys, all_values = torch.cat([keys[index], own_keys], 2), torch.cat([values[index], own_values], 2)
        scores = torch.einsum("nkgd,nksd->nkgs", query.view(4, 2, 2, 8), all_keys)
        scores[..., :width] += mask[:, None, None]
        wanted = torch.einsum("nkgs,nksd->nkgd", scores.softmax(-1), all_values).reshape(4, -1)
        for cache in made:
            cache.append(tokens[t, 0], tokens[t, 1], t)
            torch.testing.assert_close(cache.attend(query, t + 1), wanted, rtol=1e-5, atol=1e-6)


def test_what_may_be_fused():
    assert fusible(model("llama")) and fusible(model("qwen3", autocast=torch.bfloat16))
    assert not fusible(model("qwen3", autocast=torch.float16))
    half = model("llama")
    half.module.to(torch.bfloat16)
    assert not fusible(half)
    hooked = model("llama")
    hooked.transformer.base_model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: out)
    assert not fusible(hooked)
