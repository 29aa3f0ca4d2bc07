"""The particle filter: full and ratio weights are two laws, and one prompt never moves another."""

import math

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    LOG_Z,
    MEAN,
    POLICY,
    PRIOR,
    REWARD,
    SOFT,
    TILT,
    Z,
    chain,
    estimates,
    leaf_law,
    leaves,
    total_variation,
)

from keel.core.chain import TokenChain
from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain, mean_value_table
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.entropic import EntropicParticleFilter
from keel.sampling.gibbs import ParticleGibbs
from keel.sampling.particle_filter import ParticleFilter
from keel.sampling.rejection import QuasiRejection, Rejection
from keel.sampling.smc import SMC

WRONG = torch.tensor([0.002605, 0.004812, 0.019500, 0.913914, 0.000467, 0.046210, 0.000491, 0.012002]).double()
RATIO = {"none": (12.117529, 0.456875), "mean": (11.155379, 0.444702), "soft": (9.619334, 0.372582)}
VALUES = {"none": None, "mean": MEAN, "soft": SOFT}


def weighted_leaves(found):
    """The law of the weighted particles of one prompt."""
    return torch.zeros(8).double().index_add(0, leaves(found), found.log_w[0].exp())


def test_full_weights_of_many_particles_are_the_law_that_counts_every_score():
    found = ParticleFilter(20_000, BETA, "full")(chain(1, SOFT), Sample(0))
    shares = weighted_leaves(found)
    torch.testing.assert_close(shares, WRONG, atol=0.004, rtol=0)
    assert total_variation(shares, WRONG) < 0.005
    assert total_variation(shares) == pytest.approx(0.413884, abs=0.004)  # and not the tilt


def test_full_weights_have_no_estimate_of_z_but_one_of_their_own():
    found = ParticleFilter(20_000, BETA, "full")(chain(1, SOFT), Sample(1))
    assert found.log_z.isnan().all() and found.log_z_error.isnan().all()
    psi = (SOFT[0] / BETA).exp()
    level = torch.arange(8)
    own = float((PRIOR * (REWARD[0] / BETA).exp() * psi[1 + level // 4] * psi[3 + level // 2]).sum())
    assert float(found.details["log_normaliser"]) == pytest.approx(math.log(own), abs=0.05)
    kl = float((WRONG * (WRONG / PRIOR).log()).sum())
    assert float(found.kl) == pytest.approx(kl, abs=0.05)


def test_ratio_weights_of_many_particles_are_the_tilt():
    found = ParticleFilter(20_000, BETA, "ratio")(chain(1, SOFT), Sample(0))
    assert total_variation(weighted_leaves(found)) < 0.01
    assert float(found.log_z) == pytest.approx(LOG_Z, abs=0.05)


@pytest.mark.parametrize("value", VALUES)
def test_ratio_weights_have_the_table_of_smc(value):
    sampler = ParticleFilter(2, BETA, "ratio", output="draw")
    mean, deviation, tilted = estimates(sampler, VALUES[value])
    assert (mean, deviation) == pytest.approx((Z, RATIO[value][0]), abs=1e-6)
    assert total_variation(leaf_law(sampler, VALUES[value])) == pytest.approx(RATIO[value][1], abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight", ["full", "ratio"])
@pytest.mark.parametrize("n", [1, 2])
def test_scores_that_are_all_equal_leave_the_prior(weight, n):
    level = 0.7 if weight == "ratio" else 0.0  # odds of one, or any other constant

    def blind(copies, rng):
        values = torch.full((1, 7), level, dtype=torch.float64)
        table = TabularChain(POLICY, torch.full_like(REWARD, level), torch.zeros(copies, dtype=torch.long), values)
        return ParticleFilter(n, BETA, weight, output="draw")(table, rng)

    probability, found = law(blind)
    shares = torch.zeros(8).double().index_add(0, leaves(found)[found.picked], probability)
    torch.testing.assert_close(shares, PRIOR, atol=1e-12, rtol=0)


def test_the_best_is_by_reward_and_a_draw_by_weight():
    best = ParticleFilter(16, BETA, "full", output="best")(chain(200, SOFT), Sample(0))
    draw = ParticleFilter(16, BETA, "full", output="draw")(chain(200, SOFT), Sample(0))
    torch.testing.assert_close(best.reward, draw.reward)
    torch.testing.assert_close(best.reward, REWARD[0][leaves(best)].view(200, 16))
    chosen = best.reward.gather(1, best.pick[:, None])[:, 0]
    assert torch.equal(chosen, best.reward.amax(1))
    assert draw.reward.gather(1, draw.pick[:, None])[:, 0].mean() < chosen.mean()


def test_an_early_end_is_weighted_once():
    space = SequenceSpace(vocab=2, horizon=3, eos=1)  # ends: 1, 01, 001, and 000 at the horizon
    policy = TabularPolicy(space, torch.zeros(1, space.prefixes, 2, dtype=torch.float64))
    reward = torch.zeros(1, len(space.sequences()[0]), dtype=torch.float64)
    one = int((space.sequences()[1] == 1).nonzero()[0, 0])
    reward[0, one] = BETA * math.log(3)
    table = TabularChain(policy, reward)
    found = ParticleFilter(20_000, BETA, "full")(table, Sample(0))
    share = found.log_w[0].exp()[found.states.length == 1].sum()
    assert float(share) == pytest.approx(1.5 / 2, abs=0.015)  # weighted anew in each round it would be 27 / 28


SAMPLERS = {
    "best of n": BestOf(4),
    "soft best of n": SoftBestOf(4, BETA),
    "smc, now and then": SMC(4, BETA, "systematic", 0.7),
    "smc, multinomial": SMC(4, BETA, "multinomial", 0.7),
    "smc, residual": SMC(4, BETA, "residual", 0.7),
    "rejection": Rejection(3.0, 2, 8, BETA),
    "quasi rejection": QuasiRejection(0.9, "quantile", 2, 8, BETA),
    "particle filter": ParticleFilter(4, BETA),
    "particle gibbs": ParticleGibbs(3, 3, BETA, ess_threshold=0.8),
    "entropic": EntropicParticleFilter(4, BETA, look_ahead=True),
    "entropic, corrected": EntropicParticleFilter(4, BETA, "ratio", correct=True, output="draw"),
}


class TokenByToken(TabularChain):
    """Completions ask for randomness as often as the longest of them is long, as those of most chains do."""

    complete = TokenChain.complete


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_happens_to_a_prompt_depends_on_no_other(name):
    space = SequenceSpace(vocab=3, horizon=4, eos=2, prompts=24)  # completions of many lengths
    seeded = torch.Generator().manual_seed(0)
    policy = TabularPolicy(space, torch.randn(24, space.prefixes, 3, generator=seeded).double())
    reward = torch.randn(24, len(space.sequences()[0]), generator=seeded).double().clamp(max=3)
    value = mean_value_table(policy, reward)

    def run(prompts):
        index = torch.tensor(prompts)
        found = SAMPLERS[name](TokenByToken(policy, reward, index, value), Sample(5, index + 100))
        texts = [found.states.text(int(row)) for row in found.picked]
        return texts, {"log_z": found.log_z, "kl": found.kl, "log_z_error": found.log_z_error, **found.details}

    together, among = run(list(range(24)))
    for prompt in range(0, 24, 3):
        alone, numbers = run([prompt])
        assert alone[0] == together[prompt]
        for key, number in numbers.items():
            torch.testing.assert_close(among[key][prompt], number[0], atol=1e-9, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ParticleFilter(num_particles=0), "num_particles"),
        (lambda: ParticleFilter(beta=0.0), "beta"),
        (lambda: ParticleFilter(weight="half"), "weight"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, name):
    with pytest.raises((ValueError, TypeError), match=name):  # annotations may be checked before
        make()
