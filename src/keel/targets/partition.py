"""log Z of a target: summed, estimated from samples, or annealed, with an error and with what is wrong with it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.choice import generator

FEW = 10.0  # effective samples below which an estimate says little
ROUNDING = 1e-6
HEAVY = 0.1  # share of one sample above which it decides the estimate


@dataclass(frozen=True)
class Partition:
    """An estimate of log Z at each leading index.

    Args:
        log_z: shape [*n].
        standard_error: of log_z, by the delta method, shape [*n]; 0 for a sum.
        bias: E[estimate] - log Z to second order, never positive, shape [*n]; not taken out of `log_z`.
        effective_samples: 1 / sum of squared normalised weights, shape [*n].
        largest_weight: share of the heaviest sample, shape [*n].
        samples: number of samples; 0 for a sum.
    """

    log_z: Float[Tensor, "*n"]
    standard_error: Float[Tensor, "*n"]
    bias: Float[Tensor, "*n"]
    effective_samples: Float[Tensor, "*n"]
    largest_weight: Float[Tensor, "*n"]
    samples: int

    @property
    def warning(self) -> str | None:
        """Why the estimate should not be trusted; None if nothing speaks against it."""
        if not self.samples:
            return None
        heavy = (self.largest_weight > HEAVY + ROUNDING) & (self.samples > 1 / HEAVY)
        few = (self.effective_samples < FEW - ROUNDING) | heavy
        if not bool(few.any()):
            return None
        return (
            f"{int(few.sum())} of {few.numel()} estimates of log Z rest on a few of their {self.samples} samples "
            f"(effective number down to {float(self.effective_samples.min()):.1f}, one sample holding up to "
            f"{float(self.largest_weight.max()):.0%} of the weight). log Z from few samples is too low, more so than "
            "its standard error says: take more samples or a larger beta."
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers, one entry for each leading index, and their mean."""
        listed = {name: getattr(self, name).tolist() for name in ("log_z", "standard_error", "bias")}
        effective = self.effective_samples.tolist() if self.samples else None
        return {
            "mean": float(self.log_z.mean()),
            **listed,
            "effective_samples": effective,
            "warning": self.warning,
        }


def log_z_sum(log_score: Float[Tensor, "*n S"]) -> Partition:
    """log Z of listed outcomes, logsumexp of their scores."""
    log_z = log_score.logsumexp(-1)
    p = (log_score - log_z[..., None]).exp()
    zero = torch.zeros_like(log_z)
    return Partition(log_z, zero, zero, 1 / p.square().sum(-1), p.amax(-1), 0)


def log_z_samples(log_weight: Float[Tensor, "*n G"]) -> Partition:
    """log Z from importance weights of G samples of a proposal.

        log Z = logsumexp_g log w_g - log G,     w = P(x_g) / proposal(x_g)

    For samples of the reference and P = q e^{r / beta}, log w = r / beta. Z is unbiased; log Z is too low by about
    Var(w) / (2 G Z^2) (Jensen), the same number as half the square of the standard error.

    Args:
        log_weight: shape [*n, G], at least one finite for each leading index.

    Raises:
        ValueError: no samples, or none with a positive weight.
    """
    count = log_weight.shape[-1]
    if not count or bool((log_weight.amax(-1) == -math.inf).any()):
        raise ValueError("log Z needs at least one sample of positive weight at every prompt")
    log_z = log_weight.logsumexp(-1) - math.log(count)
    squares = log_weight.softmax(-1).square().sum(-1)
    relative = (squares - 1 / count).clamp(min=0)
    if count > 1:
        relative = relative * count / (count - 1)
    else:
        relative = torch.full_like(relative, math.inf)
    return Partition(log_z, relative.sqrt(), -relative / 2, 1 / squares, log_weight.softmax(-1).amax(-1), count)


def log_z_annealed(
    log_ref: Float[Tensor, "S"], reward: Float[Tensor, "S"], beta: float, chains: int, steps: int, seed: int
) -> Partition:
    """log Z of a tilt by annealed importance sampling, which needs nothing but draws of the reference and their reward.

        x_0 ~ q,     log w = sum_k (s_{k+1} - s_k) r(x_k) / beta,
        x_{k+1} from x_k by a move that leaves q e^{s_{k+1} r / beta} as it is

    s rises evenly from 0 to 1; the move is one independent Metropolis proposal from q, accepted with probability
    min(1, e^{s (r' - r) / beta}). Z is unbiased for every number of steps; more steps make the weights more even until
    proposals from q no longer find what is better. One step is importance sampling from q.

    Args:
        log_ref: log q, shape [S]; normalised here.
        reward: shape [S].
        beta: positive.
        chains: independent chains; their spread gives the error.
        steps: rungs of the ladder, at least 1.
        seed: of the draws.

    Raises:
        ValueError: fewer than one chain or step.
    """
    if min(chains, steps) < 1:
        raise ValueError("annealing needs at least one chain and one step")
    drawing = generator("annealing", seed)
    q = log_ref.double().softmax(-1).cpu()
    gain = reward.double().cpu() / beta
    x = _draw(q, chains, drawing)
    log_weight = torch.zeros(chains, dtype=torch.float64)
    for k in range(1, steps + 1):
        log_weight = log_weight + gain[x] / steps
        proposed = _draw(q, chains, drawing)
        uniform = torch.rand(chains, generator=drawing, dtype=torch.float64)
        x = torch.where(uniform.log() < k / steps * (gain[proposed] - gain[x]), proposed, x)
    return log_z_samples(log_weight)


def _draw(q: Tensor, count: int, drawing: torch.Generator) -> Int[Tensor, "n"]:
    return torch.multinomial(q, count, replacement=True, generator=drawing)
