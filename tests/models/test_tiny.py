"""The built-in model and its tokenizer."""

import pytest
import torch
from transformers import AutoTokenizer

from keel.core.errors import UserError
from keel.models.load import checksum
from keel.models.tiny import SMALL, TinyConfig, build_tiny, character_tokenizer

CHARACTERS = "0123456789+-*/=()> \n<é"


def test_the_default_has_the_stated_size():
    model = build_tiny("0123456789+-*/=()> ")
    assert sum(p.numel() for p in model.module.parameters()) == 856_192
    assert model.module.config.tie_word_embeddings and model.transformer.dtype == torch.float32


def test_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    first = checksum(build_tiny(CHARACTERS, SMALL).module)
    torch.manual_seed(5)
    assert checksum(build_tiny(CHARACTERS, SMALL).module) == first != checksum(build_tiny(CHARACTERS, SMALL, 1).module)
    torch.random.set_rng_state(before)
    build_tiny(CHARACTERS, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("text", ["3 6 17>20=", "  (1+2)*3\n\n<4", "é é", "<pad", ""])
def test_text_comes_back_character_by_character(text, tmp_path):
    tokenizer = character_tokenizer(CHARACTERS + "pad")
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text).input_ids
        assert len(ids) == len(text) and one.decode(ids) == text
        assert one.convert_ids_to_tokens(ids) == list(text)


def test_special_tokens_and_unknown_characters():
    tokenizer = character_tokenizer("01+")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer("1+x0<eos>").input_ids == [4, 5, 2, 3, 1]
    assert tokenizer.decode([4, 5, 1, 0], skip_special_tokens=True) == "1+"
    assert tokenizer(["1", "1+0"], padding=True).input_ids == [[0, 0, 4], [4, 5, 3]]


def test_messages_are_joined():
    tokenizer = character_tokenizer("01+=")
    messages = [{"role": "system", "content": "0"}, {"role": "user", "content": "1+1="}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "01+1="


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="alphabet"):
        character_tokenizer("011")
    with pytest.raises(ValueError, match="multiple"):
        TinyConfig(dim=30, heads=4)
