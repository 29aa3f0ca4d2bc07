"""The Cauchy-Schwarz divergence, between distributions over a vocabulary and between samples by way of kernels.

It is symmetric, finite on supports that overlap at all, and unmoved by a factor on either argument. It is no
f-divergence: it may rise under a map of both arguments, and has no importance-weighted policy gradient. All sums are
taken in log-space, so that far-away samples give large numbers instead of log 0.

Source: "Cauchy-Schwarz Divergence Information Bottleneck for Regression", 2024, in nats; the normaliser of the
conditional divergence is the square of a sum, as the kernel estimate of p(x, y)^2 / p(x)^2 has it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cauchy_schwarz(log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """-2 log sum p q + log sum p^2 + log sum q^2, in nats; inf for disjoint supports.

    Args:
        log_p, log_q: log-probabilities, not necessarily normalised; -inf is an outcome without mass.

    >>> p = torch.tensor([0.5, 0.5]).log()
    >>> float(cauchy_schwarz(p, p + 3.0).abs()) < 1e-6
    True
    """
    return (2 * log_p).logsumexp(-1) + (2 * log_q).logsumexp(-1) - 2 * (log_p + log_q).logsumexp(-1)


def log_gram(a: Float[Tensor, "N d"], b: Float[Tensor, "M d"], width: float = 1.0) -> Float[Tensor, "N M"]:
    """Logarithm of the Gaussian kernel, -|a - b|^2 / (2 width^2).

    Args:
        a, b: samples, one a row.
        width: standard deviation of the kernel, in the samples' unit.

    Raises:
        ValueError: samples that are not [N, d] (a vector of scalars must be [N, 1]), or a width that is not positive.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"samples must have shape [N, d], not {list(a.shape)} and {list(b.shape)}: scalars are [N, 1]")
    if not width > 0:
        raise ValueError(f"the width of a kernel must be positive, not {width}")
    return -(a[:, None] - b[None]).square().sum(-1) / (2 * width**2)


def conditional_cauchy_schwarz(
    x: Float[Tensor, "N dx"],
    y: Float[Tensor, "N dy"],
    predicted: Float[Tensor, "N dy"],
    width_x: float = 1.0,
    width_y: float = 1.0,
) -> Float[Tensor, ""]:
    """Divergence of p(y | x) and p(predicted | x) from samples, in nats; 0 if the prediction is y.

    With K = G(x, x) and w_j = 1 / (sum_i K_ji)^2:

        log sum_j w_j (K G(y, y))_j + log sum_j w_j (K G(y', y'))_j - 2 log sum_j w_j (K G(y', y))_j,
        (K L)_j = sum_i K_ji L_ji.

    Raises:
        ValueError: as `log_gram`, or different numbers of samples.
    """
    if not len(x) == len(y) == len(predicted):
        raise ValueError(f"there must be as many x as y: {len(x)}, {len(y)}, {len(predicted)}")
    kernel = log_gram(x, x, width_x)
    weighted = kernel - 2 * kernel.logsumexp(1, keepdim=True)

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (weighted + log_gram(a, b, width_y)).logsumexp((0, 1))

    return total(y, y) + total(predicted, predicted) - 2 * total(predicted, y)


def cauchy_schwarz_information(
    x: Float[Tensor, "N dx"],
    z: Float[Tensor, "N dz"],
    width_x: float = 1.0,
    width_z: float = 1.0,
    normalised: bool = False,
) -> Float[Tensor, ""]:
    """Divergence of p(x, z) and p(x) p(z) from samples, in nats; 0 if either is constant.

    With K = G(x, x) and M = G(z, z):

        log(sum_ij K_ij M_ij / N^2) + log(sum K sum M / N^4) - 2 log(sum_i (sum_j K_ij) (sum_j M_ij) / N^3).

    Args:
        x, z: paired samples.
        width_x, width_z: of the kernels.
        normalised: divide by sqrt(I(x, x) I(z, z)), 0 if either is constant.

    Raises:
        ValueError: as `log_gram`, or different numbers of samples.
    """
    if len(x) != len(z):
        raise ValueError(f"there must be as many x as z: {len(x)}, {len(z)}")
    k, m = log_gram(x, x, width_x), log_gram(z, z, width_z)
    between = _information(k, m)
    if not normalised:
        return between
    own = _information(k, k) * _information(m, m)
    constant = own <= torch.finfo(own.dtype).eps ** 2
    return torch.where(constant, torch.zeros_like(own), between / torch.where(constant, 1.0, own).sqrt())


def _information(k: Float[Tensor, "N N"], m: Float[Tensor, "N N"]) -> Float[Tensor, ""]:
    n = math.log(len(k))
    joint = (k + m).logsumexp((0, 1)) - 2 * n
    apart = k.logsumexp((0, 1)) + m.logsumexp((0, 1)) - 4 * n
    return joint + apart - 2 * ((k.logsumexp(1) + m.logsumexp(1)).logsumexp(0) - 3 * n)
