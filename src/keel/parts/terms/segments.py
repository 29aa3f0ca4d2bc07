"""Contrastive preference learning: pairs and rankings of whole segments, with a bias towards what is in the data."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss, Side
from keel.parts.terms.scores import LogRatio
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats


@part("conservative_bias", paper=85)
@dataclass(frozen=True)
class ConservativeBias:
    """softplus(offset - (A_w - lam A_l)) = -log( e^{A_w} / (e^{A_w} + e^{lam A_l + offset}) ), the loss of CPL.

    With lam = 1 it is the link of DPO, bit for bit. Below 1 it falls where both log-likelihoods rise together, so that
    the policy stays near the data without a reference model; and scores that are known only up to a constant of the
    prompt are refused.

    Args:
        lam: factor of the score that is not preferred.

    Raises:
        ValueError: lam outside (0, 1].

    Source: "Contrastive Preference Learning: Learning from Human Feedback without Reinforcement Learning", 2024.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.lam <= 1:
            raise ValueError(f"lam must be in (0, 1], not {self.lam}")

    @property
    def both(self) -> bool:
        """Whether a common shift of both scores changes the loss."""
        return self.lam != 1

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return softplus(offset - (chosen - self.lam * rejected))


@part("segment_discount", paper=85)
@dataclass(frozen=True)
class SegmentDiscount:
    """gamma^t for the t-th token of a completion, from 0: a token that comes late counts for less in its score.

    Args:
        gamma: 1 weighs all tokens alike.

    Raises:
        ValueError: gamma outside (0, 1].

    Source: "Contrastive Preference Learning: Learning from Human Feedback without Reinforcement Learning", 2024.
    """

    gamma: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], not {self.gamma}")

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        step = (side.mask.cumsum(1) - 1).clamp(min=0)
        return torch.full(step.shape, self.gamma, dtype=torch.float64, device=step.device) ** step


@part("ranked_pairs", paper=85)
@dataclass(frozen=True)
class RankedPairs:
    """A loss of pairs, on all pairs i < j of ranked lists: the mean over those whose scores in the data differ.

    Args:
        pairs: the loss.

    Source: "Contrastive Preference Learning: Learning from Human Feedback without Reinforcement Learning", 2024; its
    code divides by the number of entries that are not 0, and so leaves out pairs whose loss has vanished.
    """

    pairs: PairLoss = PairLoss(LogSigmoid(), LogRatio())
    additive = False
    reads = "lists"

    @property
    def coef(self) -> float:
        """Of the whole."""
        return self.pairs.coef

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the loss."""
        return self.pairs.needs

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the loss."""
        return self.pairs.heads_read

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        return self.pairs(rows, stats)

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """Those of the loss."""
        return self.pairs.metrics(rows, stats)
