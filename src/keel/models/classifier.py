"""A head that sorts states into classes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.policy import PolicyModel
from keel.core.registry import part
from keel.core.rows import Rows


class ClassifierHead(nn.Module):
    """z = W h + b, a logit for each class; all are 0 at first, so that every class is as likely.

    Args:
        dim: size of a state.
        classes: K.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(classes, dim)), nn.Parameter(torch.zeros(classes))

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        return hidden.to(self.weight.dtype) @ self.weight.T + self.bias


@part("classifier", paper=68)
@dataclass(frozen=True)
class Classifier:
    """A linear classifier on the policy's states.

    Args:
        classes: K.

    Raises:
        ValueError: fewer than two classes.
    """

    classes: int = 4

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, not {self.classes}")

    def build(self, policy: PolicyModel, seed: int) -> nn.Module:
        """The module, on the policy's device."""
        device = next(policy.module.parameters()).device
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            width = policy.hidden(Rows.build(one, one == 0, one, one == 0)).shape[-1]
        return ClassifierHead(width, self.classes).to(device)
