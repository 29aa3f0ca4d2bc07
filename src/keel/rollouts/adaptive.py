"""A temperature for each token, by the entropy of the distribution that it is drawn from."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.statistics.entropy_score import LEAST, Scale


@part("adaptive_temperature", paper=112)
@dataclass(frozen=True)
class AdaptiveTemperature:
    """T_t = T (1 + tau h_t), h in [-1, 1] the score of the log-entropy u_t of the distribution at temperature T.

        h = (u - pivot) / high above the pivot, (u - pivot) / low below it, clamped

    Tokens of high entropy are drawn a little hotter, those of low entropy colder. It is a transform of the sampler's
    logits, like its filters and before them: `logp["behaviour"]` is recorded under it, while what is learned from stays
    at T. The scale is that of the batch before, which `EntropyScale` sets; without one all tokens are drawn at T.

    Args:
        tau: how much the temperature follows the score, in [0, 1).
        pivot: log-entropy of score 0, in log-nats; None before there is one.
        high, low: distances from it at which the score is 1 and -1.

    Raises:
        ValueError: tau outside [0, 1), or a negative distance.

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025 (HAPO). The
    release scores the entropy at temperature 1, which is the same at T = 1, and its negative scores are positive (see
    `HeterogeneousClip`).
    """

    tau: float = 0.05
    pivot: float | None = None
    high: float = 0.0
    low: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must be in [0, 1), not {self.tau}")
        for name in ("high", "low"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def scale(self) -> float:
        """Factor on the logits: none that is common to all, so that it is for measuring and drawing, not for losses."""
        return 1.0

    @property
    def name(self) -> str:
        """The canonical name."""
        return f"adaptive={self.tau:g}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        if self.pivot is None or not self.tau:
            return logits
        log_p = logits.log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        return logits / self.factor(entropy)[:, None]

    def factor(self, entropy: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """T_t / T, of entropies in nats.

        >>> import math
        >>> H = torch.tensor([0.05, 0.2, 0.8, 1.6])
        >>> AdaptiveTemperature(0.05, math.log(0.8), math.log(2), math.log(16)).factor(H)
        tensor([0.9500, 0.9750, 1.0000, 1.0500])
        """
        if self.pivot is None:
            return torch.ones_like(entropy)
        edges = (entropy.new_tensor(edge) for edge in (self.pivot, self.high, self.low))
        return 1 + self.tau * Scale(*edges).score(entropy.clamp(min=LEAST).log()).clamp(-1, 1)
