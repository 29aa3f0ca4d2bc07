"""The models that are measured: random weights, which cost what trained ones cost."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from keel.models.language import LanguageModel


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with tied embeddings; parameters without the embedding are those of its name."""

    dim: int
    layers: int
    heads: int
    feed_forward: int
    context: int = 512


SHAPES = {
    "1M": Shape(dim=128, layers=4, heads=4, feed_forward=448),
    "10M": Shape(dim=256, layers=10, heads=8, feed_forward=1024),
}


def tokenizer(vocabulary: int, context: int = 512) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... with one token each, and `<pad>`, `<eos>`, `<unk>` before them."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=context,
    )


def build(name: str, vocabulary: int, *, seed: int = 0) -> LanguageModel:
    """A model by the name of its shape."""
    shape = SHAPES[name]
    words = tokenizer(vocabulary, shape.context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocabulary,
                hidden_size=shape.dim,
                intermediate_size=shape.feed_forward,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                head_dim=shape.dim // shape.heads,
                max_position_embeddings=shape.context,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
    return LanguageModel(module, words)
