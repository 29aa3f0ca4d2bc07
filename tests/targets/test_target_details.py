"""Targets of several prompts at once, and likelihoods in numbers."""

import math

import pytest
import torch

from keel.targets.budget import budget, frontier_gap
from keel.targets.target import Target, exponential_likelihood, sigmoid_likelihood
from keel.targets.tilt import f_tilt

P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]], dtype=torch.float64)


def test_expectations_are_those_of_each_prompt():
    """As many prompts as outcomes, so that the axes could be confused."""
    values = torch.tensor([[4.0, 8.0, 0.0], [1.0, 2.0, 3.0], [5.0, 7.0, 9.0]], dtype=torch.float64)
    assert Target(P.log()).expectation(values).tolist() == pytest.approx([4.0, 2.6, 5.0], rel=1e-12)


def test_entropies_are_those_of_each_prompt():
    second = -(0.1 * math.log(0.1) + 0.2 * math.log(0.2) + 0.7 * math.log(0.7))
    assert Target(P.log()).entropy().tolist() == pytest.approx([1.5 * math.log(2), second, 0.0], abs=1e-12)


def test_likelihoods():
    reward = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 1.0]], dtype=torch.float64)
    assert exponential_likelihood(reward, 0.5).tolist() == [[-6.0, -4.0, 0.0], [0.0, 0.0, -2.0]]
    found = sigmoid_likelihood(reward, 0.5, 1.0).exp()[0].tolist()
    assert found == pytest.approx([1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-4))], rel=1e-12)


@pytest.mark.parametrize(("name", "beta"), [("tv", 2.5), ("2*tv", 1.25), ("0.5*tv", 5.0)])
def test_the_multiplier_of_total_variation(name, beta):
    """beta f' is beta / 2 where mass arrives: r - lambda = beta / 2 at the best outcome, which has taken some."""
    log_ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    found = f_tilt(log_ref, reward, beta, name)
    assert found.log_prob.exp().tolist() == pytest.approx([0.0, 0.3, 0.7], abs=1e-12)  # 3 > beta moves, 2 < beta stays
    assert float(found.multiplier) == pytest.approx(3 - 1.25, rel=1e-12)


@pytest.mark.parametrize(
    ("reward", "beta", "prob"),
    [
        ((0.0, 1.0, 3.0), 2.0, (0.0, 0.3, 0.7)),  # 1 is worth no less than 3 - 2, and stays
        ((0.0, 1.0, 3.0), 3.0, (0.5, 0.3, 0.2)),
        ((0.0, 2.0, 2.0), 2.0, (0.5, 0.3, 0.2)),
        ((0.0, 2.0, 2.0), 1.9, (0.0, 0.6, 0.4)),  # shared as the reference does
    ],
)
def test_total_variation_keeps_what_is_worth_its_move(reward, beta, prob):
    """Mass stays where r >= max r - beta, the bound included: there moving it gains nothing."""
    log_ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    found = f_tilt(log_ref, torch.tensor(reward, dtype=torch.float64), beta, "tv")
    assert found.log_prob.exp().tolist() == pytest.approx(prob, abs=1e-12)


@pytest.mark.parametrize("kl", [0.05, 5.0])
def test_a_better_outcome_without_mass_does_not_matter_to_a_budget(kl):
    log_ref = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    found, wanted = budget(log_ref, reward, kl), budget(log_ref[:3], reward[:3], kl)
    assert found.log_prob.exp().tolist() == pytest.approx([*wanted.log_prob.exp().tolist(), 0.0], abs=1e-12)
    assert float(found.reward) == pytest.approx(float(wanted.reward), rel=1e-12)
    assert wanted.log_prob.exp().tolist() == pytest.approx([0.0, 0.0, 1.0]) or kl < 1


@pytest.mark.parametrize("divergence", ["kl_policy_ref", "kl_ref_policy", "js", "chi2_policy_ref", "tv"])
def test_a_better_outcome_without_mass_does_not_matter_to_a_tilt(divergence):
    log_ref = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    found, wanted = f_tilt(log_ref, reward, 2.0, divergence), f_tilt(log_ref[:3], reward[:3], 2.0, divergence)
    assert found.log_prob.exp().tolist() == pytest.approx([*wanted.log_prob.exp().tolist(), 0.0], abs=1e-12)


def test_gaps_are_those_of_each_prompt():
    """As many prompts as outcomes, unnormalised references; a tilt of its own reference has none."""
    log_ref = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [1.0, 1.0, 5.0]], dtype=torch.float64)
    reward = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    tilts = (log_ref + reward / 2).log_softmax(-1)
    assert frontier_gap(tilts, log_ref, reward).tolist() == pytest.approx([0.0] * 3, abs=1e-9)
    mixed = torch.stack([tilts[0], tilts[1].flip(-1), tilts[2]])
    found = frontier_gap(mixed, log_ref, reward)
    assert float(found[0]) == pytest.approx(0, abs=1e-9) and float(found[1]) > 0.01
