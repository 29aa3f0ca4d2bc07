"""The Renyi divergences, which are no f-divergences but add up over independent tokens.

Source: Renyi, "On measures of entropy and information", 1961; van Erven and Harremoes, 2014.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence


def renyi(a: float, log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """R_a(p || q) = log(sum p^a q^(1 - a)) / (a - 1), in nats.

    With the alpha-divergence D_a of the f-family it is log(1 + a (a - 1) D_a) / (a - 1), which is used near a = 1,
    where the sum is nearly 1. Its limits are taken where they lie: -log q(p > 0) at a = 0, KL(p || q) at 1, and
    log max p / q at infinity. It is inf for disjoint supports, and for a >= 1 if p has mass where q has none.

    Args:
        a: the order, at least 0; `math.inf` is allowed.
        log_p, log_q: normalised log-probabilities; -inf is an outcome without mass.

    Raises:
        ValueError: a negative or undefined order.

    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(float(renyi(2.0, p, q)), 6)
    0.287682
    """
    if not a >= 0:
        raise ValueError(f"the order of a Renyi divergence must be at least 0, not {a}")
    has_p, has_q = log_p > -math.inf, log_q > -math.inf
    if a == 0:
        return -_log_sum(torch.where(has_p, log_q, torch.full_like(log_q, -math.inf)))
    if a == math.inf:
        return torch.where(has_p, log_p - log_q, torch.full_like(log_p, -math.inf)).amax(-1)
    if abs(a - 1) < 1e-7:
        return FDivergence("kl_policy_ref").value(log_p, log_q)
    if abs(a - 1) < 0.1:
        alpha = FDivergence("alpha", a).value(log_p, log_q)
        near = torch.log1p((a * (a - 1) * alpha).clamp(min=-1.0)) / (a - 1)
        if bool(near.isfinite().all()):
            return near
    both = has_p & has_q
    zero = torch.zeros_like(log_p)
    powers = a * torch.where(both, log_p, zero) + (1 - a) * torch.where(both, log_q, zero)
    value = _log_sum(powers.masked_fill(~both, -math.inf)) / (a - 1)
    outside = (has_p & ~has_q).any(-1)
    return value.masked_fill(outside, math.inf) if a > 1 else value


def _log_sum(x: Tensor) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every entry is -inf."""
    nothing = (x == -math.inf).all(-1, keepdim=True)
    return x.masked_fill(nothing, 0.0).logsumexp(-1).masked_fill(nothing[..., 0], -math.inf)
