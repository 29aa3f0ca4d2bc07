"""The optimum of an enumerable world, with everything that is reported of it."""

import pytest
import torch
from torch.testing import assert_close

from keel.exact.optima import optimum
from keel.exact.space import SequenceSpace, TabularPolicy

Q = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
R = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
SIX = {"rtol": 0, "atol": 6e-7}


def test_kl_optimum_of_five_outcomes():
    found = optimum(R, Q.log(), 0.5)
    expected = torch.tensor([0.043220, 0.199596, 0.058742, 0.589931, 0.108512], dtype=torch.float64)
    assert_close(found.prob, expected, **SIX)
    assert_close(found.log_prob.exp(), expected, **SIX)
    numbers = [found.value, found.reward, found.divergence, found.kl, found.entropy, found.multiplier]
    expected = torch.tensor([1.112583, 1.571596, 0.918026, 0.918026, 1.176253, 1.112583], dtype=torch.float64)
    assert_close(torch.stack(numbers), expected, **SIX)


def test_kl_and_entropy_of_another_divergence():
    found = optimum(R, Q.log(), 0.2, "pearson")
    p = torch.tensor([0, 0.390625, 0.0625, 0.40625, 0.140625], dtype=torch.float64)
    assert_close(found.prob, p)
    inside = p > 0
    assert_close(found.kl, (p[inside] * (p[inside] / Q[inside]).log()).sum())
    assert_close(found.entropy, -(p[inside] * p[inside].log()).sum())
    assert_close(found.divergence, ((p - Q) ** 2 / Q).sum())


@pytest.mark.parametrize("divergence", ["kl_policy_ref", "kl_ref_policy", "js"])
def test_no_policy_of_a_world_does_better(divergence):
    """Sequences of two prompts: tabular policies near the optimum, and the optimum's own value."""
    from keel.divergences.family import f_divergence

    space = SequenceSpace(vocab=3, horizon=2, prompts=2)
    drawing = torch.Generator().manual_seed(0)
    logits = torch.randn(2, space.prefixes, 3, generator=drawing, dtype=torch.float64)
    policy = TabularPolicy(space, logits)
    log_ref = torch.stack([policy.log_prob(space.rows(prompt)) for prompt in (0, 1)]).detach()
    reward = torch.rand(2, log_ref.shape[1], generator=drawing, dtype=torch.float64)
    found = optimum(reward, log_ref, 0.3, divergence)
    d = f_divergence(divergence)

    def objective(log_p):
        return (log_p.exp() * reward).sum(-1) - 0.3 * d.value(log_p, log_ref)

    assert_close(objective(found.log_prob), found.value)
    for scale in (1e-3, 0.1, 1.0):
        noise = scale * torch.randn(log_ref.shape, generator=drawing, dtype=torch.float64)
        assert bool((objective((found.log_prob + noise).log_softmax(-1)) < found.value).all())
