"""Particle Gibbs: the exact kernel of a conditional sweep, its invariant law and its speed."""

from functools import cache

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    MEAN,
    PRIOR,
    REWARD,
    SOFT,
    Z,
    chain,
    estimates,
    leaf_law,
    sampled_law,
    total_variation,
)
from tests.sampling.test_soft_value import ByStep

from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.sampling.gibbs import ParticleGibbs, Path, sweep
from keel.sampling.smc import SMC, finish

VALUES = {"none": None, "mean": MEAN, "soft": SOFT, "three times the mean": 3 * MEAN}
TARGET = PRIOR * (REWARD[0] / BETA).exp() / (PRIOR * (REWARD[0] / BETA).exp()).sum()  # all digits of the tilt


def transition(make, leaves, n=2, known=True, **settings):
    """P(next path | reference) of a conditional sweep, exact; the values of the reference are known or asked again."""

    def run(copies, rng):
        table = make(copies)
        start = rng.categorical(torch.zeros(copies, leaves), "reference")
        tokens, x, values = table.space.sequences()[0][start], table.init(1), []
        for t in range(table.horizon):
            x = table.extend(x, tokens[:, t])
            values.append(table.value(x, rng))
        path = Path(list(tokens.unbind(1)), torch.stack(values, 1) if known else None)
        done = sweep(table, rng, n, BETA, path, **settings)
        found = finish(done.swarm, table, rng, BETA, "draw")
        return start, table.leaf(found.states)[found.picked]

    probability, (before, after) = law(run)
    joint = torch.zeros(leaves**2).double().index_add(0, before * leaves + after, probability)
    return leaves * joint.view(leaves, leaves)


@cache
def kernel(n, value, known=True, **settings):
    """That of the three-step chain."""
    return transition(lambda copies: chain(copies, VALUES[value]), 8, n, known, **settings)


@pytest.mark.parametrize("known", [True, False])
def test_one_sweep_leaves_the_tilt_where_it_is(known):
    matrix = kernel(2, "mean", known)
    torch.testing.assert_close(matrix.sum(1), torch.ones(8).double(), atol=1e-12, rtol=0)
    assert total_variation(TARGET @ matrix, TARGET) < 1e-12
    variations = [total_variation(PRIOR @ torch.linalg.matrix_power(matrix, count), TARGET) for count in (1, 5, 20)]
    assert variations == pytest.approx([0.454559, 0.270758, 0.091581], abs=1e-6)


@pytest.mark.parametrize(
    ("value", "threshold"), [("none", 2.0), ("soft", 0.75), ("mean", 0.0), ("three times the mean", 2.0)]
)
def test_it_is_invariant_for_every_potential_and_threshold(value, threshold):
    matrix = kernel(2, value, ess_threshold=threshold)
    assert total_variation(TARGET @ matrix, TARGET) < 1e-12
    assert total_variation(PRIOR @ matrix, TARGET) < total_variation(PRIOR, TARGET)


def test_three_particles_are_invariant_too_and_faster():
    matrix = kernel(3, "mean", ess_threshold=0.75)
    assert total_variation(TARGET @ matrix, TARGET) < 1e-12
    assert total_variation(PRIOR @ matrix, TARGET) < total_variation(PRIOR @ kernel(2, "mean"), TARGET)


def test_full_weights_have_another_invariant_law():
    matrix = kernel(2, "soft", weight="full")
    psi, leaf = (SOFT[0] / BETA).exp(), torch.arange(8)
    wrong = PRIOR * (REWARD[0] / BETA).exp() * psi[1 + leaf // 4] * psi[3 + leaf // 2]
    wrong /= wrong.sum()
    assert total_variation(wrong @ matrix, wrong) < 1e-12
    assert total_variation(TARGET @ matrix, TARGET) > 0.02


def test_paths_of_different_lengths():
    space = SequenceSpace(vocab=2, horizon=3, eos=1)  # they end as 1, 01, 001, and 000 at the horizon
    policy = TabularPolicy(space, torch.zeros(1, space.prefixes, 2, dtype=torch.float64))
    reward, value = torch.tensor([[0.3, -0.2, 0.9, 0.1]]).double(), torch.linspace(-1, 1, space.prefixes)[None].double()

    def make(copies):
        return TabularChain(policy, reward, torch.zeros(copies, dtype=torch.long), value)

    target = 0.5 ** space.sequences()[1].double() * (reward[0] / BETA).exp()
    target /= target.sum()
    for known in (True, False):
        matrix = transition(make, 4, known=known)
        assert total_variation(target @ matrix, target) < 1e-12 < 0.01 < float((matrix - target).abs().max())


def test_one_sweep_alone_is_smc():
    one = ParticleGibbs(2, 1, BETA)
    smc = SMC(2, BETA, "multinomial", ess_threshold=2.0)
    torch.testing.assert_close(leaf_law(one, MEAN), leaf_law(smc, MEAN), atol=1e-12, rtol=0)
    assert one(chain(), Sample(0)).details["moved"].isnan().all()


def test_two_sweeps_are_smc_and_the_kernel():
    seldom = ParticleGibbs(2, 2, BETA, ess_threshold=0.0)
    expected = leaf_law(SMC(2, BETA, ess_threshold=0.0), MEAN) @ kernel(2, "mean", ess_threshold=0.0)
    torch.testing.assert_close(leaf_law(seldom, MEAN), expected, atol=1e-12, rtol=0)
    always = leaf_law(SMC(2, BETA, "multinomial", ess_threshold=2.0), MEAN) @ kernel(2, "mean")
    assert total_variation(sampled_law(ParticleGibbs(2, 2, BETA), 20_000, value=MEAN), always) < 0.013


def test_z_is_that_of_the_first_sweep():
    found = ParticleGibbs(4, 3, BETA)(chain(200, MEAN), Sample(0))
    first = ParticleGibbs(4, 1, BETA)(chain(200, MEAN), Sample(0))
    assert torch.equal(found.log_z, first.log_z) and torch.equal(found.log_z_error, first.log_z_error)
    mean, deviation, _ = estimates(ParticleGibbs(2, 1, BETA), MEAN)
    assert (mean, deviation) == pytest.approx((Z, 11.155379), abs=1e-6)
    assert ParticleGibbs(4, 2, BETA, weight="full")(chain(2, MEAN), Sample(0)).log_z.isnan().all()


def test_sweeps_approach_the_tilt_where_one_filter_does_not():
    few = total_variation(sampled_law(ParticleGibbs(4, 1, BETA), 4000, value=MEAN), TARGET)
    many = total_variation(sampled_law(ParticleGibbs(4, 10, BETA), 4000, value=MEAN), TARGET)
    assert many < 0.06 < 0.2 < few


def test_the_path_goes_back_through_the_ancestors():
    table = chain(300, MEAN)
    done = sweep(table, Sample(0), 4, BETA)
    path, ends = done.path(torch.full((300,), 2)), table.select(done.swarm.x, torch.arange(300) * 4 + 2)
    x = table.init(1)
    for t in range(3):
        x = table.extend(x, path.actions[t])
        torch.testing.assert_close(path.values[:, t], table.value(x, Sample(0)))
    assert torch.equal(x.tokens, ends.tokens) and torch.equal(x.logp, ends.logp)


def test_rewards_of_the_reference_are_not_asked_for_again():
    table = chain(50, MEAN)
    ParticleGibbs(4, 3, BETA)(table, Sample(0))
    assert table.meter.rewards.tolist() == [4 + 3 + 3] * 50


def test_moved_says_how_often_the_reference_was_left():
    still, lively = (ParticleGibbs(n, 12, BETA)(chain(50, MEAN), Sample(0)).details["moved"] for n in (2, 32))
    assert 0.2 < float(still.mean()) < 0.5 < 0.85 < float(lively.mean())


def test_sweeps_by_steps_are_the_same():
    sampler = ParticleGibbs(4, 3, BETA)
    steps, tokens = sampler(ByStep(chain(200, MEAN)), Sample(0)), sampler(chain(200, MEAN), Sample(0))
    assert torch.equal(steps.states.tokens, tokens.states.tokens) and torch.equal(steps.pick, tokens.pick)
    torch.testing.assert_close((steps.reward, steps.log_w), (tokens.reward, tokens.log_w))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ParticleGibbs(num_particles=1), "num_particles must be at least 2"),
        (lambda: ParticleGibbs(num_sweeps=0), "num_sweeps"),
        (lambda: ParticleGibbs(beta=0.0), "beta"),
        (lambda: ParticleGibbs(weight="half"), "weight"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, name):
    with pytest.raises((ValueError, TypeError), match=name):  # annotations may be checked before
        make()
