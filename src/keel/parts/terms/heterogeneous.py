"""A clip whose range, and an advantage whose size, depend on the entropy of the token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.entropy_score import log_entropies, scale_of
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats


def entropy_score(entropy: Float[Tensor, "B T"], rows: Rows, quantile: float) -> Float[Tensor, "B T"]:
    """Where the log-entropy of a token lies: 0 at the batch's quantile, 1 at its largest, -1 at its smallest value.

    Args:
        entropy: in nats, [B, T].
        quantile: of the counted tokens; the smallest value below or at which that share of them lies.
    """
    log_entropy = log_entropies(entropy, rows)
    score = scale_of(log_entropy, rows, quantile).score(log_entropy)
    return torch.where(rows.loss_mask, score.nan_to_num(nan=0.0), torch.zeros_like(score))


@part("heterogeneous_clip", paper=112)
@dataclass(frozen=True)
class HeterogeneousClip:
    """PPO's clip, its range and the advantage modulated by the entropy score h of the token, in [-1, 1].

        h <= 0   range below   epsilon (1 - clip h);         A (1 + scale h) where neutral, A elsewhere
        h > 0    range above   epsilon_high (1 + clip h);    A where neutral, A (1 + scale h) elsewhere

    Neutral is a ratio in the inner half of the range. Tokens of high entropy may move further up, and count for more
    once they do; those of low entropy may fall further, and count for less until then. h is that of the policy that
    sampled, and constant.

    Args:
        epsilon, epsilon_high: clip range below and above 1 at h = 0; None means epsilon.
        dual: c of the dual clip, above 1; None is off.
        quantile: of the log-entropies, where h is 0.
        clip, scale: how much the range, and the advantage, follow h; 0 is plain PPO.

    Raises:
        ValueError: a setting out of its range.

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025 (HAPO). The
    authors' code divides negative scores by their smallest value with its sign, which makes them positive; the absolute
    value stands here, as the text means it.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual: float | None = 10.0
    quantile: float = 0.8
    clip: float = 1.0
    scale: float = 1.0
    needs = (Entropy(of=("old",)),)
    additive = False

    def __post_init__(self) -> None:
        if self.epsilon < 0 or (self.epsilon_high is not None and self.epsilon_high < 0):
            raise ValueError("epsilon and epsilon_high must not be negative")
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"dual must be above 1, not {self.dual}")
        for name in ("quantile", "clip", "scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor, rows: Rows, stats: Stats) -> Tensor:
        rho = log_ratio.clamp(-LIMIT, LIMIT).exp()
        score = entropy_score(stats[self.needs[0]], rows, self.quantile).to(rho)
        low, high = self.range(score)
        gain = self.scaled(advantage, rho.detach(), score)
        clipped = torch.minimum(gain * rho, gain * torch.minimum(torch.maximum(rho, 1 - low), 1 + high))
        if self.dual is None:
            return clipped
        return torch.where(gain < 0, torch.maximum(clipped, self.dual * gain), clipped)

    def range(self, score: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """How far below and above 1 the ratio may go."""
        upper = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return self.epsilon * (1 - self.clip * score.clamp(max=0)), upper * (1 + self.clip * score.clamp(min=0))

    def scaled(
        self, advantage: Float[Tensor, "B T"], rho: Float[Tensor, "B T"], score: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The advantage, redistributed."""
        low, high = self.range(score)
        neutral = (rho > 1 - low / 2) & (rho < 1 + high / 2)
        changed = torch.where(score > 0, ~neutral, neutral)
        return torch.where(changed, advantage * (1 + self.scale * score), advantage)
