"""Moments on outcomes of which some have no mass, in other units, of rare events, and of features that repeat."""

import math

import pytest
import torch
from tests.targets.example import PHI, Q, tensor
from torch.testing import assert_close

from keel.targets.moments import fit_multipliers

LQ = Q.log()
WITHOUT = tensor(-math.inf, 0, 0, -math.inf)  # the first and the last of four outcomes


@pytest.mark.parametrize("asked", [-1.0, 1.5])
def test_outcomes_without_mass_are_out_of_reach(asked):
    """Values -5 and 9 without mass, 0 and 1 with."""
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        fit_multipliers(tensor(-5, 0, 1, 9)[:, None], tensor(asked), WITHOUT)
    fit = fit_multipliers(tensor(-5, 0, 1, 9)[:, None], tensor(0.8), WITHOUT)
    assert_close(fit.multipliers, tensor(math.log(4)))


def test_outcomes_without_mass_do_not_help_to_reach_two_moments():
    """On (0, 0), (1, 0), (0, 1) the sum is at most 1; a fourth outcome (1, 1) has no mass."""
    corners = tensor(0, 1, 0, 1, 0, 0, 1, 1).reshape(2, 4).T
    log_weight = tensor(0, 0, 0, -math.inf)
    with pytest.raises(ValueError, match=r"at most 0\.7071, and they ask for 0\.8485"):
        fit_multipliers(corners, tensor(0.6, 0.6), log_weight)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_edge_of_reach_is_relative_to_the_range(unit):
    """A twentieth from either end is fine in every unit; a twentieth of a millionth is not."""
    phi = PHI[:, :1] * unit
    for share in (0.05, 0.95):
        fit = fit_multipliers(phi, tensor(share * unit), LQ)
        wanted = math.log(share / (1 - share)) - math.log(0.35 / 0.65)
        assert float(fit.multipliers) * unit == pytest.approx(wanted, rel=1e-9)
    for share in (5e-8, 1 - 5e-8):
        with pytest.raises(ValueError, match="can only lie strictly between"):
            fit_multipliers(phi, tensor(share * unit), LQ)


@pytest.mark.parametrize("start", [-1e6, 1e6])
def test_the_edge_of_reach_does_not_depend_on_where_the_range_lies(start):
    phi = PHI[:, :1] + start
    for share in (0.05, 0.95):
        fit = fit_multipliers(phi, tensor(start + share), LQ)
        wanted = math.log(share / (1 - share)) - math.log(0.35 / 0.65)
        assert float(fit.multipliers) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("rare", [1e-6, 1e-10, 1e-13])
def test_a_rare_event_made_likely(rare):
    """Its variance under the reference is as small as it is rare: lambda = log-odds of 1/2 less those of the event."""
    fit = fit_multipliers(tensor(0, 1)[:, None], tensor(0.5), tensor(math.log1p(-rare), math.log(rare)))
    assert float(fit.multipliers) == pytest.approx(math.log1p(-rare) - math.log(rare), rel=1e-9)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_a_feature_that_repeats_shares_its_multiplier(times):
    """log-odds of 0.7 less those of 0.35, in equal parts: the shortest of all solutions."""
    fit = fit_multipliers(PHI[:, :1].expand(5, times).contiguous(), torch.full((times,), 0.7).double(), LQ)
    assert_close(fit.multipliers, torch.full((times,), 1.466337 / times).double(), rtol=0, atol=6e-7)
