"""log sum p^2 in closed form: hand computation, fp64 autograd, and through the engine in slices."""

import math

import pytest
import torch
from tests.statistics.test_closed_forms import found, logits, wanted
from tests.worlds import Network, text_rows

from keel.statistics.engine import Engine
from keel.statistics.squared_mass import LogSquaredMass
from keel.statistics.stats import Stats


@pytest.mark.parametrize("offset", [0.0, 50.0, -200.0])
def test_single_precision(offset):
    policy, ref, grad = logits(offset)
    value, slope = found(LogSquaredMass(), policy, ref, grad)
    true, gradient = wanted(lambda z, q: z.softmax(-1).square().sum(-1).log(), policy, ref, grad)
    torch.testing.assert_close(value.double(), true, rtol=3e-6, atol=0)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=3e-6 * float(gradient.abs().max()))


def test_by_hand():
    """p = (3/4, 1/4): sum p^2 = 5/8, and 2 (p^2 / sum p^2 - p) = 2 (0.9 - 0.75)."""
    policy = torch.tensor([[math.log(3.0), 0.0]])
    value, slope = found(LogSquaredMass(), policy, policy, torch.ones(1))
    assert value.tolist() == pytest.approx([math.log(5 / 8)])
    assert slope.tolist()[0] == pytest.approx([0.3, -0.3], abs=1e-6)


def test_through_the_engine():
    """In slices of rows and of positions as at once; held constant where it says so."""
    rows = text_rows()

    def gradients(**sizes) -> list:
        model = Network()
        Engine({"policy": model}, {}, **sizes).step(
            [LogSquaredMass()], rows, Stats(), lambda r, s: s[LogSquaredMass()].square().sum()
        )
        return [p.grad for p in model.parameters()]

    whole, sliced = gradients(max_tokens=1 << 20), gradients(max_tokens=20, chunk_bytes=200)
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other)
    assert any(bool(grad.any()) for grad in whole)
    constant = LogSquaredMass(stop=("policy",))
    model = Network()
    stats = Engine({"policy": model}).measure([constant], rows)
    assert not stats[constant].requires_grad and float(stats[constant].max()) <= 0
    assert constant.name == "log_squared_mass" and LogSquaredMass(of=("old",)).name == "log_squared_mass(old)"
