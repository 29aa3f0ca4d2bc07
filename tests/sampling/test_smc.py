"""SMC on the three-step chain: every number of the worked example, by enumeration of all that can happen."""

import math

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    MEAN,
    PRIOR,
    REWARD,
    SOFT,
    TILT,
    Z,
    chain,
    estimates,
    leaf_law,
    leaves,
    sampled_law,
    total_variation,
)

from keel.core.chance import Sample
from keel.sampling.kernels import Twisted
from keel.sampling.smc import SMC

VALUES = {"none": None, "mean": MEAN, "soft": SOFT}
TABLE = {  # value, N -> sd of Z_hat, total variation of the pick
    ("none", 2): (12.117529, 0.456875),
    ("none", 3): (10.285831, 0.372956),
    ("mean", 2): (11.155379, 0.444702),
    ("mean", 3): (9.407064, 0.349227),
    ("soft", 2): (9.619334, 0.372582),
    ("soft", 3): (7.575338, 0.246529),
}


@pytest.mark.parametrize(("value", "n"), list(TABLE))
def test_the_table_of_the_worked_example(value, n):
    sampler = SMC(n, BETA, "multinomial", ess_threshold=2.0)
    mean, deviation, tilted = estimates(sampler, VALUES[value])
    variation = total_variation(leaf_law(sampler, VALUES[value]))
    assert mean == pytest.approx(Z, abs=1e-6)
    assert (deviation, variation) == pytest.approx(TABLE[value, n], abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_the_exact_value_and_its_kernel_one_particle_is_enough(n):
    mean, deviation, _ = estimates(SMC(n, BETA, kernel=Twisted()), SOFT)
    assert mean == pytest.approx(Z, abs=1e-6) and deviation == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(leaf_law(SMC(n, BETA, kernel=Twisted()), SOFT), TILT, atol=1e-6, rtol=0)


def test_systematic_resampling_and_a_threshold():
    systematic = SMC(2, BETA, "systematic", ess_threshold=2.0)
    mean, deviation, _ = estimates(systematic, MEAN)
    assert (mean, deviation) == pytest.approx((Z, 11.206750), abs=1e-5)
    assert total_variation(leaf_law(systematic, MEAN)) == pytest.approx(0.436094, abs=1e-6)
    rarely = SMC(2, BETA, "multinomial", ess_threshold=0.75)
    mean, deviation, _ = estimates(rarely, MEAN)
    assert (mean, deviation) == pytest.approx((Z, 11.768576), abs=1e-5)
    assert total_variation(leaf_law(rarely, MEAN)) == pytest.approx(0.443627, abs=1e-6)


def test_one_particle_without_a_value_is_the_prior():
    torch.testing.assert_close(leaf_law(SMC(1, BETA)), PRIOR, atol=1e-12, rtol=0)


def test_many_particles_approach_the_tilt():
    shares = sampled_law(SMC(64, BETA), 4000, value=MEAN)
    assert total_variation(shares) < 0.03


def test_without_a_tilt_the_prior_is_left_and_rewards_are_known():
    found = SMC(4, float("inf"))(chain(3), Sample(0))
    assert bool((found.log_w == -math.log(4)).all()) and found.log_z.abs().max() < 1e-12
    assert torch.equal(found.reward.flatten(), REWARD[0][leaves(found)])
