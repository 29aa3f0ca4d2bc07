"""Learning from chosen completions, and a budget of KL: rounds and fixed points with closed forms."""

import math

import pytest
import torch
from tests.recipes.exact import (
    FIVE,
    POLICY,
    REF,
    REWARD,
    climb,
    gradient,
    next_round,
    outcomes,
    prepared,
    probabilities,
)
from tests.worlds import from_probs

from keel.core.errors import ConfigError
from keel.core.rows import cat
from keel.exact.space import SequenceSpace
from keel.parts.controllers.budget import METRIC, KLBudget
from keel.recipes.registry import recipe_named


def close(found, wanted, atol=6e-7):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=atol)


def kl(p, q) -> float:
    return float((p * (p / q).log()).sum())


# -- curated ---------------------------------------------------------------------------------------------------------

ROUND = {
    2: [0.291028, 0.293843, 0.190023, 0.155944, 0.069161],
    4: [0.228297, 0.305015, 0.170489, 0.213252, 0.082948],
}


@pytest.mark.parametrize("k", ROUND)
def test_a_round_of_curation(k):
    found = next_round(recipe_named("curated")(num_candidates=k), outcomes(REF), outcomes(REF), REWARD)
    close(found, ROUND[k])


def test_rounds_of_curation_raise_the_reward():
    """E[r] of four rounds; E[e^r] rises beyond its bound in the first."""
    method, p, seen = recipe_named("curated")(num_candidates=2), REF, []
    for _ in range(4):
        p = next_round(method, outcomes(p), outcomes(REF), REWARD)
        seen.append(float((p * REWARD).sum()))
    assert seen == pytest.approx([0.804485, 1.005209, 1.212154, 1.407007], abs=6e-7)
    odds = REWARD.exp()
    mean, variance = float((REF * odds).sum()), float((REF * odds**2).sum() - (REF * odds).sum() ** 2)
    after = float((next_round(method, outcomes(REF), outcomes(REF), REWARD) * odds).sum())
    assert (mean, after) == (pytest.approx(2.372305, abs=6e-7), pytest.approx(2.865312, abs=6e-7))
    assert after > mean + variance / (2 * float(odds.max())) == pytest.approx(2.617748, abs=6e-7)


def test_curation_without_reference_data_ends_on_the_best():
    """Ties keep the odds of the reference; where all rewards are equal nothing moves."""
    method = recipe_named("curated")(num_candidates=4)
    reward, p = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.5], dtype=torch.float64), REF
    for _ in range(40):
        p = next_round(method, outcomes(p), outcomes(REF), reward)
    close(p, [0, 0, 2 / 3, 1 / 3, 0], atol=1e-6)
    close(next_round(method, outcomes(REF), outcomes(REF), torch.full((5,), 0.7).double()), REF, atol=1e-10)


def test_curation_with_reference_data_comes_to_rest():
    """lam = 1/2, that is two thirds of the data from the reference."""
    method = recipe_named("curated")(num_candidates=2, real_fraction=2 / 3)
    p, rewards = REF, [0.625]
    for _ in range(40):
        p = next_round(method, outcomes(p), outcomes(REF), REWARD)
        rewards.append(float((p * REWARD).sum()))
    close(p, [0.346066, 0.267288, 0.190971, 0.135422, 0.060254])
    assert rewards[-1] == pytest.approx(0.723997, abs=6e-7) and rewards == sorted(rewards)
    assert kl(p, REF) == pytest.approx(0.011230, abs=6e-7)
    assert kl(p, REF) < -math.log(1 - 0.5) and float((p / REF).max()) < 1 / (1 - 0.5)
    assert float(gradient(method, outcomes(p), outcomes(REF), REWARD).abs().max()) < 1e-9
    assert float((REF / p).max()) < 1.5  # the ratios that carry the reference's data


def test_the_reference_alone_is_imitated():
    method = recipe_named("curated")(real_fraction=1.0)
    close(next_round(method, outcomes(POLICY), outcomes(REF), REWARD), REF, atol=1e-12)


# -- the best of n ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "wanted", "spent"),
    [
        (2, [0.160000, 0.362500, 0.200000, 0.190000, 0.087500], 0.159004),
        (4, [0.025600, 0.392406, 0.104000, 0.343900, 0.134094], 0.595596),
        (16, [0.000000, 0.073969, 0.000282, 0.814698, 0.111051], 1.705628),
    ],
)
def test_one_round_is_the_best_of_n(n, wanted, spent):
    method = recipe_named("best_of_n_distillation")(n=n)
    found = next_round(method, outcomes(REF), outcomes(REF), REWARD)
    close(found, wanted)
    assert kl(found, REF) == pytest.approx(spent, abs=6e-7)
    rest = gradient(method, outcomes(found), outcomes(REF), REWARD, old=outcomes(REF))
    assert float(rest.abs().max()) < 1e-12


def test_rounds_compound():
    """Two rounds of the best of 2 are the best of 4, three are the best of 8."""
    method, p = recipe_named("best_of_n_distillation")(n=2), REF
    for n in (2, 4, 8):
        p = next_round(method, outcomes(p), outcomes(REF), REWARD)
        best = next_round(recipe_named("best_of_n_distillation")(n=n), outcomes(REF), outcomes(REF), REWARD)
        close(p, best, atol=1e-12)


def test_more_completions_than_n():
    assert recipe_named("best_of_n_distillation")(n=4, num_generations=16).rollout.num_generations == 16
    with pytest.raises(ConfigError, match="at least n=4"):
        recipe_named("best_of_n_distillation")(n=4, num_generations=2)


# -- a budget of KL --------------------------------------------------------------------------------------------------

BUDGETS = {0.1: (0.635718, 0.929010), 0.25: (0.987083, 1.113818), 0.5: (1.402697, 1.323627), 1.0: (2.119017, 1.611414)}


def observed(method, policy, ref, reward, space=FIVE) -> dict:
    """The metrics that the controller leaves after a batch of all completions of the policy."""
    rows = policy.weighted(space.rows()).with_(reward=reward[:, None])
    rows, frozen = prepared(method, rows, {"policy": policy, "old": policy, "ref": ref})
    controller, metrics = method.controllers["beta"], {}
    controller.observe(rows, frozen, metrics, controller.init())
    return metrics


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("start", [REF, POLICY], ids=["reference", "policy"])
def test_the_controller_finds_the_rate(budget, start):
    method = recipe_named("kl_budget")(budget=budget)
    found = observed(method, outcomes(start), outcomes(REF), REWARD)[METRIC]
    assert 1 / found == pytest.approx(BUDGETS[budget][0], abs=6e-7)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_policy_spends_the_budget(budget):
    """Controller and exact steps in turn, from another policy; reward and KL where they come to rest."""
    method = recipe_named("kl_budget")(budget=budget)
    policy, ref, state, metrics = outcomes(POLICY), outcomes(REF), {"value": 1.0, "seen": False}, {}
    for step in range(3):
        values, state = method.controllers["beta"].update(metrics, state, step)
        for path, value in values.items():
            method = method.set(path, value)
        climb(method, policy, ref, REWARD, rate=0.8 / method.transforms["kl"].coef, steps=3)
        metrics = observed(method, policy, ref, REWARD)
    p = probabilities(policy)
    assert kl(p, REF) == pytest.approx(budget, abs=1e-4)
    assert float((p * REWARD).sum()) == pytest.approx(BUDGETS[budget][1], abs=1e-4)


def test_a_budget_out_of_reach_and_one_without_information():
    """The argmax alone costs -log 0.1 = 2.302585 nats."""
    reach = recipe_named("kl_budget")(budget=2.30)
    assert 0 < 1 / observed(reach, outcomes(POLICY), outcomes(REF), REWARD)[METRIC] < 100
    beyond = recipe_named("kl_budget")(budget=2.31)
    assert observed(beyond, outcomes(POLICY), outcomes(REF), REWARD)[METRIC] == 1e-3
    assert observed(beyond, outcomes(POLICY), outcomes(REF), torch.ones(5).double()) == {}


def test_the_budget_is_a_mean_over_prompts():
    """Two coins, good with reference probability 1/2 and 1/4; at rate log 3 their KL is .130812 and .143841."""
    space = SequenceSpace(2, 1)
    coins = [from_probs([0.5, 0.5], space=space), from_probs([0.75, 0.25], space=space)]
    reward = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    rate = math.log(3)
    each = [rate * 0.75 - math.log(2.0), rate * 0.5 - math.log(1.5)]
    assert each == pytest.approx([0.130812, 0.143841], abs=6e-7)
    rows = cat([c.weighted(space.rows()).with_(reward=reward, group=torch.full((2,), i)) for i, c in enumerate(coins)])
    for weights in ((1.0, 1.0), (3.0, 1.0)):
        heavy = rows.with_(weight=rows.weight * torch.tensor(weights, dtype=torch.float64)[rows.group])
        budget = sum(w * v for w, v in zip(weights, each, strict=True)) / sum(weights)
        controller = KLBudget("transforms.kl.coef", budget)
        zeros = {need: torch.zeros(4, 1, dtype=torch.float64) for need in controller.needs}
        metrics: dict = {}
        controller.observe(heavy, _stats(zeros), metrics, controller.init())
        assert 1 / metrics[METRIC] == pytest.approx(rate, abs=1e-9)


def _stats(values):
    from keel.statistics.stats import Stats

    return Stats(values)


def test_the_coefficient_follows_the_batches_slowly():
    """The first estimate is taken whole; then the logarithm moves by a tenth of the way."""
    controller = KLBudget("transforms.kl.coef", 0.5, start=2.0)
    values, state = controller.update({}, controller.init(), 0)
    assert values == {"transforms.kl.coef": 2.0}
    values, state = controller.update({METRIC: 0.5}, state, 1)
    assert values == {"transforms.kl.coef": pytest.approx(0.5)}
    values, state = controller.update({METRIC: 1.0}, state, 2)
    assert values == {"transforms.kl.coef": pytest.approx(0.5 * 2**0.1)}
    values, _ = controller.update({}, state, 3)  # a batch without information
    assert values == {"transforms.kl.coef": pytest.approx(0.5 * 2**0.1)}


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": 1.0, "decay": 1.0}, {"budget": 1.0, "minimum": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} must be"):
        KLBudget("transforms.kl.coef", **wrong)


# -- references ------------------------------------------------------------------------------------------------------


def test_an_averaged_reference():
    """The soup of tables is the geometric mean; the optimum against it, and how far it lies from either."""
    from keel.models.sources import average

    other = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.2], dtype=torch.float64)
    soup = outcomes(REF)
    average(soup, [("initial", outcomes(REF)), ("sister", outcomes(other))], (0.5, 0.5))
    s = probabilities(soup)
    close(s, [0.223012, 0.249335, 0.223012, 0.193134, 0.111506])
    assert kl(REF, s) == pytest.approx(0.106655, abs=6e-7)
    method = recipe_named("rloo")(beta=0.5)
    policy = outcomes(REF)
    climb(method, policy, soup, REWARD, rate=1.6, steps=12)
    p = probabilities(policy)
    close(p, [0.014429, 0.119200, 0.039222, 0.682244, 0.144905])
    assert float((p * REWARD).sum()) == pytest.approx(1.720657, abs=6e-7)
    assert kl(p, REF) == pytest.approx(1.264127, abs=1e-6)


def test_salsa_is_ppo_with_another_reference():
    salsa, ppo = recipe_named("salsa"), recipe_named("ppo")
    soup = salsa(paths=("a", "b"), ratio=0.5).models["ref"]
    assert soup.paths == ("initial", "a", "b") and soup.weights == (0.5, 0.25, 0.25)
    assert salsa(paths=("a",), ratio=0.0).models["ref"].weights == (1.0, 0.0)
    found, wanted = salsa(), ppo()
    assert found.replacing(models=wanted.models, claim=wanted.claim) == wanted
    with pytest.raises(ConfigError, match="beta must be positive"):
        salsa(beta=0.0)
