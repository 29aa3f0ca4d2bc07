"""log sum_v p_v^2, the expected probability of a sampled token, by its logarithm."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.statistics.positions import Positions


@dataclass(frozen=True)
class LogSquaredMass:
    """log sum_v p_v^2: minus Renyi's entropy of order 2, in nats.

    Gradient of the logits: 2 (p_v^2 / sum p^2 - p_v).

    Source: Renyi, "On measures of entropy and information", 1961; WPO's alignment of weights reads it.
    """

    of: tuple[str, ...] = ("policy",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`log_squared_mass(old)`."""
        return "log_squared_mass" if self.of == ("policy",) else f"log_squared_mass({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        if at.differentiable:
            return (2 * at.log_probs(self.of[0])).logsumexp(-1)
        squares = self._squares(at)
        total = squares.sum(-1).log()
        at.give(squares)
        return total

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add 2 grad (p^2 / sum p^2 - p) to `dlogits`."""
        squares = self._squares(at)
        dlogits.addcmul_(squares, (2 * grad / squares.sum(-1))[:, None])
        at.give(squares)
        at.add_along(self.of[0], None, -2 * grad)

    def _squares(self, at: Positions) -> Float[Tensor, "n V"]:
        """p^2, to be given back."""
        p = at.probs(self.of[0])
        return torch.mul(p, p, out=at.take_like(p))
