"""Reward models in the format of transformers: a body and a linear head of one number, read at a text's last token.

reward_model/    as AutoModelForSequenceClassification reads it: weights (safetensors), tokenizer, num_labels = 1
  keel.json      how texts become tokens, and mean and deviation of the scores on samples of the policy it began with
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.errors import ConfigError, UserError
from keel.models.language import LanguageModel, transformer
from keel.models.load import _check_folder, _explained, _on_hub, _quiet, _transformers, best_device, merged

FOLDER = "reward_model"
FACTS = "keel.json"
TOKENS = 8192  # of one forward pass, padding included
Messages = str | list[dict[str, Any]]


class TextScorer:
    """A sequence classifier with one output, and the texts that it reads.

    Args:
        module: of transformers, num_labels = 1.
        tokenizer: its tokenizer.
        facts: what `keel.json` says; empty for a model of another trainer.
        name: for messages.
        max_tokens: of one forward pass.
    """

    def __init__(self, module: Any, tokenizer: Any, facts: dict[str, Any], name: str, max_tokens: int = TOKENS):
        self.module, self.tokenizer = module.eval().requires_grad_(False), tokenizer
        self.facts, self.name, self.max_tokens = facts, name, max_tokens
        config = module.config.get_text_config()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:  # without it no two texts can be scored together
            config.pad_token_id = tokenizer.pad_token_id
        self.pad_id: int = 0 if config.pad_token_id is None else config.pad_token_id

    @property
    def context_length(self) -> int | None:
        """Tokens that fit; None without a limit."""
        own = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        return own if isinstance(own, int) and own > 0 else None

    def tokens(self, prompt: Messages, completion: Messages) -> list[int]:
        """Tokens of a prompt with a completion, no end token behind them; too long ones lose their beginning.

        A model that Keel has trained reads both as the policy did: apart, the prompt through the chat template where it
        is messages. Any other reads one text, or all messages through the template.

        Raises:
            UserError: messages for a tokenizer without a chat template.
        """
        own = self.facts.get("tokens") == "apart"
        said = completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
        if isinstance(prompt, str) and own:
            ids = [*self.tokenizer(prompt).input_ids, *self._plain(said)]
        elif isinstance(prompt, str):
            ids = list(self.tokenizer(prompt + said).input_ids)
        elif own:
            ids = [*self._plain(self._shown(list(prompt), True)), *self._plain(said)]
        else:
            ids = self._plain(self._shown([*prompt, {"role": "assistant", "content": said}], False))
        return ids[-self.context_length :] if self.context_length else ids

    def scores(self, texts: Sequence[tuple[Messages, Messages]]) -> Float[Tensor, "B"]:
        """The score of each prompt with its completion, in fp32 on the CPU, long ones first in batches."""
        return self.scores_of([self.tokens(prompt, completion) for prompt, completion in texts])

    @torch.no_grad()
    def scores_of(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "B"]:
        """The score of each sequence of tokens.

        Raises:
            UserError: one without tokens.
        """
        if not all(ids):
            raise UserError("a text without tokens has no score", self.name, "Leave it out.")
        out = torch.zeros(len(ids))
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        while order:
            take = max(1, self.max_tokens // len(ids[order[0]]))
            some, order = order[:take], order[take:]
            out[some] = self._forward([list(ids[i]) for i in some])
        return out

    def _forward(self, ids: list[list[int]]) -> Float[Tensor, "n"]:
        width = max(map(len, ids))
        device = next(self.module.parameters()).device
        padded = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in ids], device=device)
        seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        return self.module(input_ids=padded, attention_mask=seen).logits[:, 0].float().cpu()

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _shown(self, messages: list[dict[str, Any]], more: bool) -> str:
        if not self.tokenizer.chat_template:
            what = "the prompts are messages, and the tokenizer of this reward model has no chat template"
            raise UserError(what, self.name, "Give plain text prompts, or another reward model.")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more))


# -- loading -----------------------------------------------------------------------------------------------------------


def find_reward_model(path: str | Path) -> Path | None:
    """The folder of the reward model that `path` names, a run's or its own; None if there is no such folder.

    Raises:
        ConfigError: a file, or a run that holds no reward model.
    """
    place = Path(path).expanduser()
    if place.is_file():
        raise ConfigError("this is a file, not the folder of a reward model", str(path), "Give the folder.")
    if not place.is_dir():
        return None
    if (place / FOLDER).is_dir():
        return place / FOLDER
    if (place / "config.yaml").is_file():
        fix = "A run of a reward recipe, such as bradley_terry, writes one when it ends."
        raise ConfigError("this run holds no reward model", str(path), fix)
    return place


def load_reward_model(path: str | Path, device: str | None = None, max_tokens: int = TOKENS) -> TextScorer:
    """A reward model of a run's folder, a folder, or the hub: any sequence classifier with num_labels = 1.

    Raises:
        ConfigError: no such folder, or a model of another kind.
        UserError: its files cannot be read, or hold no safetensors weights.
    """
    place = find_reward_model(path)
    name = str(place or path)
    if place is None and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        fix = "Give a run's folder, a folder with a sequence classifier, or a hub name."
        raise ConfigError("there is no such folder", name, fix)
    if place is not None:
        _check_folder(place)
    library = _transformers()
    options: dict[str, Any] = {"trust_remote_code": False}
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            options["local_files_only"] = place is not None or not _on_hub(name)
            config = library.AutoConfig.from_pretrained(name, **options)
            _check_kind(config, name)
            tokenizer = library.AutoTokenizer.from_pretrained(name, **options)
            module, report = library.AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, dtype="auto", **options
            )
        except UserError:
            raise
        except Exception as error:
            raise _explained(error, name, place is not None) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(f"the weights lack {missing}: this is no reward model", name, "Give one with a score head.")
    return TextScorer(module.to(device or best_device()), tokenizer, read_facts(place), name, max_tokens)


def _check_kind(config: Any, name: str) -> None:
    kinds = getattr(config, "architectures", None) or []
    if kinds and not any("SequenceClassification" in kind for kind in kinds):
        fix = "Train one with `keel train bradley_terry`, or give a model for sequence classification."
        raise ConfigError(f"{kinds[0]} is no reward model", name, fix)
    if config.num_labels != 1:
        raise ConfigError(
            f"a reward model has one output, and this classifier has num_labels={config.num_labels}",
            name,
            "Give a model that was trained with num_labels=1.",
        )


def read_facts(place: Path | None) -> dict[str, Any]:
    """What `keel.json` of a reward model's folder says; nothing where there is none.

    Raises:
        UserError: it cannot be read.
    """
    if place is None or not (place / FACTS).is_file():
        return {}
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        return {str(key): value for key, value in facts.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot be read: {error}", str(place / FACTS), "Write the reward model anew.") from error


def write_constants(path: str | Path, scores: Float[Tensor, "n"]) -> tuple[float, float]:
    """Mean and deviation of given scores, as the frozen constants of a reward model's folder.

        standardised score = (score - mean) / std

    Args:
        path: a run's folder, or a reward model's.
        scores: of samples of the policy that training will begin with, all of one model.

    Raises:
        ConfigError: no such folder.
        ValueError: fewer than two scores, or equal ones.
    """
    place = find_reward_model(path)
    if place is None:
        raise ConfigError("there is no such folder", str(path), "Copy the model here first.")
    if len(scores) < 2 or not float(scores.std()) > 0:
        raise ValueError("the scores of samples must differ, for a deviation to divide by")
    mean, std = float(scores.double().mean()), float(scores.double().std(correction=0))
    facts = read_facts(place) | {"mean": mean, "std": std, "samples": len(scores)}
    (place / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return mean, std


# -- saving ------------------------------------------------------------------------------------------------------------


def classifier_of(model: LanguageModel) -> Any:
    """The sequence classifier of a causal model's architecture, num_labels = 1, without weights.

    Raises:
        UserError: transformers has none whose head is one linear layer.
    """
    library = _transformers()
    config = type(model.transformer.config).from_dict(model.transformer.config.to_dict())
    config.num_labels = 1
    text = config.get_text_config()
    text.pad_token_id = model.pad_id
    config.architectures = None
    try:
        with torch.device("meta"):
            found = library.AutoModelForSequenceClassification.from_config(config)
    except (ValueError, AttributeError) as error:
        what = f"transformers has no sequence classifier for {model.architecture}, so it makes no reward model"
        raise UserError(what, "model", "Take another architecture, such as Llama or Qwen.") from error
    if len(_own_weights(found)) != 1:
        what = f"the head of {type(found).__name__} is no single linear layer without a bias"
        raise UserError(what, "model", "Take another architecture, such as Llama or Qwen.")
    return found


def save_reward_model(
    model: LanguageModel, weight: Float[Tensor, "D"], path: str | Path, facts: dict[str, Any] | None = None
) -> Path:
    """Write a policy's body and the weights of a score head, adapters merged, for `from_pretrained`.

    The folder is written under another name and renamed, so that it is whole or not there.

    Args:
        model: whose states the head reads.
        weight: w of r = w h.
        path: the folder.
        facts: for `keel.json`.

    Raises:
        UserError: transformers has no such classifier for this architecture.
    """
    final = Path(path)
    plain: Any = merged(model)
    outer = classifier_of(model)
    (name,) = _own_weights(outer)
    prefix = outer.base_model_prefix
    state = {f"{prefix}.{key}": value for key, value in transformer(plain).base_model.state_dict().items()}
    body = next(iter(transformer(plain).base_model.parameters()))
    state[name] = weight.detach()[None].to(body)
    outer.config.dtype = body.dtype
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with _quiet():
        outer.save_pretrained(temporary, state_dict={k: v.contiguous() for k, v in state.items()})
    side, model.tokenizer.padding_side = model.tokenizer.padding_side, "right"
    try:
        model.tokenizer.save_pretrained(temporary)
    finally:
        model.tokenizer.padding_side = side
    (temporary / FACTS).write_text(json.dumps({"tokens": "apart", **(facts or {})}, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def _own_weights(outer: nn.Module) -> list[str]:
    """Names of the weights outside the body; that of a score head is [1, D]."""
    prefix = str(getattr(outer, "base_model_prefix", ""))
    return [name for name in outer.state_dict() if not name.startswith(f"{prefix}.")]


def constants_of(facts: dict[str, Any]) -> tuple[float, float] | None:
    """(mean, std) of `keel.json`, None where there are none."""
    mean, std = facts.get("mean"), facts.get("std")
    if not isinstance(mean, (int, float)) or not isinstance(std, (int, float)):
        return None
    return (float(mean), float(std)) if math.isfinite(mean) and std > 0 else None
