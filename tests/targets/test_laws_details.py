"""log Z with what it says of itself, rounds of curation, and the best of n in numbers."""

import math

import pytest
import torch
from tests.targets.example import Q, tensor
from torch.testing import assert_close

from keel.targets.curated import curated_fixed_point
from keel.targets.order import best_of_n_log_prob
from keel.targets.partition import log_z_samples, log_z_sum

# -- partition functions ---------------------------------------------------------------------------------------------


def test_concentration_of_a_sum():
    """Shares 1/2, 1/4, 1/4 of 4 e: one over 3/8."""
    found = log_z_sum(tensor(2, 1, 1).log() + 1)
    assert float(found.log_z) == pytest.approx(math.log(4) + 1)
    assert (float(found.effective_samples), float(found.largest_weight)) == (pytest.approx(8 / 3), pytest.approx(0.5))


def test_concentration_of_the_sums_of_two_prompts():
    """Shares 1/2, 1/4, 1/4 and 1, 0, 0."""
    found = log_z_sum(torch.stack([tensor(2, 1, 1).log(), tensor(3, 0, 0).log()]))
    assert found.log_z.tolist() == pytest.approx([math.log(4), math.log(3)])
    assert found.effective_samples.tolist() == pytest.approx([8 / 3, 1.0])
    assert found.largest_weight.tolist() == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(
    ("others", "first", "warns"),
    [
        (99, 99 / 4, True),  # a fifth of the weight, and 21.6 effective samples
        (99, 9.0, False),  # a twelfth
        (9, 1.00005, False),  # ten samples cannot be more than ten
        (14, 1.0, False),
        (8, 1.0, True),
    ],
)
def test_when_an_estimate_is_called_unreliable(others, first, warns):
    """Below ten effective samples, or with one above a tenth of the weight if there are more than ten."""
    found = log_z_samples(tensor(first, *([1.0] * others)).log())
    assert float(found.largest_weight) == pytest.approx(first / (first + others))
    assert (found.warning is not None) == warns


def test_one_bad_prompt_of_three_is_told():
    log_weight = torch.zeros(3, 64, dtype=torch.float64)
    log_weight[1, 5] = 9.0
    warning = log_z_samples(log_weight).warning
    assert warning is not None and warning.startswith("1 of 3 estimates of log Z rest on a few of their 64 samples")


def test_equal_weights_have_no_error():
    """1 / G is no binary fraction: rounding must not make a variance negative."""
    for count in range(2, 200):
        found = log_z_samples(torch.full((count,), 0.3, dtype=torch.float64))
        assert float(found.standard_error) == pytest.approx(0, abs=1e-7)
        assert float(found.log_z) == pytest.approx(0.3)


# -- curated retraining ----------------------------------------------------------------------------------------------


def test_rest_is_where_no_probability_changes():
    """Weights 1/4, 1, 1 on thirds: half of the way to (1, 4, 4) / 9 is -1/9, 1/18, 1/18."""
    thirds, reward = torch.zeros(3, dtype=torch.float64), tensor(-math.log(4), 0, 0)
    with pytest.raises(ValueError, match=r"not settled after 1 rounds \(last change 1\.1e-01\)"):
        curated_fixed_point(thirds, reward, math.inf, 1.0, tolerance=0.08, max_rounds=1)
    found = curated_fixed_point(thirds, reward, math.inf, 1.0, tolerance=0.12, max_rounds=1)
    assert_close(found.prob(), tensor(4, 7, 7) / 18)


def test_without_curated_samples_the_data_stay():
    found = curated_fixed_point(Q.log(), tensor(0, 1, 2, 3, 4), 4, 0.0, tolerance=0.0, max_rounds=1)
    assert_close(found.prob(), Q)


# -- the best of n ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 10, 100, 1000])
def test_a_near_certain_best(n):
    """Log-probability log(1 - 2^-n) of the better of two, down to -2^-1000."""
    found = best_of_n_log_prob(tensor(0.5, 0.5).log(), tensor(0, 1), n)
    assert found.tolist() == pytest.approx([-n * math.log(2), math.log1p(-(0.5**n))], rel=1e-12, abs=0)


def test_ties_too_rare_for_their_type():
    """Two equally bad outcomes of mass e^-800 and a third of it: F^2 in shares 3/4 and 1/4, F = 4/3 e^-800."""
    log_ref = tensor(0, -800, -800 - math.log(3))
    found = best_of_n_log_prob(log_ref, tensor(1, 0, 0), 2)
    log_f = -800 + math.log(4 / 3)
    wanted = [0.0, 2 * log_f + math.log(3 / 4), 2 * log_f + math.log(1 / 4)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-13, abs=1e-300)
