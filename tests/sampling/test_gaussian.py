"""Samplers on chains over latents: nothing but the protocol of a chain, and every law known in closed form.

Errors are bounded by five standard errors of what is averaged.
"""

import math
from functools import partial

import pytest
import torch
from tests.sampling.gaussian import GAUSSIAN, LEVELS, MIXTURE, SPACE, Latent, LatentChain, World, exact
from torch import Tensor

from keel.core.chain import Chain, TokenChain
from keel.core.chance import Sample
from keel.core.errors import UserError
from keel.sampling.adaptive import AdaptiveBestOf
from keel.sampling.beam import BeamSearch
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.decode import Decode, ValueAugmented
from keel.sampling.entropic import EntropicParticleFilter
from keel.sampling.forest import forest_of
from keel.sampling.gibbs import ParticleGibbs, Path, sweep
from keel.sampling.introspection import Introspective
from keel.sampling.kernels import Twisted
from keel.sampling.particle_filter import ParticleFilter
from keel.sampling.particles import Particles
from keel.sampling.rejection import QuasiRejection, Rejection
from keel.sampling.resampling import SCHEMES
from keel.sampling.smc import SMC, finish
from keel.sampling.soft_value import SoftValueDecoding
from keel.sampling.tree import TreeSampling
from keel.sampling.values import Combined, MonteCarlo

WORLDS = {"gaussian": GAUSSIAN, "mixture": MIXTURE, "three dimensions": SPACE}


def agrees(samples: Tensor, truth: Tensor | float, bias: float = 0.0) -> None:
    """The mean over the first dimension is the truth, up to five standard errors and a bias that is known."""
    error = 5 * samples.std(0) / math.sqrt(len(samples)) + bias
    gap = (samples.mean(0) - torch.as_tensor(truth)).abs()
    assert bool((gap < error).all()), (samples.mean(0), truth, error)


def follows_the_tilt(samples: Tensor, world: World, bias: float = 0.0) -> None:
    """Mean and second moment."""
    first, second = world.moments()
    agrees(samples, first, bias)
    agrees(samples.square(), second, bias)


def picks(found: Particles) -> Tensor:
    """Latents that a sampler puts out, one for each prompt."""
    return found.states.x[found.picked]


def at(chain: LatentChain, step: int, x: float) -> Latent:
    """One state of each prompt."""
    start = chain.init(1)
    return Latent(torch.full_like(start.x, x), torch.full_like(start.step, step), start.prompt)


# -- the world ---------------------------------------------------------------------------------------------------------


def test_known_numbers_of_the_gaussian():
    chain = exact(GAUSSIAN)
    assert float(chain.value(at(chain, 2, 0.5), Sample(0))) == pytest.approx(-0.741081, abs=1e-6)
    assert float(GAUSSIAN.reward(torch.tensor([[0.8 * 0.5]]))) == pytest.approx(-0.72, abs=1e-6)  # of the mean
    assert math.exp(GAUSSIAN.log_z()) == pytest.approx(0.299776, abs=1e-6)
    assert [float(m) for m in GAUSSIAN.moments()] == pytest.approx([0.8, 0.8**2 + 0.2])


def test_known_numbers_of_the_mixture():
    weight, mean, variance = MIXTURE.tilt()
    assert weight.tolist() == pytest.approx([0.039166, 0.960834], abs=1e-6)
    assert (mean.flatten().tolist(), variance) == (pytest.approx([0.4, 1.2]), pytest.approx(0.2))
    assert MIXTURE.log_z() == pytest.approx(-1.857913, abs=1e-6)
    assert float(MIXTURE.moments()[0]) == pytest.approx(1.168667, abs=1e-6)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_prior_is_a_chain_whose_values_are_right_at_every_step(world):
    chain = exact(world, 20_000)
    assert isinstance(chain, Chain) and not isinstance(chain, TokenChain)
    x, rng = chain.init(1), Sample(0)
    agrees(chain.value(chain.complete(x, 1, rng), rng).exp(), math.exp(world.log_z()))
    for level in LEVELS[1:]:
        x = chain.extend(x, chain.propose(x, 1, rng)[0])
        agrees(x.x, level * world.weight @ world.mean)
        agrees(x.x.square(), 1 + level**2 * world.weight @ world.mean.square())
        agrees(chain.value(x, rng).exp(), math.exp(world.log_z()))  # a martingale
    assert bool(chain.is_done(x).all()) and chain.meter.generated.tolist() == [2 * 3] * 20_000


@pytest.mark.parametrize("world", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_has_a_density_and_backs_up_the_value(world, step):
    chain = exact(world)
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    x = at(chain, step, 0.7)
    density = chain.logp(x, grid[None, :, None])[0].exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-9)
    after = world.value(grid[:, None], chain.levels[step + 1].expand(len(grid)))
    before = float(chain.value(x, Sample(0)).exp())
    assert float(torch.trapezoid(density * after.exp(), grid)) == pytest.approx(before, abs=1e-9)
    action, logp = chain.propose(x, 3, Sample(0))
    torch.testing.assert_close(logp, chain.logp(x, action.view(1, 3, 1)))


# -- estimates of Z and of means under the tilt ------------------------------------------------------------------------

FILTER = partial(EntropicParticleFilter, 12, 1.0, "ratio", correct=True, output="draw")
SAMPLERS = {
    "soft best of n": (SoftBestOf(12, 1.0), False),
    "decode": (Decode(12, None, 1.0, reweight=True), False),
    **{f"smc {scheme}": (SMC(12, 1.0, scheme, 2.0), True) for scheme in SCHEMES},
    **{f"smc {scheme} by itself": (SMC(12, 1.0, scheme, 2.0), False) for scheme in SCHEMES},
    "smc at a threshold": (SMC(12, 1.0, "systematic", 0.5), True),
    "particle filter": (ParticleFilter(12, 1.0, "ratio", output="draw"), True),
    "entropic": (FILTER(), True),
    "entropic by entropy": (FILTER(rule="entropy", ess_threshold=0.9), True),
    "entropic that looks ahead": (FILTER(look_ahead=True), True),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("sampler", "valued"), SAMPLERS.values(), ids=SAMPLERS)
def test_z_and_the_weighted_law_are_unbiased(sampler, valued, world):
    runs = 1200
    found = sampler(exact(world, runs) if valued else LatentChain(world, runs), Sample(1))
    ratio = (found.log_z - world.log_z()).exp()
    agrees(ratio, 1.0)
    first, second = world.moments()
    x = found.states.x.view(runs, 12, -1)
    for power, truth in ((1, first), (2, second)):
        agrees(ratio[:, None] * picks(found) ** power, truth)
        agrees(ratio[:, None] * (found.log_w.exp()[..., None] * x**power).sum(1), truth)
    torch.testing.assert_close(found.reward.flatten(), world.reward(found.states.x))


def test_a_value_makes_smc_better():
    levels = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)
    chains = [LatentChain(SPACE, 1000, value, levels) for value in (None, SPACE.value)]
    plain, valued = (SMC(64, 1.0)(chain, Sample(0)).log_z.exp() for chain in chains)
    agrees(valued, math.exp(SPACE.log_z()))
    assert float(valued.std()) < 0.9 * float(plain.std())  # measured: 0.81


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_many_particles_draw_from_the_tilt(world):
    follows_the_tilt(picks(SMC(64, 1.0)(exact(world, 1000), Sample(0))), world, bias=0.02)
    follows_the_tilt(picks(SoftBestOf(200, 1.0)(LatentChain(world, 800), Sample(0))), world, bias=0.04)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_what_is_accepted_is_the_tilt_and_a_prompt_that_is_done_costs_nothing(world):
    chain = LatentChain(world, 1500)
    found = Rejection(0.0, 8, 800, 1.0)(chain, Sample(0))
    assert bool(found.details["accepted"].all())
    follows_the_tilt(picks(found), world)
    agrees(found.log_z.exp(), math.exp(world.log_z()))
    agrees(found.details["accept_rate"], math.exp(world.log_z()))
    samples = found.details["samples"].long()
    assert len(samples.unique()) > 2
    assert torch.equal(chain.meter.generated, 3 * samples) and torch.equal(chain.meter.rewards, samples)


def test_quasi_rejection_is_the_prior_at_a_low_ceiling():
    found = QuasiRejection(-50.0, "log_weight", 4, 4, 1.0)(LatentChain(GAUSSIAN, 2000), Sample(0))
    agrees(picks(found), 0.0, bias=1e-3)
    agrees(picks(found).square(), 1.0, bias=1e-3)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_soft_value_decoding_approaches_the_tilt(world):
    chain = exact(world, 1500)
    found = SoftValueDecoding(1, 100, 1.0)(chain, Sample(0))
    follows_the_tilt(picks(found), world, bias=0.03)
    one = SoftValueDecoding(1, 1, 1.0)(exact(world, 1500), Sample(0))
    agrees(picks(one), world.weight @ world.mean)
    best = SoftValueDecoding(1, 20, 1.0, "best")(exact(world, 200), Sample(0))
    assert float(best.reward.mean()) > float(found.reward.mean())


# -- particle Gibbs ----------------------------------------------------------------------------------------------------


def noised(world: World, runs: int) -> Path:
    """Paths of the tilt itself: a draw of it, and noise added level by level as the prior would have."""
    weight, mean, variance = world.tilt()
    rng = Sample(7)
    component = rng.categorical(weight.log().expand(runs, -1), "component")
    x = mean[component] + math.sqrt(variance) * rng.normal((runs, mean.shape[1]), "end")
    actions = [x]
    for a, b in zip(LEVELS[-2:0:-1], LEVELS[:1:-1], strict=True):
        noise = rng.normal((runs, mean.shape[1]), "noise")
        x = a / b * x + math.sqrt(1 - (a / b) ** 2) * noise
        actions.append(x)
    return Path(actions[::-1])


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("valued", [False, True])
def test_a_conditional_sweep_leaves_the_tilt_where_it_is(world, valued):
    chain, path = exact(world, 4000) if valued else LatentChain(world, 4000), noised(world, 4000)
    follows_the_tilt(path.actions[-1], world)
    done = sweep(chain, Sample(1), 3, 1.0, path)
    found = finish(done.swarm, chain, Sample(2), 1.0, "draw", done.swarm.value)
    follows_the_tilt(picks(found), world)
    moved = (picks(found) != path.actions[-1]).any(1)
    assert torch.equal(moved, found.pick > 0) and float(moved.double().mean()) > 0.2


def test_sweeps_approach_the_tilt():
    chain = exact(MIXTURE, 1500)
    found = ParticleGibbs(8, 8, 1.0)(chain, Sample(0))
    follows_the_tilt(picks(found), MIXTURE)
    agrees(found.log_z.exp(), math.exp(MIXTURE.log_z()))
    assert float(found.details["moved"].mean()) > 0.5


def test_the_path_of_a_pick_is_the_one_that_led_to_it():
    chain = exact(SPACE, 50)
    done = sweep(chain, Sample(0), 4, 1.0)
    pick = torch.arange(50) % 4
    path, x = done.path(pick), chain.init(1)
    for t, action in enumerate(path.actions):
        x = chain.extend(x, action)
        torch.testing.assert_close(path.values[:, t], chain.value(x, Sample(0)))
    assert torch.equal(x.x, done.swarm.x.x[torch.arange(50) * 4 + pick])


# -- what else goes through a chain ------------------------------------------------------------------------------------


def test_the_trace_holds_the_latents_of_every_round():
    found = SMC(6, 1.0, "multinomial", 2.0, keep_trace=True)(exact(SPACE, 40), Sample(0))
    assert [step.start.unique().tolist() for step in found.trace] == [[0], [1], [2]]
    assert torch.equal(found.trace[-1].states.x, found.states.x)
    chain, before = exact(SPACE, 40), exact(SPACE, 40).init(6)
    for step in found.trace:
        flat = (step.ancestors + torch.arange(40)[:, None] * 6).flatten()
        logp = chain.logp(chain.select(before, flat), step.states.x[:, None])
        torch.testing.assert_close(logp[:, 0], step.log_q.flatten())
        before = step.states
    with pytest.raises(UserError, match="completions of tokens"):
        forest_of(found)


def test_values_by_rollouts():
    chain = LatentChain(GAUSSIAN, 4000)
    x, rng = at(chain, 2, 0.5), Sample(0)
    agrees(MonteCarlo(4)(chain, x, rng), -1.44)  # the mean value
    soft = MonteCarlo(4, 1.0)
    agrees(soft(chain, x, rng).exp(), math.exp(-0.741081))
    spent = chain.meter.generated.clone()
    asked = torch.arange(4000) % 2 == 0
    both = Combined({"soft": soft, "mean": MonteCarlo(2)}, {"soft": 1.0, "mean": 0.5})
    some, everything = both.masked(chain, x, Sample(1), asked), both(chain, x, Sample(1))
    torch.testing.assert_close(some[asked], everything[asked])
    assert not some[~asked].any() and torch.equal(chain.meter.generated - spent, 6 * (1 + asked.long()))


@pytest.mark.parametrize(
    "sampler",
    [
        SMC(5, 1.0, "multinomial", 2.0),
        SoftValueDecoding(2, 3, 1.0),
        ParticleGibbs(4, 3, 1.0),
        Rejection(0.0, 2, 200, 1.0),
        BestOf(5),
        BeamSearch(3, 4, "value", 1.0, draw=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_prompt_depends_on_no_other(sampler):
    together = sampler(exact(MIXTURE, 12), Sample(3))
    for p in (0, 5, 11):
        alone = sampler(exact(MIXTURE), Sample(3, torch.tensor([p])))
        torch.testing.assert_close(picks(alone)[0], picks(together)[p])
        assert int(alone.meter.generated[0]) == int(together.meter.generated[p])


def test_the_best_of_latents():
    found = BestOf(6)(LatentChain(SPACE, 30), Sample(0))
    reward = SPACE.reward(found.states.x).view(30, 6)
    assert torch.equal(reward.argmax(1), found.pick)


def test_a_beam_of_latents_is_searched_by_value_alone():
    found = BeamSearch(3, 8, "value", 1.0, draw=True)(exact(GAUSSIAN, 400), Sample(0))
    prior = BestOf(1)(LatentChain(GAUSSIAN, 400), Sample(0))
    assert float(found.reward[:, 0].mean()) > -0.1 > -1.5 > float(prior.reward.mean())
    assert bool((found.reward.diff(dim=1) <= 0).all()) and bool(found.kl.isnan().all()) and not found.details


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (TreeSampling(), "tree_sampling: works on single tokens"),
        (ValueAugmented(beta=1.0), "twisted: works on single tokens"),
        (Decode(2, Twisted(), 1.0), "twisted: works on single tokens"),
        (SMC(2, 1.0, kernel=Twisted()), "twisted: works on single tokens"),
        (AdaptiveBestOf(lambda chain, x: torch.zeros(len(x)), 2), "adaptive_best_of_n: works on single tokens"),
        (BeamSearch(2, 2, "tilt", 1.0, draw=True), "beam_search: goes by the probabilities of texts"),
        (BeamSearch(2, 2, "value", 1.0), "beam_search: goes by the probabilities of texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_samplers_over_tokens_say_so(sampler, message):
    with pytest.raises(UserError, match=message):
        sampler(exact(GAUSSIAN, 2), Sample(0))


def test_introspection_says_so():
    class Nothing:
        values = lengths = torch.zeros(1)

        def __call__(self, chain, x):
            raise AssertionError

    with pytest.raises(UserError, match="introspection: works on single tokens"):
        Introspective(Nothing())(exact(GAUSSIAN), Sample(0))
