"""Rewards as features whose means a target prescribes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import UserError, nearest
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

FEATURES = "moments"
TOTAL = "reward"
RECORDED = "rewards/"  # prefix of the columns in which the loop records each reward by name


@part("moment_features", paper=3)
@dataclass(frozen=True)
class MomentFeatures:
    """Keeps reward functions as the features phi of a target, `rows.features["moments"]`, before they are summed.

    The name `reward` stands for the sum of all rewards. Where the rows do not say which reward is whose, the names are
    those of the reward columns in their order.

    Args:
        names: of the reward functions.

    Raises:
        ValueError: no name, or the same twice.
        UserError: a name that no reward has.
    """

    names: tuple[str, ...] = (TOTAL,)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError("moments need names, each of them once")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        if rows.reward is None:
            raise ValueError("these rows have no reward")
        features = torch.stack([self._feature(rows, rows.reward, name) for name in self.names], 1)
        return rows.with_(features={**rows.features, FEATURES: features})

    def _feature(self, rows: Rows, reward: Float[Tensor, "B K"], name: str) -> Float[Tensor, "B"]:
        if name == TOTAL:
            return torch.where(reward.isnan().all(1), torch.nan, torch.nansum(reward, 1))
        if RECORDED + name in rows.columns:
            return rows.columns[RECORDED + name].to(reward)
        own = [n for n in self.names if n != TOTAL]
        recorded = [n.removeprefix(RECORDED) for n in rows.columns if n.startswith(RECORDED)]
        if recorded or len(own) != reward.shape[1]:
            known = recorded or [f"{reward.shape[1]} without names"]
            what = f"there is no reward '{name}'.{nearest(name, recorded)}"
            raise UserError(what, "moments", f"Rewards: {', '.join(known)}.")
        return reward[:, own.index(name)]
