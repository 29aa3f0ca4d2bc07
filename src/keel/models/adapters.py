"""LoRA through peft, and views of one model with another adapter or with none."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.choice import counter_seed
from keel.core.errors import UserError
from keel.core.policy import Head
from keel.core.rows import Rows
from keel.models.language import LanguageModel


@dataclass(frozen=True)
class LoRA:
    """W + (alpha / rank) B A, with A random and B zero at the start.

    Args:
        rank: of the update.
        alpha: its scale times the rank.
        dropout: on the input of A.
        target_modules: names of the linear layers, or "all-linear" (all but the head).

    Raises:
        ValueError: a rank below 1, or a dropout outside [0, 1).

    Source: "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


def add_lora(module: nn.Module, lora: LoRA, seed: int = 0) -> nn.Module:
    """A peft model around `module`, trainable in its adapter only; the adapter's weights depend on `seed` alone.

    Raises:
        UserError: no layer has a name of `target_modules`.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and most runs have no adapter

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=_has_transposed_layers(module),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        torch.manual_seed(counter_seed(seed, "lora"))
        try:
            return get_peft_model(module, settings)  # type: ignore[arg-type]
        except ValueError as error:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in module.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(str(error), "model.lora.target_modules", f"Linear layers: {', '.join(linear)}.") from error


class AdapterView:
    """A model seen with adapter `name`, or without any (None): no copy, and the model is left as it was.

    Args:
        model: one that carries adapters.
        name: the adapter, or None for the base.

    Raises:
        UserError: the model has no such adapter.
    """

    def __init__(self, model: LanguageModel, name: str | None = None):
        known = list(getattr(model.module, "peft_config", {}))
        if name is not None and name not in known:
            raise UserError(f"there is no adapter '{name}'", "models", f"Adapters: {', '.join(known) or 'none'}.")
        self.model, self.name, self.tokenizer = model, name, model.tokenizer
        head = model.head.module
        base = _base_layer(head)
        if name is not None and base is not head:
            base = _UnderView(self, head)
        self.head = Head(base, model.head.scale, model.head.softcap)

    @property
    def module(self) -> nn.Module:
        """The parameters, those of all adapters included."""
        return self.model.module

    @torch.no_grad()
    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States without gradient; see `LanguageModel.hidden`."""
        with self.active():
            return self.model.hidden(rows)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model with this adapter; `requires_grad` of its parameters is not touched."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers: list[Any] = [
            m for m in self.model.module.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        for layer in layers:
            layer._disable_adapters = self.name is None
            if self.name is not None:
                layer._active_adapter = [self.name]
        try:
            yield
        finally:
            for layer, (adapter, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = adapter, disabled


class _UnderView(nn.Module):
    """A head that runs with the adapter of a view."""

    def __init__(self, view: AdapterView, inner: nn.Module | None):
        super().__init__()
        self._view, self._inner = (view,), (inner,)  # in tuples, so that the parameters are not listed twice

    @property
    def weight(self) -> Tensor | None:
        """That of the head inside."""
        return getattr(self._inner[0], "weight", None)

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        inner = self._inner[0]
        with self._view[0].active():
            return hidden if inner is None else inner(hidden)


def _base_layer(head: nn.Module | None) -> nn.Module | None:
    """The layer that an adapter wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(head, BaseTunerLayer):
        return head.get_base_layer()
    if isinstance(head, AuxiliaryTrainingWrapper):
        return head.original_module
    return head


def _has_transposed_layers(module: nn.Module) -> bool:
    """Whether linear layers hold their weight as [in, out], as GPT-2's do."""
    return any(type(m).__name__ == "Conv1D" for m in module.modules())
