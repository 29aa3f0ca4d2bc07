"""Transport distances: vectors, limits, gradients, and POT as an oracle."""

import math

import ot
import pytest
import torch
from tests.worlds import noise

from keel.divergences.transport import sinkhorn, sinkhorn_divergence, transport, wasserstein1

P = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
PLACES = torch.arange(5, dtype=torch.float64)
COST = (PLACES[:, None] - PLACES).abs()
UNEQUAL = 1 - torch.eye(5, dtype=torch.float64)
DIGITS = 5.1e-7


def random(*shape: int, what: str = "z") -> torch.Tensor:
    return noise(what, shape=shape).log_softmax(-1)


def test_vectors():
    """Distance on a line 1; with the cost of being unequal it is the total variation 0.35."""
    assert float(wasserstein1(P.log(), Q.log())) == pytest.approx(1.0, abs=1e-12)
    assert float(transport(P.log(), Q.log(), COST).value) == pytest.approx(1.0, abs=1e-9)
    assert float(transport(P.log(), Q.log(), UNEQUAL).value) == pytest.approx(0.35, abs=1e-9)


def test_against_pot():
    log_p, log_q = random(6), random(6, what="w")
    places = torch.tensor([-1.0, 0.0, 0.5, 2.0, 2.5, 7.0], dtype=torch.float64)
    cost = noise("cost", shape=(6, 6)).square()
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    wanted = ot.wasserstein_1d(places.numpy(), places.numpy(), p, q)
    assert float(wasserstein1(log_p, log_q, places)) == pytest.approx(wanted, abs=1e-10)
    assert float(transport(log_p, log_q, cost).value) == pytest.approx(ot.emd2(p, q, cost.numpy()), abs=1e-9)
    wide = torch.cat([cost, cost[:, :2] + 1], 1)
    log_w = random(8, what="wide")
    found = transport(log_p, log_w, wide)
    assert float(found.value) == pytest.approx(ot.emd2(p, log_w.exp().numpy(), wide.numpy()), abs=1e-9)
    torch.testing.assert_close(found.plan.sum(1), log_p.exp(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.plan.sum(0), log_w.exp(), rtol=0, atol=1e-9)
    for eps in (0.3, 2.0):
        plan = ot.sinkhorn(p, q, cost.numpy(), eps, method="sinkhorn_log", numItermax=10000, stopThr=1e-13)
        torch.testing.assert_close(sinkhorn(log_p, log_q, cost, eps).plan, torch.from_numpy(plan), rtol=0, atol=1e-9)


# eps: <P, C>, OT_eps(p, q), S_eps(p, q), OT_eps(p, p)
TABLE = {
    0.05: (1.000000, 1.019477, 0.945489, 0.077224),
    0.5: (1.016542, 1.190609, 0.554059, 0.665651),
    1.0: (1.117164, 1.329621, 0.403751, 0.972905),
}


@pytest.mark.parametrize("eps", TABLE)
def test_table(eps):
    cost, value, debiased, own = TABLE[eps]
    found = sinkhorn(P.log(), Q.log(), COST, eps)
    assert float(found.cost) == pytest.approx(cost, abs=DIGITS)
    assert float(found.value) == pytest.approx(value, abs=DIGITS)
    assert float(sinkhorn_divergence(P.log(), Q.log(), COST, eps)) == pytest.approx(debiased, abs=DIGITS)
    assert float(sinkhorn(P.log(), P.log(), COST, eps).value) == pytest.approx(own, abs=DIGITS)
    assert found.error < 1e-8
    torch.testing.assert_close(found.plan.sum(-2), Q, rtol=0, atol=1e-8)
    kl = (found.plan * (found.plan / (P[:, None] * Q)).log()).sum()
    assert float(found.cost + eps * kl) == pytest.approx(value, abs=DIGITS)


def test_limits_of_eps():
    """W1 without entropy; with ever more of it, independent draws."""
    assert float(sinkhorn(P.log(), Q.log(), COST, 0.01).value) == pytest.approx(1.0, abs=0.01)
    apart = float((P[:, None] * Q * COST).sum())
    far = sinkhorn(P.log(), Q.log(), COST, 1e6)
    assert float(far.value) == pytest.approx(apart, abs=1e-5)
    torch.testing.assert_close(far.plan, P[:, None] * Q, rtol=1e-4, atol=0)


def test_the_debiased_divergence_is_zero_only_at_equality():
    assert float(sinkhorn_divergence(P.log(), P.log(), COST, 0.5)) == pytest.approx(0, abs=1e-12)
    a, b = random(20, 5, what="a"), random(20, 5, what="b")
    assert float(sinkhorn_divergence(a, b, COST, 0.5).min()) > 0
    with pytest.raises(ValueError, match="symmetric"):
        sinkhorn_divergence(P.log(), Q.log(), COST.tril(), 0.5)


def test_batches():
    """Rows of a batch are problems of their own."""
    a, b = random(3, 5, what="a"), random(3, 5, what="b")
    for batch, one in (
        (wasserstein1(a, b), lambda i: wasserstein1(a[i], b[i])),
        (sinkhorn(a, b, COST, 0.5).value, lambda i: sinkhorn(a[i], b[i], COST, 0.5).value),
        (sinkhorn(a, b, COST.expand(3, 5, 5), 0.5).cost, lambda i: sinkhorn(a[i], b[i], COST, 0.5).cost),
    ):
        torch.testing.assert_close(batch, torch.stack([one(i) for i in range(3)]))


def test_outcomes_without_mass():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    q = p.flip(0)
    assert float(wasserstein1(p.log(), q.log())) == pytest.approx(3.0)
    assert float(transport(p.log(), q.log(), COST).value) == pytest.approx(3.0)
    z = p.log().requires_grad_()
    found = sinkhorn(z, q.log(), COST, 0.1)
    assert float(found.cost) == pytest.approx(3.0, abs=1e-6)
    (slope,) = torch.autograd.grad(found.value, z)
    assert bool(slope.isfinite().all())


# -- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_on_a_line():
    z = noise("z", shape=(2, 5)).requires_grad_()
    places = torch.tensor([0.0, 1.0, 1.5, 4.0, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: wasserstein1(z.log_softmax(-1), Q.log().expand(2, 5), places), z)


@pytest.mark.parametrize("how", ["programme", "sinkhorn", "debiased"])
def test_gradients_by_finite_differences(how):
    """In the logits of both distributions and in the cost: potentials and the coupling itself."""

    def value(z, w, cost):
        log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
        if how == "programme":
            return transport(log_p, log_q, cost).value
        if how == "sinkhorn":
            return sinkhorn(log_p, log_q, cost, 0.7).value
        return sinkhorn_divergence(log_p, log_q, (cost + cost.T) / 2, 0.7)

    inputs = [noise(name, shape=shape).abs() for name, shape in (("z", (4,)), ("w", (4,)), ("cost", (4, 4)))]
    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in inputs], eps=1e-5, atol=1e-6, rtol=1e-4)


def test_where_f_divergences_saturate_transport_still_pulls():
    """Disjoint supports at distance 4 and 3: the farther one costs more."""
    z = torch.tensor([2.0, 2.0, -30, -30, -30], dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 0, 0, 0, 1.0], dtype=torch.float64).log()
    (slope,) = torch.autograd.grad(wasserstein1(z.log_softmax(-1), target), z)
    assert slope[:2].tolist() == pytest.approx([0.25, -0.25], abs=1e-9)


def test_small_eps_in_fp32():
    """exp(-C / eps) would be 0 for all but the diagonal."""
    found = sinkhorn(P.float().log(), Q.float().log(), COST.float(), 0.02, iterations=5000, tolerance=1e-5)
    assert float(found.value) == pytest.approx(float(sinkhorn(P.log(), Q.log(), COST, 0.02).value), abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wasserstein1(P.log(), Q.log(), PLACES.flip(0)), "ascending"),
        (lambda: transport(P.log(), Q.log(), COST.where(COST < 4, math.inf)), "finite and of shape"),
        (lambda: sinkhorn(P.log(), Q.log(), COST, 0.0), "eps must be positive"),
        (lambda: sinkhorn(P.log(), Q.log(), COST.where(COST < 4, math.nan), 1.0), "finite"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
