"""Retraining on samples that a chooser picked out of k: its population map, and where it comes to rest."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from keel.targets.target import Target

STEP = 0.2  # of the trapezoid rule; its error is about exp(-pi^2 / STEP)
TAIL = 42.0  # the integrand is cut where it is below e^-TAIL of its peak


def curated(log_p: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], k: float) -> Target:
    """One round: draw k, keep one with probability softmax(r), fit the kept ones.

        p'(x) = p(x) H(x),     H(x) = E[ k e^{r(x)} / (e^{r(x)} + sum over k - 1 draws of e^{r(x_j)}) ] <= k

    The expectation over draws is one integral, since 1 / c = int e^{-t c} dt:
    H(x) = k int a e^{-t a} phi(t)^{k-1} dt with a = e^{r(x)}, phi(t) = E_p[exp(-t e^r)].

    Args:
        log_p: log-probabilities of the present model, shape [*n, S]; normalised here.
        reward: the chooser's utility, shape [*n, S].
        k: candidates; `math.inf` gives p e^r / Z, the tilt with beta = 1.

    Raises:
        ValueError: k below 1.

    Source: "Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences", 2024.
    """
    if not k >= 1:
        raise ValueError(f"a chooser needs at least one candidate, not {k}")
    log_p = log_p.log_softmax(-1)
    if k == math.inf:
        return Target(log_p + reward)
    if k == 1:
        return Target(log_p)
    r = reward - reward.amax(-1, keepdim=True)
    low = float(r.amin())
    points = torch.arange(-TAIL, -low + math.log(TAIL) + 1, STEP, dtype=r.dtype, device=r.device)  # v = log t
    rate = torch.exp(points + r[..., None])  # t e^r, [*n, S, points]
    log_phi = (log_p[..., None] - rate).logsumexp(-2, keepdim=True)
    log_h = (points + r[..., None] - rate + (k - 1) * log_phi).logsumexp(-1) + math.log(STEP * k)
    return Target(log_p + log_h)


def curated_fixed_point(
    log_ref: Float[Tensor, "*n S"],
    reward: Float[Tensor, "*n S"],
    k: float,
    weight: float,
    tolerance: float = 1e-12,
    max_rounds: int = 100_000,
) -> Target:
    """Where curated retraining settles if reference data stay in the mixture.

        p = q / (1 + w) + w / (1 + w) curated(p)

    For w (k - 1) < 1 no outcome gains more than the factor 1 / (1 - w (k - 1)) over the reference.

    Args:
        log_ref: log q of the data, shape [*n, S].
        reward: the chooser's utility, shape [*n, S].
        k: candidates of the chooser.
        weight: w, of the curated samples relative to the data.
        tolerance: largest change of a probability in the last round.
        max_rounds: rounds at most.

    Raises:
        ValueError: a negative weight, or no rest within `max_rounds`.
    """
    if weight < 0:
        raise ValueError(f"the weight of curated samples must not be negative, not {weight}")
    log_q = log_ref.log_softmax(-1)
    data = log_q - math.log1p(weight)
    mixed = -math.inf if weight == 0 else math.log(weight) - math.log1p(weight)
    log_p = log_q
    for _ in range(max_rounds):
        after = torch.logaddexp(data, mixed + curated(log_p, reward, k).log_prob())
        moved = float((after.exp() - log_p.exp()).abs().max())
        log_p = after
        if moved <= tolerance:
            return Target(log_p)
    raise ValueError(f"curated retraining has not settled after {max_rounds} rounds (last change {moved:.1e})")
