"""Advantages over the more pessimistic of two critics."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import returns
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.critics import check_critics, soft_min
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats


@part("soft_min_critics", paper=12)
@dataclass(frozen=True)
class SoftMinCritics:
    """A_t = R - V(s_t), V the soft minimum of two critics; R is the return of the whole completion.

    `columns["returns"]` = R and `columns["values"]` = V travel to the value loss.

    Args:
        sharpness: a of the soft minimum; a small one is nearly the minimum, a large one the mean.
        heads: names of the two value heads.
        slow: names of copies of them whose values make the advantage; () takes their own.

    Raises:
        ValueError: sharpness not positive and finite, or not two different heads, or slow copies that are not two.

    Source: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026; its critics see
    the completion as one step, here each token has a value.
    """

    sharpness: float = 0.3
    heads: tuple[str, str] = ("value_a", "value_b")
    slow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_critics(self.sharpness, self.heads)
        if len(self.slow) not in (0, 2):
            raise ValueError(f"slow must name two heads or none, not {self.slow}")

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The critics."""
        return (*self.heads, *self.slow)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Their values before the update."""
        return tuple(Value(head, of=("old",)) for head in self.heads_read)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = self._soft_min(rows, stats, self.heads)
        judge = self._soft_min(rows, stats, self.slow or self.heads)
        earned = returns(rows).to(value.dtype)[:, None].expand_as(value)
        scored = rows.mask & ~earned.isnan()
        gain = torch.where(scored, earned - judge, torch.zeros_like(value))
        known = torch.where(scored, earned, value)  # what has no reward teaches the critics nothing
        return rows.with_(advantage=gain, columns={**rows.columns, "returns": known, "values": value})

    def _soft_min(self, rows: Rows, stats: Stats, heads: tuple[str, ...]) -> Float[Tensor, "B T"]:
        first, second = (stats[Value(head, of=("old",))] for head in heads)
        value = soft_min(first, second, self.sharpness)
        return torch.where(rows.mask, value, torch.zeros_like(value))
