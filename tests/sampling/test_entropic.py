"""The entropic particle filter: its temperatures, its corrected weights, and the diversity that it is for."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.sampling.chain3 import BETA, MEAN, POLICY, REWARD, SOFT, TILT, Z, chain, estimates, leaf_law

from keel.core.chain import Chain
from keel.core.chance import Choice, Sample
from keel.exact.chain import TabularChain
from keel.sampling.entropic import EntropicParticleFilter, flatten, provisional_gain, temperature
from keel.sampling.particle_filter import ParticleFilter
from keel.sampling.particles import Particles, effective_size
from keel.sampling.resampling import SCHEMES
from keel.sampling.smc import SMC, Swarm, advance, finish

SCORES = torch.tensor([[0.9, 0.5, 0.5, 0.1]], dtype=torch.float64)
LOG_W = SCORES.logit().log_softmax(-1)
OVER = 3 * MEAN  # an over-confident value


@dataclass(frozen=True)
class Flattened:
    """Resampling in proportion to W^(1/2) in every round."""

    correct: bool
    scheme: str = "multinomial"

    def __call__(self, table: Chain, rng: Choice) -> Particles:
        """Run it."""
        swarm = Swarm.start(table, 2)
        while True:
            advance(swarm, table, rng, BETA, None)
            if bool(table.is_done(swarm.x).all()):
                return finish(swarm, table, rng, BETA, "draw")
            flatten(swarm, table, rng, swarm.log_w / 2, self.scheme, self.correct)


def test_weights_are_the_odds_of_the_scores():
    torch.testing.assert_close(LOG_W.exp(), torch.tensor([[0.81, 0.09, 0.09, 0.01]]).double(), atol=1e-7, rtol=0)
    assert float(effective_size(LOG_W)) == pytest.approx(1.487210, abs=1e-6)


def test_the_temperature_by_effective_size():
    heat = temperature(LOG_W, 1 / 8, "ess")
    assert float(heat) == pytest.approx(2.353400, abs=1e-6)
    flat = (LOG_W / heat[:, None]).log_softmax(-1)
    expected = torch.tensor([[0.515255, 0.202558, 0.202558, 0.079630]]).double()
    torch.testing.assert_close(flat.exp(), expected, atol=1e-6, rtol=0)
    assert float(effective_size(flat)) == pytest.approx(2.825753, abs=1e-6)


def test_the_temperature_by_entropy():
    entropy = float(torch.special.entr(LOG_W.exp()).sum()) / math.log(4)
    assert entropy == pytest.approx(0.468996, abs=1e-6)
    heat = temperature(LOG_W, 1 / 8, "entropy")
    assert float(heat) == pytest.approx(1.867863, abs=1e-6)
    assert float(effective_size((LOG_W / heat[:, None]).log_softmax(-1))) == pytest.approx(2.443730, abs=1e-6)


def test_the_temperature_by_progress_alone():
    assert float(temperature(LOG_W, 1 / 8, "base")) == pytest.approx(2 - 1 / 8)


@pytest.mark.parametrize("rule", ["ess", "entropy", "base"])
def test_no_heat_where_none_is_called_for(rule):
    even = torch.zeros(1, 4, dtype=torch.float64).log_softmax(-1)
    single = torch.zeros(1, 1, dtype=torch.float64)
    assert float(temperature(LOG_W, 0.5, rule)) == 1  # no longer early
    assert float(temperature(LOG_W, 1 / 8, rule, ess_threshold=0.37)) == 1  # ESS / N is .3718
    assert float(temperature(LOG_W, 1 / 8, rule, ess_threshold=0.38)) > 1
    assert float(temperature(even, 0.0, rule, ess_threshold=1.0)) == 1
    assert float(temperature(single, 0.0, rule)) == 1  # log N is 0
    gone = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float64)
    assert 1 < float(temperature(gone, 0.25, rule)) <= 4


@pytest.mark.parametrize(("correct", "expected"), [(True, 9.016032), (False, 9.760583)])
def test_flattened_resampling_needs_its_correction(correct, expected):
    mean, deviation, tilted = estimates(Flattened(correct), MEAN)
    assert mean == pytest.approx(expected, abs=1e-6)
    if correct:
        assert deviation == pytest.approx(10.647474, abs=1e-6)
        torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize(("rule", "scheme"), [("base", "systematic"), ("ess", "multinomial"), ("entropy", "residual")])
def test_corrected_it_is_unbiased_however_hot(rule, scheme, look_ahead):
    hot = {"ess_threshold": 1.0, "early": 1.0, "max_steps": 8}
    sampler = EntropicParticleFilter(
        2, BETA, "ratio", rule, **hot, correct=True, look_ahead=look_ahead, resampling=scheme, output="draw"
    )
    mean, _, tilted = estimates(sampler, OVER)
    assert mean == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)
    assert sampler(chain(50, OVER), Sample(0)).details["hottest"].max() > 1.3


def test_without_heat_it_is_smc():
    smc = SMC(2, BETA, "systematic", ess_threshold=2.0)
    cold = EntropicParticleFilter(2, BETA, "ratio", early=0.0, correct=True, output="draw")
    torch.testing.assert_close(leaf_law(cold, MEAN), leaf_law(smc, MEAN), atol=1e-12, rtol=0)
    assert estimates(cold, MEAN)[:2] == pytest.approx((Z, 11.206750), abs=1e-5)


def test_a_flattened_law_is_not_the_filters():
    hot = EntropicParticleFilter(2, BETA, "ratio", "base", ess_threshold=1.0, early=1.0, max_steps=8, output="draw")
    plain = ParticleFilter(2, BETA, "ratio", "systematic", output="draw")
    assert float((leaf_law(hot, OVER) - leaf_law(plain, OVER)).abs().sum()) > 0.02
    found = hot(chain(3, OVER), Sample(0))
    assert found.log_z.isnan().all() and found.kl.isnan().all()  # nothing is known of Z without the correction


@pytest.mark.parametrize("weight", ["full", "ratio"])
def test_equal_scores_give_the_particle_filter_draw_for_draw(weight):
    def blind():
        values = torch.zeros(1, 7, dtype=torch.float64)
        return TabularChain(POLICY, torch.zeros_like(REWARD), torch.zeros(300, dtype=torch.long), values)

    for output in ("best", "draw"):
        plain = ParticleFilter(8, BETA, weight, "systematic", output=output)(blind(), Sample(4))
        entropic = EntropicParticleFilter(8, BETA, weight, output=output, early=1.0)(blind(), Sample(4))
        assert torch.equal(entropic.states.tokens, plain.states.tokens)
        assert torch.equal(entropic.pick, plain.pick)


@pytest.mark.parametrize("rule", ["ess", "entropy", "base"])
def test_more_families_survive_an_over_confident_value(rule):
    plain = ParticleFilter(8, BETA, "full", "systematic")(chain(2000, OVER), Sample(0))
    entropic = EntropicParticleFilter(8, BETA, "full", rule, max_steps=8)(chain(2000, OVER), Sample(0))
    more = entropic.details["families"] - plain.details["families"]
    assert float(more.mean()) > 10 * float(more.std()) / 2000**0.5  # measured: 3.75, 3.24, 2.51 against 2.05
    reward = [found.reward.gather(1, found.pick[:, None]).mean() for found in (entropic, plain)]
    assert reward[0] > reward[1] - 0.01  # and the answers are no worse


def test_looking_ahead_prefers_particles_with_good_successors():
    swarm = Swarm.start(chain(4000, SOFT), 2)
    table = chain(4000, SOFT)
    advance(swarm, table, Sample(0), BETA, None)
    before = swarm.x.tokens.clone()
    gain = provisional_gain(swarm, table, Sample(1), BETA, full=False)
    assert torch.equal(swarm.x.tokens, before)  # nobody has moved
    for token, expected in ((0, 1.0), (1, 1.0)):  # the exact value is a martingale: E[psi' / psi] = 1
        assert float(gain.flatten()[before[:, 0] == token].exp().mean()) == pytest.approx(expected, abs=0.05)
    full = provisional_gain(swarm, table, Sample(1), BETA, full=True)
    torch.testing.assert_close(full - gain, swarm.log_psi)


def test_looking_ahead_costs_a_token_for_each_token_but_the_first():
    ahead, plain = chain(20, MEAN), chain(20, MEAN)
    EntropicParticleFilter(4, BETA, look_ahead=True)(ahead, Sample(0))
    EntropicParticleFilter(4, BETA)(plain, Sample(0))
    assert plain.meter.generated.tolist() == [12] * 20 and ahead.meter.generated.tolist() == [12 + 8] * 20


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flattening_keeps_the_mean_of_the_weights(scheme):
    table = chain(20_000, MEAN)
    swarm = Swarm.start(table, 4)
    advance(swarm, table, Sample(0), BETA, None)
    before = swarm.log_z.exp()
    ones = (swarm.x.tokens[:, 0] == 1).double().view(-1, 4)
    mass = before * (swarm.log_w.exp() * ones).sum(1)
    flatten(swarm, table, Sample(1), swarm.log_w / 3, scheme, correct=True)
    ones = (swarm.x.tokens[:, 0] == 1).double().view(-1, 4)
    after = swarm.log_z.exp() * (swarm.log_w.exp() * ones).sum(1)
    assert float(after.mean()) == pytest.approx(float(mass.mean()), rel=0.01)
    torch.testing.assert_close(swarm.log_w.logsumexp(1), torch.zeros(20_000).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"num_particles": 0}, "num_particles"),
        ({"beta": 0.0}, "beta"),
        ({"weight": "half"}, "weight"),
        ({"rule": "guess"}, "rule"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"early": -0.1}, "early"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_settings_that_make_no_sense_are_named(setting, name):
    with pytest.raises((ValueError, TypeError), match=name):  # annotations may be checked before
        EntropicParticleFilter(**setting)
