"""Verification of methods that learn from comparisons: numbers that are known without it."""

import dataclasses
import math

import pytest
import torch

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import HeadScore, LogRatio
from keel.recipes.registry import recipe_named
from keel.verify.objectives import Objective
from keel.verify.pairs import learnt_scores, minimiser, preference_rows, stationarity, table_of
from keel.verify.recipes import verify_recipe, worlds


def test_comparisons_have_the_probabilities_of_bradley_and_terry():
    world = worlds()["far"]
    rows = preference_rows(world, "pairs")
    pairs = rows.pairs
    assert pairs is not None
    prob = world.log_probs("ref").exp()
    # each unordered pair comes in both orders, whose labels add up to 1
    assert float(pairs.measure.sum()) == pytest.approx(float(0.5 * (1 - prob.square().sum(1)).sum()), rel=1e-12)
    place = rows.columns["sequence"]
    first, second = place[pairs.chosen], place[pairs.rejected]
    reward = world.reward.flatten()
    odds = {}
    for i, j, m in zip(first.tolist(), second.tolist(), pairs.measure.tolist(), strict=True):
        odds[i, j] = m
    for (i, j), m in odds.items():
        assert math.log(m / odds[j, i]) == pytest.approx(float(reward[i] - reward[j]), abs=1e-9)


def test_labels_make_one_distribution():
    rows = preference_rows(worlds()["far"], "labels")
    assert float(rows.weight.sum()) == pytest.approx(2.0)  # two prompts
    good = float(rows.weight[rows.label == 1].sum())
    assert 0 < good < 2


def test_a_table_is_found_back_from_its_sequences():
    world = worlds()["far"]
    again = world.at(table_of(world.log_probs("policy"), world.space))
    assert torch.allclose(again.log_probs(), world.log_probs("policy"), atol=1e-12)


def test_dpo_rests_at_the_optimum_and_nowhere_else():
    world = worlds()["far"]
    method = recipe_named("dpo")(beta=0.5)
    right = Objective("reward", "kl_policy_ref", "sequence", 0.5).optimum(world)
    assert stationarity(method, world, right) < 1e-12
    wrong = Objective("reward", "kl_policy_ref", "sequence", 0.6).optimum(world)
    assert stationarity(method, world, wrong) > 0.01
    reached = minimiser(method, world).log_probs()
    assert float((reached.exp() - right.exp()).abs().max()) < 1e-6


def test_a_wrong_claim_falls_short():
    recipe = recipe_named("dpo")
    turned = recipe(beta=0.5).replacing(claim=Claim("wrong", "sequence", "kl_ref_policy", "beta"))
    other = dataclasses.replace(recipe, make=lambda beta=0.5: turned, neutral={})
    found = verify_recipe(other, {"beta": 0.5}, full=True)
    assert found.status == "falls short"
    assert found.fixed_point_tv is not None and found.fixed_point_tv > 0.01


def test_scores_of_bradley_terry_are_the_rewards_up_to_a_constant():
    world = worlds()["far"]
    method = Method(
        kind="reward",
        terms={"pairs": PairLoss(LogSigmoid(), HeadScore(), beta=1.0)},
        heads={"reward": Critic()},
        aggregation=Aggregation("sequence_mean_token_sum"),
    )
    shift = learnt_scores(method, world) - world.reward
    assert float((shift - shift.mean(1, keepdim=True)).abs().max()) < 1e-4


def test_label_smoothing_moves_the_minimum():
    world = worlds()["far"]
    method = Method(
        kind="pairs",
        terms={"pairs": PairLoss(LogSigmoid(), LogRatio(), 0.5, label_smoothing=0.2)},
        models={"ref": Initial()},
    )
    right = Objective("reward", "kl_policy_ref", "sequence", 0.5).optimum(world)
    assert stationarity(method, world, right) > 0.01
