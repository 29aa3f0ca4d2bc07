"""The law of the best of n draws, without loss of precision however large n is."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def best_of_n_log_prob(
    log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], n: float
) -> Float[Tensor, "*n S"]:
    """log p(x) of the best of n; see `keel.targets.target.best_of_n`.

    F^n - G^n = F^n (1 - (G / F)^n) with log F from whichever tail is the smaller one, so that n may be e^100.

    Raises:
        ValueError: n below 1.
    """
    if not n >= 1:
        raise ValueError(f"best-of-n needs n of at least 1, not {n}")
    log_q = log_ref.log_softmax(-1)
    order = reward.argsort(-1)
    ranked, mass = reward.gather(-1, order).contiguous(), log_q.gather(-1, order)
    none = torch.full_like(mass[..., :1], -math.inf)
    below = torch.cat([none, mass.logcumsumexp(-1)], -1)  # entry i: mass of the i lowest
    above = torch.cat([mass.flip(-1).logcumsumexp(-1).flip(-1), none], -1)  # entry i: mass without the i lowest
    first, after = (torch.searchsorted(ranked, reward.contiguous(), right=right) for right in (False, True))
    log_f = _log_cdf(below.gather(-1, after), above.gather(-1, after))
    log_f_before = _log_cdf(below.gather(-1, first), above.gather(-1, first))
    level = n * log_f + _log1mexp(n * (log_f_before - log_f))
    share = log_q - _group_logsumexp(log_q, first)
    return torch.where(log_q == -math.inf, torch.full_like(log_q, -math.inf), level + share)


def _log_cdf(below: Tensor, above: Tensor) -> Tensor:
    """log of a cumulative probability from both of its tails."""
    return torch.where(below < math.log(0.5), below, torch.log1p(-above.exp().clamp(max=0.5)))


def _log1mexp(z: Tensor) -> Tensor:
    """log(1 - e^z) for z <= 0."""
    return torch.where(z > -math.log(2), torch.log(-torch.expm1(z)), torch.log1p(-z.exp()))


def _group_logsumexp(values: Tensor, group: Tensor) -> Tensor:
    """logsumexp of the values with the same group number, at each of them."""
    top = torch.full_like(values, -math.inf).scatter_reduce(-1, group, values, "amax")
    highest = top.gather(-1, group)
    finite = highest.where(highest > -math.inf, torch.zeros_like(highest))
    total = torch.zeros_like(values).scatter_add(-1, group, (values - finite).exp())
    return finite + total.gather(-1, group).log()
