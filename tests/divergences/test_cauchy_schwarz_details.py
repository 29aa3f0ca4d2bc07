"""The kernel in numbers."""

import pytest
import torch

from keel.divergences.cauchy_schwarz import cauchy_schwarz_information, log_gram


def test_kernel_of_several_dimensions():
    """Squared distances 25 and 1, over 2 * 4."""
    a = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    assert log_gram(a, b, 2.0)[0].tolist() == pytest.approx([-25 / 8, -1 / 8], rel=1e-12)


def test_normalised_information_of_wide_kernels_is_the_squared_correlation():
    """To second order in the distances I(x, z) is the squared covariance, in units of the widths; 1e-10 is not 0."""
    x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    z = torch.tensor([1.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    # deviations (-2, -1, 0, 3) and (-1, -2, 1, 2): 10 / sqrt(14 * 10)
    found = cauchy_schwarz_information(x[:, None], z[:, None], 500.0, 500.0, normalised=True)
    assert float(found) == pytest.approx(100 / 140, rel=1e-3)
