"""Rewards bent by what all rewards of the run so far have been, and by length."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.curation import scalar_reward
from keel.statistics.stats import Stats

RAW = "running_reward/raw"  # column with the rewards before they were bent
RunningShape = Literal["standardise", "clip", "min_max"]


@part("running_reward", paper=213)
@dataclass(frozen=True)
class RunningReward:
    """The reward on the scale of all rewards since the run began, those of the batch included.

        standardise   (r - mean) / std
        clip          min(max(r, mean - std), mean + std)
        min_max       (r - smallest) / (largest - smallest)

    std is the population's, and 1 where all rewards are equal; min_max is 0 there. As the policy improves, the mean
    follows: what was good once is bent to be mediocre.

    Args:
        shape: one of the three.

    Raises:
        ValueError: an unknown shape, or several reward columns (put a WeightedSum before it).

    Source: "Reward Shaping to Mitigate Reward Hacking in RLHF", 2025, where these are baselines.
    """

    shape: RunningShape = "standardise"

    def __post_init__(self) -> None:
        if self.shape not in get_args(RunningShape):
            raise ValueError(f"shape '{self.shape}' is not one of {', '.join(get_args(RunningShape))}")

    def init(self) -> dict[str, float]:
        """Weight, mean, sum of squared distances, smallest and largest of what was seen: nothing yet."""
        return {"count": 0.0, "mean": 0.0, "squares": 0.0, "low": math.inf, "high": -math.inf}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Adds the batch."""
        return seen(state, rows.columns[RAW], rows) if RAW in rows.columns else state

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        reward = scalar_reward(rows)
        now = seen(state, reward, rows)
        std = math.sqrt(now["squares"] / now["count"]) if now["count"] > 0 else 0.0
        if self.shape == "standardise":
            bent = (reward - now["mean"]) / (std or 1.0)
        elif self.shape == "clip":
            bent = reward.clamp(now["mean"] - std, now["mean"] + std)
        else:
            width = now["high"] - now["low"]
            bent = (reward - now["low"]) / width if width > 0 else torch.where(reward.isnan(), reward, 0.0)
        return rows.with_(reward=bent[:, None], columns={**rows.columns, RAW: reward})


def seen(state: dict[str, Any], reward: Float[Tensor, "B"], rows: Rows) -> dict[str, float]:
    """The state with the rewards of a batch: main rows that have one, by their weight."""
    reward = reward.double()
    weight = rows.weight.double() * (rows.main & ~reward.isnan())
    more = float(weight.sum())
    if more <= 0:
        return dict(state)
    mean = weighted_mean(reward, weight)
    spread = float(weighted_mean((reward - mean).square(), weight))
    count, apart = state["count"] + more, float(mean) - state["mean"]
    there = reward[weight > 0]
    return {
        "count": count,
        "mean": state["mean"] + apart * more / count,
        "squares": state["squares"] + spread * more + apart**2 * state["count"] * more / count,
        "low": min(state["low"], float(there.min())),
        "high": max(state["high"], float(there.max())),
    }


@part("length_penalty", paper=213)
@dataclass(frozen=True)
class LengthPenalty:
    """r - per_token max(0, L - valid_length), before rewards are bent.

    Args:
        valid_length: tokens that cost nothing.
        per_token: reward that each further token costs.

    Raises:
        ValueError: a negative valid_length or per_token, or several reward columns (put a WeightedSum before it).

    Source: "Reward Shaping to Mitigate Reward Hacking in RLHF", 2025.
    """

    valid_length: int = 300
    per_token: float = 0.01

    def __post_init__(self) -> None:
        for name in ("valid_length", "per_token"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        excess = (rows.lengths - self.valid_length).clamp(min=0).to(reward.dtype)
        return rows.with_(reward=(reward - self.per_token * excess)[:, None])
