"""Resampling: N ancestors from N weights, every scheme with N W_j copies of j in the mean.

With C = cumsum(W) and a_i = #{C < u_i}:

    multinomial   u_i independent uniforms
    stratified    u_i = (i + U_i) / N, a uniform for each stratum
    systematic    u_i = (i + U) / N, one uniform for all
    residual      floor(N W_j) copies of j, the rest multinomial in proportion to what is left
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.chance import Choice

Scheme = Literal["multinomial", "stratified", "systematic", "residual"]
SCHEMES: tuple[Scheme, ...] = ("multinomial", "stratified", "systematic", "residual")


def resample(
    log_w: Float[Tensor, "P N"], scheme: Scheme, rng: Choice, name: str = "resample", count: int | None = None
) -> Int[Tensor, "P M"]:
    """Ancestors of M new particles (N without `count`), drawn in proportion to the weights; their order means nothing.

    >>> from keel.core.chance import Sample
    >>> weights = torch.tensor([[.1, .2, .3, .4]]).log()
    >>> sorted(set(resample(weights, "systematic", Sample(0))[0].tolist()) - {0})
    [1, 2, 3]

    Args:
        log_w: normalised log-weights.
        scheme: one of the four.
        rng: where the uniforms come from.
        name: of the request.

    Raises:
        ValueError: an unknown scheme.
    """
    n = log_w.shape[1] if count is None else count
    if scheme == "multinomial":
        return rng.categorical(log_w, name, n)
    if scheme == "residual":
        return _residual(log_w, n, rng, name)
    if scheme not in SCHEMES:
        raise ValueError(f"resampling must be one of {', '.join(SCHEMES)}, not '{scheme}'")
    goal = _cumulated(log_w)[:, :-1] * n  # where the ancestor changes, in strata
    if scheme == "systematic":
        return systematic(log_w, rng.uniform(goal - goal.floor(), name), n)
    strata = torch.arange(n, device=log_w.device)
    uniform = rng.uniform((goal[:, None] - strata[:, None]).clamp(0, 1), name)
    return ancestors(log_w, (strata + uniform) / n)


def systematic(
    log_w: Float[Tensor, "P N"], uniform: Float[Tensor, "P"], count: int | None = None
) -> Int[Tensor, "P M"]:
    """Systematic resampling with a given uniform.

    >>> systematic(torch.tensor([[.1, .2, .3, .4]]).log(), torch.tensor([.5]))
    tensor([[1, 2, 3, 3]])
    """
    n = log_w.shape[1] if count is None else count
    return ancestors(log_w, (torch.arange(n, device=log_w.device) + uniform[:, None]) / n)


def ancestors(log_w: Float[Tensor, "P N"], u: Float[Tensor, "P M"]) -> Int[Tensor, "P M"]:
    """a_i = #{C < u_i}, at most the last one with weight, however the sum was rounded."""
    found = torch.searchsorted(_cumulated(log_w), u.double().contiguous())
    last = log_w.shape[1] - 1 - (log_w > -torch.inf).flip(1).int().argmax(1)
    return torch.minimum(found, last[:, None])


def _cumulated(log_w: Float[Tensor, "P N"]) -> Float[Tensor, "P N"]:
    sums = log_w.double().softmax(-1).cumsum(-1)
    return sums / sums[:, -1:]


def _residual(log_w: Float[Tensor, "P N"], n: int, rng: Choice, name: str) -> Int[Tensor, "P M"]:
    expected = log_w.double().softmax(-1) * n
    copies = (expected + 1e-9).floor()  # 0.3 * 10 is 3, however it was rounded
    left = (expected - copies).clamp(min=0)
    fixed = copies.long().cumsum(1)
    slots = torch.arange(n, device=log_w.device).expand(len(log_w), n).contiguous()
    certain = torch.searchsorted(fixed, slots, right=True).clamp(max=log_w.shape[1] - 1)
    free = slots >= fixed[:, -1:]  # slots that chance fills
    some = left.sum(1, keepdim=True) > 0
    left = torch.where(some, left, torch.ones_like(left))
    only = torch.zeros_like(left).log()
    only[:, 0] = 0.0  # nothing to decide where the slot is filled already
    drawn = rng.categorical(torch.where(free[..., None], left.log()[:, None], only[:, None]), name)
    return torch.where(free, drawn, certain)
