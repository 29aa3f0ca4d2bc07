"""Momentum that does not go stale: Hessian products by enumeration, exactness on quadratics, less error than plain."""

import pytest
import torch
from torch import Tensor

from keel.exact.momentum import HessianAided, ImplicitTransport, Momentum, hessian_product

Z = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
R = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
V = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def gradient(z: Tensor) -> Tensor:
    """Of E[r] on the bandit."""
    p = z.softmax(-1)
    return p * (R - (p * R).sum())


def expected_product(z: Tensor, v: Tensor) -> Tensor:
    """E[B v] over the three arms."""
    p = z.softmax(-1)
    return sum(
        p[a] * hessian_product(lambda x, a=a: x.log_softmax(-1)[a], lambda x, a=a: R[a] * x.log_softmax(-1)[a], z, v)
        for a in range(3)
    )


def test_hessian_product_by_enumeration():
    found = expected_product(Z, V)
    assert found.tolist() == pytest.approx([0.007790, 0.021868, -0.029658], abs=5.1e-7)
    difference = (gradient(Z + 1e-5 * V) - gradient(Z - 1e-5 * V)) / 2e-5
    assert found.tolist() == pytest.approx(difference.tolist(), abs=1e-9)


def test_products_between_two_points_are_the_change_of_the_gradient():
    """The mean over q, by Simpson's rule on 40 intervals: the increment is unbiased."""
    change = gradient(Z) - gradient(Z - V)
    assert change.tolist() == pytest.approx([0.011341, 0.018675, -0.030016], abs=5.1e-7)
    state = Momentum(Z, Z - V, torch.zeros(3, dtype=torch.float64))
    points = [expected_product(HessianAided().point(state, i / 40), state.move) for i in range(41)]
    weights = [1 if i in (0, 40) else 4 if i % 2 else 2 for i in range(41)]
    mean = sum(w * point for w, point in zip(weights, points, strict=True)) / 120
    assert mean.tolist() == pytest.approx(change.tolist(), abs=1e-8)
    assert mean.tolist() == pytest.approx([0.01134, 0.01867, -0.03001], abs=1e-5)  # as the specification has the mean


def test_two_steps_with_rewards_to_go():
    """A chain of two actions: the mean of B v is the Hessian of J, whose second reward depends on both."""
    z = torch.tensor([[0.2, -0.3], [0.1, 0.5]], dtype=torch.float64)  # logits of both steps
    v = torch.tensor([[0.4, -0.1], [0.2, 0.7]], dtype=torch.float64)
    first, second = torch.tensor([1.0, -0.5]).double(), torch.tensor([[0.0, 2.0], [1.0, -1.0]]).double()

    def value(x: Tensor) -> Tensor:
        p, q = x[0].softmax(-1), x[1].softmax(-1)
        return (p * first).sum() + (p[:, None] * q * second).sum()

    _, wanted = torch.autograd.functional.hvp(value, z, v)
    found = torch.zeros_like(z)
    for a in range(2):
        for b in range(2):

            def steps(x: Tensor, a=a, b=b) -> tuple[Tensor, Tensor]:
                return x[0].log_softmax(-1)[a], x[1].log_softmax(-1)[b]

            def potential(x: Tensor, a=a, b=b) -> Tensor:
                one, two = steps(x, a, b)
                return (first[a] + second[a, b]) * one + second[a, b] * two

            p = sum(steps(z, a, b)).exp()
            found += p * hessian_product(lambda x, a=a, b=b: sum(steps(x, a, b)), potential, z, v)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("normalised", [False, True])
def test_transport_is_exact_on_a_quadratic(normalised):
    """And plain momentum is not: without the extrapolation it lags behind."""
    curve = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    goal = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        return goal - curve @ x

    way = ImplicitTransport(rate=0.5, normalised=normalised)
    state = plain = Momentum.start(torch.zeros(2, dtype=torch.float64))
    for t in range(20):
        state, plain = way.update(state, slope(way.point(state))), way.update(plain, slope(plain.parameters))
        torch.testing.assert_close(state.direction, slope(state.before))
        if t:
            assert float((plain.direction - slope(plain.before)).norm()) > 1e-4


def test_hessian_aided_is_exact_without_noise():
    """With the change of the gradient itself as product."""
    way = HessianAided(rate=2.0)
    state = Momentum.start(Z)
    for _ in range(10):
        state = way.update(state, gradient(state.parameters), gradient(state.parameters) - gradient(state.before))
        torch.testing.assert_close(state.direction, gradient(state.before))


def test_without_momentum_it_is_the_gradient():
    """eta = 1: the sampling point is theta, d is g, and the step is rate / (t + 2) along it."""
    for way in (ImplicitTransport(3.0, power=0.0, normalised=False), ImplicitTransport(3.0, power=0.0)):
        state = way.update(way.update(Momentum.start(Z), gradient(Z)), V)
        assert torch.equal(way.point(Momentum.start(Z)), Z) and torch.equal(state.direction, V)
        length = 1.0 if way.normalised else float(V.norm())
        assert float(state.move.norm()) == pytest.approx(3.0 / 3 * length)


def test_the_first_step_is_the_gradient():
    for way in (ImplicitTransport(), HessianAided()):
        assert way.eta(Momentum.start(Z)) == 1.0
    assert ImplicitTransport().eta(Momentum(Z, Z, Z, 30)) == pytest.approx(16**-0.8)
    still = ImplicitTransport().update(Momentum.start(Z), torch.zeros_like(Z))
    assert torch.equal(still.parameters, Z)  # a direction of length 0 has no direction


def error_after(steps: int, method: str, runs: int = 2000) -> float:
    """Mean squared error of d against the exact gradient where it was taken; one arm is drawn a step, two for HARPG."""
    chance, arms = torch.Generator().manual_seed(7), torch.eye(3, dtype=torch.float64)
    way = HessianAided(8.0) if method == "hessian" else ImplicitTransport(8.0, normalised=False)
    state = Momentum.start(Z.expand(runs, 3))

    def drawn(z: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards, and scores e - p."""
        a = torch.multinomial(z.softmax(-1), 1, generator=chance)[:, 0]
        return R[a, None], arms[a] - z.softmax(-1)

    for _ in range(steps):
        reward, score = drawn(way.point(state) if method == "transport" else state.parameters)
        if method != "hessian":
            state = way.update(state, reward * score)
            continue
        there = way.point(state, torch.rand(runs, 1, generator=chance, dtype=torch.float64))
        (other, tilt), v, p = drawn(there), state.move, there.softmax(-1)
        change = other * ((tilt * v).sum(1, keepdim=True) * tilt - p * (v - (p * v).sum(1, keepdim=True)))
        state = way.update(state, reward * score, change)
    p = state.before.softmax(-1)
    wanted = p * (R - (p * R).sum(1, keepdim=True))
    return float((state.direction - wanted).square().sum(1).mean())


def test_errors_fall():
    """The Hessian product halves the error of plain momentum at equal steps."""
    plain, aided = error_after(100, "plain"), error_after(100, "hessian")
    assert aided < plain / 2 and error_after(100, "transport") < error_after(1, "plain") / 50


@pytest.mark.parametrize("way", [ImplicitTransport, HessianAided])
@pytest.mark.parametrize(("settings", "what"), [({"rate": 0.0}, "rate"), ({"power": -1.0}, "power")])
def test_settings_out_of_range(way, settings, what):
    with pytest.raises(ValueError, match=what):
        way(**settings)
