"""The kernel in numbers."""

import pytest
import torch

from keel.divergences.cauchy_schwarz import log_gram


def test_kernel_of_several_dimensions():
    """Squared distances 25 and 1, over 2 * 4."""
    a = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert log_gram(a, b, 2.0)[0].tolist() == pytest.approx([-25 / 8, -1 / 8], rel=1e-12)
