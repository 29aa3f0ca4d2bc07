"""Tree sampling: the backup by hand, trees built leaf by leaf, and trees that grow on the three-step chain."""

import itertools
import math

import pytest
import torch
from tests.sampling.chain3 import BETA, LEAVES, LOG_Z, ONE, PRIOR, REWARD, chain, leaf_law, leaves, total_variation
from tests.sampling.test_soft_value import ByStep, UsedUp, ending

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.sampling.tree import Node, Tree, TreeSampling, soft_backup


def built(sampler: TreeSampling, texts: list[str]) -> Tree:
    """A tree in which these leaves were visited once each."""
    tree = Tree()
    for text in texts:
        node = tree.root
        for step, bit in enumerate(text):
            one = float(ONE[2**step - 1 + int(text[:step] or "0", 2)])
            prior = one if bit == "1" else 1 - one
            if int(bit) not in node.children:
                node.children[int(bit)] = Node(node, int(bit), math.log(prior), step + 1)
                node.left -= prior
            node = node.children[int(bit)]
        node.stop, node.value, node.closed = 2, float(REWARD[0, int(text, 2)]), True
        tree.leaves.append(node)
        sampler.back_up(node)
    return tree


def shares(sampler: TreeSampling, tree: Tree) -> torch.Tensor:
    """The law of the leaves in a tree."""
    found = torch.zeros(8, dtype=torch.float64)
    for leaf, log_q in zip(tree.leaves, sampler.law(tree), strict=True):
        found[int("".join(str(step.token) for step in leaf.path()), 2)] += math.exp(log_q)
    return found


def variation(sampler: TreeSampling, runs: int, seed: int = 0) -> tuple[float, float]:
    """Total variation and value of the root, means over trees."""
    trees = sampler.grow(chain(runs), Sample(seed))
    found = [total_variation(shares(sampler, tree)) for tree in trees]
    return sum(found) / runs, sum(tree.root.value for tree in trees) / runs


# -- the backup ------------------------------------------------------------------------------------------------------


def test_the_backup_by_hand():
    assert soft_backup([0.0, 1.0], [0.0, 0.0], 1.0) == pytest.approx(0.620115, abs=1e-6)
    often = [math.log(1 / (1 + math.e)), math.log(math.e / (1 + math.e))]  # how often Boltzmann selection visits each
    assert soft_backup([0.0, 1.0], often, 1.0) == pytest.approx(0.813666, abs=1e-6)  # wrong, and told apart
    assert soft_backup([300.0, 400.0], [0.0, 0.0], 1e-3) == pytest.approx(400.0, abs=1e-2)


def test_uniform_weights_are_told_from_those_of_the_prior():
    def root(log_weight):
        below = [float(each) for each in REWARD[0]]
        for step in (2, 1, 0):
            places = range(2**step - 1, 2 ** (step + 1) - 1)
            pairs = zip(places, below[::2], below[1::2], strict=True)
            below = [soft_backup([zero, one], log_weight(place), BETA) for place, zero, one in pairs]
        return below[0]

    prior = lambda place: [math.log(1 - ONE[place]), math.log(ONE[place])]  # noqa: E731
    assert root(prior) == pytest.approx(1.099502, abs=1e-6)
    assert root(lambda place: [0.0, 0.0]) == pytest.approx(1.221482, abs=1e-6)


def test_a_whole_tree_is_the_tilt():
    sampler = TreeSampling(beta=BETA)
    tree = built(sampler, LEAVES)
    exact = PRIOR * (REWARD[0] / BETA).exp()
    assert tree.root.value == pytest.approx(BETA * LOG_Z, abs=1e-6) and tree.root.closed
    assert total_variation(shares(sampler, tree), exact / exact.sum()) < 1e-12


def test_a_leaf_that_was_not_visited_is_missed():
    sampler = TreeSampling(beta=BETA)
    tree = built(sampler, [leaf for leaf in LEAVES if leaf != "101"])
    assert (tree.root.value, total_variation(shares(sampler, tree))) == pytest.approx((0.9452, 0.2673), abs=5e-5)
    assert not tree.root.closed


# -- trees that grow -------------------------------------------------------------------------------------------------


def test_one_rollout_is_the_prior():
    torch.testing.assert_close(leaf_law(TreeSampling(1, 1, BETA)), PRIOR, atol=1e-9, rtol=0)


def test_the_law_of_three_rollouts_is_that_of_many_runs():
    sampler = TreeSampling(1, 3, BETA, expansion="draw")
    exact = leaf_law(sampler)
    assert float(exact.sum()) == pytest.approx(1.0) and total_variation(exact, PRIOR) > 0.05
    runs = 2000
    found = sampler(chain(runs), Sample(0))
    drawn = torch.bincount(leaves(found)[found.picked], minlength=8).double() / runs
    assert bool(((drawn - exact).abs() < 4 * (exact * (1 - exact) / runs).sqrt() + 1e-9).all())


def test_more_rollouts_come_closer():
    found = [variation(TreeSampling(1, n, BETA), 60)[0] for n in (5, 15, 50)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.200, abs=0.05)
    late, root = variation(TreeSampling(1, 500, BETA), 20)
    assert late == pytest.approx(0.027, abs=0.03) and root == pytest.approx(1.0995, abs=0.03)


def test_once_nothing_is_unseen_the_tree_is_exact_and_stops():
    found = TreeSampling(1, 400, BETA)(chain(30), Sample(2))
    whole = found.details["leaves"] == 8
    assert int(whole.sum()) >= 4
    assert found.log_z[whole].tolist() == pytest.approx([LOG_Z] * int(whole.sum()), abs=1e-5)
    assert found.kl[whole].tolist() == pytest.approx([0.938994] * int(whole.sum()), abs=1e-5)
    assert bool((found.details["rollouts"][whole] < 400).all())
    assert bool((found.details["rollouts"][~whole] == 400).all())


@pytest.mark.parametrize(("setting", "worst"), [({"expansion": "draw"}, 0.30), ({"weights": "draws"}, 0.40)])
def test_other_ways_to_expand_approach_the_tilt(setting, worst):
    early = variation(TreeSampling(1, 5, BETA, **setting), 40)[0]
    late = variation(TreeSampling(1, 60, BETA, **setting), 40)[0]
    assert late < worst < early


def test_a_node_for_each_draw_learns_slowly_and_low():
    merged, apart = TreeSampling(1, 60, BETA), TreeSampling(1, 60, BETA, weights="separate")
    (near, higher), (far, lower) = variation(merged, 20), variation(apart, 20)
    assert near < 0.21 < far and lower < 0.93 < higher < 1.0995
    world = chain(1)
    tree = apart.grow(world, Sample(0))[0]
    assert len(tree.leaves) > 8 == int(world.meter.rewards)  # no reward is asked for twice


def test_the_search_finds_the_best_leaf_and_never_loses_it():
    found = []
    for rollouts in (1, 4, 16, 64):
        particles = TreeSampling(3, rollouts, BETA, mode="search")(chain(15), Sample(1))
        best = particles.reward[:, 0]
        assert bool((best == particles.reward.amax(1)).all()) and not particles.pick.any()
        found.append(best)
    for before, after in itertools.pairwise(found):
        assert bool((after >= before).all())
    assert bool((found[-1] == 2.0).all()) and not bool((found[0] == 2.0).all())


def test_of_equal_leaves_each_is_as_likely():
    world = chain(800)
    world.rewards = torch.zeros_like(world.rewards)
    found = TreeSampling(2, 60, BETA, mode="search")(world, Sample(0))
    assert bool((found.details["leaves"] == 8).all())
    counts = torch.bincount(leaves(found)[found.picked], minlength=8)
    assert counts.tolist() == pytest.approx([100] * 8, abs=4.5 * (100 * 7 / 8) ** 0.5)


def test_what_a_search_puts_out():
    found = TreeSampling(10, 100, BETA, mode="search")(chain(1), Sample(0))
    seen = int(found.details["leaves"])
    assert found.reward[0, :seen].tolist() == sorted(found.reward[0, :seen].tolist(), reverse=True)
    assert len(set(leaves(found)[:seen].tolist())) == seen < 10
    assert float(found.ess) == pytest.approx(seen) and float(found.kl) == pytest.approx(-math.log(0.084), abs=1e-6)


def test_the_kl_is_that_of_the_leaves():
    probability, found = law(lambda copies, rng: TreeSampling(1, 3, BETA, expansion="draw")(chain(copies), rng))
    shares = torch.zeros(8).double().index_add(0, leaves(found), probability)
    assert float((probability * found.kl).sum()) > float((shares * (shares / PRIOR).log()).sum()) > 0


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_a_prefix_that_is_used_again_costs_nothing():
    world = chain(4)
    trees = TreeSampling(1, 100, BETA).grow(world, Sample(0))
    for p, tree in enumerate(trees):
        assert tree.generated == int(world.meter.generated[p]) <= 14  # the edges of the whole tree
        assert len(tree.leaves) == int(world.meter.rewards[p])


def test_the_budget_stops_each_prompt_alone():
    world = chain(20)
    found = TreeSampling(1, 200, BETA, budget=7)(world, Sample(0))
    assert bool((world.meter.generated >= 7).all()) and bool((world.meter.generated <= 9).all())
    assert len(found.details["rollouts"].unique()) > 1


@pytest.mark.parametrize(
    "setting", [{}, {"expansion": "draw"}, {"mode": "search"}, {"weights": "draws"}, {"weights": "separate"}], ids=str
)
def test_a_prompt_depends_on_no_other_and_ends_stay_ends(setting):
    sampler = TreeSampling(3, 12, BETA, **setting)
    together = sampler(ending([1, 0, 1]), Sample(4, torch.tensor([8, 9, 10])))
    for place, prompt in enumerate([1, 0, 1]):
        alone = sampler(ending([prompt]), Sample(4, torch.tensor([8 + place])))
        assert together.states.tokens[3 * place : 3 * place + 3].tolist() == alone.states.tokens.tolist()
        torch.testing.assert_close((together.log_z[place], together.kl[place]), (alone.log_z[0], alone.kl[0]))
    states = together.states
    assert bool(states.done.all())
    torch.testing.assert_close(together.reward.flatten(), ending([1, 0, 1]).reward(states))
    grown = ending([1, 0, 1]).at(states.tokens, states.length - 1, states.prompt)
    last = states.tokens.gather(1, states.length[:, None] - 1)[:, 0]
    torch.testing.assert_close(ending([1, 0, 1]).extend(grown, last).logp, states.logp)


def test_no_state_is_used_twice():
    states = TreeSampling(8, 40, BETA)(ending([0, 1], UsedUp), Sample(0)).states
    assert states.memory is None and len(states.length.unique()) > 1


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"num_particles": 0},
        {"rollouts": 0},
        {"beta": 0.0},
        {"mode": "uct"},
        {"widening": 0.0},
        {"alpha": -0.1},
        {"expansion": "none"},
        {"weights": "visits"},
        {"c_uct": -1.0},
        {"budget": 0},
    ],
    ids=str,
)
def test_bad_settings(setting):
    with pytest.raises(
        (ValueError, TypeError), match=next(iter(setting))
    ):  # a type error where annotations are checked
        TreeSampling(**setting)


def test_a_chain_by_steps_has_no_tree():
    with pytest.raises(UserError, match="by steps"):
        TreeSampling()(ByStep(chain()), Sample(0))
