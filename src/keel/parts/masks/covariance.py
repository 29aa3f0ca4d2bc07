"""Tokens by what they do to the entropy: the covariance of log-probability and advantage, which drives it down.

For a tabular softmax the natural-gradient step z += eta A changes the entropy by -eta Cov(log pi, A), a step of the
policy gradient by -eta Cov(log pi, pi A), both up to eta^2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import masked_mean, token_weight, top_share
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


def covariance(rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
    """(A - mean A) (log pi - mean log pi) at each token, the means over the counted tokens of the batch; 0 elsewhere.

    Raises:
        ValueError: the rows have no advantage.
    """
    if rows.advantage is None:
        raise ValueError("a covariance with the advantage needs one: the method's chain `advantage` is empty")
    log_prob = torch.where(rows.mask, stats[LogProb()].detach(), torch.zeros_like(stats[LogProb()]))
    product = (rows.advantage - masked_mean(rows.advantage, rows)) * (log_prob - masked_mean(log_prob, rows))
    return torch.where(rows.loss_mask, product, torch.zeros_like(product))


@part("high_covariance", paper=47)
@dataclass(frozen=True)
class HighCovariance:
    """The tokens with the largest covariance of log-probability and advantage: `fraction` of the batch, at least one.

    Args:
        fraction: share of the counted tokens, 2e-3 in the paper for 7B and 2e-4 for 32B; a fraction of a token is one.

    Returns:
        Mask [B, T].

    Raises:
        ValueError: fraction outside [0, 1].

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025 (KL-Cov).
    """

    fraction: float = 2e-3
    needs = (LogProb(),)

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], not {self.fraction}")

    def __call__(self, rows: Rows, stats: Stats) -> Bool[Tensor, "B T"]:
        return top_share(covariance(rows, stats), self.fraction, token_weight(rows))
