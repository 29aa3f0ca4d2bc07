"""Masks that pick tokens by the entropy of the policy there."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.entropy import check_peaks, nucleus_entropy, peaks
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats


@part("peak_entropy", paper=52)
@dataclass(frozen=True)
class PeakEntropy:
    """Tokens whose entropy lies above the quantile of their row: where the policy has a decision to make.

        m_t = [H_t > quantile(H of the row)]

    Args:
        quantile: share of a row's tokens that stay out, in [0, 1); 0 takes all.
        top_p: H is the entropy of the renormalised nucleus that holds this probability; 1 is the whole vocabulary.
        top_k: the nucleus is taken of this many likeliest tokens; None is all.

    Returns:
        Mask [B, T], False on padding.

    Raises:
        ValueError: quantile outside [0, 1), top_p outside (0, 1], or top_k below 1.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", 2025 (SIREN). The released code drops the
    token that crosses top_p, so that a token of that mass leaves an empty nucleus; here it stays. Where several tokens
    are tied for the largest entropy of a row, a row of one token included, they are peaks.
    """

    quantile: float = 0.8
    top_p: float = 0.8
    top_k: int | None = 10000
    additive = True

    def __post_init__(self) -> None:
        check_peaks(self.quantile, self.top_p, self.top_k)

    @property
    def needs(self) -> tuple[Entropy, ...]:
        """The live entropy."""
        return (nucleus_entropy(self.top_p, self.top_k),)

    def __call__(self, rows: Rows, stats: Stats) -> Bool[Tensor, "B T"]:
        return peaks(stats[self.needs[0]], rows.mask, self.quantile)
