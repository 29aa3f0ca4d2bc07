"""Calibration tables, the best of n, and the over-optimisation that ensembles are against."""

import itertools
import math

import numpy as np
import pytest
import torch

from keel.evaluate.reward_models import (
    best_of_n_kl,
    best_of_n_value,
    calibration,
    comparison_evaluation,
    overoptimisation,
)
from keel.parts.rewards.ensembles import aggregate


def test_reliability_by_hand():
    """Margins log 3 and log 1.5 are confidences 0.75 and 0.6: 3 of 4 and 1 of 2 are right."""
    three, half = math.log(3), math.log(1.5)
    found = calibration(np.array([three, three, three, -three, half, -half]), bins=5)
    assert [b.count for b in found.bins] == [2, 4]
    assert [round(b.confidence, 9) for b in found.bins] == [0.6, 0.75]
    assert [b.accuracy for b in found.bins] == [0.5, 0.75]
    assert found.error == pytest.approx(2 / 6 * 0.1)


def test_certainty_falls_into_the_last_bin_and_a_tie_counts_one_half():
    found = calibration(np.array([1000.0, 0.0]))
    assert (found.bins[-1].high, found.bins[-1].accuracy, found.bins[0].accuracy) == (1.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="needs pairs"):
        calibration(np.array([]))


def test_an_evaluation_of_pairs():
    found = comparison_evaluation(np.array([1.0, 0.0, 2.0]), np.array([-0.5, 0.0, 3.0]), index=[4, 5, 6])
    assert found.metrics["accuracy"].value == pytest.approx(0.5)
    assert found.values["log_loss"][0] == pytest.approx(0.201413, abs=5e-7)
    assert found.values["margin"] == (1.5, 0.0, -1.0) and found.prompts == 3
    again = type(found).from_json(found.to_json())
    assert again.metrics == found.metrics and again.values == found.values
    with pytest.raises(ValueError, match="no pairs"):
        comparison_evaluation(np.array([]), np.array([]))


def test_accuracy_of_each_domain():
    """Two of three right in one, none of one in the other; with one domain there is nothing to tell apart."""
    chosen, rejected = np.array([1.0, 2.0, 0.0, -1.0]), np.zeros(4)
    found = comparison_evaluation(chosen, rejected, domains=["maths", "maths", "prose", "maths"])
    assert found.metrics["accuracy/maths"].value == pytest.approx(2 / 3)
    assert found.metrics["accuracy/prose"].value == pytest.approx(0.5) == 0.5  # a tie
    assert found.metrics["accuracy"].value == pytest.approx(2.5 / 4)
    assert len(found.values["accuracy/maths"]) == 4 and math.isnan(found.values["accuracy/maths"][2])
    assert type(found).from_json(found.to_json()).metrics["accuracy/maths"] == found.metrics["accuracy/maths"]
    assert "accuracy/x" not in comparison_evaluation(chosen, rejected, domains=["x"] * 4).metrics
    with pytest.raises(ValueError, match="3 domains for 4"):
        comparison_evaluation(chosen, rejected, domains=["x"] * 3)


@pytest.mark.parametrize(("n", "wanted"), [(1, 0.0), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_kl_of_the_best_of_n(n, wanted):
    assert best_of_n_kl(n) == pytest.approx(wanted, abs=5e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_value_of_the_best_of_n_is_the_mean_over_all_subsets(n):
    """Ties of the proxy are broken evenly."""
    proxy, gold = np.array([[0.3, 0.9, 0.3, 0.1, 0.9]]), np.array([[1.0, 5.0, -2.0, 0.5, 3.0]])
    picks = []
    for some in itertools.combinations(range(5), n):
        best = max(proxy[0, list(some)])
        picks.append(np.mean([gold[0, i] for i in some if proxy[0, i] == best]))
    assert best_of_n_value(proxy, gold, n)[0] == pytest.approx(np.mean(picks))


def test_bad_settings_of_the_best_of_n():
    one = np.ones((1, 2))
    for n in (0, 3):
        with pytest.raises(ValueError, match="between 1 and the 2"):
            best_of_n_value(one, one, n)
    with pytest.raises(ValueError, match="alike"):
        best_of_n_value(one, np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


def test_gold_against_kl():
    metrics = {
        "reward": [(1, 0.1), (2, 0.4), (3, 0.5)],
        "rewards/gold/mean": [(1, 0.3), (2, 0.2)],
        "kl": [(1, 0.5), (2, 0.25), (3, 1.0)],
        "completions/mean_length": [(1, 4.0), (2, 8.0), (3, 8.0)],
    }
    found = overoptimisation(metrics, "reward", "rewards/gold/mean")
    assert found.measured and found.distance == (2.0, 2.0) and found.gold == (0.3, 0.2) and found.steps == (1, 2)
    without = {name: curve for name, curve in metrics.items() if name != "kl"}
    found = overoptimisation(without, "reward", "rewards/gold/mean")
    assert not found.measured and found.distance == (1.0, 2.0)
    assert overoptimisation(metrics, "reward", "rewards/other/mean") is None


def test_the_best_of_n_by_one_model_falls_and_that_of_ensembles_rises():
    """Proxies are gold with independent heavy noise, on 2000 answers to each of 20 prompts; the paper's coefficient."""
    chance = np.random.default_rng(0)
    gold = chance.normal(size=(20, 2000))
    noise = chance.standard_t(1.5, size=(5, 20, 2000))
    proxies = torch.tensor(gold[None] + noise)
    proxies = (proxies - proxies.flatten(1).mean(1)[:, None, None]) / proxies.flatten(1).std(1)[:, None, None]
    sizes = [1, 4, 16, 64, 256, 1024]

    def curve(scores):
        return [best_of_n_value(scores.reshape(20, 2000).numpy(), gold, n).mean() for n in sizes]

    single = curve(proxies[0].reshape(-1))
    assert max(single) - single[-1] > 0.25 and single.index(max(single)) not in (0, len(sizes) - 1)
    flat = proxies.reshape(5, -1)
    worst = curve(aggregate(flat, "wco"))
    for found in (worst, curve(aggregate(flat, "uwo"))):
        assert all(b > a for a, b in itertools.pairwise(found)), found
        assert found[-1] > max(single) + 1
