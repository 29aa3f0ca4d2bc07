"""Weights of tokens within a score: masks that a head learns, and masks that are read off a frozen model's states."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.choice import uniforms
from keel.core.registry import part
from keel.parts.terms.pairs import Side, part_heads, part_needs
from keel.parts.terms.scores import TokenWeight
from keel.statistics.functionals import Functional, Value
from keel.statistics.positions import Positions

DROPOUT = 1 << 20  # the counter from which the uniforms of dropped tokens are taken


@part("learned_mask", paper=37)
@dataclass(frozen=True)
class LearnedMask:
    """m_t >= 0, what a head reads from the states of every layer of a frozen model; it learns with the policy.

    Args:
        head: name of the method's head, a `TokenMask`.
        layers: name of the model whose states it reads.
        dropout: share of tokens whose mask is 0 in this batch, by chance of row and position; the others are scaled.

    Raises:
        ValueError: a dropout outside [0, 1).

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025; the authors drop units
    of each layer, too.
    """

    head: str = "mask"
    layers: str = "layers"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def _value(self) -> Value:
        return Value(self.head, of=(self.layers, "policy"))  # with the policy's name, so that the head learns

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The head."""
        return (self._value,)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The head."""
        return (self.head,)

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        mask = side.tokens(self._value)
        if not self.dropout:
            return mask
        own = side.rows.row[side.index].repeat_interleave(mask.shape[1])
        place = torch.arange(mask.shape[1], device=mask.device).repeat(len(side))
        kept = (uniforms(own, DROPOUT + place) >= self.dropout).view(mask.shape)
        return mask * kept / (1 - self.dropout)


@dataclass(frozen=True)
class Activation:
    """Mean of the numbers that a frozen view of a model has at a position."""

    of: tuple[str, ...] = ("activations",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"activation({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        found = at.hidden[self.of[0]].mean(-1)
        return found.to(torch.promote_types(found.dtype, torch.float32))


@part("activation_mask", paper=37)
@dataclass(frozen=True)
class ActivationMask:
    """m_t in [0, 1], the mean activation of a frozen model at the token, scaled to [0, 1] over the completion.

    Args:
        model: name of the model, an `Activations`.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025 (MaPO).
    """

    model: str = "activations"

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The activations, measured once a batch."""
        return (Activation((self.model,)),)

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        return side.tokens(Activation((self.model,))).detach()


@part("weight_norm", paper=37)
@dataclass(frozen=True)
class WeightNorm:
    """sum_t |w_t| over the tokens of a completion.

    Args:
        weight: w.
        name: under which its sparsity is logged.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025.
    """

    weight: TokenWeight
    name: str = "mask"
    difference_only = False

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the weight."""
        return part_needs(self.weight)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the weight."""
        return part_heads(self.weight)

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        return self._weights(side).abs().sum(1)

    def metrics(self, side: Side) -> dict[str, Float[Tensor, ""]]:
        """NAME/sparsity, the share of tokens with weight 0, and NAME/mean."""
        weights = self._weights(side)[side.mask]
        count = float(len(weights))
        return {
            f"{self.name}/sparsity": ratio((weights == 0).to(weights).sum(), count),
            f"{self.name}/mean": ratio(weights.sum(), count),
        }

    def _weights(self, side: Side) -> Float[Tensor, "N T"]:
        found = self.weight(side)
        return torch.where(side.mask, found, torch.zeros_like(found))
