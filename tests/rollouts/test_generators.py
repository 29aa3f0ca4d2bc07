"""Both generators keep the contract, on every kind of architecture."""

import pytest
import torch
from scipy.stats import chisquare
from tests.rollouts.architectures import CACHED, OWN, model
from transformers import DynamicCache

from keel.core.errors import UserError
from keel.core.rows import Stop
from keel.models.adapters import LoRA
from keel.models.language import LanguageModel
from keel.models.load import load, save
from keel.rollouts import caches, steppers
from keel.rollouts.choose import choose_generator
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.rollouts.steppers import CacheStepper, DecoderStepper
from keel.rollouts.transformers import TransformersGenerator

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [4, 4, 9, 13, 20], [9, 14]]
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


def recomputed(policy, rows, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities from the states of whole sequences, under the transform of the sampler."""
    with torch.no_grad():
        logits = policy.head.logits(policy.hidden(rows)[rows.mask])
    if sampling.temperature:
        logits = logits / sampling.temperature
        logits = logits if sampling.filter is None else sampling.filter(logits)
    return logits.log_softmax(-1).gather(1, rows.tokens[rows.mask][:, None])[:, 0]


def completions(rows) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rows.tokens, rows.mask, strict=True)]


def equal(one, other) -> None:
    assert completions(one) == completions(other)
    assert torch.equal(one.stop, other.stop) and torch.equal(one.row, other.row)
    torch.testing.assert_close(one.logp["behaviour"][one.mask], other.logp["behaviour"][other.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("short", [0, caches.SHORT])
@pytest.mark.parametrize("name", OWN + CACHED)
def test_decoding_gives_the_logits_of_a_whole_forward_pass(name, short, monkeypatch):
    monkeypatch.setattr(steppers, "SHORT", short)  # 0: no prompt is copied to its rows
    policy = model(name)
    own = name in OWN
    stepper = DecoderStepper(policy) if own else CacheStepper(policy)
    assert DecoderStepper.serves(policy, 20) == own
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 23, (3, 5), generator=draws)
    mask = torch.arange(5) >= torch.tensor([[0], [3], [1]])
    index = torch.tensor([0, 0, 2, 1, 2, 0])
    sequences = [ids[i][mask[i]] for i in index.tolist()]
    rows = torch.arange(6)
    with torch.no_grad():
        states = stepper.prefill(ids, mask, 9)[index]
        stepper.expand(index)
        for t in range(9):
            logits = policy.head.logits(states)
            for i, row in enumerate(rows.tolist()):
                whole = policy.module(input_ids=sequences[row][None]).logits[0, -1]
                torch.testing.assert_close(logits[i], whole, rtol=0, atol=1e-4)
            if t in (3, 6):
                keep = torch.tensor([0, 4, 2]) if t == 6 else torch.tensor([0, 1, 5, 3, 4])
                rows = rows[keep]
                stepper.keep(keep)
            token = torch.randint(3, 23, (len(rows),), generator=draws)
            for row, choice in zip(rows.tolist(), token.tolist(), strict=True):
                sequences[row] = torch.cat([sequences[row], torch.tensor([choice])])
            states = stepper.step(token)


@pytest.mark.parametrize("kind", ["local", "transformers"])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_behaviour_is_the_log_probability_under_the_sampled_distribution(name, transform, kind):
    policy = model(name)
    sampling = Sampling(**TRANSFORMS[transform], max_completion_length=12)
    rows = choose_generator(policy, kind).generate(PROMPTS, 4, sampling, seed=3)
    behaviour = rows.logp["behaviour"]
    torch.testing.assert_close(behaviour[rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)
    assert bool((behaviour[~rows.mask] == 0).all())


@pytest.mark.parametrize("name", OWN + CACHED + ("granite", "cohere"))
def test_both_generators_draw_the_same(name):
    policy = model(name)
    sampling = Sampling(**TRANSFORMS["all"], max_completion_length=10, stop_strings=("7",))
    local = choose_generator(policy, "local").generate(PROMPTS, 3, sampling, seed=5)
    equal(local, choose_generator(policy, "transformers").generate(PROMPTS, 3, sampling, seed=5))


def test_an_architecture_with_another_kind_of_memory_goes_to_the_second_generator():
    policy = model("mamba")
    with pytest.raises(UserError, match="transformers"):
        LocalGenerator(policy)
    second = choose_generator(policy)
    assert isinstance(second, TransformersGenerator)
    sampling = Sampling(max_completion_length=8)
    rows = second.generate(PROMPTS, 2, sampling, seed=0)
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="Did you mean 'local'"):
        choose_generator(policy, "lokal")


def test_the_models_own_generation_settings_are_not_applied():
    policy = model("qwen2")
    sampling = Sampling(max_completion_length=8)
    plain = TransformersGenerator(policy).generate(PROMPTS, 2, sampling, seed=0)
    settings = policy.transformer.generation_config
    settings.repetition_penalty, settings.temperature, settings.do_sample, settings.top_k = 3.0, 0.1, True, 2
    equal(plain, TransformersGenerator(policy).generate(PROMPTS, 2, sampling, seed=0))
    assert policy.transformer.generation_config is settings and settings.repetition_penalty == 3.0


@pytest.mark.parametrize("name", OWN + CACHED)
def test_greedy_is_what_transformers_gives(name):
    policy = model(name)
    rows = LocalGenerator(policy).generate(PROMPTS, 1, Sampling(temperature=0, max_completion_length=9), seed=0)
    for prompt, ours in zip(PROMPTS, completions(rows), strict=True):
        theirs = policy.module.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=9,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()[: len(ours)]


def test_the_first_token_follows_the_softmax():
    policy = model("qwen3")
    rows = LocalGenerator(policy).generate([PROMPTS[0]], 4000, Sampling(max_completion_length=1), seed=11)
    with torch.no_grad():
        expected = policy.module(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(0)
    counts = rows.tokens[:, 0].bincount(minlength=26).double()
    common = expected * 4000 >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * 4000
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 0.001


@pytest.mark.parametrize("kind", ["local", "transformers"])
def test_a_row_depends_on_its_identity_alone(kind):
    policy = model("qwen3")
    draw = choose_generator(policy, kind)
    sampling = Sampling(max_completion_length=12)
    whole = draw.generate(PROMPTS, 4, sampling, seed=2, step=7, data_index=[30, 31, 32, 33, 34])
    order = [3, 0, 4, 2, 1]
    other = draw.generate([PROMPTS[i] for i in order], 4, sampling, seed=2, step=7, data_index=[30 + i for i in order])
    place = {int(row): i for i, row in enumerate(other.row)}
    equal(whole, other.select(torch.tensor([place[int(row)] for row in whole.row])))
    alone = draw.generate([PROMPTS[3]], 2, sampling, seed=2, step=7, data_index=[33])
    equal(alone, whole.select(torch.tensor([12, 13])))
    small = choose_generator(policy, kind, batch_rows=3)
    equal(whole, small.generate(PROMPTS, 4, sampling, seed=2, step=7, data_index=[30, 31, 32, 33, 34]))
    assert completions(draw.generate(PROMPTS, 4, sampling, seed=2, step=8)) != completions(whole)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_rows_that_leave_the_batch_change_nothing(name):
    policy = model(name)
    sampling = Sampling(max_completion_length=40, stop_strings=("3",))
    kept = LocalGenerator(policy, compact=2.0).generate(PROMPTS, 8, sampling, seed=1)
    for share in (0.0, 0.25):
        equal(kept, LocalGenerator(policy, compact=share).generate(PROMPTS, 8, sampling, seed=1))
    assert len(kept.lengths.unique()) > 5


@pytest.mark.parametrize("short", [0, caches.SHORT])
def test_long_completions_outgrow_their_buffers(monkeypatch, short):
    monkeypatch.setattr(caches, "CHUNK", 8)
    monkeypatch.setattr(steppers, "SHORT", short)
    policy = model("qwen3")
    sampling = Sampling(max_completion_length=70, temperature=1.5)
    rows = LocalGenerator(policy).generate(PROMPTS, 6, sampling, seed=1)
    assert rows.lengths.max() > 40
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["local", "transformers"])
def test_reasons_to_stop(kind):
    policy = model("llama")
    policy.eos_ids = (1, 8)  # 8 stands for "5"
    sampling = Sampling(max_completion_length=6, stop_strings=("7", "+1"))
    rows = choose_generator(policy, kind).generate(PROMPTS, 30, sampling, seed=0)
    assert {int(reason) for reason in rows.stop.unique()} == {Stop.EOS, Stop.STOP_STRING, Stop.LENGTH}
    for tokens, reason in zip(completions(rows), rows.stop.tolist(), strict=True):
        text = policy.tokenizer.decode(tokens)
        assert not any(token in policy.eos_ids for token in tokens[:-1])
        assert not any(stop in policy.tokenizer.decode(tokens[:-1]) for stop in sampling.stop_strings)
        if reason == Stop.EOS:
            assert tokens[-1] in policy.eos_ids
        elif reason == Stop.STOP_STRING:
            assert text.endswith(sampling.stop_strings)
        else:
            assert len(tokens) == 6 and not text.endswith(sampling.stop_strings) and tokens[-1] not in policy.eos_ids


def test_rows_are_laid_out_as_promised():
    policy = model("llama")
    rows = LocalGenerator(policy).generate(
        PROMPTS, 3, Sampling(max_completion_length=9), seed=0, data_index=[7, 8, 9, 7, 3]
    )
    assert rows.group.tolist() == [i for i in range(5) for _ in range(3)]
    assert rows.data_index.tolist() == [i for i in [7, 8, 9, 7, 3] for _ in range(3)]
    for i, prompt in enumerate(PROMPTS):
        ids, mask = rows.prompt_ids[3 * i], rows.prompt_mask[3 * i]
        assert ids[mask].tolist() == prompt and mask[-1]
    assert torch.equal(rows.mask, torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None])
    assert bool((rows.tokens[~rows.mask] == policy.pad_id).all()) and rows.lengths.max() == rows.tokens.shape[1]
    assert rows.main.all() and not rows.exact and rows.weight.tolist() == [1.0] * 15


def test_without_an_end_token_completions_run_to_the_limit():
    policy = model("llama")
    policy.eos_ids = ()
    for kind in ("local", "transformers"):
        rows = choose_generator(policy, kind).generate(PROMPTS, 2, Sampling(max_completion_length=5), seed=0)
        assert rows.lengths.tolist() == [5] * 10 and set(rows.stop.tolist()) == {Stop.LENGTH}


def test_prompts_that_cannot_be_continued_are_errors():
    draw = LocalGenerator(model("gpt2"))
    with pytest.raises(UserError, match="context of 160"):
        draw.generate([[4] * 150], 1, Sampling(max_completion_length=11), seed=0)
    with pytest.raises(UserError, match="token 26 is outside"):
        draw.generate([[26]], 1, Sampling(max_completion_length=4), seed=0)
    with pytest.raises(UserError, match="nothing to generate"):
        draw.generate([], 1, Sampling(max_completion_length=4), seed=0)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_lora_weights_are_sampled_from(name, tmp_path):
    save(model(name), tmp_path)
    policy = load(tmp_path, lora=LoRA(4))
    with torch.no_grad():
        for i, parameter in enumerate(policy.trainable()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    sampling = Sampling(max_completion_length=10)
    rows = LocalGenerator(policy).generate(PROMPTS, 4, sampling, seed=0)
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)
    base = LocalGenerator(load(tmp_path)).generate(PROMPTS, 4, sampling, seed=0)
    assert completions(base) != completions(rows)


def test_new_weights_are_seen_at_the_next_call():
    policy = model("qwen3")
    draw, sampling = LocalGenerator(policy), Sampling(max_completion_length=8)
    draw.generate(PROMPTS, 2, sampling, seed=0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.1)
    rows = draw.generate(PROMPTS, 2, sampling, seed=0)
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)


@pytest.mark.parametrize("short", [0, caches.SHORT])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama_bias_rope"])
def test_bf16_stays_close_to_the_recomputed_log_probabilities(name, mixed, short, monkeypatch):
    monkeypatch.setattr(steppers, "SHORT", short)
    full = model(name)
    policy = LanguageModel(full.module, full.tokenizer, autocast=torch.bfloat16) if mixed else full
    if not mixed:
        full.module.to(torch.bfloat16)
    sampling = Sampling(max_completion_length=8)
    rows = LocalGenerator(policy).generate(PROMPTS, 4, sampling, seed=0)
    gap = (rows.logp["behaviour"][rows.mask] - recomputed(policy, rows, sampling)).abs()
    assert gap.mean() < 0.03


def test_a_patched_model_is_noticed_and_decoded_by_its_own_forward_pass():
    policy = model("llama")
    attention = policy.transformer.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, inputs, out: (out[0] * 0.5, *out[1:]))
    draw, sampling = LocalGenerator(policy), Sampling(max_completion_length=6)
    with pytest.warns(UserWarning, match="does not reproduce"):
        rows = draw.generate(PROMPTS, 2, sampling, seed=0)
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)


def test_generation_leaves_mode_gradients_and_global_randomness_alone():
    policy = model("qwen3")
    policy.module.train()
    before = torch.random.get_rng_state()
    for kind in ("local", "transformers"):
        rows = choose_generator(policy, kind).generate(PROMPTS, 2, Sampling(max_completion_length=4), seed=0)
        assert policy.module.training and torch.is_grad_enabled()
        policy.hidden(rows).sum().backward()  # the rows are ordinary tensors
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_caches_of_transformers_are_what_the_steppers_expect():
    policy = model("qwen3")
    cache = DynamicCache()
    with torch.no_grad():
        policy.transformer.base_model(torch.tensor([[4, 5, 6]]), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape == (1, 2, 3, 16)  # prompts, key heads, columns, width of a head
