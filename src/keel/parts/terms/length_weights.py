"""Weights of tokens within a score that only lengths decide."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.parts.terms.pairs import Side


@part("shared_length")
@dataclass(frozen=True)
class SharedLength:
    """1 on the first min(L_w, L_l) tokens of a completion, `tail` on those beyond: LD-DPO.

    Args:
        tail: alpha, in [0, 1]; 1 weighs all tokens alike.

    Raises:
        ValueError: tail outside [0, 1].

    Source: Liu et al., "Length Desensitization in Direct Preference Optimization", 2024.
    """

    tail: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail must be in [0, 1], not {self.tail}")

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        shared = torch.minimum(side.lengths, side.other_lengths)
        weight = side.rows.weight
        tail = torch.as_tensor(self.tail, dtype=weight.dtype, device=weight.device)
        return torch.where(side.mask.cumsum(1) <= shared[:, None], torch.ones_like(tail), tail)
