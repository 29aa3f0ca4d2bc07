"""Losses of value heads other than PPO's single clipped one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.critics import check_critics, soft_min
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats


def returns_of(rows: Rows, head: str) -> Float[Tensor, "B T"]:
    """`columns["returns/HEAD"]` where several critics learn, `columns["returns"]` otherwise.

    Raises:
        ValueError: there is neither.
    """
    for name in (f"returns/{head}", "returns"):
        if name in rows.columns:
            return rows.columns[name]
    raise ValueError(
        f"the value head '{head}' needs returns: put its critic's part into the method's chain `advantage`"
    )


@part("squared_value_loss", paper=96)
@dataclass(frozen=True)
class SquaredValueLoss:
    """(V - R)^2 of one critic among several.

    Args:
        head: the value head's name; R is its return.

    Raises:
        ValueError: nothing has left the returns of this head.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023.
    """

    head: str = "value"
    additive = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The live value."""
        return (Value(self.head),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The value head."""
        return (self.head,)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return (stats[Value(self.head)] - returns_of(rows, self.head)).square()


@part("soft_min_value_loss", paper=12)
@dataclass(frozen=True)
class SoftMinValueLoss:
    """(huber(V - R) + huber(clip(V, V_old - epsilon, V_old + epsilon) - R)) / 2, V the soft minimum of two critics.

    Args:
        sharpness, heads: of the soft minimum, as in `SoftMinCritics`.
        epsilon: clip range of V.
        delta: error from which on the loss is linear.

    Raises:
        ValueError: sharpness, epsilon or delta not positive, not two heads, or no returns.

    Source: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026; the mean of the
    two is its own, PPO takes the larger.
    """

    sharpness: float = 0.3
    heads: tuple[str, str] = ("value_a", "value_b")
    epsilon: float = 0.2
    delta: float = 0.5
    additive = True

    def __post_init__(self) -> None:
        check_critics(self.sharpness, self.heads)
        for name in ("epsilon", "delta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The live values."""
        return tuple(Value(head) for head in self.heads)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The critics."""
        return self.heads

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        target = returns_of(rows, self.heads[0])
        before = rows.columns["values"]
        first, second = (stats[need] for need in self.needs)
        value = soft_min(first, second, self.sharpness)
        near = torch.minimum(torch.maximum(value, before - self.epsilon), before + self.epsilon)
        loss = [huber_loss(v, target.to(v), reduction="none", delta=self.delta) for v in (value, near)]
        return (loss[0] + loss[1]) / 2
