"""What a frozen model's layers say of each token: their states, their activations, and a mask that is learned on them.

    m_t = ReLU(sum_l v_l ReLU(w_l . norm(h_l,t) + b_l)),    h_l,t the state after layer l from which token t was chosen

Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.aggregate import ratio
from keel.core.errors import UserError
from keel.core.policy import PolicyModel
from keel.core.registry import part
from keel.core.rows import Rows
from keel.models.adapters import AdapterView
from keel.models.language import LanguageModel
from keel.models.sources import FROZEN, Frozen, Initial
from keel.models.view import ModelView

POSITIONS = 1024  # whose logits exist together
# names of what is watched, the last part of a module's path; an architecture may have no module for one of them
WATCHED = {"attention": re.compile("(self_)?(attn|attention)"), "mlp": re.compile("mlp|feed_forward|ffn")}


# -- states of every layer -------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_states(model: PolicyModel, rows: Rows) -> Float[Tensor, "B T L D"]:
    """States after every layer from which the completion tokens were chosen; of a table its only one."""
    with _language(model) as language:
        if language is None:
            return model.hidden(rows)[:, :, None]
        states, start = _run(language, rows)
        return torch.stack([_completion(state, start, rows.tokens.shape[1]) for state in states], 2)


@dataclass(frozen=True)
class _View:
    """A frozen model seen through its layers.

    Args:
        of: the frozen model: initial, pretrained or soup.

    Raises:
        ValueError: a model that moves.
    """

    of: Frozen = Initial()

    def __post_init__(self) -> None:
        if not isinstance(self.of, FROZEN):
            raise ValueError(f"the layers of a frozen model are read, not of {type(self.of).__name__}")


@part("layers", paper=37)
@dataclass(frozen=True)
class Layers(_View):
    """The states of all layers of a frozen model, one after the other: L D numbers at each position.

    Args:
        of: the frozen model: initial, pretrained or soup.

    Raises:
        ValueError: a model that moves.
    """

    def view(self, model: PolicyModel) -> PolicyModel:
        """The model, with its layers for a state."""
        return LayerView(model)


class LayerView(ModelView):
    """A model whose state is that of all its layers; the head reads the last one alone."""

    @torch.no_grad()
    def hidden(self, rows: Rows) -> Float[Tensor, "B T LD"]:
        """States without gradient."""
        return layer_states(self.model, rows).flatten(2)


class MaskNet(nn.Module):
    """m = ReLU(sum_l v_l ReLU(w_l . norm(h_l) + b_l)), one LayerNorm for all layers; at first m is 1 everywhere.

    A mask that is 0 everywhere has no gradient, so the biases start at 1, w at 0, and v at 1 / L.

    Args:
        layers: L.
        dim: size of a layer's state.
    """

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.zeros(layers, dim))
        self.bias = nn.Parameter(torch.ones(layers))
        self.mixer = nn.Parameter(torch.full((layers,), 1 / layers))

    def forward(self, hidden: Float[Tensor, "n LD"]) -> Float[Tensor, "n"]:
        layers, dim = self.weight.shape
        if hidden.shape[1] != layers * dim:
            raise UserError(
                f"a mask for {layers} layers of {dim} numbers met states of {hidden.shape[1]}",
                "heads",
                "The model that it reads must have the policy's architecture.",
            )
        states = self.norm(hidden.to(self.weight.dtype).unflatten(1, (layers, dim)))
        found = ((states * self.weight).sum(-1) + self.bias).relu()
        return (found @ self.mixer).relu()


@part("token_mask", paper=37)
@dataclass(frozen=True)
class TokenMask:
    """A head that makes a mask m_t >= 0 of the states of every layer of a frozen model; see `MaskNet`.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025; in the authors' code the
    weights start at random.
    """

    def build(self, policy: PolicyModel, seed: int) -> nn.Module:
        """The module, on the policy's device."""
        parameter = next(policy.module.parameters())
        one = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
        states = layer_states(policy, Rows.build(one, one == 0, one, one == 0))
        return MaskNet(*states.shape[2:]).to(parameter.device)


# -- activations -----------------------------------------------------------------------------------------------------


@part("activations", paper=37)
@dataclass(frozen=True)
class Activations(_View):
    """Mean activations of a frozen model at each position, in [0, 1]: attention, MLP, residual stream and logits.

        z_t = mean over the features,    (z_t - min_t z) / (max_t z - min_t z) over the completion

    for the output of every module, averaged over the modules of a kind; one number for each kind. It is 0 where z is
    the same at all tokens. (Standardising z before, as the paper does, changes nothing.)

    Args:
        of: the frozen model: initial, pretrained or soup.

    Raises:
        ValueError: a model that moves.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025 (MaPO); the authors also
    look inside the attention and at the inputs of the layers.
    """

    def view(self, model: PolicyModel) -> PolicyModel:
        """The model, with its activations for a state."""
        return ActivationView(model)


class ActivationView(ModelView):
    """A model whose state is the mean activation of each kind of module, scaled over the completion."""

    @torch.no_grad()
    def hidden(self, rows: Rows) -> Float[Tensor, "B T K"]:
        """The activations, without gradient."""
        kinds = self._means(rows)
        return torch.stack([torch.stack([scaled(z, rows) for z in kind]).mean(0) for kind in kinds], -1)

    def _means(self, rows: Rows) -> list[list[Float[Tensor, "B T"]]]:
        """z of every module, kind by kind."""
        with _language(self.model) as language:
            if language is None:
                return [[_mean(self.model.hidden(rows))]]
            with watched(language) as seen:
                states, start = _run(language, rows)
            width = rows.tokens.shape[1]
            kinds = [[_completion(z, start, width) for z in found] for found in seen.values() if found]
            kinds.append([_completion(_mean(state), start, width) for state in states])
            return [*kinds, [self._logits(_completion(language.for_head(states[-1]), start, width))]]

    def _logits(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
        parts = [_mean(self.model.head.logits(part)) for part in states.flatten(0, 1).split(POSITIONS)]
        return torch.cat(parts).view(states.shape[:2])


def scaled(z: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, "B T"]:
    """(z - min) / (max - min) over the completion of each row; 0 off it, and where all are the same."""
    low = z.masked_fill(~rows.mask, torch.inf).amin(1, keepdim=True)
    high = z.masked_fill(~rows.mask, -torch.inf).amax(1, keepdim=True)
    return ratio(torch.where(rows.mask, z - low, 0.0), torch.where(high > low, high - low, 0.0))


@contextlib.contextmanager
def watched(language: LanguageModel) -> Iterator[dict[str, list[Tensor]]]:
    """Mean activations [B, W] of every attention and MLP module that runs in the meantime, in the order of the runs."""
    seen: dict[str, list[Tensor]] = {kind: [] for kind in WATCHED}
    handles = []

    def note(kind: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            seen[kind].append(_mean(output[0] if isinstance(output, tuple) else output))

        return hook

    for name, module in language.transformer.named_modules():
        for kind, pattern in WATCHED.items():
            if pattern.fullmatch(name.rsplit(".", 1)[-1]):
                handles.append(module.register_forward_hook(note(kind)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- a forward pass that shows every layer ---------------------------------------------------------------------------


@contextlib.contextmanager
def _language(model: PolicyModel) -> Iterator[LanguageModel | None]:
    """The language model of a frozen one, its adapters as the view has them; None for a table."""
    if isinstance(model, AdapterView):
        with model.active():
            yield model.model
    else:
        yield model if isinstance(model, LanguageModel) else None


def _run(language: LanguageModel, rows: Rows) -> tuple[list[Float[Tensor, "B W D"]], Tensor]:
    """States after every layer of packed sequences, and where the states of the completions begin."""
    ids, start = language.pack(rows)
    with language.mixed():
        base = language.transformer.base_model
        found = base(input_ids=ids, use_cache=False, output_hidden_states=True, **rows.inputs)
    return list(found.hidden_states[1:]), start - 1


def _completion(states: Float[Tensor, "B W *D"], start: Tensor, width: int) -> Float[Tensor, "B T *D"]:
    """`width` states of each row from its own `start` on; beyond the last one it repeats."""
    place = (start[:, None] + torch.arange(width, device=start.device)).clamp(max=states.shape[1] - 1)
    return states[torch.arange(len(states), device=start.device)[:, None], place]


def _mean(activation: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    """Over the features, in fp32 at least."""
    return activation.to(torch.promote_types(activation.dtype, torch.float32)).mean(-1)
