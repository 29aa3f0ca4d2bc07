"""Further surrogates: what else than PPO's clip bounds the ratio."""

from dataclasses import dataclass

import torch
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.stats import Stats


@part("two_sided_clip")
@dataclass(frozen=True)
class TwoSidedClip:
    """min(A min(rho, delta), A clip(rho, 1 - epsilon, 1 + epsilon_high)).

    PPO's clip leaves the ratio unbounded where A < 0; there the loss is at most -delta A, and beyond without gradient.

    Args:
        delta: largest ratio of tokens with A < 0.
        epsilon, epsilon_high: clip range below and above 1; None means epsilon.

    Raises:
        ValueError: a negative range, or delta not above the clip range.

    Source: "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning", 2025.
    """

    delta: float = 4.0
    epsilon: float = 0.2
    epsilon_high: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon < 0 or (self.epsilon_high is not None and self.epsilon_high < 0):
            raise ValueError("epsilon and epsilon_high must not be negative")
        if self.delta <= self.bounds[1]:
            raise ValueError(f"delta must be above the clip range, which ends at {self.bounds[1]:g}, not {self.delta}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        rho = log_ratio.clamp(-LIMIT, LIMIT).exp()
        low, high = self.bounds
        return torch.minimum(advantage * rho.clamp(max=self.delta), advantage * rho.clamp(low, high))

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the ratio is cut."""
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


@part("geometric_mean")
@dataclass(frozen=True)
class GeometricMean:
    """A exp(mean over the row of d'), d = log rho cut on the side where the step would go on.

        d' = min(d, epsilon) where A > 0,   max(d, -epsilon) elsewhere

    Each token carries the row's number, its gradient that of exp(sg(mean) + d'_t - sg(d'_t)). A token that is cut has
    no gradient, the others of its row keep theirs, where a clip of the row's ratio (GSPO) silences all or none.

    Args:
        epsilon: in log space; 0.4 is a ratio in (0.67, 1.49).

    Raises:
        ValueError: a negative epsilon.

    Source: "Geometric-Mean Policy Optimization", 2025.
    """

    epsilon: float = 0.4
    needs = ()  # but it looks at the whole row

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor, rows: Rows, stats: Stats) -> Tensor:
        cut = torch.where(advantage > 0, log_ratio.clamp(max=self.epsilon), log_ratio.clamp(min=-self.epsilon))
        cut = torch.where(rows.mask, cut, torch.zeros_like(cut))
        mean = ratio(cut.detach().sum(1), rows.lengths.to(cut.dtype))[:, None]
        return advantage * (mean + cut - cut.detach()).clamp(-LIMIT, LIMIT).exp()


@part("soft_gate")
@dataclass(frozen=True)
class SoftGate:
    """A (4 / tau) sigmoid(tau (rho - 1)), whose derivative in rho is 1 at rho = 1 and falls off smoothly on both sides.

    Args:
        tau: where A > 0.
        tau_negative: elsewhere; larger, so that these gradients vanish sooner.

    Raises:
        ValueError: a temperature that is not positive.

    Source: "Soft Adaptive Policy Optimization", 2025.
    """

    tau: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.tau_negative <= 0:
            raise ValueError(f"tau and tau_negative must be positive, not {self.tau} and {self.tau_negative}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        rho = log_ratio.clamp(-LIMIT, LIMIT).exp()
        tau = torch.full_like(rho, self.tau).where(advantage > 0, self.tau_negative)
        return advantage * (4 / tau) * torch.sigmoid(tau * (rho - 1))


@part("gamma_kernel")
@dataclass(frozen=True)
class GammaKernel:
    """sg(phi(w)) A log pi with phi(w) = w^k e^(lam (1 - w)), w the ratio of the row: level `trajectory`.

    phi(1) = 1, and far from 1 on either side it vanishes: k decides how fast below, lam above.

    Args:
        k, lam: where A >= 0.
        k_negative, lam_negative: where A < 0.

    Raises:
        ValueError: a negative exponent.

    Source: "VESPO: Variational Sequence-level Soft Policy Optimization for Off-Policy LLM Training", 2026.
    """

    k: float = 2.0
    lam: float = 3.0
    k_negative: float = 3.0
    lam_negative: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k", "lam", "k_negative", "lam_negative"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        log_w = log_ratio.detach().clamp(-LIMIT, LIMIT)
        k = torch.full_like(log_w, self.k).where(advantage >= 0, self.k_negative)
        lam = torch.full_like(log_w, self.lam).where(advantage >= 0, self.lam_negative)
        return (k * log_w - lam * torch.expm1(log_w)).exp() * advantage * log_prob
