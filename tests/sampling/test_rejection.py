"""Rejection and quasi rejection: laws of what is accepted, rates, divergences, and the cases without luck."""

import math

import pytest
import torch
from tests.sampling.chain3 import BETA, POLICY, PRIOR, REWARD, TILT, Z, chain, leaves, sampled_law, total_variation

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.sampling.rejection import QuasiRejection, Rejection, trade_off

LOG_W = REWARD[0] / BETA
TARGET = PRIOR * LOG_W.exp() / (PRIOR * LOG_W.exp()).sum()  # all digits of the tilt
RATE = 0.165134  # Z exp(-r_max / beta)


def clipped_law(ceiling):
    """p_c, and the rate at which it is accepted."""
    mass = PRIOR * LOG_W.clamp(max=ceiling).exp()
    return mass / mass.sum(), float(mass.sum()) / math.exp(ceiling)


def laws(sampler):
    """P(accepted), the law of what is accepted, and that of the last resort."""
    probability, found = law(lambda copies, rng: sampler(chain(copies), rng))
    leaf, accepted = leaves(found)[found.picked], found.details["accepted"]
    shares = [torch.zeros(8).double().index_add(0, leaf, probability * part) for part in (accepted, 1 - accepted)]
    return float(shares[0].sum()), shares[0] / shares[0].sum(), shares[1] / shares[1].sum()


@pytest.mark.parametrize(("n", "limit"), [(1, 1), (1, 3), (2, 2), (2, 4)])
def test_what_is_accepted_is_the_tilt_however_the_rounds_are_cut(n, limit):
    rate, accepted, _ = laws(Rejection(2.0, n, limit, BETA))
    torch.testing.assert_close(accepted, TARGET, atol=1e-12, rtol=0)
    torch.testing.assert_close(accepted, TILT, atol=1e-6, rtol=0)
    assert rate == pytest.approx(1 - (1 - RATE) ** limit, abs=1e-5)


def test_the_accept_rate_gives_z():
    probability, found = law(lambda copies, rng: Rejection(2.0, 2, 4, BETA)(chain(copies), rng))
    assert float(probability @ found.details["accept_rate"]) == pytest.approx(RATE, abs=1e-6)
    assert float(probability @ found.log_z.exp()) == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(found.log_z, found.details["accept_rate"].log() + 2.0 / BETA, atol=1e-10, rtol=0)


def test_a_loose_bound_costs_samples_and_nothing_else():
    rate, accepted, _ = laws(Rejection(2.5, 1, 2, BETA))
    torch.testing.assert_close(accepted, TARGET, atol=1e-12, rtol=0)
    assert rate == pytest.approx(1 - (1 - RATE * math.exp(-1)) ** 2, abs=1e-5)


def test_enough_samples_draw_from_the_tilt_and_say_how_many():
    found = Rejection(2.0, 4, 200, BETA)(chain(20_000), Sample(0))
    assert found.details["accepted"].all()
    assert total_variation(torch.bincount(leaves(found)[found.picked], minlength=8) / 20_000) < 0.012
    samples = found.details["samples"]
    none = (1 - RATE) ** 4  # a round of 4 without luck
    assert float(samples.mean()) == pytest.approx(4 / (1 - none), abs=0.15)
    assert samples.min() == 4 and samples.eq(4).double().mean() == pytest.approx(1 - none, abs=0.015)
    assert found.kl.mean() < float((TARGET * (TARGET / PRIOR).log()).sum()) + 0.1


def test_the_last_resort_is_drawn_from_all_that_was_seen():
    _, _, one_round = laws(Rejection(2.0, 2, 2, BETA))
    _, _, two_rounds = laws(Rejection(2.0, 1, 2, BETA))
    torch.testing.assert_close(one_round, two_rounds, atol=1e-12, rtol=0)
    found = Rejection(60.0, 4, 8, BETA)(chain(200), Sample(0))
    assert not found.details["accepted"].any() and found.details["samples"].eq(8).all()


def test_weights_are_those_of_the_accepted():
    found = Rejection(2.0, 8, 64, BETA)(chain(300), Sample(2))
    assert (found.log_w.gather(1, found.pick[:, None]) > -math.inf).all()
    inside = found.log_w > -math.inf
    torch.testing.assert_close(found.ess, inside.sum(1).double())


def test_a_reward_above_the_bound_is_an_error_that_names_both():
    with pytest.raises(UserError, match=r"a reward of 2 is above the bound of 1\.5.*Raise the bound"):
        Rejection(1.5, 16, 64, BETA)(chain(8), Sample(0))


class Wasteful(TabularChain):
    """Draws for all prompts, whoever is asked for."""

    def complete(self, x, m, rng, where=None):
        """See `Chain`."""
        return super().complete(x, m, rng)


@pytest.mark.parametrize("sampler", [Rejection(2.0, 2, 100, BETA), QuasiRejection(3.0, "log_weight", 2, 100, BETA)])
def test_a_prompt_that_has_accepted_costs_nothing_more_and_its_result_is_the_same(sampler):
    table, wasteful = chain(400), Wasteful(POLICY, REWARD, torch.zeros(400, dtype=torch.long))
    found, other = sampler(table, Sample(0)), sampler(wasteful, Sample(0))
    samples = found.details["samples"].long()
    assert len(samples.unique()) > 4
    assert torch.equal(table.meter.rewards, samples) and torch.equal(table.meter.generated, 3 * samples)
    assert wasteful.meter.generated.unique().tolist() == [3 * int(samples.max())]
    assert torch.equal(found.states.tokens, other.states.tokens) and torch.equal(found.pick, other.pick)
    torch.testing.assert_close((found.log_w, found.log_z, found.reward), (other.log_w, other.log_z, other.reward))


@pytest.mark.parametrize("ceiling", [0.5, 2.0, 3.0, 4.0])
def test_quasi_rejection_accepts_the_law_of_its_ceiling(ceiling):
    exact, rate = clipped_law(ceiling)
    lucky, accepted, _ = laws(QuasiRejection(ceiling, "log_weight", 2, 4, BETA))
    torch.testing.assert_close(accepted, exact, atol=1e-12, rtol=0)
    assert lucky == pytest.approx(1 - (1 - rate) ** 4, abs=1e-12)


def test_exact_numbers_of_the_ceiling_at_exp_2():
    exact, rate = clipped_law(2.0)
    assert rate == pytest.approx(0.477313, abs=1e-6)
    assert total_variation(exact, TARGET) == pytest.approx(0.348614, abs=1e-6)
    assert total_variation(clipped_law(4.0)[0], TARGET) == pytest.approx(0, abs=1e-12)


def test_the_estimated_divergences_converge_to_the_exact_ones():
    found = QuasiRejection(2.0, "log_weight", 50_000, 50_000, BETA)(chain(4), Sample(0))
    exact, rate = clipped_law(2.0)
    kl = float((exact * (exact / TARGET).log()).sum())
    assert found.details["total_variation"].tolist() == pytest.approx([total_variation(exact, TARGET)] * 4, abs=0.006)
    assert found.details["kl_to_tilt"].tolist() == pytest.approx([kl] * 4, abs=0.012)
    assert found.details["accept_rate"].tolist() == pytest.approx([rate] * 4, abs=0.006)
    assert found.log_z.exp().tolist() == pytest.approx([Z] * 4, rel=0.03)
    spent = float((exact * (exact / PRIOR).log()).sum())
    assert found.kl.tolist() == pytest.approx([spent] * 4, abs=0.02)


def test_a_sweep_of_ceilings_trades_rate_for_divergence():
    ceilings = torch.linspace(-2, 4, 13, dtype=torch.float64)
    many = 20_000 * PRIOR
    log_w = LOG_W.repeat_interleave(many.round().long())[None]  # every leaf in proportion to p_0
    found = trade_off(log_w, ceilings[None], ("tv", "kl_policy_ref", "kl_ref_policy"))
    for i, ceiling in enumerate(ceilings.tolist()):
        exact, rate = clipped_law(ceiling)
        assert float(found["accept_rate"][0, i]) == pytest.approx(rate, abs=1e-9)
        assert float(found["tv"][0, i]) == pytest.approx(total_variation(exact, TARGET), abs=1e-9)
        assert float(found["kl_policy_ref"][0, i]) == pytest.approx(
            float((exact * (exact / TARGET).log()).sum()), abs=1e-9
        )
        assert float(found["kl_ref_policy"][0, i]) == pytest.approx(
            float((TARGET * (TARGET / exact).log()).sum()), abs=1e-9
        )
    assert found["accept_rate"].diff(dim=1).max() < 0 and found["tv"].diff(dim=1).max() < 0


def test_a_ceiling_below_all_weights_accepts_the_prior_at_once():
    found = QuasiRejection(-2.0, "log_weight", 1, 1, BETA)
    lucky, accepted, _ = laws(found)
    assert lucky == pytest.approx(1)
    torch.testing.assert_close(accepted, PRIOR, atol=1e-12, rtol=0)


def test_a_quantile_sets_the_ceiling_from_completions_of_its_own():
    found = QuasiRejection(1.0, "quantile", 64, 256, BETA)(chain(2000), Sample(0))
    assert found.details["ceiling"].eq(4.0).double().mean() == pytest.approx(1 - (1 - 0.084) ** 64, abs=0.01)
    middle = QuasiRejection(0.5, "quantile", 401, 802, BETA)(chain(50), Sample(0))
    assert float(middle.details["ceiling"].median()) == pytest.approx(float(LOG_W[7]), abs=1e-9)  # P(r <= .5) = .47
    table = TabularChain(POLICY, REWARD, torch.zeros(5, dtype=torch.long))
    spent = QuasiRejection(0.5, "quantile", 8, 8, BETA)(table, Sample(0))
    assert table.meter.rewards.tolist() == [16] * 5 and spent.details["samples"].tolist() == [8] * 5


def test_weights_of_zero_are_never_accepted_and_break_nothing():
    table = chain(64)
    table.rewards = torch.where(table.rewards > 0.6, 0.0, -math.inf)
    found = Rejection(0.0, 2, 40, BETA)(table, Sample(0))
    assert found.details["accepted"].all()
    assert (found.reward.gather(1, found.pick[:, None]) == 0).all()
    quasi = QuasiRejection(0.5, "quantile", 4, 80, BETA)(table, Sample(0))
    assert quasi.details["ceiling"].eq(0).all()
    assert torch.equal(quasi.details["total_variation"].isnan(), quasi.log_z == -math.inf)  # no weight, no divergence
    assert (quasi.reward.gather(1, quasi.pick[:, None]) == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rejection(1.0, num_particles=0), "num_particles must be positive"),
        (lambda: Rejection(1.0, beta=0.0), "beta must be positive"),
        (lambda: Rejection(1.0, num_particles=8, max_samples=4), "max_samples must be at least num_particles, 8"),
        (lambda: QuasiRejection(beta=-1.0), "beta must be positive"),
        (lambda: QuasiRejection(1.5), r"ceiling must be in \[0, 1\]"),
        (lambda: QuasiRejection(0.5, "percent"), "unit.*percent"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):  # annotations may be checked before
        make()


def test_the_soft_limit_of_many_samples_is_sampled_at_a_middle_ceiling():
    exact, _ = clipped_law(3.0)
    assert total_variation(sampled_law(QuasiRejection(3.0, "log_weight", 8, 64, BETA), 20_000), exact) < 0.012
