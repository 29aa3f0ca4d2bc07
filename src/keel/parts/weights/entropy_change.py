"""Weights by how much a token's step will change the entropy."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio, token_weight, weighted_quantile
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats

TINY = 1e-8  # probabilities are kept this far from 0 and 1
LEAST = 0.02  # the exponential form is no steeper than if the largest change were this


def entropy_change(rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
    """What a token's step takes from the entropy of its state, A / p_old p (1 - p) (log p + H); 0 off the mask.

    Positive where a likely token is rewarded or an unlikely one punished. A step along grad log p_a takes
    p_a (log p_a + H) - sum_v p_v^2 (log p_v + H) from the entropy of a tabular softmax; of it this is the part of the
    token's own logit, times A / p_old. The others' part is left out.

    Raises:
        ValueError: the rows have no advantage.
    """
    if rows.advantage is None:
        raise ValueError("an entropy change needs an advantage: the method's chain `advantage` is empty")
    p = stats[LogProb()].detach().exp().clamp(TINY, 1 - TINY)
    old = stats[LogProb(of=("old",))].exp()
    change = rows.advantage / old * p * (1 - p) * (p.log() + stats[Entropy()].detach())
    return torch.where(rows.mask, torch.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0), torch.zeros_like(change))


@part("entropy_change", paper=51)
@dataclass(frozen=True)
class EntropyChange:
    """Weights that fall with the size m of a token's entropy change, whichever way it goes.

        linear        high - (high - low) (m - m_min) / (m_max - m_min)
        exponential   exp(-k m) with k = -log(low) / max(m_max, 0.02), at least low

    m_min and m_max are those of the counted tokens of the batch. A is divided by p_old, so that a single rare token may
    set m_max and leave all others at `high`: a quantile below 1 takes that from it.

    Args:
        low, high: weights of the largest and the smallest change; `high` is 1 in the exponential form.
        form: linear or exponential.
        quantile: of m, taken for m_max; 1 is the paper's.

    Returns:
        Weights [B, T].

    Raises:
        ValueError: not 0 < low <= high, or quantile outside (0, 1].

    Source: "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", 2025 (STEER).
    """

    low: float = 0.8
    high: float = 1.2
    form: Literal["linear", "exponential"] = "linear"
    quantile: float = 1.0
    needs = (LogProb(), LogProb(of=("old",)), Entropy())

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"low and high must satisfy 0 < low <= high, not {self.low} and {self.high}")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], not {self.quantile}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        size = entropy_change(rows, stats).abs()
        weight = token_weight(rows)
        least, most = (weighted_quantile(size, q, weight) for q in (0.0, self.quantile))
        if self.form == "exponential":
            steepness = -math.log(min(self.low, 1.0)) / most.clamp(min=LEAST)
            return (-steepness * size).exp().clamp(min=min(self.low, 1.0))
        if not bool(most > least):
            return torch.full_like(size, (self.low + self.high) / 2)
        place = ratio(size - least, most - least).clamp(0, 1)
        return self.high - (self.high - self.low) * place
