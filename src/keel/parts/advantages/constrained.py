"""Advantages of several rewards, each with its own critic, mixed by the multipliers of their constraints."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.components import components
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage
from keel.parts.advantages.stream import GAE, Whiten
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats


def critic_names(number: int) -> tuple[str, ...]:
    """Heads of the KL and of the constraints, in this order.

    >>> critic_names(2)
    ('value_kl', 'value_0', 'value_1')
    """
    return ("value_kl", *(f"value_{m}" for m in range(number)))


@part("constrained_gae", paper=96)
@dataclass(frozen=True)
class ConstrainedGAE:
    """A = (M - sum_m lam_m) A^KL + sum_m lam_m A^m, of M rewards under constraints and the KL in the token rewards.

    Each A is a generalised advantage with a critic of its own, whitened on its own, so that no scale decides. The
    returns of head NAME travel in `columns["returns/NAME"]`.

    Args:
        multipliers: lam_m, one for each reward column; the controller `lagrange` owns them.
        gamma, lam: discount and trace decay.
        whiten: each advantage over the tokens of the batch.

    Raises:
        ValueError: no multiplier, gamma or lam outside [0, 1], or another number of reward columns.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023.
    """

    multipliers: tuple[float, ...] = (0.5,)
    gamma: float = 0.99
    lam: float = 0.95
    whiten: bool = True

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise ValueError("multipliers: at least one reward needs a constraint")
        GAE(self.gamma, self.lam)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The critics."""
        return critic_names(len(self.multipliers))

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Their values before the update."""
        return tuple(Value(head, of=("old",)) for head in self.heads_read)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        number, columns = len(self.multipliers), components(rows).shape[1]
        if columns != number:
            raise ValueError(f"{number} multipliers for {columns} reward columns")
        found = [self._one(self.stream(rows, head), stats, head) for head in self.heads_read]
        mixed = mix(torch.stack([advantage(one) for one in found]), self.multipliers)
        returns = {f"returns/{h}": one.columns["returns"] for h, one in zip(self.heads_read, found, strict=True)}
        return rows.with_(advantage=mixed, columns={**rows.columns, **returns})

    def stream(self, rows: Rows, head: str) -> Rows:
        """The rows with what one critic predicts for reward: the KL alone, or one reward without it."""
        rewards, place = components(rows), self.heads_read.index(head)
        if place == 0:
            return rows.with_(reward=torch.zeros_like(rewards[:, :1]))
        return rows.with_(reward=rewards[:, place - 1 : place], token_reward=None)

    def _one(self, rows: Rows, stats: Stats, head: str) -> Rows:
        rows = GAE(self.gamma, self.lam, head)(rows, stats)
        assert rows.reward is not None
        if self.whiten:
            return Whiten()(rows, stats)
        return rows.with_(advantage=torch.where(rows.reward.isnan(), 0.0, advantage(rows)))


def mix(advantages: Float[Tensor, "H B T"], multipliers: tuple[float, ...]) -> Float[Tensor, "B T"]:
    """(M - sum lam) A^KL + sum_m lam_m A^m; the KL's comes first."""
    weights = advantages.new_tensor([len(multipliers) - sum(multipliers), *multipliers])
    return (weights[:, None, None] * advantages).sum(0)
