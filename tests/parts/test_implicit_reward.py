"""Supervised learning by divergences: the table of the specification, its limits, poles, and the values."""

import math

import pytest
import torch
from tests.parts.completions import ALIKE, REF, assert_gradient, completions
from tests.worlds import Network, text_rows

from keel.core.choice import generator
from keel.core.rows import Stream
from keel.parts.terms.implicit_reward import ImplicitRewardMatching, StateValue, concave
from keel.recipes.implicit_reward import implicit_reward_sft
from keel.recipes.supervised import sft
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

NAMES = ("total_variation", "chi2", "hellinger", "js")
Z = torch.tensor([2.0, -1.0, 4.0])


def given(group=None, dtype=torch.float64, lengths=(1, 3, 2)):
    """Log-ratios 2, -1, 4."""
    rows, stats = completions([-1.0, -4.0, -1.0], [-3.0, -3.0, -5.0], list(lengths), dtype)
    return rows if group is None else rows.with_(group=torch.tensor(group)), stats


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("total_variation", 0.2, 1.0),
        ("chi2", 0.19, 0.9),
        ("hellinger", 0.2 / 1.2, 0.694444),
        ("js", math.log(2 - math.exp(-0.2)), 0.693094),
    ],
)
def test_the_table(name, value, slope):
    found = concave(name, torch.tensor(0.2, dtype=torch.float64))
    assert [float(x) for x in found] == pytest.approx([value, slope], abs=ALIKE)
    zero = concave(name, torch.zeros((), dtype=torch.float64))
    assert [float(x) for x in zero] == pytest.approx([0.0, 1.0], abs=1e-12)


def test_chi2_beyond_its_zero():
    assert concave("chi2", torch.tensor([2.0, 3.0]))[1].tolist() == [0.0, -0.5]


@pytest.mark.parametrize(("name", "edge"), [("hellinger", -0.683772), ("js", -0.597837)])
def test_near_the_poles_phi_goes_on_as_a_straight_line(name, edge):
    """The edge is where the slope is 10: 1 / (1 + z)^2, and 1 / (2 e^z - 1). Value and slope are continuous there."""
    z = torch.tensor([edge - 1e-6, edge + 1e-6, -50.0], dtype=torch.float64)
    value, slope = concave(name, z)
    assert slope.tolist() == pytest.approx([10.0, 10.0, 10.0], abs=1e-3)
    assert float(value[1] - value[0]) == pytest.approx(2e-5, abs=1e-9)
    assert float(value[2]) == pytest.approx(float(value[1]) - 10 * (edge + 50), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_is_that_of_the_value(name):
    z = torch.tensor([-3.0, -0.6, -0.3, 0.0, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    value, slope = concave(name, z)
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(grad, slope)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("total_variation", -0.166667),
        ("chi2", -0.149167),
        ("hellinger", -(0.2 / 1.2 - 0.1 / 0.9 + 0.4 / 1.4) / 3),
        ("js", -(math.log(2 - math.exp(-0.2)) + math.log(2 - math.exp(0.1)) + math.log(2 - math.exp(-0.4))) / 3),
    ],
)
def test_losses(name, wanted):
    rows, stats = given()
    assert float(ImplicitRewardMatching(name)(rows, stats)) == pytest.approx(wanted, abs=ALIKE)


def test_an_optimised_value():
    """-mean z + var z / 4 over the batch; in groups (2, -1) and (4) the variances are 0.0225, 0.0225 and 0."""
    rows, stats = given()
    assert float(ImplicitRewardMatching(value="batch")(rows, stats)) == pytest.approx(-0.156111, abs=ALIKE)
    rows, stats = given([0, 0, 1])
    wanted = -0.5 / 3 + (0.0225 + 0.0225) / 3 / 4
    assert float(ImplicitRewardMatching(value="group")(rows, stats)) == pytest.approx(wanted, abs=1e-6)


def test_at_the_reference_the_first_step_is_that_of_sft():
    rows, stats = given()
    start = stats.merged({REF: stats[LogProb()].detach()})
    (wanted,) = torch.autograd.grad(sft("sequence_mean_token_sum").loss(rows, start, {}), stats[LogProb()])
    for name in NAMES[1:]:
        (grad,) = torch.autograd.grad(implicit_reward_sft(name).loss(rows, start, {}), stats[LogProb()])
        torch.testing.assert_close(grad, wanted)
    (grad,) = torch.autograd.grad(implicit_reward_sft().loss(rows, stats, {}), stats[LogProb()])
    torch.testing.assert_close(grad, wanted * (1 - 0.05 * Z.double())[:, None])


def test_total_variation_is_sft():
    assert implicit_reward_sft("total_variation") == sft("sequence_mean_token_sum")
    rows, stats = given()
    (grad,) = torch.autograd.grad(ImplicitRewardMatching("total_variation", coef=10.0)(rows, stats), stats[LogProb()])
    (wanted,) = torch.autograd.grad(sft("sequence_mean_token_sum").loss(rows, stats, {}), stats[LogProb()])
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_order_weight_and_precision(name):
    loss = ImplicitRewardMatching(name, value="batch" if name == "chi2" else "zero")
    rows, stats = given()
    assert_gradient(loss, rows, stats)
    found = float(loss(rows, stats))
    order = torch.randperm(3, generator=generator("matching"))
    assert float(loss(rows.select(order), stats.select(order))) == pytest.approx(found, abs=1e-12)
    twice = torch.tensor([0, 0, 2])
    heavy = rows.with_(weight=torch.tensor([2.0, 0.0, 1.0]))
    assert float(loss(heavy, stats)) == pytest.approx(float(loss(rows.select(twice), stats.select(twice))), abs=1e-9)
    aside = rows.with_(stream=torch.tensor([0, int(Stream.BASELINE), 0]))
    assert float(loss(aside, stats)) == pytest.approx(float(loss(heavy.with_(weight=torch.tensor([1.0, 0, 1])), stats)))
    coarse = Stats({f: value.detach().bfloat16() for f, value in stats.items()})
    assert float(loss(rows, coarse)) == pytest.approx(found, abs=5e-3)


def test_values():
    """Q - V is log pi; a constant on all logits moves V and Q and not their difference."""
    rows, network = text_rows(), Network()
    found = []
    for shift in (0.0, 3.0):
        with torch.no_grad():
            network.output.bias += shift
        stats = Engine({"policy": network, "ref": Network(seed=1)}).measure([LogProb(), REF, StateValue()], rows)
        found.append(ImplicitRewardMatching(read_values=True).metrics(rows, stats))
        states = network.hidden(rows)
        wanted = (network.output(states).logsumexp(-1) * rows.mask).sum() / rows.mask.sum()
        assert float(found[-1]["values/state"]) == pytest.approx(float(wanted), abs=1e-9)
    assert float(found[1]["values/state"] - found[0]["values/state"]) == pytest.approx(3.0)
    assert float(found[1]["values/action"] - found[0]["values/action"]) == pytest.approx(3.0)
    assert float(found[1]["values/advantage"] - found[0]["values/advantage"]) == pytest.approx(0.0, abs=1e-12)
    assert StateValue().name == "state_value" and StateValue(("ref",)).name == "state_value(ref)"


def test_metrics():
    rows, stats = given()
    found = ImplicitRewardMatching().metrics(rows, stats)
    assert float(found["rewards/implicit"]) == pytest.approx(0.5 / 3)
    assert float(found["rewards/trust"]) == pytest.approx((0.9 + 1.05 + 0.8) / 3)


@pytest.mark.parametrize(
    "settings",
    [{"divergence": "kl"}, {"value": "mean"}, {"divergence": "js", "value": "batch"}, {"beta": 0.0}, {"largest": 1.0}],
    ids=str,
)
def test_bad_settings(settings):
    with pytest.raises((ValueError, TypeError)):
        ImplicitRewardMatching(**settings)
