"""Frozen models seen in another way: behind a text, through their layers, through their activations."""

import pytest
import torch
from tests.worlds import table

from keel.core.errors import UserError
from keel.core.rows import Rows
from keel.models.adapters import AdapterView, LoRA, add_lora
from keel.models.language import LanguageModel
from keel.models.prompted import Prompted, PromptedModel
from keel.models.sources import EMA, Initial, Soup, build, build_all
from keel.models.tiny import TinyConfig, build_tiny
from keel.models.token_masks import Activations, Layers, MaskNet, TokenMask, layer_states, scaled
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb, Value
from keel.tasks.task import Example
from keel.train.encode import Encoder, supervised_rows

SMALL = TinyConfig(dim=16, layers=3, heads=2, feed_forward=24, context=64)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_tiny("0123456789+=>", SMALL, seed=3)


def rows_of(model: LanguageModel, *pairs: tuple[str, str]) -> Rows:
    examples = [Example(prompt, {}, i) for i, (prompt, _) in enumerate(pairs)]
    return supervised_rows(examples, [text for _, text in pairs], Encoder(model), None, 0, 0)[0]


# -- behind a text ---------------------------------------------------------------------------------------------------


def test_a_text_before_every_prompt(model):
    """The log-probabilities are those of rows whose prompts begin with it; lengths of prompts differ."""
    found = build(Prompted("1+1=2>"), model)
    short = rows_of(model, ("3+4=", "7"), ("12+5=", "17"))
    long = rows_of(model, ("1+1=2>3+4=", "7"), ("1+1=2>12+5=", "17"))
    need = LogProb(of=("better",))
    seen = Engine({"policy": model, "better": found}).measure([need], short)[need]
    wanted = Engine({"policy": model}).measure([LogProb()], long)[LogProb()]
    torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=0)
    plain = Engine({"policy": model}).measure([LogProb()], short)[LogProb()]
    assert float((seen - plain).abs().max()) > 1e-3


def test_the_start_token_stays_in_front():
    """Of prompts with and without one; padding stays on the left."""
    rows = Rows.build(
        torch.tensor([[0, 1, 5, 6], [1, 5, 6, 7], [0, 0, 5, 6]]),
        torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool(),
        torch.zeros(3, 1, dtype=torch.long),
        torch.ones(3, 1, dtype=torch.bool),
    )
    found = PromptedModel(table("any"), (8, 9), start=1).before(rows)
    shown = [ids[mask].tolist() for ids, mask in zip(found.prompt_ids, found.prompt_mask, strict=True)]
    assert shown == [[1, 8, 9, 5, 6], [1, 8, 9, 5, 6, 7], [8, 9, 5, 6]]
    assert bool((found.prompt_mask.diff(dim=1) >= 0).all())
    assert rows.prompt_ids.tolist() == [[0, 1, 5, 6], [1, 5, 6, 7], [0, 0, 5, 6]]  # these are as they were


def test_equal_sources_are_one_model(model):
    found = build_all({"ref": Initial(), "better": Prompted("1>"), "worse": Prompted("0>"), "slow": EMA(0.9)}, model)
    assert found["better"].module is found["ref"].module is found["worse"].module
    assert found["better"].model is not found["worse"].model
    assert found["slow"].module is not found["ref"].module and found["ref"].module is not model.module
    twice = build_all({"a": EMA(0.9), "b": EMA(0.9)}, model)
    assert twice["a"].module is not twice["b"].module


def test_what_is_no_view(model):
    with pytest.raises(ValueError, match="text must not be empty"):
        Prompted("")
    for view in (Prompted, Layers, Activations):
        arguments = {"text": "1"} if view is Prompted else {}
        with pytest.raises((ValueError, TypeError)):
            view(of=EMA(0.5), **arguments)
    with pytest.raises(UserError, match="reads no text"):
        Prompted("1").view(table("any"))
    assert Prompted("1", of=Soup(("a", "b"))).of.paths == ("a", "b")


# -- layers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hooked(model, rows):
    """What hooks of the test's own see of one row: outputs of attentions, MLPs, layers and head, [T, D]."""
    one = rows.trim()
    start, stop = one.prompt_ids.shape[1] - 1, one.prompt_ids.shape[1] + one.tokens.shape[1] - 1
    base, seen = model.transformer.base_model, ([], [], [])

    def keep(kind):
        return lambda module, given, out: kind.append((out[0] if isinstance(out, tuple) else out)[0, start:stop])

    watched = [(m, kind) for e in base.layers for m, kind in zip((e.self_attn, e.mlp, e), seen, strict=True)]
    handles = [module.register_forward_hook(keep(kind)) for module, kind in watched]
    logits = model.transformer(input_ids=torch.cat([one.prompt_ids, one.tokens], 1)).logits[0, start:stop]
    for handle in handles:
        handle.remove()
    attention, mlp, residual = seen
    return attention, mlp, [*residual[:-1], base.norm(residual[-1])], [logits]


def test_layers(model):
    """The last layer's is the state that the head reads; padding on both sides changes nothing; no gradient."""
    rows = rows_of(model, ("3+4=", "7"), ("12+5=", "17"))
    states = layer_states(model, rows)
    assert not states.requires_grad
    torch.testing.assert_close(states[rows.mask][:, -1], model.hidden(rows)[rows.mask], atol=1e-5, rtol=0)
    _, _, residual, _ = hooked(model, rows.select(torch.tensor([1])))
    torch.testing.assert_close(states[1, :, :], torch.stack(residual, 1), atol=1e-5, rtol=0)
    wide = layer_states(model, rows.padded(rows.prompt_ids.shape[1] + 3, rows.tokens.shape[1] + 2))
    torch.testing.assert_close(wide[:, : rows.tokens.shape[1]][rows.mask], states[rows.mask], atol=1e-6, rtol=0)
    seen = build(Layers(), model).hidden(rows)
    assert torch.equal(seen[rows.mask], states.flatten(2)[rows.mask])


def test_layers_of_the_base_below_an_adapter(model):
    """They are those of the model without it, though the adapter has moved."""
    adapted = LanguageModel(add_lora(model.copy().module, LoRA(rank=2)), model.tokenizer)
    with torch.no_grad():
        for parameter in adapted.trainable():
            parameter += 0.3
    rows = rows_of(model, ("3+4=", "7"))
    base = layer_states(AdapterView(adapted), rows)
    torch.testing.assert_close(base, layer_states(model, rows), atol=1e-6, rtol=0)
    assert float((layer_states(adapted, rows) - base).abs().max()) > 1e-2


def test_a_mask_begins_at_one_and_by_hand():
    """Two layers of two numbers, (1, 3) and (5, 1): normed (-1, 1) and (1, -1)."""
    net = MaskNet(2, 2).double()
    states = torch.tensor([[1.0, 3.0, 5.0, 1.0]], dtype=torch.float64)
    assert net(states).tolist() == [1.0]
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 1.0], [1.0, 2.0]]))
        net.mixer.copy_(torch.tensor([2.0, 3.0]))
    # ReLU(-0.5 + 1 + 1) = 1.5 and ReLU(1 - 2 + 1) = 0
    assert net(states).tolist() == pytest.approx([3.0], abs=1e-4)
    with torch.no_grad():
        net.mixer.copy_(torch.tensor([-2.0, 3.0]))
    assert net(states).tolist() == [0.0]
    with pytest.raises(UserError, match="2 layers of 2 numbers met states of 6"):
        net(torch.zeros(1, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_learns_through_the_engine(model, dtype):
    """Its gradient is autograd's over the states of the frozen model; the policy and the frozen model get none."""
    policy = model.copy()
    policy.module.to(dtype)
    sources = build_all({"layers": Layers()}, policy)
    head = TokenMask().build(policy, 0)
    with torch.no_grad():
        head.weight += 0.1 * torch.arange(48.0).view(3, 16).sin()
    rows = rows_of(model, ("3+4=", "7"), ("12+5=", "17"))
    need = Value("mask", of=("layers", "policy"))
    engine = Engine({"policy": policy, **sources}, {"mask": head})
    loss, stats = engine.step([need], rows, engine.measure([], rows), lambda r, s: s[need].square().sum())
    found = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    states = layer_states(policy, rows).flatten(2)[rows.mask]
    wanted = head(states)
    assert wanted.dtype == stats[need].dtype == torch.float32
    wanted.square().sum().backward()
    torch.testing.assert_close(loss, wanted.square().sum().detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None or not p.grad.any() for p in policy.module.parameters())


# -- activations -----------------------------------------------------------------------------------------------------


def test_scaling_by_hand():
    rows = Rows.build(
        torch.zeros(3, 1, dtype=torch.long),
        torch.ones(3, 1, dtype=torch.bool),
        torch.zeros(3, 4, dtype=torch.long),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool(),
    )
    z = torch.tensor([[2.0, -2.0, 1.0, 99.0], [5.0, 5.0, 99.0, 99.0], [3.0, 99.0, 99.0, 99.0]])
    assert scaled(z, rows).tolist() == [[1.0, 0.0, 0.75, 0.0], [0.0] * 4, [0.0] * 4]


def test_activations(model):
    """Four kinds, each in [0, 1], by a second way: hooks of the test's own; other rows and padding do not matter."""
    rows = rows_of(model, ("3+4=", "7+1+2"), ("12+5=", "17"))
    found = build(Activations(), model).hidden(rows)
    assert found[rows.mask].amin() == 0 and found[rows.mask].amax() <= 1 and not bool(found[~rows.mask].any())
    alone = build(Activations(), model).hidden(rows.select(torch.tensor([1])))
    torch.testing.assert_close(alone[rows.mask[1:]], found[1:][rows.mask[1:]], atol=1e-5, rtol=0)
    kinds = hooked(model, rows.select(torch.tensor([0])))
    wanted = []
    for kind in kinds:
        means = [z.mean(-1) for z in kind]
        wanted.append(torch.stack([(z - z.min()) / (z.max() - z.min()) for z in means]).mean(0))
    torch.testing.assert_close(found[0], torch.stack(wanted, 1), atol=1e-4, rtol=0)
