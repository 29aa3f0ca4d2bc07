"""Policy-gradient steps whose momentum does not go stale: by extrapolated sampling points, or by a Hessian product.

A momentum d mixes gradients that were taken at earlier parameters. Two ways to make up for that, with one trajectory,
or two, a step:

    N-PG-IGT    sample at theta~ = theta + ((1 - eta) / eta) (theta - before),   d <- (1 - eta) d + eta g(theta~)
    HARPG       sample at theta and at a point between,   d <- (1 - eta) (d + B (theta - before)) + eta g(theta)

and theta <- theta + rate d / |d|, or rate d. For a quadratic objective and gradients without noise the first d is the
gradient at theta exactly; B has the mean Hess J at a point drawn uniformly between, so that B (theta - before) has the
mean of the change of the gradient.

Source: "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies", 2023;
reconstructed, the constants of the schedules are uncertain.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

Potential = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Momentum:
    """Where an optimiser stands.

    Args:
        parameters: theta.
        before: theta one step earlier; at the start, the same.
        direction: d, an estimate of the gradient at `before`; at the start 0.
        step: steps made.
    """

    parameters: Float[Tensor, "*n"]
    before: Float[Tensor, "*n"]
    direction: Float[Tensor, "*n"]
    step: int = 0

    @staticmethod
    def start(parameters: Float[Tensor, "*n"]) -> "Momentum":
        """Before the first step."""
        return Momentum(parameters, parameters, torch.zeros_like(parameters))

    @property
    def move(self) -> Float[Tensor, "*n"]:
        """The last step, theta - before."""
        return self.parameters - self.before


@dataclass(frozen=True)
class _Ascent:
    """What the two ways share: steps of rate / (t + 2), and the share of a new gradient."""

    rate: float
    power: float
    normalised: bool

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, not {self.rate}")
        if self.power < 0:
            raise ValueError(f"power must not be negative, got {self.power}")

    def eta(self, state: Momentum) -> float:
        """Share of the new gradient in d."""
        return (2 / (state.step + 2)) ** self.power

    def _stepped(self, state: Momentum, direction: Tensor) -> Momentum:
        norm = direction.norm() if self.normalised else torch.ones_like(direction.sum())
        step = torch.where(norm > 0, direction / norm, torch.zeros_like(direction))
        moved = state.parameters + self.rate / (state.step + 2) * step
        return replace(state, parameters=moved, before=state.parameters, direction=direction, step=state.step + 1)


@dataclass(frozen=True)
class ImplicitTransport(_Ascent):
    """N-PG-IGT: ascent along a momentum of gradients at extrapolated points, with steps of a length that is set.

    Args:
        rate: the step is rate / (t + 2), t from 0.
        power: eta_t = (2 / (t + 2))^power; 0 is eta 1, the gradient itself without momentum.
        normalised: divide d by its norm; then steps shrink only by their schedule.

    Raises:
        ValueError: rate not positive, or a negative power.
    """

    rate: float = 1.0
    power: float = 0.8
    normalised: bool = True

    def point(self, state: Momentum) -> Float[Tensor, "*n"]:
        """theta~, where the next trajectory is to be drawn, and its gradient taken."""
        eta = self.eta(state)
        return state.parameters + (1 - eta) / eta * state.move

    def update(self, state: Momentum, gradient: Float[Tensor, "*n"]) -> Momentum:
        """After a step along d, with the gradient at `point(state)`."""
        eta = self.eta(state)
        direction = (1 - eta) * state.direction + eta * gradient
        return self._stepped(state, direction)


@dataclass(frozen=True)
class HessianAided(_Ascent):
    """HARPG, and N-HARPG where normalised: ascent along a momentum that is carried over by a Hessian product.

    Args:
        rate: the step is rate / (t + 2), t from 0.
        power: eta_t = (2 / (t + 2))^power.
        normalised: divide d by its norm.

    Raises:
        ValueError: rate not positive, or a negative power.
    """

    rate: float = 1.0
    power: float = 1.0
    normalised: bool = False

    def point(self, state: Momentum, share: float | Tensor) -> Float[Tensor, "*n"]:
        """theta^, where the second trajectory is to be drawn; `share` is uniform in [0, 1], 1 is theta."""
        return share * state.parameters + (1 - share) * state.before

    def update(self, state: Momentum, gradient: Float[Tensor, "*n"], change: Float[Tensor, "*n"]) -> Momentum:
        """After a step along d.

        Args:
            gradient: at theta.
            change: `hessian_product` of the second trajectory with `state.move`.
        """
        eta = self.eta(state)
        direction = (1 - eta) * (state.direction + change) + eta * gradient
        return self._stepped(state, direction)


def hessian_product(
    log_prob: Potential, potential: Potential, parameters: Float[Tensor, "*n"], vector: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """B v = (grad log p . v) grad Phi + grad(grad Phi . v), whose mean over trajectories is Hess J v.

    The first half is there because the distribution of trajectories moves with the parameters, too.

    Args:
        log_prob: theta -> log p(tau), of a trajectory drawn at `parameters`.
        potential: theta -> Phi(tau) = sum_t (reward to go)_t log pi(a_t | s_t), whose gradient is that of the policy.
        parameters: theta^.
        vector: v.
    """
    at = parameters.detach().requires_grad_()
    (score,) = torch.autograd.grad(log_prob(at), at)
    (slope,) = torch.autograd.grad(potential(at), at, create_graph=True)
    (curved,) = torch.autograd.grad((slope * vector).sum(), at)
    return (score * vector).sum() * slope.detach() + curved
