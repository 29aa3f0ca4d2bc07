"""A language model as a policy: its states give the logits of the module itself, however the rows are padded."""

import pytest
import torch
from tests.rollouts.architectures import CHARACTERS, MAKE, model, module
from torch import nn

from keel.core.errors import UserError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.models.tiny import SMALL, build_tiny, character_tokenizer


def ragged(seed: int = 0, vocabulary: int = 23) -> Rows:
    """Prompts of lengths 5, 2, 0, 3 and completions of lengths 4, 1, 3, 0, the fourth with a hole (tool output)."""
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.tensor([5, 2, 0, 3])
    ids = torch.randint(3, vocabulary, (4, 5), generator=draw)
    tokens = torch.randint(3, vocabulary, (4, 4), generator=draw)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    return Rows.build(ids, torch.arange(5) >= 5 - prompt[:, None], tokens, mask)


def logits_of(policy: LanguageModel, rows: Rows) -> torch.Tensor:
    """[B, T, V], from states and head."""
    with torch.no_grad():
        hidden = policy.hidden(rows)
        return policy.head.logits(hidden.flatten(0, 1)).view(*rows.tokens.shape, -1)


@pytest.mark.parametrize("name", list(MAKE))
def test_states_give_the_logits_of_each_sequence_alone(name):
    policy = model(name)
    rows = ragged()
    logits = logits_of(policy, rows)
    assert logits.isfinite().all()
    for i in range(len(rows)):
        prompt = (
            rows.prompt_ids[i][rows.prompt_mask[i]] if rows.prompt_mask[i].any() else torch.tensor([policy.start_id])
        )
        sequence = torch.cat([prompt, rows.tokens[i]])[None]
        with torch.no_grad():
            alone = policy.module(input_ids=sequence).logits[0, len(prompt) - 1 : -1]
        present = rows.present[i]
        torch.testing.assert_close(logits[i][present], alone[present], rtol=1e-4, atol=1e-4)


def test_padding_of_the_batch_changes_nothing():
    policy = model("qwen3")
    rows = ragged()
    with torch.no_grad():
        plain, padded = policy.hidden(rows), policy.hidden(rows.padded(11, 9))
    torch.testing.assert_close(padded[:, :4][rows.present], plain[rows.present], rtol=1e-5, atol=1e-6)


def test_no_prompt_columns_at_all_count_as_the_start_token():
    policy = model("llama")
    tokens = torch.tensor([[4, 5, 6]])
    empty = torch.zeros(1, 0, dtype=torch.long)
    rows = Rows.build(empty, empty.bool(), tokens, torch.ones(1, 3, dtype=torch.bool))
    given = Rows.build(torch.tensor([[policy.start_id]]), torch.ones(1, 1, dtype=torch.bool), tokens, rows.mask)
    with torch.no_grad():
        torch.testing.assert_close(policy.hidden(rows), policy.hidden(given))


def test_gradient_of_padded_rows_is_that_of_each_alone():
    policy = model("qwen3")
    rows = ragged()

    def gradient(batches):
        policy.module.zero_grad()
        for batch in batches:
            (policy.hidden(batch)[batch.mask].square()).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])

    together = gradient([rows])
    apart = gradient([rows.select(torch.tensor([i])) for i in range(len(rows))])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_scaled_and_capped_heads_are_found(name):
    head = model(name).head
    expected = {"granite": (0.25, None), "cohere": (0.25, None), "gemma2": (1.0, 5.0)}
    assert (head.scale, head.softcap) == expected[name]


def test_a_head_that_is_not_linear_is_refused():
    bent = module("llama")
    inner = bent.forward

    def forward(*args, **options):
        out = inner(*args, **options)
        out.logits = out.logits.abs()
        return out

    bent.forward = forward
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        LanguageModel(bent, character_tokenizer(CHARACTERS))


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient_in_less_memory(training):
    saved = {}

    def run(checkpointing):
        policy = model("qwen3", gradient_checkpointing=checkpointing)
        policy.module.train(training)
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            states = policy.hidden(ragged())
        saved[checkpointing] = kept
        states[ragged().mask].square().sum().backward()
        assert not any("forward" in vars(layer) for layer in policy.module.modules())
        return torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])

    torch.testing.assert_close(run(True), run(False))
    assert saved[True] < 0.3 * saved[False]


def test_autocast_runs_in_bf16_and_gives_states_in_the_dtype_of_the_head():
    full = build_tiny(CHARACTERS, SMALL)
    mixed = LanguageModel(full.module, full.tokenizer, autocast=torch.bfloat16)
    rows = ragged()
    with torch.no_grad():
        exact, rounded = full.hidden(rows), mixed.hidden(rows)
    assert rounded.dtype == torch.float32
    gap = (exact - rounded)[rows.mask].abs().max()
    assert 1e-5 < gap < 0.1


def test_a_sequence_beyond_the_context_is_an_error_that_names_the_settings():
    policy = model("gpt2")
    tokens = torch.full((1, 200), 4)
    rows = Rows.build(tokens[:, :1], tokens[:, :1] > 0, tokens, tokens > 0)
    with pytest.raises(UserError, match=r"201 tokens .* context of 160.*max_completion_length"):
        policy.hidden(rows)


def test_a_group_in_one_sequence_may_be_longer_than_the_context():
    policy = model("llama")  # a context of 160
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 23, (1, 40), generator=draw).expand(8, -1)
    tokens = torch.randint(3, 23, (8, 30), generator=draw)
    mask = torch.arange(30) < torch.tensor([30, 30, 20, 10, 30, 5, 30, 29])[:, None]
    rows = Rows.build(prompt, prompt >= 0, tokens, mask, group=torch.zeros(8, dtype=torch.long))
    together = logits_of(policy, rows)
    apart = logits_of(policy, rows.with_(group=torch.arange(8)))
    torch.testing.assert_close(together[mask], apart[mask], rtol=1e-4, atol=1e-4)


def test_end_tokens_come_from_the_tokenizer_and_the_generation_settings():
    made = module("llama")
    made.generation_config.eos_token_id = [7, 9, 99]
    made.generation_config._from_model_config = False
    assert LanguageModel(made, character_tokenizer(CHARACTERS)).eos_ids == (1, 7, 9)  # 99 is outside the vocabulary


def test_a_tokenizer_without_padding_pads_with_its_end_token():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.pad_token = None
    policy = LanguageModel(module("llama"), tokenizer)
    assert policy.pad_id == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_without_an_end_token_there_is_a_warning_that_says_what_to_do():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.pad_token = tokenizer.eos_token = None
    made = module("llama")
    made.generation_config.eos_token_id = None
    with pytest.warns(UserWarning, match="stop_strings"):
        policy = LanguageModel(made, tokenizer)
    assert policy.eos_ids == () and policy.pad_id == 0
