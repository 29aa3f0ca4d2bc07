"""Reward models: the folder that transformers reads, the scores that it gives, and the mistakes that are answered."""

import pytest
import torch

from keel.core.errors import ConfigError, UserError
from keel.models.heads import RewardHead
from keel.models.language import LanguageModel
from keel.models.reward_model import load_reward_model, read_facts, save_reward_model, write_constants
from keel.models.tiny import TinyConfig, build_tiny, character_tokenizer
from keel.statistics.engine import Engine
from keel.statistics.functionals import Value
from keel.tasks.task import Example
from keel.train.encode import Encoder, supervised_rows

ALPHABET = "0123456789+= "
TEXTS = [("1+2=", "3"), ("12+13=", "25"), ("5 5", ""), ("7", "7777777777")]


def other(kind: str) -> LanguageModel:
    """A small model of another architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer(ALPHABET)
    known = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None}
    if kind == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token  # no padding token of its own
        return LanguageModel(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **known)), tokenizer)
    shape = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **known)
    return LanguageModel(LlamaForCausalLM(shape), tokenizer)


def small() -> LanguageModel:
    return build_tiny(ALPHABET, TinyConfig(dim=16, layers=1, heads=2, feed_forward=32))


@pytest.mark.parametrize("kind", ["tiny", "gpt2", "llama"])
def test_transformers_gives_the_scores_of_training(kind, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = small() if kind == "tiny" else other(kind)
    head = RewardHead(0.5).build(model, 3)
    rows, _ = supervised_rows([Example(p, {}, i) for i, (p, _) in enumerate(TEXTS)], [c for _, c in TEXTS],
                              Encoder(model), None, 0, 0)  # fmt: skip
    value = Value("reward", where="last")
    trained = Engine({"policy": model}, {"reward": head}).measure([value], rows)[value]
    assert float(trained.std()) > 1e-2
    folder = save_reward_model(model, head.weight, tmp_path / "reward_model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == model.pad_id
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side in ("right", "left") if kind == "llama" else ("right",):
        batch = tokenizer([p + c for p, c in TEXTS], return_tensors="pt", padding=True, padding_side=side)
        with torch.no_grad():
            found = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        torch.testing.assert_close(found, trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(load_reward_model(tmp_path).scores(TEXTS), trained, atol=1e-5, rtol=0)


def test_batches_and_their_order_change_nothing(tmp_path):
    model = small()
    folder = save_reward_model(model, RewardHead(0.5).build(model, 0).weight, tmp_path / "reward_model")
    scorer = load_reward_model(folder)
    together = scorer.scores(TEXTS)
    scorer.max_tokens = 1  # each by itself
    torch.testing.assert_close(scorer.scores(TEXTS), together, atol=1e-6, rtol=0)
    torch.testing.assert_close(scorer.scores(TEXTS[::-1]).flip(0), together, atol=1e-6, rtol=0)


def test_a_long_text_loses_its_beginning(tmp_path):
    model = build_tiny(ALPHABET, TinyConfig(dim=16, layers=1, heads=2, feed_forward=32, context=8))
    folder = save_reward_model(model, RewardHead(0.5).build(model, 0).weight, tmp_path / "reward_model")
    scorer = load_reward_model(folder)
    assert torch.equal(scorer.scores([("9" * 20, "12345678")]), scorer.scores([("0", "12345678")]))


def test_messages_go_through_the_chat_template_as_in_training(tmp_path):
    model = small()
    folder = save_reward_model(model, RewardHead(0.5).build(model, 0).weight, tmp_path / "reward_model")
    scorer = load_reward_model(folder)
    messages = [{"role": "user", "content": "1+2="}]
    encoder = Encoder(model)
    wanted = [*encoder.prompt(messages), *encoder.completion("3")[:-1]]  # without the end token
    assert scorer.tokens(messages, [{"role": "assistant", "content": "3"}]) == wanted
    scorer.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        scorer.tokens(messages, "3")


def test_adapters_are_merged(tmp_path):
    from keel.models.adapters import LoRA
    from keel.models.load import load

    plain = small()
    model = load(plain.module, plain.tokenizer, lora=LoRA(rank=2, alpha=4.0))
    with torch.no_grad():
        for parameter in model.trainable():
            parameter += 0.1
    head = RewardHead(0.5).build(model, 0)
    rows, _ = supervised_rows([Example("1+2=", {}, 0)], ["3"], Encoder(model), None, 0, 0)
    value = Value("reward", where="last")
    trained = Engine({"policy": model}, {"reward": head}).measure([value], rows)[value]
    save_reward_model(model, head.weight, tmp_path / "reward_model")
    torch.testing.assert_close(load_reward_model(tmp_path).scores([("1+2=", "3")]), trained, atol=1e-5, rtol=0)


def test_constants_are_frozen_beside_the_model(tmp_path):
    model = small()
    folder = save_reward_model(model, RewardHead().build(model, 0).weight, tmp_path / "reward_model")
    assert write_constants(tmp_path, torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    assert read_facts(folder) == {"tokens": "apart", "mean": 2.0, "std": 1.0, "samples": 2}
    with pytest.raises(ValueError, match="must differ"):
        write_constants(tmp_path, torch.tensor([1.0, 1.0]))


def test_what_is_no_reward_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from keel.models.load import save

    shape = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    shape.num_labels = 3
    LlamaForSequenceClassification(shape).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match="num_labels=3"):
        load_reward_model(tmp_path / "three")
    save(small(), tmp_path / "policy")
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM is no reward model"):
        load_reward_model(tmp_path / "policy")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file, not the folder"):
        load_reward_model(tmp_path / "file")
    with pytest.raises(ConfigError, match="no such folder"):
        load_reward_model(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match="this run holds no reward model"):
        load_reward_model(tmp_path / "run")


def test_heads_of_other_seeds_differ():
    model = small()
    one, other_ = (RewardHead().build(model, seed).weight for seed in (0, 1))
    assert not torch.equal(one, other_) and abs(float(one.detach().std()) - 0.02) < 0.01
    with pytest.raises(ValueError, match="std"):
        RewardHead(0.0)
