"""Entropies of nuclei, the tokens of a row where they peak, and what is averaged over rows and turns."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.statistics.functionals import Entropy
from keel.statistics.transforms import filters


def nucleus_entropy(top_p: float, top_k: int | None, of: str = "policy") -> Entropy:
    """Entropy of the renormalised nucleus of the top_k likeliest tokens, the token that crosses top_p included.

    >>> nucleus_entropy(0.8, 10000, "old").name
    'entropy(old, top_k=10000,top_p=0.8)'
    """
    return Entropy(of=(of,), transform=filters(top_k, top_p))


def peaks(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], quantile: float) -> Bool[Tensor, "B T"]:
    """The tokens of each row whose value lies above the row's quantile, interpolated as in numpy.

    Where none does, because the largest are tied, those at the quantile are taken, so that every row has a peak; at
    quantile 0 all tokens are peaks.
    """
    if quantile == 0:
        return mask
    known = torch.where(mask, values.detach().to(torch.promote_types(values.dtype, torch.float32)), torch.nan)
    edge = known.nanquantile(quantile, 1, keepdim=True)
    above = known > edge
    return torch.where(above.any(1, keepdim=True), above, known >= edge)


def check_peaks(quantile: float, top_p: float, top_k: int | None) -> None:
    """The ranges of what `PeakEntropy`, and whoever reads its tokens, takes."""
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be in [0, 1), not {quantile}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")


def row_mean(values: Float[Tensor, "B T"], rows: Rows, where: Bool[Tensor, "B T"] | None) -> Float[Tensor, ""]:
    """Mean over rows of the mean over a row's tokens within `where`."""
    return Aggregation("sequence_mean_token_mean")(values, rows, where, "where")


def turns(rows: Rows) -> Int[Tensor, "B T"]:
    """The turn of each token."""
    turn = rows.columns.get("turn")
    if turn is None:
        return torch.zeros_like(rows.tokens)
    turn = turn.long()
    return turn if turn.dim() == 2 else turn[:, None].expand_as(rows.tokens)
