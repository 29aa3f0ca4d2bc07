"""Rewards that look at where a completion was uncertain: by phase, and by windows of tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.curation import scalar_reward
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats

OLD_ENTROPY = Entropy(of=("old",))


@part("phase_entropy", paper=83)
@dataclass(frozen=True)
class PhaseEntropy:
    """A success loses what its thinking was less certain of than its answer.

        r' = max(0, r - coef max(0, H_think - alpha H_answer))   where r >= threshold,   r elsewhere

    H_think and H_answer are the mean entropies of the policy that sampled, in nats, before and after the first
    occurrence of `end`, whose own tokens count in neither; without one there is no answer and H_answer is 0.

    Args:
        end: tokens that end the thinking phase, in their order; () takes the whole completion for thinking.
        alpha: how much more entropy the thinking may have.
        coef: of the penalty, in reward per nat.
        threshold: rewards from which on a completion is a success.

    Raises:
        ValueError: a negative alpha or coef, or several reward columns (put a WeightedSum before it).

    Source: "PEAR: Phase Entropy Aware Reward for Efficient Reasoning", 2025, arXiv 2510.08026; reconstructed from its
    text, alpha of 1 and the floor at 0 are Keel's.
    """

    end: tuple[int, ...] = ()
    alpha: float = 1.0
    coef: float = 1.0
    threshold: float = 0.5
    needs = (OLD_ENTROPY,)

    def __post_init__(self) -> None:
        for name in ("alpha", "coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        thinking, answer = phases(rows, self.end)
        entropy = stats[OLD_ENTROPY]
        excess = masked_row_mean(entropy, thinking) - self.alpha * masked_row_mean(entropy, answer)
        bent = torch.clamp(reward - self.coef * excess.clamp(min=0).to(reward.dtype), min=0)
        good = (reward >= self.threshold) & (excess > 0) & (self.coef > 0)
        return rows.with_(reward=torch.where(good, bent, reward)[:, None])


def phases(rows: Rows, end: tuple[int, ...]) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Chosen tokens before and after the first occurrence of `end`, whose own tokens are in neither."""
    width, size = rows.tokens.shape[1], len(end)
    places = torch.arange(width, device=rows.device)
    if not size or size > width:
        return rows.mask, torch.zeros_like(rows.mask)
    windows = rows.tokens.unfold(1, size, 1) == rows.tokens.new_tensor(end)
    found = (windows & rows.mask.unfold(1, size, 1)).all(2)
    first = torch.where(found, places[: width - size + 1], width).amin(1, keepdim=True)
    return rows.mask & (places < first), rows.mask & (places >= first + size)


def masked_row_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Mean over the masked tokens of each row, 0 without any."""
    return ratio(torch.where(mask, values, torch.zeros_like(values)).sum(1), mask.sum(1).to(values.dtype))
