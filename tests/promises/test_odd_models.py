"""Tokenizers and prompts at their limits."""

import math

import pytest
import torch
from tests.promises.runs import ALPHABET, start
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from keel.core.errors import DataError, UserError
from keel.core.rows import Stop
from keel.models.load import load
from keel.models.tiny import character_tokenizer
from keel.train.checkpoint import checkpoints
from keel.train.encode import Encoder, supervised_rows


def tokenizer(eos=True, pad=True, blank=False):
    """One token for each character; without an end, without padding, or without a token for blanks."""
    from tokenizers import Regex, normalizers

    full = character_tokenizer(ALPHABET, 48)
    inner = full.backend_tokenizer
    if blank:
        inner.normalizer = normalizers.Replace(Regex(r"\s"), "")
    special = {"unk_token": "<unk>"} | ({"eos_token": "<eos>"} if eos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=full.chat_template, **special)


def architecture(vocabulary, eos, pad):
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48,
        tie_word_embeddings=False,
        eos_token_id=1 if eos else None,
        pad_token_id=0 if pad else None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config)


@pytest.fixture
def odd(tmp_path):
    """A folder with such a model."""

    def make(eos=True, pad=True, blank=False, extra=0):
        words = tokenizer(eos, pad, blank)
        folder = tmp_path / f"model-{eos}-{pad}-{extra}"
        architecture(len(words) + extra, eos, pad).save_pretrained(folder)
        words.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("recipe", ["grpo", "sft"])
@pytest.mark.parametrize(("eos", "pad"), [(False, True), (True, False), (False, False)])
def test_without_an_end_or_a_padding_token(odd, tmp_path, recipe, eos, pad):
    folder = odd(eos, pad)
    settings = {"data": [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "33"}]}
    run = start(folder, tmp_path / "runs", recipe, max_steps=2, **(settings if recipe == "sft" else {}))
    assert all(math.isfinite(value) for curve in run.metrics.values() for _, value in curve)
    again = load(run.path / run.summary["checkpoint"])
    assert bool(again.eos_ids) == eos
    if recipe == "grpo" and not eos:
        assert run.metrics["completions/clipped_ratio"][0][1] == 1.0  # nothing but the limit ends a completion
    if recipe == "sft":
        assert run.metrics["completions/mean_length"][0][1] == 1.5 + eos  # the end token is added where there is one


def test_tokens_of_the_model_that_the_tokenizer_lacks(odd, tmp_path):
    """Vocabularies are padded to a round size; such tokens are drawn, shown and stored, and no page breaks on them."""
    from keel.report.run import write_report
    from keel.store.store import Store

    folder = odd(extra=600)
    run = start(folder, tmp_path / "runs", max_steps=1, **{"train.log_completions": 1, "rollout.stop_strings": ("9=",)})
    policy = load(folder)
    size = len(policy.tokenizer)
    with Store(tmp_path / "runs/keel.sqlite", readonly=True) as store:
        kept = store.rollouts(store.run("run").id)
    assert any(len(r.tokens) == 4 and len(r.completion) < 4 for r in kept), "no such token was drawn"
    assert all(isinstance(token, str) for r in kept for token in r.tokens)
    assert write_report(run.path)
    encoder = Encoder(policy)
    assert encoder.decode([size, size + 599]) == ""
    assert encoder.decode([4, size, 5]) == policy.tokenizer.decode([4, 5])


def test_a_decoder_that_breaks_on_unknown_tokens_never_sees_them(odd):
    """As those of sentencepiece do."""
    policy = load(odd(extra=3))

    class Strict:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def decode(self, tokens, **options):
            if any(token >= len(self.inner) for token in tokens):
                raise IndexError("piece id is out of range.")
            return self.inner.decode(tokens, **options)

    size = len(policy.tokenizer)
    policy.tokenizer = Strict(policy.tokenizer)
    assert Encoder(policy).decode([4, size, 5, size + 2]) == "12"


def test_a_prompt_longer_than_the_context_is_named_before_the_first_update(train, tmp_path):
    with pytest.raises(UserError, match=r"prompt of 60 tokens.*do not fit the model's context of 48") as error:
        train(data=[{"prompt": "1" * 60}, {"prompt": "2" * 60}], max_steps=1)
    assert "max_prompt_length" in error.value.fix
    assert not checkpoints(tmp_path / "runs/run")


def test_a_prompt_longer_than_its_limit_loses_its_beginning(train):
    settings = {"data": [{"prompt": "1" * 60 + "+2="}, {"prompt": "3" * 60 + "+4="}], "rollout.max_prompt_length": 5}
    run = train(max_steps=1, reward=lambda prompts, **_: [float(i) for i in range(len(prompts))], **settings)
    assert run.metrics["num_rows"][0][1] == 4.0


def test_given_rows_that_are_too_long_are_cut_and_counted(train, model):
    rows = [
        {"prompt": "1" * 60, "completion": "23"},
        {"prompt": "1+1=", "completion": "2" * 90},
        {"prompt": "1+1=", "completion": "2"},
    ]
    run = train("sft", data=rows, max_steps=1, **{"train.batch_size": 3})
    assert run.metrics["truncated/prompts"][0][1] == 1.0 and run.metrics["truncated/completions"][0][1] == 2.0
    assert math.isfinite(run.metrics["loss"][0][1])


def test_an_empty_completion_learns_the_end(train, odd, tmp_path):
    run = train("sft", data=[{"prompt": "1+1=", "completion": ""}], max_steps=1, **{"train.batch_size": 1})
    assert run.metrics["completions/mean_length"][0][1] == 1.0 and math.isfinite(run.metrics["loss"][0][1])


def test_an_empty_completion_without_an_end_token_is_an_error(odd, tmp_path):
    with pytest.raises(DataError, match="no completion has a token"):
        start(odd(eos=False), tmp_path / "runs", "sft", data=[{"prompt": "1+1=", "completion": ""}], max_steps=1)


def test_a_completion_that_ends_at_once_is_scored_and_counted(train):
    """All completions are empty but for their end token; a reward sees empty texts."""
    seen = []

    def reward(completions, completion_ids, **_):
        seen.append((list(completions), [list(ids) for ids in completion_ids]))
        return [float(i) for i in range(len(completions))]

    import keel.rollouts.decoding as decoding

    with pytest.MonkeyPatch.context() as patch:
        choose = decoding.Chooser.choose
        patch.setattr(
            decoding.Chooser,
            "choose",
            lambda self, logits, alive, position: choose(
                self, logits.index_fill(1, torch.tensor([1]), 1e4), alive, position
            ),
        )
        run = train(reward=reward, max_steps=1)
    assert seen[0] == ([""] * 4, [[1]] * 4)
    assert run.metrics["completions/mean_length"][0][1] == 1.0
    assert run.metrics["completions/clipped_ratio"][0][1] == 0.0
    assert math.isfinite(run.metrics["loss"][0][1])


@pytest.mark.parametrize("prompt", ["", "   ", [], [{"role": "user", "content": ""}]])
@pytest.mark.parametrize("recipe", ["grpo", "sft"])
def test_an_empty_prompt_is_refused_with_the_prompt(odd, tmp_path, prompt, recipe):
    """Some are empty in the data, some only for the tokenizer."""
    with pytest.raises(DataError) as error:
        data = [{"prompt": prompt, "completion": "2"}]
        start(odd(blank=True), tmp_path / "runs", recipe, data=data, max_steps=1)
    assert "empty" in str(error.value) or "no tokens" in str(error.value)


def test_all_groups_tied_move_nothing_and_say_so(train, model):
    run = train(reward=lambda completions, **_: [1.0] * len(completions), max_steps=2)
    assert [v for _, v in run.metrics["frac_reward_zero_std"]] == [1.0, 1.0]
    assert [v for _, v in run.metrics["grad_norm"]] == [0.0, 0.0]
    before, after = load(model).module.state_dict(), run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_groups_tied_with_dynamic_sampling_is_an_error_that_says_why(train):
    from keel.core.errors import TrainingError

    with pytest.raises(TrainingError, match=r"no usable group in 2 rounds.*tied"):
        settings = {"train.dynamic_sampling": True, "train.max_rounds": 2}
        train(reward=lambda completions, **_: [1.0] * len(completions), **settings)


def test_one_prompt_and_one_row(train):
    """One group; and, for a method without groups, one single completion."""
    single = {"data": [{"prompt": "1+1="}], "rollout.num_prompts": 1, "max_steps": 2}
    run = train("grpo", **single)
    assert run.metrics["num_rows"][0][1] == 2.0
    for recipe, settings in {"reinforce": {"num_generations": 1}, "reinforce_pp": {"num_generations": 1}}.items():
        run = train(recipe, name=recipe, **{**single, **settings})
        assert run.metrics["num_rows"][0][1] == 1.0
        assert all(math.isfinite(value) for curve in run.metrics.values() for _, value in curve)
    run = train("sft", name="sft", data=[{"prompt": "1", "completion": "2"}], max_steps=1, **{"train.batch_size": 1})
    assert math.isfinite(run.metrics["loss"][0][1])


@pytest.mark.parametrize("limit", [2, 3, 5, 48, 100])
@pytest.mark.parametrize("completion", ["", "2", "2" * 200])
@pytest.mark.parametrize("prompt", ["1", "1" * 47, "1" * 200])
def test_given_rows_always_fit(model, prompt, completion, limit):
    from keel.tasks.task import Example

    policy = load(model)
    limit = min(limit, policy.context_length)
    rows, cut = supervised_rows([Example(prompt, {}, 0)], [completion], Encoder(policy), limit, 0, 0)
    kept = int(rows.prompt_mask.sum()), int(rows.mask.sum())
    assert sum(kept) <= limit and min(kept) >= 1
    assert (cut.completions or kept[1] == len(completion) + 1) and (cut.prompts or kept[0] == len(prompt))
    assert rows.stop.tolist() == [int(Stop.DATA)]
