"""The optimum of E[r] - beta D_f(policy || ref) for every f-divergence, exactly, on listed outcomes."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.targets.target import Target, masked_product

STEPS = 300  # at most; some six are usual
TOLERANCE = 1e-14  # of log sum pi*


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

    Solved by Newton's method in a bracket for the log-ratio of the best outcome, log(pi* / q) at max r, which lies in
    [0, -log q(best)]: the mass grows with it, and nothing cancels even where pi* is nearly all on one outcome. Equal
    rewards keep their reference odds under every f. Total variation keeps q where r >= max r - beta and moves the rest
    to the best outcomes, as the reference shares them.

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
    ratio, before = (low + high) / 2, torch.full_like(low, math.inf)
    for _ in range(STEPS):
        log_u = _log_ratio(ratio, top, deficit, d)
        mass = (log_q + log_u).logsumexp(-1)
        low, high = torch.where(mass > 0, low, ratio), torch.where(mass > 0, ratio, high)
        settled = (mass.abs() < TOLERANCE) | (high - low <= 1e-16 * high)
        if bool(settled.all()):
            break
        newton = ratio - mass / _growth(log_q, log_u, ratio, d)
        pays = (newton >= low) & (newton <= high) & (mass.abs() < before / 2)  # halve the bracket where it does not
        ratio, before = torch.where(settled, ratio, torch.where(pays, newton, (low + high) / 2)), mass.abs()
    return (log_q + _log_ratio(ratio, top, deficit, d)).log_softmax(-1), best - beta * d.f_prime(ratio)


def _log_ratio(best_ratio: Tensor, top: Tensor, deficit: Tensor, d: FDivergence) -> Tensor:
    """log u of every outcome where that of the best is `best_ratio`."""
    slope = d.f_prime(best_ratio)[..., None] - deficit
    log_u = torch.where(top, best_ratio[..., None], d.f_prime_inverse(slope))
    # an outcome below the best has a smaller ratio; rounding near f'(inf) must not say otherwise
    return torch.minimum(log_u, best_ratio[..., None]).masked_fill(slope <= d.f_prime_at_zero, -math.inf)


def _growth(log_q: Tensor, log_u: Tensor, best_ratio: Tensor, d: FDivergence) -> Tensor:
    """The slope of the log of the mass in `best_ratio`: the policy's mean of f''(u_best) u_best / (f''(u) u)."""
    here = torch.where(log_u > -math.inf, log_u, torch.zeros_like(log_u))
    speed = (d.f_second(best_ratio).log() + best_ratio)[..., None] - (d.f_second(here).log() + here)
    return masked_product((log_q + log_u).softmax(-1), speed.exp()).sum(-1)


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
