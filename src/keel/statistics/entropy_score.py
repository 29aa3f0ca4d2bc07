"""Where the log-entropy of a token lies within those of a batch, from -1 to 1."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio, token_weight, weighted_quantile
from keel.core.rows import Rows

LEAST = 1e-8  # entropies below it are taken for it


class Scale(NamedTuple):
    """The scale of a score: the log-entropy where it is 0, and how far above and below it is 1 and -1, in log-nats."""

    pivot: Tensor
    high: Tensor
    low: Tensor

    def score(self, log_entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """h = (u - pivot) / high above the pivot, (u - pivot) / low below it; NaN at infinite log-entropies."""
        above = log_entropy - self.pivot
        return torch.where(above > 0, ratio(above, self.high.expand_as(above)), ratio(above, self.low.expand_as(above)))


def log_entropies(entropy: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, "B T"]:
    """u = log H, that of 1 off the mask."""
    return torch.where(rows.mask, entropy, torch.ones_like(entropy)).clamp(min=LEAST).log()


def scale_of(log_entropy: Float[Tensor, "B T"], rows: Rows, quantile: float) -> Scale:
    """The scale of a batch: the quantile of its counted tokens, and the distance of the largest and the smallest.

    Args:
        log_entropy: [B, T].
        quantile: the smallest value below or at which that share of the counted tokens lies is the pivot.
    """
    weight = token_weight(rows)
    pivot = weighted_quantile(log_entropy, quantile, weight)
    low, high = (weighted_quantile(log_entropy - pivot, q, weight) for q in (0.0, 1.0))
    return Scale(pivot, high, -low)
