"""Best-of-N and its soft kin: exact laws by multisets of leaves, and what they say of Z and of the KL."""

import math

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    MEAN,
    PRIOR,
    REWARD,
    TILT,
    Z,
    chain,
    estimates,
    leaf_law,
    sampled_law,
    total_variation,
)

from keel.core.chance import Sample, law
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.smc import SMC

BEST_OF_4 = torch.tensor([0.025590, 0.101603, 0.013319, 0.295985, 0.001050, 0.302546, 0.008839, 0.251069]).double()
SOFT_BEST_OF_4 = torch.tensor([0.081580, 0.077743, 0.027458, 0.243564, 0.011243, 0.259127, 0.016059, 0.283225]).double()


def order_law(n):
    """F(r)^N - F(r-)^N."""
    upto = (PRIOR[None] * (REWARD[0] <= REWARD[0][:, None])).sum(1)
    below = (PRIOR[None] * (REWARD[0] < REWARD[0][:, None])).sum(1)
    return upto**n - below**n


def divergence(p):
    """KL(p || p_0)."""
    return float((p * (p / PRIOR).log()).sum())


def test_the_rows_of_the_worked_example():
    torch.testing.assert_close(leaf_law(BestOf(4)), BEST_OF_4, atol=1e-6, rtol=0)
    torch.testing.assert_close(leaf_law(SoftBestOf(4, BETA)), SOFT_BEST_OF_4, atol=1e-6, rtol=0)
    assert total_variation(leaf_law(BestOf(4))) == pytest.approx(0.214344, abs=1e-6)


@pytest.mark.parametrize(("n", "variation"), [(1, 0.572008), (2, 0.435223), (4, 0.273316), (8, 0.162101)])
def test_soft_best_of_n_approaches_the_tilt(n, variation):
    assert total_variation(leaf_law(SoftBestOf(n, BETA))) == pytest.approx(variation, abs=1e-6)


@pytest.mark.parametrize(("n", "reward", "kl"), [(4, 1.343513, 0.609883), (8, 1.648024, 1.155280)])
def test_best_of_n_is_the_law_of_the_largest(n, reward, kl):
    found = leaf_law(BestOf(n))
    torch.testing.assert_close(found, order_law(n), atol=1e-12, rtol=0)
    assert float(found @ REWARD[0]) == pytest.approx(reward, abs=1e-6)
    assert divergence(found) == pytest.approx(kl, abs=1e-6)
    bound = BestOf(n)(chain(), Sample(0)).kl
    assert float(bound) == pytest.approx(math.log(n) - (n - 1) / n) and divergence(found) < float(bound)


def test_best_of_16_overshoots_the_tilt():
    assert float(order_law(16) @ REWARD[0]) == pytest.approx(1.862160, abs=1e-6)
    shares = sampled_law(BestOf(16), 20_000)
    assert float(shares @ REWARD[0]) == pytest.approx(1.862160, abs=4 * 0.25 / 20_000**0.5)
    assert float(shares @ REWARD[0]) > float(TILT @ REWARD[0])


def test_best_of_n_sees_the_order_of_rewards_only():
    table = chain(500)
    table.rewards = table.rewards.exp() - 3
    stretched, plain = BestOf(4)(table, Sample(1)), BestOf(4)(chain(500), Sample(1))
    assert torch.equal(stretched.pick, plain.pick) and torch.equal(stretched.states.tokens, plain.states.tokens)


def test_weights_of_best_of_n_are_spread_over_equals():
    table = chain()
    table.rewards = torch.zeros_like(table.rewards)
    found = BestOf(4)(table, Sample(0))
    assert float(found.ess) == pytest.approx(4) and int(found.pick) == 0
    assert found.log_z.isnan().all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_estimate_of_z_is_unbiased(n):
    mean, _, tilted = estimates(SoftBestOf(n, BETA))
    assert mean == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_kl_of_soft_best_of_n_is_a_bound(n):
    probability, found = law(lambda copies, rng: SoftBestOf(n, BETA)(chain(copies), rng))
    weights = found.log_w.exp()
    direct = torch.special.xlogy(weights, n * weights).sum(1)  # sum W log(N W)
    torch.testing.assert_close(found.kl, direct, atol=1e-10, rtol=0)
    assert found.kl_is_bound
    spent, output = float(probability @ found.kl), divergence(leaf_law(SoftBestOf(n, BETA)))
    assert output <= spent + 1e-12 and (n == 1 or output < spent)


@pytest.mark.parametrize(
    ("sampler", "value", "runs"),
    [
        (SoftBestOf(64, BETA), None, 4000),
        (SMC(64, BETA, "multinomial", ess_threshold=0.5), MEAN, 2000),
        (SMC(64, BETA, "multinomial", ess_threshold=2.0), MEAN, 2000),
    ],
)
def test_the_standard_error_of_log_z_is_the_deviation_of_many_runs(sampler, value, runs):
    found = sampler(chain(runs, value), Sample(1))
    true = (found.log_z.exp() / Z).std()
    claimed = found.log_z_error.square().mean().sqrt()
    assert 0.92 < float(claimed / true) < 1.04  # measured: 0.98, 0.97, 0.99


def test_the_standard_error_is_too_small_where_resampling_is_not_multinomial():
    found = SMC(64, BETA, "systematic", ess_threshold=2.0)(chain(3000, MEAN), Sample(1))
    ratio = found.log_z_error.square().mean().sqrt() / (found.log_z.exp() / Z).std()
    assert 0.7 < float(ratio) < 0.85  # measured: 0.77


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: BestOf(num_particles=0), "num_particles"),
        (lambda: SoftBestOf(num_particles=0), "num_particles"),
        (lambda: SoftBestOf(beta=0.0), "beta"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
        make()
