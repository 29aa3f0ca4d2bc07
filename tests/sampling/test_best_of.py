"""Best-of-N and its soft kin: exact laws by multisets of leaves, and what they say of Z and of the KL."""

import math

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    MEAN,
    POLICY,
    PRIOR,
    REWARD,
    TILT,
    Z,
    chain,
    estimates,
    leaf_law,
    leaves,
    sampled_law,
    total_variation,
)

from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain, mean_value_table
from keel.sampling.adaptive import AdaptiveBestOf
from keel.sampling.beam import BeamSearch
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.particle_filter import ParticleFilter
from keel.sampling.particles import best
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
    assert float(found.ess) == pytest.approx(4) and found.log_z.isnan().all()


# -- equal rewards -----------------------------------------------------------------------------------------------------

PASSED = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]).double()  # of a verifier: siblings may be equal


def verified(copies: int = 1) -> TabularChain:
    """The chain with rewards of 0 and 1."""
    return TabularChain(POLICY, PASSED, torch.zeros(copies, dtype=torch.long), mean_value_table(POLICY, PASSED))


def verified_law(sampler) -> torch.Tensor:
    """The exact law of what a sampler puts out there."""
    probability, found = law(lambda copies, rng: sampler(verified(copies), rng))
    return torch.zeros(8).double().index_add(0, leaves(found)[found.picked], probability)


@pytest.mark.parametrize(
    "sampler", [BestOf(2), BestOf(3), BestOf(5), SMC(2, BETA, ess_threshold=0.0, output="best")], ids=str
)
def test_equals_are_put_out_in_proportion_to_the_prior(sampler):
    n, none = sampler.num_particles, float(PRIOR[PASSED[0] == 0].sum())  # P(a completion fails)
    truth = PRIOR * (PASSED[0] * (1 - none**n) / (1 - none) + (1 - PASSED[0]) * none ** (n - 1))
    torch.testing.assert_close(verified_law(sampler), truth, atol=1e-12, rtol=0)
    found = sampler(verified(20_000), Sample(0))
    shares = torch.bincount(leaves(found)[found.picked], minlength=8) / 20_000
    assert bool(((shares - truth).abs() < 4.5 * (truth * (1 - truth) / 20_000).sqrt()).all())


def by_first_token(chain, x):
    """The same prediction for half of all completions."""
    return 1 - x.tokens[:, 0].double() / 2


@pytest.mark.parametrize(
    "sampler",
    [
        SMC(2, BETA, "multinomial", 2.0, output="best"),
        SMC(2, BETA, "systematic", 2.0, output="best"),
        ParticleFilter(2, BETA, "ratio"),
        BeamSearch(1, 2, "value", BETA, draw=True),
        BeamSearch(2, 2, "value", BETA, draw=True),
        AdaptiveBestOf(by_first_token, 2, 0.6, doubling=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_the_exact_law_is_that_of_many_runs_where_rewards_are_equal(sampler):
    exact, runs = verified_law(sampler), 20_000
    found = sampler(verified(runs), Sample(0))
    shares = torch.bincount(leaves(found)[found.picked], minlength=8) / runs
    assert bool(((shares - exact).abs() <= 4.5 * (exact * (1 - exact) / runs).sqrt() + 1e-12).all())


def test_no_place_is_favoured():
    for sampler in (BestOf(4), SMC(4, BETA, output="best")):
        table = chain(4000)
        table.rewards = torch.zeros_like(table.rewards)
        found = torch.bincount(sampler(table, Sample(0)).pick, minlength=4)
        assert found.tolist() == pytest.approx([1000] * 4, abs=4 * (4000 * 3 / 16) ** 0.5)


def test_best_of_scores_by_hand():
    score = torch.tensor([[1.0, 3.0, 3.0], [5.0, 2.0, 2.0], [-math.inf, -math.inf, -math.inf]]).double()
    among = torch.tensor([[True, True, False], [False, True, True], [False, True, False]])
    picks = torch.stack([best(score, Sample(seed), among) for seed in range(40)])
    assert picks[:, 0].unique().tolist() == [1] and picks[:, 2].unique().tolist() == [1]
    assert picks[:, 1].unique().tolist() == [1, 2]
    anything = torch.stack([best(score, Sample(seed)) for seed in range(40)])
    assert [anything[:, p].unique().tolist() for p in range(3)] == [[1, 2], [0], [0, 1, 2]]


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
