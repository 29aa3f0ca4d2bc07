"""The forest of weighted particles, against lineages that are followed one particle at a time."""

import dataclasses
import math

import pytest
import torch
from tests.sampling.chain3 import BETA, MEAN, REWARD, SOFT, TILT, Z, chain

from keel.core.aggregate import Groups
from keel.core.chain import Meter, Prefix
from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.core.forest import PRUNED, Forest
from keel.core.rows import Rows
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.parts.advantages.group import GroupCentre, LeaveOneOut
from keel.parts.advantages.tree import TreeAdvantage
from keel.parts.weights.prefix import PrefixWeight
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.forest import forest_of, rows_of
from keel.sampling.kernels import Twisted
from keel.sampling.particles import Particles, Step
from keel.sampling.smc import SMC
from keel.statistics.stats import Stats

OFTEN = SMC(5, BETA, "multinomial", ess_threshold=2.0, keep_trace=True)  # resamples before every round but the first
ENDING = SequenceSpace(vocab=3, horizon=4, eos=2)


def prompts(particles: Particles) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(len(particles.pick))[:, None]
    return ids, ids >= 0


def survivors(particles: Particles) -> Rows:
    return rows_of(particles, *prompts(particles), 0)


def bits(runs: int = 6, kernel=None) -> Particles:
    """On the three-step chain, all sequences of one length."""
    return dataclasses.replace(OFTEN, kernel=kernel)(chain(runs, MEAN), Sample(3))


def ending(runs: int = 6) -> Particles:
    """On a chain whose sequences end early, so that finished particles are copied, too."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, ENDING.prefixes, 3, generator=generator, dtype=torch.float64)
    reward = torch.randn(1, len(ENDING.sequences()[0]), generator=generator, dtype=torch.float64)
    value = torch.randn(1, ENDING.prefixes, generator=generator, dtype=torch.float64)
    world = TabularChain(TabularPolicy(ENDING, table), reward, torch.zeros(runs, dtype=torch.long), value)
    return OFTEN(world, Sample(1))


RUNS = pytest.mark.parametrize("run", [bits, ending])


def origins(particles: Particles) -> list[list[tuple[int, int, int]]]:
    """For each token of each survivor: the round, the prompt and the slot in which it was drawn."""
    count = particles.count
    found = []
    for prompt in range(len(particles.pick)):
        for slot in range(count):
            at, drawn = slot, []
            for number in range(len(particles.trace) - 1, -1, -1):
                step = particles.trace[number]
                added = int(step.states.length[prompt * count + at]) - int(step.start[prompt, at])
                drawn += [(number, prompt, at)] * added
                at = int(step.ancestors[prompt, at])
            found.append(drawn[::-1])
    return found


# -- survivors -------------------------------------------------------------------------------------------------------


@RUNS
def test_rows_are_the_particles(run):
    particles = run()
    rows, states = survivors(particles), particles.states
    width = rows.tokens.shape[1]
    assert width == int(states.length.max()) and torch.equal(rows.tokens, states.tokens[:, :width])
    assert torch.equal(rows.mask.sum(1), states.length) and torch.equal(rows.stop, states.stop)
    assert torch.equal(rows.logp["behaviour"], states.logp[:, :width])
    assert rows.reward is not None and torch.equal(rows.reward[:, 0], particles.reward.flatten())
    assert torch.equal(rows.group, states.prompt) and torch.equal(rows.prompt_ids[:, 0], states.prompt)
    torch.testing.assert_close(rows.weight.view(-1, 5).sum(1), torch.full((6,), 5.0, dtype=torch.float64))
    torch.testing.assert_close(rows.weight.view(-1, 5) / 5, particles.log_w.exp())
    assert torch.equal(rows.columns["log_w"].exp(), rows.weight)


@RUNS
def test_what_is_shared_is_what_has_one_origin(run):
    particles = run()
    rows, drawn = survivors(particles), origins(particles)
    every = [origin for row in drawn for origin in row]
    assert len(set(every)) < len(every)  # resampling has happened
    for i, row in enumerate(drawn):
        n = len(row)
        assert rows.columns["mult"][i, :n].tolist() == [every.count(origin) for origin in row]
        first = [
            min((float(rows.weight[j]) == 0, j) for j in range(len(rows)) if origin in drawn[j])[1] for origin in row
        ]
        assert rows.columns["owner"][i, :n].tolist() == [owner == i for owner in first]
        assert int(rows.columns["branch"][i]) == sum(every.count(origin) > 1 for origin in row)
    assert int(rows.columns["owner"].sum()) == len(set(every))


@RUNS
def test_every_token_that_was_paid_for_is_there_once(run):
    particles = run()
    for merge in (True, False):
        forest = forest_of(particles, merge)
        size = forest.end - forest.start
        paid = torch.zeros(6, dtype=torch.long).index_add(0, forest.prompt, size)
        assert torch.equal(paid, particles.meter.generated)
    assert len(forest.tokens) == int(particles.meter.generated.sum())


@RUNS
def test_dead_branches(run):
    """Who has no survivor below is pruned, without weight and without reward."""
    particles = run()
    forest = forest_of(particles)
    dead = forest.status == PRUNED
    assert int((~dead).sum()) == 30 and not bool(dead[:30].any()) and bool(dead.any())
    assert bool((forest.log_w[dead] == -math.inf).all()) and bool(forest.reward[dead].isnan().all())
    drawn = {origin for row in origins(particles) for origin in row}
    paid = int(particles.meter.generated.sum())
    assert len(forest.keep(~dead).tokens) == len(drawn) < paid
    rows = forest.rows(*prompts(particles), 0)
    part = TreeAdvantage("parent", "leaves")
    alive = part(rows.select(~dead), Stats()).advantage
    assert alive is not None
    torch.testing.assert_close(part(rows, Stats()).advantage[~dead], alive, atol=1e-12, rtol=0)


@RUNS
def test_merging_joins_what_no_branching_parts(run):
    particles = run()
    long, short = forest_of(particles, merge=False), forest_of(particles)
    assert len(short.parent) < len(long.parent)
    assert all(len(short.children(n)) != 1 for n in range(len(short.parent)))
    one, other = (f.rows(*prompts(particles), 0) for f in (long, short))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.logp["behaviour"], other.logp["behaviour"])
    for name in ("mult", "owner", "branch", "log_w"):
        assert torch.equal(one.columns[name], other.columns[name])


@RUNS
def test_a_stretch_gets_the_advantage_of_its_branch(run):
    """Without merging only the first token of a stretch has siblings."""
    particles = run()
    forest = forest_of(particles, merge=False)
    alive = forest.keep(forest.status != PRUNED)
    long, short = (f.rows(*prompts(particles), 0) for f in (alive, alive.merged()))
    node = short.columns["node"]
    begins = node != torch.nn.functional.pad(node[:, :-1], (1, 0))
    part = TreeAdvantage("parent")
    one, other = part(long, Stats()).advantage, part(short, Stats()).advantage
    assert one is not None and other is not None and bool(other[~begins & short.mask].any())
    torch.testing.assert_close(one, torch.where(begins, other, 0.0), atol=1e-12, rtol=0)


def test_copies_of_finished_particles_add_nothing():
    forest = forest_of(ending())
    empty = forest.start == forest.end
    assert bool(empty.any()) and not bool((forest.mult[empty] != 1).any())
    assert bool((forest.parent[empty] >= 0).all())


def test_a_kernel_is_remembered_and_corrected_by_the_weights_alone():
    particles = bits(kernel=Twisted())
    forest = forest_of(particles, merge=False)
    first = particles.trace[0]
    assert forest.branch_log_q[:30].tolist() == pytest.approx(first.log_q.flatten().tolist())
    assert not torch.allclose(forest.branch_log_q[:30], forest.logp[:30])
    assert not bool(survivors(particles).columns["correction"].any())
    assert torch.equal(survivors(particles).logp["behaviour"], particles.states.logp)


# -- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [MEAN, SOFT])
def test_a_weighted_mean_over_a_group_is_the_estimate_of_the_sampler(table):
    """E[Z_hat mean_w r] = Z E_p*[r], over everything that can happen."""
    sampler = SMC(2, BETA, "multinomial", ess_threshold=2.0, keep_trace=True)
    probability, found = law(lambda copies, rng: sampler(chain(copies, table), rng))
    rows = survivors(found)
    assert rows.reward is not None
    mean = Groups.of(rows).mean(rows.reward[:, 0])
    wanted = Z * float((TILT * REWARD[0]).sum())
    assert float((probability * found.log_z.exp() * mean).sum()) == pytest.approx(wanted, abs=2e-5)


# -- without a trace -------------------------------------------------------------------------------------------------


def test_best_of_n_is_a_group_of_roots():
    particles = BestOf(8)(chain(4), Sample(0))
    forest = forest_of(particles)
    assert forest.parent.tolist() == [-1] * 32 and torch.equal(forest.tokens, particles.states.tokens.flatten())
    rows = survivors(particles)
    top = particles.reward == particles.reward.amax(1, keepdim=True)
    torch.testing.assert_close(rows.weight.view(4, 8), 8 * top.double() / top.sum(1, keepdim=True))
    assert bool((rows.columns["mult"] == 1).all()) and bool(rows.columns["owner"].all())


@pytest.mark.parametrize(
    "part", [GroupCentre(), LeaveOneOut(), TreeAdvantage("loo"), TreeAdvantage("parent", "leaves")]
)
def test_rows_without_weight_break_no_mean(part):
    """Only the best have weight in best-of-N, so their group is tied; what has none is compared with nothing."""
    rows = part(survivors(BestOf(8)(chain(4), Sample(0))), Stats())
    assert bool((rows.weight == 0).any()) and rows.advantage is not None
    assert bool(rows.advantage.isfinite().all()) and not bool(rows.advantage[rows.weight > 0].any())
    for policy in ("all", "once", "owner", "exclude"):
        assert bool((PrefixWeight(policy)(rows, Stats()) == 1).all())


def test_soft_best_of_n_centres_on_its_own_estimate():
    particles = SoftBestOf(8, BETA)(chain(4), Sample(0))
    rows = survivors(particles)
    mean = (particles.log_w.exp() * particles.reward).sum(1, keepdim=True)
    for part in (GroupCentre(), TreeAdvantage("parent")):
        found = part(rows, Stats()).advantage
        assert found is not None
        torch.testing.assert_close(found[:, 0].view(4, 8), particles.reward - mean, atol=1e-12, rtol=0)


# -- rounds of several tokens ----------------------------------------------------------------------------------------


def by_steps(**changes) -> Particles:
    """Two particles: [1 2] and [3], of which the first is continued twice, by [4] and by [5 6]."""
    even = torch.full((1, 2), -math.log(2), dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.long)

    def states(tokens: list[list[int]], length: list[int], stop: int) -> Prefix:
        logp = -torch.tensor(tokens, dtype=torch.float64) / 10
        return Prefix(torch.tensor(tokens), logp, torch.tensor(length), zeros + stop, zeros)

    first = states([[1, 2, 0, 0], [3, 0, 0, 0]], [2, 1], -1)
    last = states([[1, 2, 4, 0], [1, 2, 5, 6]], [3, 4], 0)
    trace = (
        Step(torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.long), first, torch.tensor([[-0.9, -0.3]]), even),
        Step(torch.tensor([[0, 0]]), torch.tensor([[2, 2]]), last, torch.tensor([[-0.4, -2.0]]), even),
    )
    none = torch.zeros(1, dtype=torch.float64)
    known = {"states": last, "log_w": even, "reward": torch.tensor([[1.0, 2.0]], dtype=torch.float64), "trace": trace}
    rest = {name: none for name in ("log_z", "log_z_error", "kl")}
    return Particles(pick=zeros[:1], meter=Meter(1), **rest, **{**known, **changes})


def test_rounds_of_several_tokens():
    """The first token of a node takes what the round's proposal differs by: -0.9 + 0.2 and -2.0 + 0.6."""
    forest: Forest = forest_of(by_steps())
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5, 6] and forest.parent.tolist() == [-1, -1, 0, 0]
    assert forest.end.tolist() == [2, 3, 4, 6] and forest.leaf_node.tolist() == [2, 3, 1]
    assert forest.branch_log_q.tolist() == pytest.approx([-0.7, -0.3, -0.4, -1.4])
    assert forest.status.tolist() == [0, 0, PRUNED]
    rows = survivors(by_steps())
    assert rows.columns["mult"].tolist() == [[2, 2, 1, 0], [2, 2, 1, 1]] and rows.columns["branch"].tolist() == [2, 2]


def test_particles_that_are_no_forest():
    particles = by_steps()
    with pytest.raises(UserError, match="trace"):
        forest_of(by_steps(trace=particles.trace[:1]))
    with pytest.raises(UserError, match="tokens"):
        forest_of(by_steps(states=torch.zeros(2, 3)))
