"""Loading, saving, freezing and identifying models."""

import contextlib
import copy
import gc
import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.core.errors import KeelError, UserError
from keel.core.policy import PolicyModel
from keel.models.adapters import AdapterView, LoRA, add_lora
from keel.models.language import LanguageModel, transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    autocast: str | None = None,
    device: str | torch.device | None = None,
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> LanguageModel:
    """A causal LM of any transformers architecture, from a folder, from the hub, or from memory.

    Args:
        name_or_path: folder (of a model, or of a peft adapter), hub name, or a model in memory, which is not copied.
        tokenizer: of a model in memory, or another one for a folder.
        dtype: of the weights, float32, bfloat16, float16, or "auto" for that of the files; in memory it stays.
        autocast: dtype of mixed precision in the forward pass, or None.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is, and leaves a model in memory where it is.
        lora: train a LoRA adapter and freeze the rest.
        gradient_checkpointing: trade time for memory.
        trust_remote_code: run Python code that comes with the model.
        seed: of the adapter's initial weights.

    Raises:
        UserError: nothing there, no safetensors weights, incomplete weights, no network, or no tokenizer.
    """
    _check_tokenizer(tokenizer)
    module: Any = name_or_path
    place = None if device is None else _device(device)
    if isinstance(name_or_path, (str, Path)):
        module, tokenizer = _read(str(name_or_path), tokenizer, dtype, trust_remote_code)
        place = place or best_device()
    tokenizer = tokenizer or _tokenizer_of(module)
    _check_vocabulary(module, tokenizer)
    if lora is not None:
        module = add_lora(module, lora, seed)
    if place is not None:
        module = _move(module, place)
    try:
        return LanguageModel(
            module,
            tokenizer,
            autocast=None if autocast is None else _dtype(autocast),
            gradient_checkpointing=gradient_checkpointing,
        )
    except UserError:
        _check_finite(module)
        raise


class Outline(LanguageModel):
    """A model without its weights: what its configuration and its tokenizer say of tokens, ends and context."""

    def _find_head(self) -> Any:
        return None  # that takes weights


def outline(name: str | Path, tokenizer: Any = None) -> Outline:
    """What is known of a model that runs elsewhere, from the same folder or hub name, without reading its weights.

    Raises:
        UserError: nothing there, no network, or no tokenizer.
    """
    _check_tokenizer(tokenizer)
    path = Path(name).expanduser()
    name, library = str(path) if path.is_dir() else str(name), _transformers()
    with _quiet():
        try:
            if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
                from peft import PeftConfig

                own = (path / "tokenizer_config.json").exists()
                tokenizer = library.AutoTokenizer.from_pretrained(name) if tokenizer is None and own else tokenizer
                return outline(str(PeftConfig.from_pretrained(name).base_model_name_or_path), tokenizer)
            options = {"local_files_only": path.is_dir() or not _on_hub(name), "trust_remote_code": False}
            tokenizer = tokenizer or library.AutoTokenizer.from_pretrained(name, **options)
            with torch.device("meta"):
                module = library.AutoModelForCausalLM.from_config(library.AutoConfig.from_pretrained(name, **options))
            with contextlib.suppress(OSError):  # not every model has generation settings of its own
                module.generation_config = library.GenerationConfig.from_pretrained(
                    name, local_files_only=path.is_dir()
                )
        except KeelError:
            raise
        except Exception as error:
            raise _explained(error, name, path.is_dir()) from error
    return Outline(module, tokenizer)


def save(model: LanguageModel, path: str | Path) -> None:
    """Write weights (safetensors) and tokenizer for `from_pretrained` and `load`; of LoRA the adapter only."""
    module: Any = model.module
    with _quiet():
        if model.adapted:
            module.save_pretrained(path, save_embedding_layers=False)
        else:
            module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)


def merged(model: LanguageModel) -> Any:
    """A plain transformers model with the adapters merged into the weights; without adapters the model itself."""
    return copy.deepcopy(model.module).merge_and_unload() if model.adapted else model.transformer  # type: ignore[operator]


def reference(model: PolicyModel) -> PolicyModel:
    """A frozen copy of the model as it is now; of a model with LoRA its adapter-free base, without a copy."""
    if isinstance(model, LanguageModel) and model.adapted:
        return AdapterView(model)
    return frozen_copy(model)


def frozen_copy(model: PolicyModel) -> PolicyModel:
    """A copy without gradients, in evaluation mode; of a model with adapters it shares what is not trained."""
    if isinstance(model, LanguageModel):
        shared = [p for p in model.module.parameters() if not p.requires_grad] if model.adapted else []
        new: Any = model.copy(share=shared)
    else:
        new = copy.deepcopy(model)
    new.module.requires_grad_(False).eval()
    return new


def checksum(module: nn.Module, adapters: bool = True) -> str:
    """Hash of names, dtypes, shapes and bytes of the parameters, in the order of their names.

    Args:
        module: any; tied parameters count once.
        adapters: with False the adapters are left out, and the hash is that of the model before it had any.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(_parameters(module, adapters).items()):
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def best_device() -> torch.device:
    """CUDA, MPS or CPU, the first there is."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def out_of_memory(error: BaseException, doing: str = "update") -> KeelError:
    """What to tell a user whose memory ran out.

    Args:
        error: the original one.
        doing: "update" (forward and backward), "rollout" (generation), or "load".
    """
    fixes = {
        "update": "Lower train.max_tokens (tokens of one micro-batch); then set model.gradient_checkpointing=true, "
        "model.dtype=bfloat16, or model.lora.",
        "rollout": "Lower rollout.num_prompts, rollout.num_generations or max_completion_length.",
        "load": "Set model.dtype=bfloat16, take model.device=cpu, or a smaller model.",
    }
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"memory ran out ({first})", doing, fixes.get(doing, fixes["update"]))


def _transformers() -> Any:
    """The library, imported when the first model is read: most mistakes are answered before these seconds."""
    if "transformers.models.auto.modeling_auto" not in sys.modules:
        with _uncollected():
            for module in ("modeling_utils", "generation.utils", "models.auto.modeling_auto"):
                importlib.import_module(f"transformers.{module}")
    return importlib.import_module("transformers")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: what an import makes stays, and walking through it again and again takes a fifth
    of its time. Freezing and unfreezing makes all objects old ones, which are not walked through soon.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():  # somebody else's stay frozen
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _read(name: str, tokenizer: Any, dtype: str, trust: bool) -> tuple[nn.Module, Any]:
    path = Path(name).expanduser()
    if path.is_dir():
        name = str(path)
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            return _read_adapter(path, tokenizer, dtype, trust)
        _check_folder(path)
    elif path.exists():
        raise UserError("this is a file, not a folder", name, "Give the folder that holds config.json.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError("this path does not exist", name, "Give a folder with config.json, or a hub name.")
    library = _transformers()
    options: dict[str, Any] = {"trust_remote_code": trust}
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            options["local_files_only"] = path.is_dir() or not _on_hub(name)
            tokenizer = tokenizer or library.AutoTokenizer.from_pretrained(name, **options)
            options["dtype"] = dtype if dtype == "auto" else _dtype(dtype)
            module, report = library.AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:
            raise _explained(error, name, path.is_dir()) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"the weights lack {missing} ...", name, "Give the model with its language-model head.")
    return module, tokenizer


def _read_adapter(path: Path, tokenizer: Any, dtype: str, trust: bool) -> tuple[nn.Module, Any]:
    from peft import PeftConfig, PeftModel  # slow to import, and most models have no adapter

    _check_pickles(path, "adapter_model.safetensors")  # without that file peft would unpickle another
    with _quiet():
        try:
            base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
            if tokenizer is None and (path / "tokenizer_config.json").exists():
                tokenizer = _transformers().AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust)
        except Exception as error:
            raise _explained(error, str(path), local=True) from error
    if not base:
        raise UserError("the adapter does not say whose it is", str(path), "Load its model, then wrap it with peft.")
    module, tokenizer = _read(base, tokenizer, dtype, trust)
    with _quiet():
        try:
            return PeftModel.from_pretrained(module, str(path), is_trainable=True, use_safetensors=True), tokenizer
        except Exception as error:
            raise _explained(error, str(path), local=True) from error


def _check_folder(path: Path) -> None:
    if not (path / "config.json").exists():
        raise UserError("this folder holds no config.json", str(path), "Give a folder written by save_pretrained.")
    _check_pickles(path, "*.safetensors")


def _check_pickles(path: Path, weights: str) -> None:
    """Refuse a folder without safetensors weights; where there are both, the pickled ones are not looked at."""
    if any(path.glob(weights)):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(
            "the weights are pickled, and unpickling runs code; Keel reads safetensors only",
            str(path),
            "Convert them: load the model in a place that you trust and call save_pretrained.",
        )
    raise UserError("there are no safetensors weights in this folder", str(path))


def _on_hub(name: str) -> bool:
    """Whether the hub answers for this name; one quick question instead of the many tries of each download."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, timeout=10)
        return True
    except (HfHubHTTPError, HFValidationError):  # it answers: there is no such model, or no access
        raise
    except Exception:  # no network, by whatever library
        return False


def _explained(error: Exception, name: str, local: bool) -> KeelError:
    """What an exception of transformers means to a user."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return out_of_memory(error, "load")
    if "trust_remote_code" in text:
        return UserError("this model brings Python code of its own", name, "Run it with model.trust_remote_code=true.")
    if local:
        return UserError(f"the model cannot be read: {text[:400]}", name)
    if "safetensors" in text:
        return UserError("the hub has no safetensors weights of this model", name, "Choose a revision that has them.")
    reason = "there is no such folder, and the hub did not give a model of this name"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        reason = "there is no such folder, HF_HUB_OFFLINE is set, and the cache holds no model of this name"
    elif not isinstance(error, (HfHubHTTPError, HFValidationError)):
        reason = "there is no such folder, the hub cannot be reached, and the cache holds no model of this name"
    return UserError(
        f"{reason} ({text[:160]})",
        name,
        "Check the name; without a network, give the path of a downloaded model, or set HF_HOME to a cache with it.",
    )


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None or (callable(tokenizer) and hasattr(tokenizer, "decode") and hasattr(tokenizer, "__len__")):
        return
    fix = "Give a tokenizer of transformers: AutoTokenizer.from_pretrained(...)."
    raise UserError(f"{tokenizer!r:.60} is no tokenizer but of type {type(tokenizer).__name__}", "tokenizer", fix)


def _tokenizer_of(module: Any) -> Any:
    name = getattr(transformer(module).config, "_name_or_path", "")
    if not name:
        raise UserError("a model in memory needs its tokenizer", "tokenizer", "Pass tokenizer=...")
    try:
        # False, because without it transformers asks on the terminal whether to run the code of a stranger
        return _transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer was found at {name}", "tokenizer", "Pass tokenizer=...") from error


def _check_vocabulary(module: Any, tokenizer: Any) -> None:
    rows = transformer(module).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings",
            "tokenizer",
            "Call model.resize_token_embeddings(len(tokenizer)), or take the model's own tokenizer.",
        )


def _check_finite(module: nn.Module) -> None:
    """Weights that are no numbers break every test of a model; they are named rather than what they break."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"the weight {name} is not finite", "model", "Take a checkpoint from before it diverged.")


def _device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        fix = "Give cpu, cuda, cuda:1 or mps, or nothing for the best there is."
        raise UserError(f"'{name}' is no device", "model.device", fix) from error


def _move(module: Any, place: torch.device) -> Any:
    try:
        return module.to(place)
    except (RuntimeError, AssertionError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, "load") from error
        raise UserError(f"device '{place}' cannot be used: {error}", "model.device", "See `keel doctor`.") from error


def _parameters(module: nn.Module, adapters: bool) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(module.named_parameters())
    if adapters or not hasattr(module, "peft_config"):
        return named
    own = ("lora_", "modules_to_save.", "trainable_tokens_")
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in named.items()
        if not any(sign in name for sign in own)
    }


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"unknown dtype '{name}'", "model.dtype", f"One of {', '.join(DTYPES)}.")
    return DTYPES[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers, and what it and peft have to settle between them."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
