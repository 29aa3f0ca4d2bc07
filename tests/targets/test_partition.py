"""log Z summed, sampled and annealed: known values, honest errors, and the bias that few samples have."""

import math

import pytest
import torch
from tests.targets.example import BETA, MU, SIX, Q, R, tensor
from torch.testing import assert_close

from keel.core.choice import generator
from keel.targets.partition import log_z_annealed, log_z_samples, log_z_sum

LQ = Q.log()
LOG_Z = 2.225165


def test_the_sum():
    found = log_z_sum(torch.stack([LQ + R / BETA, LQ + 1]))
    assert_close(found.log_z, tensor(LOG_Z, 1.0), **SIX)
    assert found.standard_error.tolist() == [0, 0]
    assert found.warning is None


def test_weights_by_hand():
    found = log_z_samples(tensor(1, 1, 4).log())
    assert_close(found.log_z, tensor(math.log(2))[0])
    assert_close(found.effective_samples, tensor(36 / 18)[0])
    assert_close(found.largest_weight, tensor(4 / 6)[0])
    # the variance of the mean of (1, 1, 4) is 3 / 3 = 1, relative to the squared mean 4
    assert_close(found.standard_error, tensor(0.5)[0])
    assert_close(found.bias, tensor(-0.125)[0])


@pytest.mark.parametrize("proposal", [Q, MU], ids=["reference", "another proposal"])
def test_error_and_bias_are_as_stated(proposal):
    """4000 estimates from 100 samples each: their spread and their mean."""
    drawing = generator("partition", 0)
    x = torch.multinomial(proposal, 400_000, replacement=True, generator=drawing).reshape(4000, 100)
    found = log_z_samples((LQ + R / BETA - proposal.log())[x])
    assert float(found.log_z.std()) == pytest.approx(float(found.standard_error.mean()), rel=0.05)
    bias = float(found.log_z.mean()) - LOG_Z
    assert bias < 0
    assert bias == pytest.approx(float(found.bias.mean()), abs=3 * float(found.log_z.std()) / math.sqrt(4000))
    assert float(found.log_z.exp().mean()) == pytest.approx(math.exp(LOG_Z), rel=0.01)


def test_few_heavy_samples_are_called_so():
    found = log_z_samples(tensor(*([0.0] * 63), 9.0))
    assert found.warning is not None
    assert "too low" in found.warning
    assert log_z_samples(torch.zeros(64, dtype=torch.float64)).warning is None
    assert float(log_z_samples(tensor(0.3)).standard_error) == math.inf


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_annealing_is_unbiased_and_says_its_error(steps):
    estimates = [log_z_annealed(LQ, R, BETA, 500, steps, seed) for seed in range(20)]
    log_z = torch.stack([e.log_z for e in estimates])
    error = float(torch.stack([e.standard_error for e in estimates]).mean())
    assert float(log_z.exp().mean()) == pytest.approx(math.exp(LOG_Z), rel=4 * error / math.sqrt(20))
    assert float(log_z.std()) == pytest.approx(error, rel=0.6)


def test_annealing_gains_over_importance_sampling():
    """beta = 0.2: the ladder's weights are more even than those of one step."""
    one, many = (log_z_annealed(LQ, R, 0.2, 2000, steps, 0) for steps in (1, 64))
    exact = float((LQ + R / 0.2).logsumexp(-1))
    assert float(many.effective_samples) > 3 * float(one.effective_samples)
    assert abs(float(many.log_z) - exact) < 4 * float(many.standard_error)
    assert float(many.standard_error) < float(one.standard_error) / 1.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: log_z_samples(torch.zeros(0)),
        lambda: log_z_samples(tensor(-math.inf, -math.inf)),
        lambda: log_z_annealed(LQ, R, BETA, 0, 1, 0),
        lambda: log_z_annealed(LQ, R, BETA, 1, 0, 0),
    ],
)
def test_refusals(wrong):
    with pytest.raises(ValueError, match="at least one"):
        wrong()
