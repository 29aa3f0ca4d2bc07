"""Completions of some states only: what is left out costs nothing, and changes nothing for the others."""

import pytest
import torch
from tests.sampling.chain3 import POLICY, PRIOR, REWARD, chain
from tests.sampling.test_soft_value import UsedUp, ending

from keel.core.chain import FIELDS, Prefix, TokenChain
from keel.core.chance import Sample, law
from keel.core.rows import Stop
from keel.exact.chain import TabularChain
from keel.sampling.joint import JointChain
from keel.sampling.values import Combined, MonteCarlo

PROMPTS = [0, 1, 1, 0, 1]


def started(world: TokenChain) -> Prefix:
    """Three states of each prompt."""
    return world.init(3)


def half_way(world: TokenChain) -> Prefix:
    """The same after two tokens, some of them finished."""
    x, rng = world.init(3), Sample(8)
    for _ in range(2):
        x = world.extend(x, world.propose(x, 1, rng)[0])
    assert bool(x.done.any()) and not bool(x.done.all())
    return x


def joint(index, kind=TabularChain) -> JointChain:
    return JointChain(ending(index, kind), {"other": ending(index)})


@pytest.mark.parametrize("begin", [started, half_way])
@pytest.mark.parametrize("make", [ending, joint])
@pytest.mark.parametrize("m", [1, 2])
def test_the_others_draw_what_they_would_have_drawn(begin, make, m):
    worlds = [make(PROMPTS, UsedUp) for _ in range(2)]
    x, y = (begin(world) for world in worlds)
    before = worlds[0].meter.generated.clone()
    asked = torch.rand(15, generator=torch.Generator().manual_seed(1)) < 0.6
    some = worlds[0].complete(x, m, Sample(2), asked)
    everything = worlds[1].complete(y, m, Sample(2))
    rows = asked.repeat_interleave(m)
    for name in FIELDS:
        assert torch.equal(getattr(some, name)[rows], getattr(everything, name)[rows])
    assert torch.equal(some.prompt, everything.prompt) and bool(some.done.all())
    assert bool((some.stop[~rows] == int(Stop.LENGTH)).all())
    assert not some.length[~rows].any() and not some.tokens[~rows].any() and not some.logp[~rows].any()
    written = torch.where(rows, everything.length - y.length.repeat_interleave(m), 0)
    assert torch.equal(worlds[0].meter.generated - before, written.view(5, -1).sum(1))
    worlds[0].complete(x, m, Sample(3))  # x was not used up


@pytest.mark.parametrize("begin", [started, half_way])
def test_nobody_asked(begin):
    world = ending(PROMPTS)
    x = begin(world)
    before = world.meter.generated.clone()
    found = world.complete(x, 2, Sample(0), torch.zeros(15, dtype=torch.bool))
    assert len(found) == 30 and bool(found.done.all()) and torch.equal(world.meter.generated, before)


def test_how_long_one_prompt_writes_shifts_nothing_for_another():
    def run(index: list[int], place: int) -> list[list[int]]:
        world = ending(index)
        rng = Sample(4, torch.arange(place, place + len(index)))
        x = world.at(torch.zeros(len(index), 1).long(), torch.ones(len(index)).long(), torch.arange(len(index)))
        found = [world.complete(x, 1, rng) for _ in range(6)]
        return [[y.text(i) for y in found] for i in range(len(index))]

    together = run(PROMPTS, 30)
    assert len({len(text) for row in together for text in row}) > 1
    for i, prompt in enumerate(PROMPTS):
        assert run([prompt], 30 + i) == [together[i]]


def test_what_is_left_out_does_not_branch():
    def run(copies, rng):
        world = chain(copies)
        coin = rng.categorical(torch.zeros(copies, 2), "coin")
        return coin, world.complete(world.init(1), 2, rng, coin == 1)

    probability, (coin, ends) = law(run)
    assert int((coin == 0).sum()) == 1 and int((coin == 1).sum()) == 8 * 9 // 2
    drawn = chain().leaf(ends).view(-1, 2)[coin == 1].flatten()
    share = probability[coin == 1].repeat_interleave(2)  # half of it is the coin's, and each universe has two draws
    prior = torch.zeros(8).double().index_add(0, drawn, share)
    torch.testing.assert_close(prior, PRIOR, atol=1e-12, rtol=0)


@pytest.mark.parametrize("begin", [started, half_way])
def test_rollouts_are_made_of_the_states_that_are_asked_for(begin):
    value = Combined({"mean": MonteCarlo(4), "soft": MonteCarlo(2, 0.5)}, {"mean": 1.0, "soft": 2.0})
    worlds = [ending(PROMPTS) for _ in range(2)]
    asked, found = torch.arange(15) % 3 == 0, []
    for world, where in zip(worlds, (asked, None), strict=True):
        world.value_of = value
        x = begin(world)
        world.meter.generated.zero_()
        found.append(world.value(x, Sample(5), where))
    wanted = asked & ~x.done
    torch.testing.assert_close(found[0][asked], found[1][asked])
    assert not found[0][~asked].any() and bool(found[1][~asked].any())
    rewards, all_rewards = (world.meter.rewards for world in worlds)
    assert torch.equal(rewards, (6 * wanted + (asked & x.done)).view(5, 3).sum(1))
    assert int(worlds[0].meter.generated.sum()) < 0.6 * int(worlds[1].meter.generated.sum())
    assert int(all_rewards.sum()) == int(6 * (~x.done).sum() + x.done.sum())


def test_values_that_cannot_be_masked_are_asked_for_everything():
    seen = []

    def value(world, x, rng):
        seen.append(len(x))
        return torch.ones(len(x))

    world = TabularChain(POLICY, REWARD, torch.zeros(4).long(), value)
    found = world.value(world.init(1), Sample(0), torch.tensor([True, False, False, True]))
    assert seen == [4] and found.tolist() == [1.0, 0.0, 0.0, 1.0]
