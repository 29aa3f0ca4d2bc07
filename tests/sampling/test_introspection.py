"""Sampling by introspection: the utility by hand, its limits, and its worth against every fixed number of samples."""

import math

import pytest
import torch
from tests.rollouts.architectures import model
from tests.sampling.chain3 import PRIOR, REWARD, chain, leaves

from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.models.introspection import JointBins
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.sampling.introspection import Introspective, OracleJoint, Outlook, ReservedJoint, max_law, meta_actions

ORACLE = OracleJoint.of(chain())
ORDER = REWARD[0].argsort()


def outlook(reward, length, floor=-math.inf) -> Outlook:
    reward, length = torch.tensor(reward).double(), torch.tensor(length).double()
    lengths = torch.arange(length.shape[-1]).double()
    values = torch.arange(reward.shape[-1]).double()
    return Outlook(reward, length, values, lengths, torch.tensor(floor).double().expand(reward.shape[:-2]))


def best_of(n: int) -> torch.Tensor:
    """The law of the best of n independent samples."""
    cumulated = PRIOR[ORDER].cumsum(0)
    found = torch.zeros(8, dtype=torch.float64)
    found[ORDER] = (cumulated**n).diff(prepend=torch.zeros(1).double())
    return found


def picked(probability, found) -> torch.Tensor:
    return torch.zeros(8, dtype=torch.float64).index_add(0, leaves(found)[found.picked], probability)


# -- the utility ------------------------------------------------------------------------------------------------------


def test_the_best_of_two_independent_samples():
    two = outlook([[0.4, 0.6], [0.4, 0.6]], [[0.0, 1.0], [0.0, 1.0]])
    assert float(two.best_reward(torch.tensor([1, 1]))) == pytest.approx(0.84)
    assert float(two.best_reward(torch.tensor([2, 0]))) == pytest.approx(0.84)
    assert float(two.best_reward(torch.tensor([1, 0]))) == pytest.approx(0.6)
    apart = max_law(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]]), torch.tensor([1, 1]))
    torch.testing.assert_close(apart, torch.tensor([0.0, 0.1, 0.9]))


def test_the_utility_by_hand():
    two = outlook([[0.4, 0.6], [0.7, 0.3]], [[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    both, none = torch.tensor([1, 1]), torch.tensor([False, False])
    reward, tokens, longest = 1 - 0.4 * 0.7, 1.5 + 1.0, 1.5
    assert float(two.utility(both, none, 0.1, 1.0)) == pytest.approx(reward - 0.1 * tokens)
    assert float(two.utility(both, none, 0.1, 0.0)) == pytest.approx(reward - 0.1 * longest)
    assert float(two.utility(both, none, 0.1, 0.25)) == pytest.approx(reward - 0.025 * tokens - 0.075 * longest)
    done = torch.tensor([True, False])  # the first is finished: its reward counts and its length does not
    assert float(two.utility(torch.tensor([0, 1]), done, 0.1, 0.5)) == pytest.approx(reward - 0.1)
    assert float(two.utility(torch.tensor([0, 0]), done, 0.1, 0.5)) == pytest.approx(0.6)
    known = outlook([[0.4, 0.6]], [[0.0, 1.0]], floor=0.5)
    assert float(known.best_reward(torch.tensor([1]))) == pytest.approx(0.4 * 0.5 + 0.6)
    assert float(known.best_reward(torch.tensor([0]))) == 0.5


def test_pruning_together_saves_what_pruning_one_by_one_does_not():
    """Two long samples and a short one: as long as one long one is left, the latency stays."""
    three = outlook([[[0.5, 0.5]] * 3], [[[0.0, 1.0, 0, 0, 0, 0]] + [[0.0, 0, 0, 0, 0, 1.0]] * 2])
    running, finished = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    options, allowed = meta_actions(three, running, finished)
    wide = Outlook(three.reward[:, None], three.length[:, None], three.values, three.lengths, three.floor[:, None])
    found = wide.utility(options, finished[:, None].expand(options.shape), 1.0, 0.0).masked_fill(~allowed, -math.inf)
    assert options[0, int(found.argmax())].tolist() == [1, 0, 0]
    assert not bool(allowed[0, 1])  # to stop with nothing finished
    assert not bool(allowed[0, -3:].any())  # no place for a branch


# -- the oracle -------------------------------------------------------------------------------------------------------


def test_the_oracle_is_the_conditional_law():
    root = ORACLE(chain(), chain().init(1))[0]
    torch.testing.assert_close(root[:, 3], PRIOR[ORDER])
    assert float(root[:, :3].sum()) == 0
    x = chain().init(1)
    for token in (0, 1, 1):
        x = chain().extend(x, torch.tensor([token]))
        if int(x.length) == 2:
            near = ORACLE(chain(), x)[0, :, 1]
            assert near.nonzero()[:, 0].tolist() == [3, 7]  # rewards .5 and 2
            torch.testing.assert_close(near[[3, 7]], torch.tensor([0.3, 0.7]).double())
    assert float(ORACLE(chain(), x)[0, 7, 0]) == 1


def test_the_oracle_knows_lengths():
    space = SequenceSpace(2, 3, eos=0)
    policy = TabularPolicy(space, torch.tensor([0.25, 0.75]).log().expand(1, space.prefixes, 2))
    world = TabularChain(policy, torch.arange(4.0)[None])
    lengths = OracleJoint.of(world)(world, world.init(1))[0].sum(0)
    torch.testing.assert_close(lengths, torch.tensor([0, 0.25, 0.1875, 0.5625]).double())


# -- the sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["predicted", "best"])
def test_without_a_cost_all_places_are_filled_and_nothing_is_pruned(output):
    sampler = Introspective(ORACLE, 2, cost=0.0, every=1, output=output)
    probability, found = law(lambda copies, rng: sampler(chain(copies), rng))
    torch.testing.assert_close(picked(probability, found), best_of(2), atol=1e-12, rtol=0)
    assert bool((found.details["pruned"] == 0).all()) and bool((found.details["finished"] == 2).all())
    assert bool((found.meter.rewards == (1 if output == "predicted" else 2)).all())


@pytest.mark.parametrize("output", ["predicted", "best"])
def test_of_equals_each_is_as_likely(output):
    passed = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]).double()
    world = lambda copies: TabularChain(chain().logits, passed, torch.zeros(copies).long())  # noqa: E731
    sampler = Introspective(OracleJoint.of(world(1)), 2, cost=0.0, every=3, output=output)
    probability, found = law(lambda copies, rng: sampler(world(copies), rng))
    reward = passed[0, leaves(found)].view(-1, 2)
    equal = reward[:, 0] == reward[:, 1]
    assert float(probability[equal & (found.pick == 0)].sum() / probability[equal].sum()) == pytest.approx(0.5)
    assert bool((reward[:, 0] > reward[:, 1])[~equal].eq(found.pick[~equal] == 0).all())


@pytest.mark.parametrize("compute", [0.0, 0.5, 1.0])
def test_beyond_all_rewards_a_single_sample_is_left(compute):
    sampler = Introspective(ORACLE, 3, cost=1e6, compute=compute, every=1)
    probability, found = law(lambda copies, rng: sampler(chain(copies), rng))
    if compute == 0:  # copies cost no latency, and are stopped with the first one that ends
        assert bool((found.details["finished"] == 3).all())
        return
    torch.testing.assert_close(picked(probability, found), PRIOR, atol=1e-12, rtol=0)
    assert bool((found.meter.generated == 3).all()) and bool((found.details["finished"] == 1).all())


@pytest.mark.parametrize("cost", [0.01, 0.03, 0.06, 0.12, 0.3])
def test_it_is_worth_at_least_what_the_best_fixed_number_is(cost):
    """Exact on both sides: every decision follows a plan whose worth is known, so that none can lose in the mean."""
    fixed = [float(best_of(n) @ REWARD[0]) - 3 * n * cost for n in (1, 2, 3)]
    sampler = Introspective(ORACLE, 3, cost=cost, every=1, output="best")
    probability, found = law(lambda copies, rng: sampler(chain(copies), rng))
    reward = found.reward.gather(1, found.pick[:, None])[:, 0]
    worth = float((probability * (reward - cost * found.meter.generated)).sum())
    assert worth >= max(fixed) - 1e-9
    if cost in (0.03, 0.06, 0.12):  # where there is something to decide on the way
        assert worth > max(fixed) + 0.01
        assert float((probability * found.details["pruned"]).sum()) > 0.1


def test_predictions_alone_give_the_same_with_an_oracle():
    known = Introspective(ORACLE, 3, cost=0.05, every=1, output="best")(chain(200), Sample(0))
    predicted = Introspective(ORACLE, 3, cost=0.05, every=1)(chain(200), Sample(0))
    assert torch.equal(known.states.tokens[known.picked], predicted.states.tokens[predicted.picked])
    torch.testing.assert_close(predicted.details["predicted"], known.reward[torch.arange(200), known.pick])
    assert bool((known.details["branched"] > 0).any())


def test_no_prompt_depends_on_another_and_stopped_ones_cost_nothing():
    sampler = Introspective(ORACLE, 3, cost=0.05, every=1)
    together = sampler(chain(60), Sample(7))
    assert together.meter.generated.unique().numel() > 2
    for p in range(0, 60, 7):
        alone = sampler(chain(1), Sample(7, torch.tensor([p])))
        assert int(alone.meter.generated[0]) == int(together.meter.generated[p])
        assert alone.states.text(int(alone.pick[0])) == together.states.text(int(together.picked[p]))


def test_decisions_every_so_often():
    rarely = Introspective(ORACLE, 3, cost=0.05, every=3, output="best")
    probability, found = law(lambda copies, rng: rarely(chain(copies), rng))
    n = int(found.details["finished"][0])
    assert bool((found.details["finished"] == n).all()) and bool((found.details["pruned"] == 0).all())
    torch.testing.assert_close(picked(probability, found), best_of(n), atol=1e-12, rtol=0)
    fixed = [float(best_of(k) @ REWARD[0]) - 0.15 * k for k in (1, 2, 3)]
    assert n == 1 + max(range(3), key=fixed.__getitem__)


def test_reserved_logits_are_read_and_never_drawn():
    """Tokens 2 .. 5 are reserved; after token 1 the text looks good, after token 0 bad."""
    space = SequenceSpace(6, 3)
    logits = torch.zeros(1, space.prefixes, 6).double()
    logits[:, :, 2:] = torch.tensor([0.25, 0.25, 0.25, 0.25]).log() + 5  # much of the mass is on reserved tokens
    first = torch.arange(1, 7)
    logits[0, first, 2:] = torch.tensor([0.45, 0.45, 0.05, 0.05]).double().log() + 5
    logits[0, 2, 2:] = torch.tensor([0.05, 0.05, 0.45, 0.45]).double().log() + 5
    world = TabularChain(TabularPolicy(space, logits), torch.zeros(1, 216), torch.zeros(300, dtype=torch.long))
    bins = JointBins(2, (0, 2, 4), 2)
    joint = ReservedJoint(bins)
    x = world.extend(world.init(1), torch.ones(300, dtype=torch.long))
    torch.testing.assert_close(joint(world, x)[0].sum(1), torch.tensor([0.1, 0.9]).double())
    found = Introspective(joint, 2, cost=0.0, every=1)(world, Sample(0))
    assert int(found.states.tokens.max()) == 1
    assert float(found.states.tokens.double().mean()) == pytest.approx(0.5, abs=0.05)
    assert bool(joint(world, found.states).isnan().all())
    assert bool(found.details["predicted"].isfinite().all())  # the last prediction before the end


def test_a_language_model_branches_with_its_caches():
    world = LocalChain(LocalGenerator(model("qwen3")), [[5, 6, 7], [9]], Sampling(max_completion_length=8))
    joint = ReservedJoint(JointBins(2, (0, 2, 8), 22))  # beyond the tokenizer's 23 tokens, and one of them
    sampler = Introspective(joint, 5, cost=0.01, every=1)
    found = sampler(world, Sample(0))
    states = found.states
    assert bool((found.details["branched"] > 0).all()) and bool((found.details["pruned"] > 0).any())
    assert int(states.tokens.max()) < 22
    written = torch.arange(8) < states.length[:, None]
    assert bool(states.done[found.picked].all()) and bool((world.meter.generated >= 8).all())
    again = world._read(states.tokens, states.length, states.prompt)
    torch.testing.assert_close(states.logp[written], again[written], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "setting", [{"num_particles": 0}, {"cost": -1.0}, {"compute": 2.0}, {"every": 0}, {"output": "first"}]
)
def test_settings_out_of_range(setting):
    with pytest.raises((ValueError, TypeError), match=next(iter(setting))):  # TypeError where annotations are checked
        Introspective(ORACLE, **setting)
