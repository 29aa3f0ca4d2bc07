"""Divergences between diagonal normal distributions, in closed form."""

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kl(
    mean: Float[Tensor, "*n A"],
    std: Float[Tensor, "*n A"],
    ref_mean: Float[Tensor, "*n A"],
    ref_std: Float[Tensor, "*n A"],
) -> Float[Tensor, "*n"]:
    """KL(p || q) = sum_j log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2, in nats.

    Args:
        mean, std: of p, each of A actions.
        ref_mean, ref_std: of q.

    >>> one = torch.ones(1)
    >>> float(gaussian_kl(one, one, 0 * one, one))
    0.5
    """
    square = (std.square() + (mean - ref_mean).square()) / (2 * ref_std.square())
    return (ref_std.log() - std.log() + square - 0.5).sum(-1)


def gaussian_chi2(
    mean: Float[Tensor, "*n A"],
    std: Float[Tensor, "*n A"],
    ref_mean: Float[Tensor, "*n A"],
    ref_std: Float[Tensor, "*n A"],
) -> Float[Tensor, "*n"]:
    """chi2(p || q) = prod_j s_q^2 / (s_p sqrt(v_j)) exp((m_p - m_q)^2 / v_j) - 1,   v = 2 s_q^2 - s_p^2.

    It is infinite where v <= 0 for some action: p has heavier tails than q allows. The gradient is 0 there.

    Args:
        mean, std: of p, each of A actions.
        ref_mean, ref_std: of q.

    >>> float(gaussian_chi2(*(torch.tensor([x]) for x in (0.0, 2.0, 0.0, 1.0))))
    inf
    """
    spread = 2 * ref_std.square() - std.square()
    finite = spread > 0
    safe = torch.where(finite, spread, torch.ones_like(spread))
    log = 2 * ref_std.log() - std.log() - safe.log() / 2 + (mean - ref_mean).square() / safe
    value = torch.expm1(torch.where(finite, log, torch.zeros_like(log)).sum(-1))
    return torch.where(finite.all(-1), value, torch.full_like(value, torch.inf))


def gaussian_penalty(
    mean: Float[Tensor, "*n A"],
    std: Float[Tensor, "*n A"],
    ref_mean: Float[Tensor, "*n A"],
    ref_std: Float[Tensor, "*n A"],
    *,
    root: bool = False,
    floor: float = 1e-4,
) -> Float[Tensor, "*n"]:
    """chi2(p || q), or with `root` sqrt(max(chi2, floor)); where that is infinite, KL(p || q), which is not.

    Args:
        mean, std: of the policy, each of A actions.
        ref_mean, ref_std: of the reference.
        root: the square root, whose slope at 0 is infinite without the floor.
        floor: smallest number of which a root is taken.

    Raises:
        ValueError: floor is not positive.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024.
    """
    if floor <= 0:
        raise ValueError(f"floor must be positive, not {floor}")
    value = gaussian_chi2(mean, std, ref_mean, ref_std)
    finite = value.isfinite()
    value = torch.where(finite, value, torch.zeros_like(value))
    value = value.clamp(min=floor).sqrt() if root else value
    return torch.where(finite, value, gaussian_kl(mean, std, ref_mean, ref_std))
