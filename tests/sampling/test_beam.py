"""Beam search on the three-step chain, where the best leaves are known, and its greedy relatives."""

import math

import pytest
import torch
from tests.sampling.chain3 import BETA, LEAVES, LOG_Z, MEAN, PRIOR, REWARD, SOFT, chain, leaf_law, leaves
from tests.sampling.test_soft_value import ByStep, UsedUp, ending

from keel.core.chance import Sample, law
from keel.sampling.beam import BeamSearch
from keel.sampling.soft_value import SoftValueDecoding
from keel.sampling.tree import TreeSampling


def found_leaves(sampler: BeamSearch, value=None) -> list[str]:
    """The live beams, best first."""
    found = sampler(chain(1, value), Sample(0))
    live = found.log_w[0] > -math.inf
    return [LEAVES[i] for i in leaves(found)[live].tolist()]


def ranked(score: torch.Tensor) -> list[str]:
    """All leaves, best first."""
    return [LEAVES[i] for i in score.argsort(descending=True).tolist()]


@pytest.mark.parametrize("width", [8, 11])
def test_a_wide_beam_ranks_every_leaf(width):
    assert found_leaves(BeamSearch(width, 2, "logp", BETA)) == ranked(PRIOR)
    assert found_leaves(BeamSearch(width, 2, "tilt", BETA), SOFT) == ranked(PRIOR.log() + REWARD[0] / BETA)
    assert found_leaves(BeamSearch(width, 2, "value", BETA), MEAN) == ranked(REWARD[0])


def test_narrow_beams_by_hand():
    assert found_leaves(BeamSearch(1, 2, "logp", BETA)) in (["100"], ["111"])  # .6, then .5 of each
    assert found_leaves(BeamSearch(2, 2, "logp", BETA)) == ["111", "100"]
    # mean values: 01 1.55, 11 .7, 00 .2, 10 0; then 011 2, 111 .75, 010 .5, 110 .25
    assert found_leaves(BeamSearch(2, 2, "value", BETA), MEAN) == ["011", "111"]
    assert found_leaves(BeamSearch(1, 1, "tilt", BETA), SOFT) in (["100"], ["111"])  # one candidate leaves no choice


def test_the_exact_value_goes_straight_to_the_mode_of_the_tilt():
    assert found_leaves(BeamSearch(1, 2, "tilt", BETA), SOFT) == ["011"]
    assert found_leaves(BeamSearch(1, 2, "tilt", BETA)) in (["101"], ["111"])  # without a value: .6, then .5 of each


@pytest.mark.parametrize("value", [SOFT, MEAN])
def test_the_greedy_limits_agree(value):
    assert found_leaves(BeamSearch(1, 2, "value", BETA), value) == ["011"]
    many = leaf_law(SoftValueDecoding(1, 8, BETA, "best"), value)
    assert float(many[3]) > 0.9  # eight candidates miss a successor of probability .3 at times
    cold = SoftValueDecoding(1, 8, 1e-3)
    torch.testing.assert_close(leaf_law(cold, value), many, atol=1e-9, rtol=0)
    search = TreeSampling(1, 100, 1e-3, mode="search", c_uct=2.0)(chain(4), Sample(0))
    assert bool((leaves(search) == 3).all())


def test_what_is_reported():
    found = BeamSearch(3, 2, "logp", BETA)(chain(2), Sample(0))
    torch.testing.assert_close(found.reward.flatten(), REWARD[0, leaves(found)])
    torch.testing.assert_close(found.kl, -PRIOR[leaves(found)[found.picked]].log(), atol=1e-6, rtol=0)
    whole = BeamSearch(8, 2, "tilt", BETA)(chain(1, SOFT), Sample(0))
    assert float(whole.details["log_z_floor"]) == pytest.approx(LOG_Z, abs=1e-5)
    assert float(found.details["log_z_floor"][0]) < LOG_Z - 0.1 and found.log_z.isnan().all()


def test_places_that_nobody_takes_hold_copies_without_weight():
    found = BeamSearch(11, 2, "tilt", BETA)(chain(2, SOFT), Sample(0))
    assert float(found.ess[0]) == pytest.approx(8) and bool(found.states.done.all())
    assert leaves(found)[8:11].tolist() == [3] * 3 and found.reward[0, 8:].tolist() == [2.0] * 3


def test_what_it_costs():
    classic, judged = chain(1), chain(1, SOFT)
    BeamSearch(2, 2, "logp", BETA)(classic, Sample(0))
    BeamSearch(2, 2, "tilt", BETA)(judged, Sample(0))
    assert (int(classic.meter.generated), int(classic.meter.scored), int(classic.meter.rewards)) == (6, 0, 2)
    assert (int(judged.meter.generated), int(judged.meter.scored), int(judged.meter.rewards)) == (6, 2 + 4 + 4, 4)


# -- drawn continuations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["logp", "tilt", "value"])
def test_many_draws_see_every_successor(score):
    likely = BeamSearch(8, 2, score, BETA)(chain(1, SOFT), Sample(0))
    drawn = BeamSearch(8, 60, score, BETA, draw=True)(chain(1, SOFT), Sample(0))
    steps = BeamSearch(8, 60, score, BETA)(ByStep(chain(1, SOFT)), Sample(0))
    for found in (drawn, steps):
        assert leaves(found).tolist() == leaves(likely).tolist()
        torch.testing.assert_close(found.reward, likely.reward)


def test_one_draw_and_one_beam_is_the_prior():
    sampler = BeamSearch(1, 1, "value", BETA, draw=True)
    torch.testing.assert_close(leaf_law(sampler, SOFT), PRIOR, atol=1e-12, rtol=0)


@pytest.mark.parametrize("by_step", [False, True])
def test_one_beam_that_draws_is_soft_value_decoding_without_softness(by_step):
    wrap = ByStep if by_step else lambda world: world
    sampler = BeamSearch(1, 3, "value", BETA, draw=True)
    probability, found = law(lambda copies, rng: sampler(wrap(chain(copies, SOFT)), rng))
    shares = torch.zeros(8).double().index_add(0, leaves(found)[found.picked], probability)
    torch.testing.assert_close(shares, leaf_law(SoftValueDecoding(1, 3, BETA, "best"), SOFT))
    assert float((probability * found.kl).sum()) > float((shares * (shares / PRIOR).log()).sum())


def test_equal_draws_count_once():
    found = BeamSearch(4, 10, "value", BETA, draw=True)(chain(50, SOFT), Sample(0))
    live = found.log_w > -math.inf
    for row, kept in zip(leaves(found).view(50, 4), live, strict=True):
        assert len(set(row[kept].tolist())) == int(kept.sum()) >= 1
    assert bool(live.all(1).any())


# -- chains whose sequences end early --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["logp", "tilt", "value"])
@pytest.mark.parametrize("draw", [False, True])
def test_a_prompt_depends_on_no_other_and_ends_stay_ends(score, draw):
    sampler = BeamSearch(4, 3, score, BETA, draw)
    together = sampler(ending([1, 0, 1], UsedUp), Sample(6, torch.tensor([1, 2, 3])))
    for place, prompt in enumerate([1, 0, 1]):
        alone = sampler(ending([prompt]), Sample(6, torch.tensor([1 + place])))
        assert together.states.tokens[4 * place : 4 * place + 4].tolist() == alone.states.tokens.tolist()
        torch.testing.assert_close((together.kl[place], together.reward[place]), (alone.kl[0], alone.reward[0]))
    states = together.states
    assert bool(states.done.all()) and (score == "value" or len(states.length.unique()) > 1)
    torch.testing.assert_close(together.reward.flatten(), ending([1, 0, 1]).reward(states))


def test_the_likeliest_sequence_of_any_length():
    world = ending([0, 1])
    found = BeamSearch(30, 3, "logp", BETA)(world, Sample(0))
    for prompt in (0, 1):
        log_p = world.logits.log_prob(world.space.rows(prompt)).double()
        assert int(world.leaf(found.states)[found.picked][prompt]) == int(log_p.argmax())
        assert float(-found.kl[prompt]) == pytest.approx(float(log_p.max().detach()), abs=1e-6)
        assert float(found.ess[prompt]) == pytest.approx(len(log_p))


@pytest.mark.parametrize(
    "setting", [{"num_particles": 0}, {"num_candidates": 0}, {"beta": 0.0}, {"score": "reward"}], ids=str
)
def test_bad_settings(setting):
    with pytest.raises(
        (ValueError, TypeError), match=next(iter(setting))
    ):  # a type error where annotations are checked
        BeamSearch(**setting)
