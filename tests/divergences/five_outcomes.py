"""The five outcomes of the tables, with policy p and reference q, and each member of the family by its name."""

import math

import pytest
import torch

from keel.divergences.family import NAMES

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
LOG_U = (P / Q).log()
U = (0.25, 1.2, 0.75, 2.5, 4.0)
DIGITS = 5.1e-7
INF = math.inf
NAMED = (*(n for n in NAMES if n != "alpha"), "alpha:0.5", "alpha:0.2", "alpha:2", "alpha:-1", "js:0.1", "js:0.9")
EACH = pytest.mark.parametrize("name", NAMED)


def fp64(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)
