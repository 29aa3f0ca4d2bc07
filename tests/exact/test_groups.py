"""Every group of the real size, against ordered tuples, closed forms and exact gradients."""

import itertools
import math

import pytest
import torch
from tests.worlds import noise, table

from keel.core.aggregate import Groups, weighted_mean
from keel.core.rows import Rows
from keel.exact.groups import (
    every_group,
    group_log_probs,
    groups,
    joined,
    moments,
    multisets,
    number_of_groups,
    sampled_groups,
)
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine

FOUR = SequenceSpace(2, 2)
ENDING = SequenceSpace(2, 3, eos=1)  # 1, 01, 001, 000: four sequences of different lengths
REWARD = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)


def probabilities(policy: TabularPolicy) -> torch.Tensor:
    return policy.log_prob(policy.space.rows()).detach().exp()


def over_tuples(p: torch.Tensor, size: int, statistic) -> float:
    """The expectation by enumerating ordered draws, the slow way."""
    total = 0.0
    for draw in itertools.product(range(len(p)), repeat=size):
        total += math.prod(float(p[i]) for i in draw) * statistic([float(REWARD[i]) for i in draw])
    return total


@pytest.mark.parametrize(
    ("sequences", "size", "count"), [(4, 2, 10), (4, 4, 35), (4, 8, 165), (4, 16, 969), (3, 1, 3), (1, 5, 1)]
)
def test_how_many(sequences, size, count):
    found = multisets(sequences, size)
    assert number_of_groups(sequences, size) == count == len(found) == len(found.unique(dim=0))
    assert found.sum(1).tolist() == [size] * count


@pytest.mark.parametrize("space", [FOUR, ENDING], ids=["fixed length", "with eos"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_probabilities_sum_to_one(space, size):
    batch = every_group(table("sum", space=space), size)
    assert float(batch.probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(batch.rows.weight.sum()) == pytest.approx(size, abs=1e-11)
    assert batch.size == size and not batch.rows.exact and not batch.sampled


def test_probability_of_a_multiset_by_hand():
    """Two sequences of probabilities 0.2 and 0.8; three draws: 0.008, 3 * 0.032, 3 * 0.128, 0.512."""
    log_p = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    found = group_log_probs(multisets(2, 3), log_p).exp().tolist()
    assert found == pytest.approx([0.008, 0.096, 0.384, 0.512], abs=1e-14)


def test_a_sequence_without_probability():
    log_p = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    assert group_log_probs(multisets(2, 2), log_p).exp().tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("size", [2, 3])
def test_statistics_of_groups_against_ordered_draws(size):
    policy = table("tuples", space=FOUR)
    p, batch = probabilities(policy), every_group(policy, size).with_reward(REWARD)
    seen, values = Groups.of(batch.rows), batch.rows.reward[:, 0]
    found = {
        "mean of squares": seen.mean(values).square(),
        "deviation": seen.std(values),
        "largest": seen.range(values)[1],
        "tied": seen.tied(values).double(),
    }
    wanted = {
        "mean of squares": lambda r: (sum(r) / size) ** 2,
        "deviation": lambda r: math.sqrt(sum((x - sum(r) / size) ** 2 for x in r) / (size - 1)),
        "largest": max,
        "tied": lambda r: float(len(set(r)) == 1),
    }
    for name, statistic in wanted.items():
        assert float((batch.probability * found[name]).sum()) == pytest.approx(
            over_tuples(p, size, statistic), abs=1e-12
        ), name


@pytest.mark.parametrize("size", [2, 4, 8])
def test_moments_of_the_mean_and_of_the_sample_variance(size):
    """E[mean] = mu, Var[mean] = sigma^2 / G, E[s^2] = sigma^2: the n - 1 is that of a sample."""
    policy = table("moments", space=FOUR)
    p = probabilities(policy)
    mean = float((p * REWARD).sum())
    variance = float((p * (REWARD - mean).square()).sum())
    batch = every_group(policy, size).with_reward(REWARD)
    seen, values = Groups.of(batch.rows), batch.rows.reward[:, 0]
    of_mean, of_variance = moments(seen.mean(values), batch), moments(seen.std(values).square(), batch)
    assert float(of_mean.mean) == pytest.approx(mean, abs=1e-12)
    assert float(of_mean.variance) == pytest.approx(variance / size, abs=1e-12)
    assert float(of_variance.mean) == pytest.approx(variance, abs=1e-12)
    assert float(of_mean.standard_error) == 0.0
    assert float(weighted_mean(values, batch.rows.weight)) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_pass_at_k(size):
    """At least one of G completions is right with probability 1 - (1 - p)^G; all of them with p^G."""
    policy = table("pass", space=ENDING)
    right = torch.tensor([0, 1, 1, 0])
    p = float(probabilities(policy)[right.bool()].sum())
    batch = every_group(policy, size)
    solved = (batch.counts * right).sum(1)
    assert float(batch.probability[solved > 0].sum()) == pytest.approx(1 - (1 - p) ** size, abs=1e-12)
    assert float(batch.probability[solved == size].sum()) == pytest.approx(p**size, abs=1e-12)


def test_rows_are_the_completions_that_the_counts_say():
    policy = table("rows", space=ENDING)
    batch = every_group(policy, 3)
    tokens, lengths = ENDING.sequences()
    assert torch.equal(batch.rows.tokens, tokens[batch.sequence])
    assert torch.equal(batch.rows.lengths, lengths[batch.sequence])
    for i, counts in enumerate(batch.counts):
        mine = batch.sequence[batch.rows.group == i]
        assert torch.equal(torch.bincount(mine, minlength=4), counts)
        assert torch.equal(batch.one(i).tokens, tokens[mine]) and batch.one(i).weight.tolist() == [1.0] * 3
    assert len(batch.rows.row.unique()) == len(batch.rows)
    behaviour = batch.rows.logp["behaviour"].sum(1)
    torch.testing.assert_close(behaviour, policy.log_prob(batch.rows).detach(), rtol=0, atol=1e-13)


def test_several_prompts_in_one_batch():
    space = SequenceSpace(2, 2, prompts=2)
    policy = table("two", space=space)
    rows = joined([every_group(policy, 2, prompt) for prompt in range(2)])
    assert sorted(rows.group.unique().tolist()) == list(range(20)) and len(rows.row.unique()) == 40
    assert [float(rows.weight[rows.prompt_ids[:, 0] == q].sum()) for q in range(2)] == pytest.approx([1.0, 1.0])


# -- drawn groups ----------------------------------------------------------------------------------------------------


def test_drawn_groups_agree_within_their_standard_error():
    policy = table("drawn", space=FOUR)
    exact, drawn = every_group(policy, 4), sampled_groups(policy, 4, 4000, seed=0)
    found = moments((drawn.counts * REWARD).sum(1), drawn)
    wanted = moments((exact.counts * REWARD).sum(1), exact)
    assert drawn.sampled and float(drawn.probability.sum()) == pytest.approx(1.0)
    assert abs(float(found.mean - wanted.mean)) < 4 * float(found.standard_error)
    assert float(found.standard_error) == pytest.approx(float((wanted.variance / 4000).sqrt()), rel=0.05)
    assert torch.equal(sampled_groups(policy, 4, 50, seed=1).counts, sampled_groups(policy, 4, 50, seed=1).counts)
    assert not torch.equal(sampled_groups(policy, 4, 50, seed=1).counts, sampled_groups(policy, 4, 50, seed=2).counts)


def test_too_many_groups_are_drawn():
    policy = table("many", space=SequenceSpace(3, 2))  # 9 sequences, 12870 groups of 8
    assert groups(policy, 8, count=20).sampled and len(groups(policy, 8, count=20).counts) == 20
    assert not groups(policy, 4).sampled and len(groups(policy, 4).counts) == 495
    with pytest.raises(ValueError, match="12870"):
        every_group(policy, 8)


@pytest.mark.parametrize("make", [lambda p: every_group(p, 0), lambda p: sampled_groups(p, 2, 0, seed=0)])
def test_sizes_out_of_range(make):
    with pytest.raises(ValueError, match="at least one"):
        make(table("bad", space=FOUR))


# -- gradients -------------------------------------------------------------------------------------------------------


def ascent(method: Method, rows: Rows, policy: TabularPolicy) -> torch.Tensor:
    """The direction in which the method moves the table, at the policy that sampled."""
    engine = Engine({"policy": policy, "old": policy, "ref": policy})
    frozen = engine.measure(method.frozen_needs(several_updates=True), rows)
    rows = method.prepare(rows, frozen, {})
    policy.table.grad = torch.zeros_like(policy.table)  # a tied group gives none
    engine.step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    return -policy.table.grad.clone()


def exact_gradient(policy: TabularPolicy) -> torch.Tensor:
    value = (policy.log_prob(policy.space.rows()).exp() * REWARD).sum()
    return torch.autograd.grad(value, policy.table)[0]


@pytest.mark.parametrize("space", [FOUR, ENDING], ids=["fixed length", "with eos"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_rloo_is_unbiased_and_grpo_without_the_deviation_is_shrunk(space, size):
    policy = table("gradient", space=space)
    rows = every_group(policy, size).with_reward(REWARD).rows
    wanted = exact_gradient(policy)
    rloo = recipe_named("rloo")(beta=0.0, num_generations=size)
    torch.testing.assert_close(ascent(rloo, rows, policy), wanted, rtol=0, atol=1e-10)
    options = {"scale_rewards": "none", "aggregation": "constant", "max_completion_length": space.horizon}
    grpo = recipe_named("grpo")(beta=0.0, num_generations=size, **options)
    centred = ascent(grpo, rows, policy) * space.horizon  # the constant that it divides by
    torch.testing.assert_close(centred, wanted * (size - 1) / size, rtol=0, atol=1e-10)


def test_variance_of_the_gradient_falls_with_the_size():
    """Of leave-one-out: with the groups one by one, the mean is exact; 2 completions scatter more than 4."""
    policy, spread = table("variance", space=FOUR), []
    for size in (2, 4):
        batch = every_group(policy, size).with_reward(REWARD)
        rloo = recipe_named("rloo")(beta=0.0, num_generations=size)
        each = torch.stack([ascent(rloo, batch.one(i), policy) for i in range(len(batch.counts))])
        found = moments(each, batch)
        torch.testing.assert_close(found.mean, exact_gradient(policy), rtol=0, atol=1e-10)
        spread.append(float(found.variance.sum()))
    assert spread[1] < spread[0] / 2  # more than twice as good: the baseline improves too


def test_a_wide_space_is_built_at_once():
    """969 groups of 16 in rows: 15504 of them, and the mean of any reward is the policy's."""
    policy = table("wide", space=FOUR)
    batch = every_group(policy, 16)
    reward = noise("wide", shape=(4,))
    found = weighted_mean(reward[batch.sequence], batch.rows.weight)
    assert len(batch.rows) == 15504
    assert float(found) == pytest.approx(float((probabilities(policy) * reward).sum()), abs=1e-12)
