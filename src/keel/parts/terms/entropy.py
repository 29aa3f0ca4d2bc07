"""Entropy as a regulariser: held at an anchor, or inside the band of its own history."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.entropy import check_peaks, nucleus_entropy, row_mean, turns
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats


@part("anchored_entropy", paper=52)
@dataclass(frozen=True)
class AnchoredEntropy:
    """coef (Hbar - anchor)^2: pulls the mean entropy to an anchor from both sides, where a bonus pushes for ever.

        Hbar = mean over rows of the mean of H over the row's peak tokens,   dHbar/dH as the mask has it, held constant

    Args:
        coef: c.
        anchor: in nats; None takes Hbar of the policy when the batch was prepared, so that the first update is free.
        where: name of the mask with the peak tokens; None is all tokens.
        top_p, top_k: H is the entropy of the renormalised nucleus, as in `PeakEntropy`.

    Raises:
        ValueError: a negative coef, top_p outside (0, 1], top_k below 1, or no mask of that name.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", 2025 (SIREN).
    """

    coef: float = 0.005
    anchor: float | None = None
    where: str | None = None
    top_p: float = 0.8
    top_k: int | None = 10000
    additive = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        check_peaks(0.0, self.top_p, self.top_k)

    @property
    def needs(self) -> tuple[Entropy, ...]:
        """The live entropy; without an anchor, that of the batch's policy, too."""
        old = () if self.anchor is not None else (nucleus_entropy(self.top_p, self.top_k, "old"),)
        return (nucleus_entropy(self.top_p, self.top_k), *old)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        if self.where is not None and self.where not in rows.masks:
            raise ValueError(f"where: there is no mask '{self.where}'")
        mask = None if self.where is None else rows.masks[self.where]
        value, *before = (row_mean(stats[need], rows, mask) for need in self.needs)
        anchor = before[0].detach() if self.anchor is None else self.anchor
        return self.coef * (value - anchor).square()


@part("entropy_band", paper=100)
@dataclass(frozen=True)
class EntropyBand:
    """What the entropy of a token exceeds, or lacks to, a band around the historical mean of its turn.

        P_t = [H_t - high Hbar_k]_+ + [low Hbar_k - H_t]_+,   k the turn of the token

    Turns come from `columns["turn"]`, [B] or [B, T], counted from 0; without the column all is turn 0. A turn without
    history has no band, and P = 0 there.

    Args:
        low, high: the band, in units of the historical mean.
        history: Hbar_k in nats, turn by turn; the controller `turn_entropy` keeps it.
        gradient: False is the release: P = 1 outside the band, a constant, which moves no parameter.
        level: sequence judges a row by its mean entropy, with its share on every token.

    Raises:
        ValueError: not 0 <= low <= high, or a negative history.

    Source: "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning", 2025. The form with a
    gradient is not the authors'. Their rule that only micro-batches with a late turn are punished is left out: it
    depends on how a batch is split.
    """

    low: float = 0.8
    high: float = 1.2
    history: tuple[float, ...] = (1.0,)
    gradient: bool = True
    level: Literal["token", "sequence"] = "token"
    needs = (Entropy(),)
    additive = True

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"the band must satisfy 0 <= low <= high, not {self.low}, {self.high}")
        if any(mean < 0 for mean in self.history):
            raise ValueError(f"history holds mean entropies, which are not negative: {self.history}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        entropy = torch.where(rows.mask, stats[Entropy()], torch.zeros_like(stats[Entropy()]))
        if self.level == "sequence":
            mean = ratio(entropy.sum(1), rows.lengths.to(entropy.dtype))
            entropy = mean[:, None].expand_as(entropy)
        known = torch.tensor([*self.history, torch.nan], dtype=entropy.dtype, device=rows.device)
        centre = known[turns(rows).clamp(max=len(self.history))]  # nan where there is no history
        above, below = entropy - self.high * centre, self.low * centre - entropy
        if not self.gradient:
            return ((above >= 0) | (below >= 0)).to(entropy)
        inside = torch.zeros_like(entropy)
        return torch.where(above > 0, above, inside) + torch.where(below > 0, below, inside)
