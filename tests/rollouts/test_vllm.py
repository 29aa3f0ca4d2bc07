"""What is asked of vLLM, and what is made of its answers: with a stand-in that records, and with vLLM where it is."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.rollouts.architectures import model
from tests.rollouts.test_generators import PROMPTS, completions, recomputed

from keel.core.errors import UserError
from keel.core.rows import Stop
from keel.models.adapters import LoRA
from keel.models.load import load, save
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.rollouts.vllm import VLLMGenerator

HERE = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()


class Engine:
    """Stands in for `vllm.LLM`: writes the tokens that it is told to, and keeps what it is asked."""

    writes: list[tuple[list[int], str]]
    made: "Engine"

    def __init__(self, **options):
        from pathlib import Path

        self.options, self.folder = options, sorted(path.name for path in Path(options["model"]).iterdir())
        self.loaded, self.calls = [], []
        Engine.made = self

    def apply_model(self, function):
        return [function(SimpleNamespace(load_weights=lambda pairs: self.loaded.append(dict(pairs))))]

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append((prompts, sampling_params, use_tqdm))
        return [SimpleNamespace(outputs=[self.output(*self.writes[i % len(self.writes)])]) for i in range(len(prompts))]

    @staticmethod
    def output(tokens, reason):
        logprobs = [{token: SimpleNamespace(logprob=-0.25 * (t + 1))} for t, token in enumerate(tokens)]
        return SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs, finish_reason=reason)


@pytest.fixture
def engine(monkeypatch):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, lambda **settings: settings
    fake.TokensPrompt = lambda **prompt: prompt
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    Engine.writes = [([6, 7, 1], "stop"), ([6, 10], "stop"), ([6, 6, 6, 6], "length")]
    return Engine


def test_without_vllm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        choose_generator(model("qwen3"), "vllm")


def test_what_vllm_is_asked(engine, monkeypatch):
    policy = model("qwen3")
    policy.eos_ids = (1, 8)
    draw = choose_generator(policy, "vllm")
    assert isinstance(draw, VLLMGenerator) and draw.engine is None  # nothing starts before it is needed
    sampling = Sampling(0.7, top_k=5, top_p=0.9, min_p=0.05, max_completion_length=4, stop_strings=("7", "9"))
    rows = draw.generate([[5, 6], []], 2, sampling, seed=3, step=1, data_index=[8, 9])
    options = Engine.made.options
    assert {**options, "model": ""} == {
        "model": "",
        "load_format": "dummy",
        "dtype": "float32",
        "max_model_len": 160,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
    }
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(Engine.made.folder)
    reset, (prompts, settings, bar) = Engine.made.calls
    assert reset == "reset" and bar is False
    assert prompts == [{"prompt_token_ids": ids} for ids in ([5, 6], [5, 6], [policy.start_id], [policy.start_id])]
    assert [one["seed"] for one in settings] == rows.row.tolist() and len(rows.row.unique()) == 4
    assert {**settings[0], "seed": 0} == {
        "n": 1,
        "seed": 0,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "max_tokens": 4,
        "stop": ["7", "9"],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "stop_token_ids": [1, 8],
        "skip_special_tokens": False,
        "detokenize": True,
        "logprobs": 0,
    }
    plain = Sampling(max_completion_length=4)
    draw.generate([[5]], 1, plain, seed=0)
    last = Engine.made.calls[-1][1][0]
    assert (last["top_k"], last["top_p"], last["min_p"], last["stop"], last["detokenize"]) == (0, 1.0, 0.0, [], False)


def test_rows_are_what_the_answers_say(engine):
    policy = model("qwen3")
    policy.eos_ids = (1, 8)
    engine.writes.append(([6, 10, 7, 7], "length"))  # vLLM may have written on behind a stop string
    sampling = Sampling(max_completion_length=4, stop_strings=("7",))
    rows = VLLMGenerator(policy).generate([[5, 6], [9]], 2, sampling, seed=0, data_index=[8, 9])
    assert completions(rows) == [[6, 7, 1], [6, 10], [6, 6, 6, 6], [6, 10]]
    assert rows.stop.tolist() == [Stop.EOS, Stop.STOP_STRING, Stop.LENGTH, Stop.STOP_STRING]
    wanted = [[-0.25, -0.5, -0.75, 0.0], [-0.25, -0.5, 0.0, 0.0], [-0.25, -0.5, -0.75, -1.0], [-0.25, -0.5, 0.0, 0.0]]
    assert rows.logp["behaviour"].tolist() == wanted
    assert rows.group.tolist() == [0, 0, 1, 1] and rows.data_index.tolist() == [8, 8, 9, 9]
    assert [ids[mask].tolist() for ids, mask in zip(rows.prompt_ids, rows.prompt_mask, strict=True)] == [
        [5, 6],
        [5, 6],
        [9],
        [9],
    ]


def test_the_weights_are_those_of_the_model_at_each_call(engine):
    policy = model("qwen3")
    draw, sampling = VLLMGenerator(policy, gpu_memory_utilization=0.3), Sampling(max_completion_length=4)
    draw.generate([[5]], 1, sampling, seed=0)
    loaded = Engine.made.loaded
    assert Engine.made.options["gpu_memory_utilization"] == 0.3
    assert set(loaded[0]) == {name for name, _ in policy.module.named_parameters()}
    before = loaded[0]["model.norm.weight"].clone()
    with torch.no_grad():
        policy.module.model.norm.weight.add_(1.0)
    draw.generate([[5]], 1, sampling, seed=0)
    assert len(loaded) == 2 and Engine.made.calls.count("reset") == 2
    torch.testing.assert_close(loaded[1]["model.norm.weight"], before + 1)
    assert not any(value.requires_grad for value in loaded[1].values())
    still = VLLMGenerator(policy, live=False)
    still.generate([[5]], 1, sampling, seed=0)
    still.generate([[5]], 1, sampling, seed=0)
    assert len(Engine.made.loaded) == 1
    still.sync()
    assert len(Engine.made.loaded) == 2


def test_adapters_are_merged_into_the_weights(engine, tmp_path):
    save(model("qwen2"), tmp_path)
    policy = load(tmp_path, lora=LoRA(2))
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.fill_(0.1)
    VLLMGenerator(policy).sync()
    (loaded,) = Engine.made.loaded
    assert set(loaded) == {name for name, _ in model("qwen2").module.named_parameters()}
    name = "model.layers.0.self_attn.q_proj.weight"
    change = loaded[name] - dict(model("qwen2").module.named_parameters())[name]
    scale = next(iter(policy.module.peft_config.values()))
    torch.testing.assert_close(change, torch.full_like(change, 2 * 0.01 * scale.lora_alpha / scale.r))


@pytest.mark.skipif(not HERE, reason="needs vLLM and a GPU")
def test_vllm_itself_draws_from_the_model():
    policy = model("qwen2")
    policy.module.to("cuda")
    draw = VLLMGenerator(policy, gpu_memory_utilization=0.2, enforce_eager=True)
    sampling = Sampling(temperature=0.8, top_k=9, max_completion_length=12)
    rows = draw.generate(PROMPTS, 4, sampling, seed=0)
    gap = (rows.logp["behaviour"][rows.mask] - recomputed(policy, rows, sampling)).abs()
    assert float(gap.max()) < 1e-2
    again = draw.generate(PROMPTS, 4, sampling, seed=0)
    assert completions(again) == completions(rows)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.1)
    rows = draw.generate(PROMPTS, 4, sampling, seed=0)
    gap = (rows.logp["behaviour"][rows.mask] - recomputed(policy, rows, sampling)).abs()
    assert float(gap.max()) < 1e-2
