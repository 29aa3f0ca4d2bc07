"""The built-in model: Qwen3 architecture, one token for each character, small enough to train in seconds.

It is saved and loaded in the transformers format, so that the path that serves a hub model serves it too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from keel.core.choice import counter_seed
from keel.core.errors import UserError
from keel.models.language import LanguageModel

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the built-in model; the default has some 0.86 million parameters.

    Args:
        dim: width of the states.
        layers, heads: of the transformer.
        feed_forward: width of the gated feed-forward layers.
        context: tokens at most, prompt and completion together.

    Raises:
        ValueError: `dim` is no even multiple of `heads`.
    """

    dim: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 384
    context: int = 512

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim must be a multiple of twice the heads, not {self.dim} with {self.heads} heads")


SMALL = TinyConfig(dim=64, layers=2, heads=2, feed_forward=128, context=256)


def character_tokenizer(characters: str, context: int = 512) -> Any:
    """A transformers tokenizer with one token for each character, and `<pad>`, `<eos>`, `<unk>` before them.

    Raises:
        UserError: a character occurs twice, or there are none.
    """
    from transformers import PreTrainedTokenizerFast

    if not characters or len(set(characters)) != len(characters):
        raise UserError(f"the alphabet {characters!r} is empty or repeats a character", "tiny")
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny(characters: str, config: TinyConfig | None = None, seed: int = 0) -> LanguageModel:
    """An untrained model over an alphabet; its weights depend on `seed` alone.

    >>> model = build_tiny("0123456789+=", SMALL)
    >>> model.tokenizer.decode(model.tokenizer("1+2=3").input_ids)
    '1+2=3'
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = config or TinyConfig()
    tokenizer = character_tokenizer(characters, config.context)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.dim,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.dim // config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},  # short sequences
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counter_seed(seed, "tiny"))
        module = Qwen3ForCausalLM(shape)
    return LanguageModel(module, tokenizer)
