"""What Keel asks of a policy: a state for each position, and a head that turns states into logits.

A transformers model, and a table with one row of logits for each prefix, look the same through this window.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.rows import Rows


class Head:
    """From states to logits, z = scale * softcap(W h + b), with a backward pass that needs no graph.

    Args:
        module: an `nn.Linear`, any module that maps [n, D] to [n, V], or None where the state is the logits.
        scale: factor on the logits (some architectures divide or multiply them).
        softcap: c of z = c tanh(z / c), or None.
    """

    def __init__(self, module: nn.Module | None = None, scale: float = 1.0, softcap: float | None = None):
        self.module, self.scale, self.softcap = module, scale, softcap

    @property
    def plain(self) -> bool:
        """Whether the head is linear, so that its backward is two matrix products."""
        return self.softcap is None and (self.module is None or type(self.module) is nn.Linear)

    def logits(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits, in fp32 at least."""
        z = hidden if self.module is None else self.module(hidden)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def writes(self, hidden: Float[Tensor, "n D"]) -> bool:
        """Whether `write` can be used: the head is linear, in the type of its logits, and nobody watches its calls."""
        module = self.module
        if not self.plain or not isinstance(module, nn.Linear) or torch.is_autocast_enabled(hidden.device.type):
            return False
        fine = hidden.dtype == module.weight.dtype and hidden.dtype in (torch.float32, torch.float64)
        return fine and not (module._forward_hooks or module._forward_pre_hooks)

    @property
    def vocabulary(self) -> int:
        """V of a linear head."""
        assert isinstance(self.module, nn.Linear)
        return self.module.weight.shape[0]

    @torch.no_grad()
    def write(self, hidden: Float[Tensor, "n D"], out: Float[Tensor, "n V"]) -> None:
        """Logits without a graph, written to `out`."""
        assert isinstance(self.module, nn.Linear)
        weight, bias = self.module.weight, self.module.bias
        if bias is None:
            torch.mm(weight, hidden.T, out=out.T)
        else:
            torch.addmm(bias[:, None], weight, hidden.T, out=out.T)
        if self.scale != 1.0:
            out.mul_(self.scale)

    def backward(self, hidden: Float[Tensor, "n D"], dlogits: Float[Tensor, "n V"]) -> Float[Tensor, "n D"]:
        """Gradient with respect to the states; that of the head's parameters is added to their `.grad`."""
        if not self.plain:
            return self._autograd(hidden, dlogits)
        if self.scale != 1.0:
            dlogits = dlogits * self.scale
        if self.module is None:
            return dlogits.to(hidden.dtype)
        assert isinstance(self.module, nn.Linear)
        weight, bias = self.module.weight, self.module.bias
        dlogits = dlogits.to(weight.dtype)
        if weight.requires_grad:
            _add_product(weight, dlogits.T, hidden.to(weight.dtype))
        if bias is not None and bias.requires_grad:
            _add_grad(bias, dlogits.sum(0))
        return (dlogits @ weight).to(hidden.dtype)

    def _autograd(self, hidden: Tensor, dlogits: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            self.logits(leaf).backward(dlogits)
        assert leaf.grad is not None
        return leaf.grad


@runtime_checkable
class PolicyModel(Protocol):
    """A policy over tokens: `hidden(rows)[b, t]` is the state from which `rows.tokens[b, t]` was chosen."""

    @property
    def head(self) -> Head:
        """From states to logits."""
        ...

    @property
    def module(self) -> nn.Module:
        """The parameters."""
        ...

    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States for all completion positions; what stands off the mask is arbitrary."""
        ...


def _add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to the gradient, without a tensor of its size."""
    if parameter.grad is None:
        parameter.grad = left @ right
    else:
        parameter.grad.addmm_(left, right)


def _add_grad(parameter: Tensor, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
