"""Resampling: the counts of every scheme by enumeration, the edges of the weights, and what SMC makes of them."""

import pytest
import torch
from tests.sampling.chain3 import BETA, MEAN, TILT, Z, estimates

from keel.core.chance import Sample, law
from keel.sampling.particles import effective_size
from keel.sampling.resampling import SCHEMES, ancestors, resample, systematic
from keel.sampling.smc import SMC

WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
VARIANCES = {
    "multinomial": (0.36, 0.64, 0.84, 0.96),
    "residual": (0.32, 0.48, 0.18, 0.42),
    "stratified": (0.24, 0.40, 0.40, 0.24),
    "systematic": (0.24, 0.16, 0.16, 0.24),
}


def counts(weights, scheme, number=None):
    """Every vector of counts with its probability."""
    n = len(weights)
    probability, found = law(lambda copies, rng: resample(weights.log().expand(copies, n), scheme, rng, count=number))
    return probability, torch.nn.functional.one_hot(found, n).sum(1).double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mean_and_variance_of_the_counts(scheme):
    probability, found = counts(WEIGHTS, scheme)
    mean = probability @ found
    variance = probability @ (found - mean) ** 2
    torch.testing.assert_close(mean, 4 * WEIGHTS, atol=1e-12, rtol=0)
    torch.testing.assert_close(variance, torch.tensor(VARIANCES[scheme]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("number", [1, 3, 6])
def test_as_many_as_asked_for(scheme, number):
    probability, found = counts(WEIGHTS, scheme, number)
    assert found.sum(1).eq(number).all()
    torch.testing.assert_close(probability @ found, number * WEIGHTS, atol=1e-12, rtol=0)


def test_effective_size_and_systematic_with_a_given_uniform():
    assert float(effective_size(WEIGHTS.log()[None])) == pytest.approx(10 / 3)
    assert systematic(WEIGHTS.log()[None], torch.tensor([0.5])).tolist() == [[1, 2, 3, 3]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_without_weight_is_chosen(scheme):
    _, found = counts(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64), scheme)
    assert not found[:, [0, 2, 4]].any() and found[:, [1, 3]].any()
    log_w = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(200, 3)  # one particle has it all
    assert resample(log_w, scheme, Sample(0)).eq(1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_ratios_of_weights_matter(scheme):
    log_w = WEIGHTS.log().expand(500, 4)
    expected = resample(log_w, scheme, Sample(3))
    assert torch.equal(resample(log_w - 700, scheme, Sample(3)), expected)  # exp would underflow
    assert torch.equal(resample((log_w + 2).float(), scheme, Sample(3)), expected)


def test_rounding_never_leads_past_the_last_weight():
    log_w = torch.full((1, 10), 0.1, dtype=torch.float64).log()
    log_w[0, 9] = -torch.inf
    assert ancestors(log_w, torch.tensor([[1 - 1e-17, 1.0, 0.0]], dtype=torch.float64)).tolist() == [[8, 8, 0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_particle_has_one_ancestor(scheme):
    assert resample(torch.zeros(3, 1), scheme, Sample(0)).tolist() == [[0], [0], [0]]


def test_an_unknown_scheme_is_named():
    with pytest.raises((ValueError, TypeError), match="wheel"):  # annotations may be checked before
        resample(torch.zeros(1, 2), "wheel", Sample(0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_leaves_smc_unbiased(scheme):
    mean, _, tilted = estimates(SMC(2, BETA, scheme, ess_threshold=2.0), MEAN)
    assert mean == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)
