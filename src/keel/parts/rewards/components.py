"""Several rewards kept apart, for methods that treat each on its own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.components import COMPONENTS, components
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats


@part("keep_components", paper=[13, 96])
@dataclass(frozen=True)
class KeepComponents:
    """Copies the reward columns to `features["components"]`, before they are summed.

    Raises:
        ValueError: the rows have no reward.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        return rows.with_(features={**rows.features, COMPONENTS: components(rows)})


@part("standardise_components", paper=13)
@dataclass(frozen=True)
class StandardiseComponents:
    """(r_k - mean) / (std + epsilon) of each reward column within its group, before the columns are summed.

    So a sum weighs objectives and not their scales; a column that a group is tied in becomes 0 there. With one column
    and the advantage A = R it is GRPO's.

    Args:
        epsilon: added to the deviation; 1e-4 in TRL.

    Raises:
        ValueError: a negative epsilon, or rows without reward.

    Source: group normalisation, "DeepSeekMath", 2024, column by column.
    """

    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        if rows.reward is None:
            raise ValueError("these rows have no reward")
        return rows.with_(reward=torch.stack([self._column(rows, c) for c in rows.reward.unbind(1)], 1))

    def _column(self, rows: Rows, column: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        groups = Groups.of(rows, ~column.isnan())
        centred = column - groups.broadcast(groups.mean(column))
        scaled = ratio(centred, groups.broadcast(groups.std(column)) + self.epsilon)
        tied = groups.broadcast(groups.tied(column)) & ~column.isnan()
        return torch.where(tied, torch.zeros_like(scaled), scaled)
