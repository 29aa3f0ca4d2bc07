"""Reward against entropy along a run: whether it was bought with entropy, and where that ends."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class EntropyLaw:
    """R = -a e^H + b, fitted to a run.

    Args:
        a, b: by least squares.
        r_squared: share of the variance of R that the law explains; 1 where R does not vary.
    """

    a: float
    b: float
    r_squared: float

    @property
    def ceiling(self) -> float:
        """The reward at which the entropy is used up, b - a."""
        return self.b - self.a

    def __call__(self, entropy: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The reward that the law gives."""
        return self.b - self.a * entropy.exp()


def fit_entropy_law(entropy: Float[Tensor, "n"], reward: Float[Tensor, "n"]) -> EntropyLaw:
    """The law R = -a e^H + b by least squares; it is linear in e^H.

    A run of plain policy optimisation without anything that holds the entropy lies on such a curve, whose end can be
    read off early. A method that keeps entropy leaves it.

    Args:
        entropy: mean entropy of the policy at each step, in nats.
        reward: mean reward at each step.

    Raises:
        ValueError: fewer than two steps, numbers that are not finite, or an entropy that does not vary.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025.

    >>> import torch
    >>> law = fit_entropy_law(torch.tensor([0.0, 0.5, 1.0]), 0.8 - 0.2 * torch.tensor([0.0, 0.5, 1.0]).exp())
    >>> round(law.a, 3), round(law.b, 3), round(law.ceiling, 3)
    (0.2, 0.8, 0.6)
    """
    if len(entropy) < 2:
        raise ValueError(f"entropy must have at least two steps, not {len(entropy)}")
    if not bool((entropy.isfinite() & reward.isfinite()).all()):
        raise ValueError("entropy and reward must be finite")
    x, y = entropy.double().exp(), reward.double()
    dx, dy = x - x.mean(), y - y.mean()
    if not float(dx.square().sum()) > 0:
        raise ValueError("entropy does not vary, so nothing can be fitted")
    slope = float((dx * dy).sum() / dx.square().sum())
    total = float(dy.square().sum())
    explained = 1.0 if total == 0 else 1 - float((dy - slope * dx).square().sum()) / total
    return EntropyLaw(-slope, float(y.mean()) - slope * float(x.mean()), explained)
