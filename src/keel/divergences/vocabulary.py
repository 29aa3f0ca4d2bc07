"""Divergences over a whole vocabulary, from log-probabilities, with their gradients in closed form.

The first argument is the policy p, the second the reference q; both are named, because "forward" and "reverse" change
places between papers:

    kl_policy_ref    KL(p || q) = sum p (log p - log q)              "reverse KL": mode-seeking
    kl_ref_policy    KL(q || p) = sum q (log q - log p)              "forward KL": mass-covering
    js               (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2

Source: the standard f-divergences; gradients with respect to the logits z of p, by dp_v / dz_w = p_v ([v = w] - p_w).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["kl_policy_ref", "kl_ref_policy", "js"]
ALIASES = {"reverse_kl": "kl_policy_ref", "forward_kl": "kl_ref_policy", "jensen_shannon": "js"}


def divergence(kind: Kind, log_p: Float[Tensor, "n V"], log_q: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """D(p, q) at each position, in nats.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(float(divergence("kl_policy_ref", p, q)), 6)
    0.143841
    """
    if kind == "kl_policy_ref":
        return _expect(log_p, log_p - log_q)
    if kind == "kl_ref_policy":
        return _expect(log_q, log_q - log_p)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_expect(log_p, log_p - middle) + _expect(log_q, log_q - middle))


def divergence_backward(kind: Kind, log_p: Float[Tensor, "n V"], log_q: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """dD / dz for the logits z of p.

    With d the log-ratio: KL(p||q): p (log p/q - D);  KL(q||p): p - q;  JS: p (h - sum p h), h = log(p/m) / 2.
    """
    p = log_p.exp()
    if kind == "kl_ref_policy":
        return p - log_q.exp()
    against = log_q if kind == "kl_policy_ref" else torch.logaddexp(log_p, log_q) - math.log(2)
    slope = torch.where(p > 0, log_p - against, torch.zeros_like(p))
    if kind == "js":
        slope = 0.5 * slope
    return p * (slope - (p * slope).sum(-1, keepdim=True))


def _expect(log_weight: Tensor, values: Tensor) -> Tensor:
    """sum exp(log_weight) * values, where a weight of 0 counts nothing."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * values, torch.zeros_like(values)).sum(-1)
