"""The five outcomes on which every number of these tests was worked out beforehand."""

import torch
from torch import Tensor


def tensor(*values: float) -> Tensor:
    """fp64."""
    return torch.tensor(values, dtype=torch.float64)


Q = tensor(0.40, 0.25, 0.20, 0.10, 0.05)  # reference
P = tensor(0.10, 0.30, 0.15, 0.25, 0.20)  # policy
MU = tensor(0.25, 0.20, 0.30, 0.15, 0.10)  # proposal
TEACHER = tensor(0.05, 0.45, 0.10, 0.25, 0.15)
R = tensor(0.0, 1.0, 0.5, 2.0, 1.5)
BETA = 0.5
TILT = tensor(0.043220, 0.199596, 0.058742, 0.589931, 0.108512)
TIES = tensor(0.0, 1.0, 1.0, 2.0, 2.0)
PHI = torch.stack([tensor(0, 1, 0, 1, 0), tensor(0, 0, 0, 1, 1)], -1)
SIX = {"rtol": 0, "atol": 6e-7}  # numbers that were written down with six digits


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), written out."""
    return torch.where(p > 0, p * (p / q).log(), torch.zeros_like(p)).sum(-1)
