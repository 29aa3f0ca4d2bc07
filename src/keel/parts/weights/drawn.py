"""Weights for rows that a mixture of policy and teacher has drawn: what takes a mean over them back to the policy."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

MIXTURE = "mixture"  # under this name the rows' log-probabilities of what drew them stand
OLD = LogProb(of=("old",))
LIMIT = 20.0  # log-ratios beyond +-20 are cut before exp
Level = Literal["token", "prefix", "sequence"]


@part("mixture_weight")
@dataclass(frozen=True)
class MixtureWeight:
    """old / mixture of what was drawn, for rows of a mixture; 1 for all others, which the policy itself has drawn.

        token      of the token itself
        prefix     the product over the tokens before it: the weight of its state, for a number of the whole vocabulary
        sequence   the product over the row

    Where the policy has a share 1 - alpha of the mixture, no ratio of a token exceeds 1 / (1 - alpha).

    Args:
        level: one of the three. Only `prefix`, for numbers of states, and `sequence` are without bias; `token` keeps
            the variance down.
        cap: largest weight; None for none.

    Returns:
        Weights [B, T]; 1 off the mask.

    Raises:
        ValueError: an unknown level, or a cap that is not positive.

    Source: "MiniLLM: Knowledge Distillation of Large Language Models", 2024, takes `token`.
    """

    level: Level = "token"
    cap: float | None = None
    needs = (OLD,)
    additive = True

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level must be one of {', '.join(get_args(Level))}, not '{self.level}'")
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        old = stats[OLD].detach()
        if MIXTURE not in rows.logp:
            return torch.ones_like(old)
        gap = torch.where(rows.mask, old - rows.logp[MIXTURE], torch.zeros_like(old))
        if self.level == "prefix":
            gap = gap.cumsum(1) - gap
        elif self.level == "sequence":
            gap = gap.sum(1, keepdim=True).expand_as(gap)
        weight = gap.clamp(-LIMIT, LIMIT).exp().clamp(max=math.inf if self.cap is None else self.cap)
        return torch.where(rows.mask, weight, torch.ones_like(weight))
