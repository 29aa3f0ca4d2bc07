"""The head's backward pass in closed form against autograd."""

import itertools

import pytest
import torch
from tests.worlds import noise
from torch import nn

from keel.core.policy import Head


class Doubling(nn.Linear):
    """No plain linear layer, so that its backward goes through autograd."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def module(kind: str) -> nn.Module | None:
    if kind == "identity":
        return None
    made = {"linear": nn.Linear(4, 7), "no bias": nn.Linear(4, 7, bias=False), "own": Doubling(4, 7)}[kind].double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(noise("head", i, shape=tuple(parameter.shape)))
    return made


@pytest.mark.parametrize(
    ("kind", "scale", "softcap"),
    list(itertools.product(["identity", "linear", "no bias", "own"], [1.0, 0.25], [None, 2.0])),
)
def test_backward(kind, scale, softcap):
    head = Head(module(kind), scale, softcap)
    hidden = noise("hidden", shape=(5, 4))
    dlogits = noise("dlogits", shape=(5, 4 if kind == "identity" else 7))
    leaf = hidden.clone().requires_grad_()
    z = leaf if head.module is None else head.module(leaf)
    z = scale * z
    wanted = z if softcap is None else softcap * torch.tanh(z / softcap)
    torch.testing.assert_close(head.logits(hidden), wanted, rtol=1e-12, atol=1e-12)
    parameters = [] if head.module is None else list(head.module.parameters())
    by_hand = torch.autograd.grad(wanted, [leaf, *parameters], dlogits)
    found = head.backward(hidden, dlogits)
    torch.testing.assert_close(found, by_hand[0], rtol=1e-12, atol=1e-12)
    head.backward(hidden, dlogits)  # gradients of the parameters add up
    for parameter, grad in zip(parameters, by_hand[1:], strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_get_no_gradient():
    linear = module("linear").requires_grad_(False)
    Head(linear).backward(noise("h", shape=(2, 4)), noise("d", shape=(2, 7)))
    assert linear.weight.grad is None and linear.bias.grad is None


def test_logits_are_fp32_at_least():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert Head().logits(torch.ones(1, 2, dtype=dtype)).dtype == wanted
