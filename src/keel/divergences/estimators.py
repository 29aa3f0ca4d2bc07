"""KL estimated from sampled tokens: k1, k2, k3 of the log-ratio d = log pi - log ref.

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

On samples of pi all three have (k2: nearly) the value KL(pi || ref), but as a loss their gradients differ: k1 gives 0,
k2 the gradient of KL(pi || ref), k3 that of KL(ref || pi). k3 times the differentiable ratio pi / pi_old gives that of
KL(pi || ref), also off-policy.

Source: Schulman, "Approximating KL divergence", 2020; gradients as derived there and checked on an exact world.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def estimate(kind: Estimator, log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The estimator at each token; no clamp, which would silence the gradient of exactly the most divergent tokens.

    >>> [round(float(estimate(k, torch.tensor(0.3))), 6) for k in ("k1", "k2", "k3")]
    [0.3, 0.045, 0.040818]
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio
