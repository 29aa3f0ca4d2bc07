"""Importance weights: normalised over a sample, and a warning where a few of them are all that counts.

A sum of exponentials over n draws obeys the law of large numbers only while log n exceeds the spread of the exponents;
beyond, its largest term is the sum. The rule: n much larger than e^KL(target || proposal).

Source: "Kernel Density Estimators in Large Dimensions", 2024; Kong's effective sample size.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 0.1  # a share above which one draw decides
FEWEST = 10.0  # effective draws


def self_normalised(log_w: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """w / sum w along a dimension, from logarithms known up to a constant; all 0 where every weight is 0.

    >>> self_normalised(torch.tensor([1000.0, 1000.0])).tolist()
    [0.5, 0.5]
    """
    nothing = (log_w == -math.inf).all(dim, keepdim=True)
    return log_w.masked_fill(nothing, 0.0).softmax(dim).masked_fill(nothing, 0.0)


@dataclass(frozen=True)
class Concentration:
    """How much of a weighted sample rests on few draws.

    Args:
        ess: effective number of draws, 1 / sum w^2 of the normalised weights.
        largest: the largest normalised weight.
        n: number of draws.
        warning: what is wrong, in words; None if nothing is.
    """

    ess: float
    largest: float
    n: int
    warning: str | None


def concentration(log_w: Float[Tensor, "n"]) -> Concentration:
    """Effective sample size and largest share of importance weights, with a warning.

    It warns if one draw has more than a tenth of the weight, or if fewer than ten draws are effective. What the
    warning calls the divergence is the estimate sum w log(n w) of KL(target || proposal), which cannot exceed log n.

    Args:
        log_w: log target - log proposal of each draw, up to a constant; -inf is a weight of 0.

    >>> found = concentration(torch.tensor([3.0, 1.0]).log())
    >>> round(found.ess, 6), round(found.largest, 6)
    (1.6, 0.75)
    """
    n = log_w.numel()
    w = self_normalised(log_w.detach().double(), dim=0)
    total = float(w.square().sum())
    if not total > 0:
        what = "the log-weights are not numbers" if bool(w.isnan().any()) else "no draw has any weight"
        return Concentration(0.0, 0.0, n, f"{what}: nothing can be estimated from these {n} draws")
    ess, largest = 1 / total, float(w.max())
    if largest <= LARGEST and ess >= FEWEST:
        return Concentration(ess, largest, n, None)
    kl = float(torch.xlogy(w, n * w).sum())
    decided = f"one of {n} draws has {largest:.0%} of the weight and about {ess:.1f} of them count"
    wanted = f"the target is at least {kl:.1f} nats away from where they were drawn"
    fix = "draw many times e^KL of them, or from closer to the target"
    return Concentration(ess, largest, n, f"{decided}; {wanted}: {fix}")
