"""The optimum of E[r] - beta D_f(policy || ref) for every f-divergence, exactly, on listed outcomes."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.targets.target import Target, masked_product

HALVINGS = 120


@dataclass(frozen=True)
class Tilted:
    """The optimum of one regularised objective.

    Args:
        log_prob: log pi*, shape [*n, S]; -inf where the optimum has no mass.
        multiplier: lambda of sum pi* = 1, shape [*n], in units of reward. Wherever pi* has mass,
            r = beta f'(pi* / q) + lambda.
        value: E_pi*[r] - beta D_f(pi* || q), shape [*n].
        reward: E_pi*[r], shape [*n].
        divergence: D_f(pi* || q), shape [*n].
    """

    log_prob: Float[Tensor, "*n S"]
    multiplier: Float[Tensor, "*n"]
    value: Float[Tensor, "*n"]
    reward: Float[Tensor, "*n"]
    divergence: Float[Tensor, "*n"]

    @property
    def target(self) -> Target:
        """As a target."""
        return Target(self.log_prob)


def f_tilt(
    log_ref: Float[Tensor, "*n S"],
    reward: Float[Tensor, "*n S"],
    beta: float | Float[Tensor, "*n"],
    divergence: str | FDivergence = "kl_policy_ref",
) -> Tilted:
    """The policy that maximises E[r] - beta D_f(policy || q).

        pi*(x) = q(x) max(0, (f')^{-1}((r(x) - lambda) / beta)),     lambda such that sum pi* = 1

    Solved by bisection for the ratio of the best outcome, l = log(pi* / q) at max r, which lies in [0, -log q(best)]:
    the mass grows with l, and nothing cancels even where pi* is nearly all on one outcome. Equal rewards keep their
    reference odds under every f. Total variation keeps q where r >= max r - beta and moves the rest to the best.

    Args:
        log_ref: log q, shape [*n, S]; normalised here; -inf is an outcome that the optimum lacks as well.
        reward: finite, shape [*n, S].
        beta: positive; one number, or one for each leading index, shape [*n].
        divergence: a name such as `alpha:0.5`, or an `FDivergence`.

    Raises:
        ValueError: beta is not positive, or a reward is not finite.
    """
    d = f_divergence(divergence)
    kind = torch.promote_types(log_ref.dtype, torch.float32)
    log_q, r = log_ref.double().log_softmax(-1), reward.double()
    if not bool(r.isfinite().all()):
        raise ValueError("rewards must be finite; `pointwise` removes outcomes")
    by = torch.as_tensor(beta, dtype=torch.float64, device=log_q.device).expand(log_q.shape[:-1])
    if not bool(((by > 0) & by.isfinite()).all()):
        raise ValueError(f"beta must be positive and finite, not {beta}")
    best = r.masked_fill(log_q == -math.inf, -math.inf).amax(-1)
    deficit = (best[..., None] - r).clamp(min=0) / by[..., None]
    if d.name == "tv":
        log_p, multiplier = _total_variation(log_q, deficit, best, by * d.scale, d)
    else:
        log_p, multiplier = _solve(log_q, deficit, best, by, d)
    gained = masked_product(log_p.exp(), r).sum(-1)
    cost = d.value(_without_underflow(log_p, log_q, d), log_q)
    found = (log_p, multiplier, gained - by * cost, gained, cost)
    return Tilted(*(number.to(kind) for number in found))


def _solve(log_q: Tensor, deficit: Tensor, best: Tensor, beta: Tensor, d: FDivergence) -> tuple[Tensor, Tensor]:
    """log pi* and lambda; `deficit` is (max r - r) / beta."""
    top = deficit == 0
    low = torch.zeros_like(best)
    high = -log_q.masked_fill(~top, -math.inf).logsumexp(-1).clamp(max=0)

    def log_prob(l: Tensor) -> Tensor:
        slope = d.f_prime(l)[..., None] - deficit
        log_u = torch.where(top, l[..., None], d.f_prime_inverse(slope))
        # an outcome below the best has a smaller ratio; rounding near f'(inf) must not say otherwise
        log_u = torch.minimum(log_u, l[..., None]).masked_fill(slope <= d.f_prime_at_zero, -math.inf)
        return log_q + log_u

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = log_prob(middle).logsumexp(-1) > 0
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    found = (low + high) / 2
    return log_prob(found).log_softmax(-1), best - beta * d.f_prime(found)


def _without_underflow(log_p: Tensor, log_q: Tensor, d: FDivergence) -> Tensor:
    """Ratios too small for fp64 count as 0 where f(0) is finite, so that 0 * inf cannot arise."""
    if d.f_at_zero == math.inf:
        return log_p
    return log_p.masked_fill(log_p - log_q < -700, -math.inf)


def _total_variation(
    log_q: Tensor, deficit: Tensor, best: Tensor, beta: Tensor, d: FDivergence
) -> tuple[Tensor, Tensor]:
    """The optimum of the linear programme; among the best outcomes the moved mass is shared as the reference does."""
    top = deficit == 0
    kept = log_q.masked_fill(deficit > d.scale, -math.inf)
    moved = log_q.masked_fill(deficit <= d.scale, -math.inf).logsumexp(-1)
    best_mass = log_q.masked_fill(~top, -math.inf).logsumexp(-1)
    log_p = torch.where(top, log_q + (torch.logaddexp(best_mass, moved) - best_mass)[..., None], kept)
    return log_p.log_softmax(-1), best - beta / 2
