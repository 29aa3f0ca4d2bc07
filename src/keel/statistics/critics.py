"""The values of two critics as one."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def soft_min(first: Float[Tensor, "*n"], second: Float[Tensor, "*n"], sharpness: float) -> Float[Tensor, "*n"]:
    """-a (log(e^(-v1 / a) + e^(-v2 / a)) - log 2): the smaller for a -> 0, the mean for a -> inf.

    >>> round(float(soft_min(torch.tensor(1.0), torch.tensor(2.0), 0.3)), 6)
    1.197428
    """
    return -sharpness * (torch.logaddexp(-first / sharpness, -second / sharpness) - math.log(2))


def check_critics(sharpness: float, heads: tuple[str, str]) -> None:
    """The settings of whoever reads the two critics."""
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be positive and finite, not {sharpness}: a large one takes the mean")
    if len(set(heads)) != 2:
        raise ValueError(f"heads must be two different names, not {heads}")
