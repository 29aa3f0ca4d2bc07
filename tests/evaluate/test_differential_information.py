"""Differential information: the numbers of the specification, and DPO's optimum by minimising its loss."""

import math

import pytest
import torch
from scipy.optimize import minimize
from tests.parts.completions import ALIKE
from tests.worlds import noise

from keel.core.choice import generator
from keel.evaluate.differential_information import (
    differential_information,
    dpo_optimum,
    estimate_information,
    information_entropy,
    power_law_gap,
    rejected_sampler,
)

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
NEW = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64).log()


def test_the_distribution_and_its_entropy():
    assert differential_information(NEW, REF).exp().tolist() == pytest.approx([0.102564, 0.256410, 0.641026], abs=ALIKE)
    assert float(information_entropy(NEW, REF)) == pytest.approx(0.867589, abs=ALIKE)
    assert float(information_entropy(REF, REF)) == pytest.approx(1.098612, abs=ALIKE)
    assert differential_information(NEW, NEW).exp().tolist() == pytest.approx([1 / 3] * 3)
    both = torch.stack([NEW, REF])
    assert information_entropy(both, REF).tolist() == pytest.approx([0.867589, 1.098612], abs=ALIKE)
    gone = torch.tensor([0.0, 0.5, 0.5]).log()
    assert float(information_entropy(gone, REF.float())) == pytest.approx(
        -0.4 * math.log(0.4) - 0.6 * math.log(0.6), abs=1e-6
    )
    with pytest.raises(ValueError, match="must be finite"):
        differential_information(REF.float(), gone)


def test_the_rejected_sampler():
    found = rejected_sampler(REF, NEW, 0.5)
    assert found.exp().tolist() == pytest.approx([0.649573, 0.246496, 0.103932], abs=ALIKE)
    assert float(power_law_gap(REF, found, NEW, 0.5)) == pytest.approx(0, abs=1e-12)
    assert float(power_law_gap(REF, found, NEW, 1.0)) > 0.1 and float(power_law_gap(REF, UNIFORM, NEW, 0.5)) > 0.1


def minimised(log_rejected, beta: float) -> list[float]:
    """The policy that minimises E_{w ~ ref, l ~ rejected}[-log sigmoid(beta (m_w - m_l))], by L-BFGS."""
    measure = REF.exp()[:, None] * log_rejected.exp()[None, :]

    def loss(flat):
        logits = torch.tensor(flat, requires_grad=True)
        ahead = logits.log_softmax(0) - REF
        value = (measure * torch.nn.functional.softplus(-beta * (ahead[:, None] - ahead[None, :]))).sum()
        (grad,) = torch.autograd.grad(value, logits)
        return float(value), grad.numpy()

    found = minimize(loss, [0.0] * 3, jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
    return torch.tensor(found.x).softmax(0).tolist()


@pytest.mark.parametrize(
    ("rejected", "beta", "wanted"),
    [
        (rejected_sampler(REF, NEW, 0.5), 0.5, [0.2, 0.3, 0.5]),
        (UNIFORM, 0.5, [0.781250, 0.168750, 0.050000]),
        (rejected_sampler(REF, NEW, 0.5), 1.0, [0.339134, 0.321731, 0.339134]),
    ],
    ids=["matching", "uniform", "another beta"],
)
def test_where_dpo_goes(rejected, beta, wanted):
    assert minimised(rejected, beta) == pytest.approx(wanted, abs=1e-6)
    assert dpo_optimum(REF, REF, rejected, beta).exp().tolist() == pytest.approx(wanted, abs=ALIKE)


def test_an_enumerated_estimate_is_exact():
    found = estimate_information(NEW - REF, UNIFORM, enumerated=True)
    assert float(found.entropy) == pytest.approx(0.867589, abs=ALIKE)
    assert float(found.log_z) == pytest.approx(float((NEW - REF).logsumexp(0)), abs=1e-12)
    d = torch.tensor([0.102564, 0.256410, 0.641026])
    assert float(found.effective_samples) == pytest.approx(float(1 / d.square().sum()), abs=1e-4)


def test_an_estimate_from_samples_converges():
    """Proposal: the reference. K = 400,000; the standard error of the entropy is about 1e-3."""
    picks = REF.exp().multinomial(400_000, replacement=True, generator=generator("information"))
    found = estimate_information((NEW - REF)[picks], REF[picks])
    assert float(found.entropy) == pytest.approx(0.867589, abs=5e-3)
    weight = (NEW - 2 * REF).exp()
    share = float((REF.exp() * weight).sum() ** 2 / (REF.exp() * weight.square()).sum())
    assert float(found.effective_samples) / 400_000 == pytest.approx(share, rel=2e-2)


def test_order_and_batches():
    ratio, proposal = noise("ratio", shape=(2, 5)), noise("proposal", shape=(2, 5))
    both = estimate_information(ratio, proposal)
    order = torch.tensor([3, 1, 0, 4, 2])
    turned = estimate_information(ratio[:, order], proposal[:, order])
    torch.testing.assert_close(turned.entropy, both.entropy)
    assert float(estimate_information(ratio[1], proposal[1]).entropy) == pytest.approx(float(both.entropy[1]))
    assert estimate_information(ratio[:, :1], proposal[:, :1]).effective_samples.tolist() == [1.0, 1.0]


def test_bad_input():
    with pytest.raises(ValueError, match="at least one"):
        estimate_information(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="log K"):
        estimate_information(NEW - REF, REF, enumerated=True)
    with pytest.raises(ValueError, match="beta"):
        dpo_optimum(REF, REF, UNIFORM, 0.0)
