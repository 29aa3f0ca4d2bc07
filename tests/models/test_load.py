"""Loading, saving, freezing, adapters, checksums."""

import json
import shutil

import pytest
import torch
from tests.models.test_language import logits_of, ragged
from tests.rollouts.architectures import model
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.core.errors import UserError
from keel.models.adapters import AdapterView, LoRA
from keel.models.language import LanguageModel
from keel.models.load import checksum, is_out_of_memory, load, merged, out_of_memory, reference, save
from keel.models.tiny import SMALL, build_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(build_tiny("0123456789+-*/=()> ?", SMALL), path)
    return path


def shaken(policy: LanguageModel) -> LanguageModel:
    """With trained parameters that are not the initial ones."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return policy


def states(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.hidden(ragged())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_saved_model_loads_with_transformers_and_with_keel_to_the_same_bits(name, tmp_path):
    policy = model(name)
    save(policy, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load(tmp_path)
    assert checksum(theirs) == checksum(ours.module) == checksum(policy.module)
    assert torch.equal(states(ours), states(policy))
    assert AutoTokenizer.from_pretrained(tmp_path)("1+2").input_ids == policy.tokenizer("1+2").input_ids


def test_a_model_in_memory_is_used_as_it_is(folder):
    module = AutoModelForCausalLM.from_pretrained(folder)
    policy = load(module, AutoTokenizer.from_pretrained(folder))
    assert policy.module is module


def test_loading_draws_nothing_from_the_global_generator(folder):
    before = torch.random.get_rng_state()
    load(folder, lora=LoRA(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dtype_is_that_asked_for(folder):
    policy = load(folder, dtype="bfloat16")
    assert policy.transformer.dtype == torch.bfloat16
    assert states(policy).dtype == torch.bfloat16
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        load(folder, dtype="float23")


def test_a_device_that_there_is_not_is_an_error(folder):
    with pytest.raises(UserError, match="'tpu' is no device"):
        load(folder, device="tpu")


def test_a_missing_path_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)


def test_pickled_weights_are_never_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match="safetensors only"):
        load(tmp_path / "pickled")


def test_weights_that_lack_a_part_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lack .*layers\.2"):
        load(tmp_path / "deeper")


def test_a_damaged_file_is_an_error_that_names_the_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut"):
        load(tmp_path / "cut")


def test_a_tokenizer_that_is_too_large_is_refused():
    policy = model("llama")
    policy.tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    with pytest.raises(UserError, match="resize_token_embeddings"):
        load(policy.module, policy.tokenizer)


def test_checksum_sees_one_bit_and_a_renamed_parameter(folder):
    first, second = load(folder), load(folder)
    assert checksum(first.module) == checksum(second.module)
    with torch.no_grad():
        weight = second.transformer.model.layers[0].mlp.up_proj.weight
        weight.view(torch.int32)[3, 5] ^= 1
    assert checksum(first.module) != checksum(second.module)
    assert checksum(torch.nn.Sequential(first.module)) != checksum(first.module)


def test_the_reference_is_a_frozen_copy_that_training_does_not_move(folder):
    policy = load(folder)
    frozen = reference(policy)
    before = states(policy)
    shaken(policy)
    assert torch.equal(states(frozen), before)
    assert not torch.equal(states(policy), before)
    assert not any(p.requires_grad for p in frozen.module.parameters())
    assert all(p.requires_grad for p in policy.module.parameters())


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_with_lora_the_reference_is_the_base_without_a_copy(name, tmp_path):
    base = model(name)
    save(base, tmp_path)
    policy = shaken(load(tmp_path, lora=LoRA(4)))
    frozen = reference(policy)
    assert frozen.module is policy.module
    assert torch.equal(states(frozen), states(base))
    assert not torch.allclose(states(policy), states(base), atol=1e-3)
    assert checksum(policy.module, adapters=False) == checksum(base.module)


def test_a_view_does_not_disturb_a_pending_backward_pass(folder):
    def gradient(look):
        policy = shaken(load(folder, lora=LoRA(4)))
        frozen = reference(policy)
        loss = policy.hidden(ragged())[ragged().mask].square().sum()
        if look:
            frozen.hidden(ragged())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable()])

    assert torch.equal(gradient(True), gradient(False))


def test_lora_trains_the_adapter_only_and_starts_as_the_base(folder):
    plain, policy = load(folder), load(folder, lora=LoRA(4))
    assert torch.equal(states(policy), states(plain))
    names = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    again, other = load(folder, lora=LoRA(4)), load(folder, lora=LoRA(4), seed=1)
    assert checksum(again.module) == checksum(policy.module) != checksum(other.module)


def test_lora_on_a_layer_that_is_not_there_names_those_that_are(folder):
    with pytest.raises(UserError, match="q_proj"):
        load(folder, lora=LoRA(4, target_modules=("query",)))


def test_a_head_with_an_adapter_is_without_it_in_the_reference(folder):
    base = load(folder)
    policy = shaken(load(folder, lora=LoRA(4, target_modules=("q_proj", "lm_head"))))
    rows, frozen = ragged(), reference(policy)
    expected = logits_of(base, rows)
    assert torch.equal(logits_of(frozen, rows), expected)
    with torch.no_grad():
        assert not torch.allclose(policy.head.logits(base.hidden(rows)[0]), expected[0], atol=1e-3)


def test_an_adapter_is_saved_alone_and_loads_again(folder, tmp_path):
    policy = shaken(load(folder, lora=LoRA(4)))
    save(policy, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    again = load(tmp_path)
    assert torch.equal(states(again), states(policy))
    assert len(again.trainable()) == len(policy.trainable())


def test_the_merged_model_is_a_plain_one_with_the_same_output(folder, tmp_path):
    policy = shaken(load(folder, lora=LoRA(4)))
    before = checksum(policy.module)
    plain = merged(policy)
    plain.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(states(load(tmp_path)), states(policy), rtol=1e-3, atol=1e-4)
    assert checksum(policy.module) == before


def test_a_second_adapter_is_seen_by_name(folder):
    from peft import LoraConfig

    policy = shaken(load(folder, lora=LoRA(4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.module.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    mine = states(policy)
    other = AdapterView(policy, "other")
    assert not torch.allclose(states(other), mine, atol=1e-3)
    assert torch.equal(states(AdapterView(policy, "default")), mine)
    assert torch.equal(states(policy), mine)
    with pytest.raises(UserError, match="default, other"):
        AdapterView(policy, "mine")


def test_out_of_memory_names_the_setting_to_lower():
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_out_of_memory(error) and is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))
    assert "train.max_tokens" in str(out_of_memory(error))
    assert "rollout.num_prompts" in str(out_of_memory(error, "rollout"))
