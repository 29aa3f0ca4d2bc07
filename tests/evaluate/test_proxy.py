"""What a proxy promises of the true reward: numbers by hand, and that the promise is kept on random problems."""

import math

import pytest
import torch

from keel.evaluate.proxy import ProxyReport, proxy_report

P, Q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()


def listed(p, q, proxy, true) -> ProxyReport:
    """All outcomes with their probabilities."""
    return proxy_report(proxy, true, (p / q).log(), proxy, true, p, q)


def test_by_hand():
    """Under q: E proxy = .9, E proxy^2 = 1.3, E true = E true^2 = .7, E proxy true = .9."""
    proxy, true = torch.tensor([2.0, 0.0, 1.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    found = listed(P, Q, proxy, true)
    sd = math.sqrt(1.3 - 0.81), math.sqrt(0.7 - 0.49)
    r = (0.9 - 0.63) / (sd[0] * sd[1])
    assert found.correlation == pytest.approx(r) and (found.sd_proxy, found.sd_true) == pytest.approx(sd)
    assert found.safe_coefficient == pytest.approx(sd[0] * math.sqrt(1 - r * r))
    assert found.chi2 == pytest.approx(0.63) and math.sqrt(found.chi2) == pytest.approx(0.793725, abs=5.1e-7)
    assert (found.proxy_gain, found.true_gain) == pytest.approx((1.2 - 0.9, 0.7 - 0.7))
    assert found.least_true_gain == pytest.approx(sd[1] / r * (0.3 / sd[0] - math.sqrt((1 - r * r) * 0.63)))


def violations(count: int) -> int:
    """Violations among random problems with five outcomes."""
    chance = torch.Generator().manual_seed(0)
    draw = torch.rand(count, 2, 5, generator=chance, dtype=torch.float64).pow(3) + 1e-3
    p, q = (draw / draw.sum(-1, keepdim=True)).unbind(1)
    proxy, noise = torch.randn(count, 2, 5, generator=chance, dtype=torch.float64).unbind(1)
    broken = 0
    for i in range(count):
        found = listed(p[i], q[i], proxy[i], proxy[i] + noise[i])
        if found.correlation > 0:
            slack = found.true_gain - found.least_true_gain
            broken += slack < -1e-9 * (1 + abs(found.least_true_gain))
    return broken


def test_the_bound_is_never_broken():
    assert violations(500) == 0


@pytest.mark.slow
def test_the_bound_is_never_broken_in_twenty_thousand_problems():
    assert violations(20000) == 0


def test_the_bound_can_be_attained():
    """The policy that moves along proxy - R true, standardised, loses all that it may."""
    q = torch.full((4,), 0.25, dtype=torch.float64)
    x = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    y = 0.6 * x + 0.8 * torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    p = q * (1 + 0.5 * (y - 0.6 * x))
    found = listed(p, q, y, x)
    assert found.correlation == pytest.approx(0.6)
    assert found.true_gain == pytest.approx(found.least_true_gain, abs=1e-12)


def test_samples_and_rewards_that_say_nothing():
    """Repeated rows are weights; a constant reward is refused; a negative correlation promises nothing."""
    proxy, true = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    ratio = torch.tensor([0.1, -0.2, 0.0])
    twice = [x.repeat(2) for x in (proxy, true, ratio)]
    one, two = proxy_report(proxy, true, ratio, proxy, true), proxy_report(*twice, twice[0], twice[1])
    assert vars(one) == pytest.approx(vars(two))
    assert math.isnan(proxy_report(proxy, -true, ratio, proxy, -true).least_true_gain)
    with pytest.raises(ValueError, match="constant"):
        proxy_report(proxy, 0 * true, ratio, proxy, 0 * true)
