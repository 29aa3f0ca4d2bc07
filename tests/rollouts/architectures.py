"""Small random models of several architectures, with one character tokenizer."""

import torch
import transformers

from keel.models.language import LanguageModel
from keel.models.tiny import character_tokenizer

CHARACTERS = "0123456789+-*/=()> ?"
SHAPE = {
    "vocab_size": 26,  # more rows than the tokenizer has tokens
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 26, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160, "initializer_range": 0.3}
MAKE = {
    "llama": ("Llama", SHAPE),
    "llama_bias_rope": ("Llama", {**SHAPE, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**SHAPE, "sliding_window": None}),
    "qwen2": ("Qwen2", SHAPE),
    "qwen3": ("Qwen3", {**SHAPE, "head_dim": 16}),
    "mistral_window": ("Mistral", {**SHAPE, "sliding_window": 6}),
    "gemma2": ("Gemma2", {**SHAPE, "head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 5.0}),
    "granite": ("Granite", {**SHAPE, "logits_scaling": 4.0}),
    "cohere": ("Cohere", {**SHAPE, "logit_scale": 0.25}),
    "gpt2": ("GPT2", {**GPT2, "bos_token_id": None, "eos_token_id": None}),
    "mamba": ("Mamba", {"vocab_size": 26, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
OWN = ("llama", "llama_bias_rope", "mistral", "qwen2", "qwen3")
CACHED = ("mistral_window", "gemma2", "gpt2")


def module(name: str, seed: int = 0) -> torch.nn.Module:
    """A transformers model whose norms and biases are random too, so that none of them can be forgotten unseen."""
    family, settings = MAKE[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = kind(config)
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def model(name: str, seed: int = 0, **options) -> LanguageModel:
    """The same as a LanguageModel."""
    return LanguageModel(module(name, seed), character_tokenizer(CHARACTERS), **options)
