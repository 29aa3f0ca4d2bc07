"""The reward of an environment: as a reward function, and turn by turn as token rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.core.errors import RewardError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats

ENVIRONMENT = "environment"
COLUMN = "turn_reward"


def environment_reward(*, episode_reward: Sequence[float | str], **columns: Any) -> list[float]:
    """Reward: what the environment gave in all turns of an episode.

    Args:
        episode_reward: the sums, or what went wrong in the group of an episode, as text.

    Raises:
        RewardError: something went wrong in one of these groups.
    """
    for entry in episode_reward:
        if isinstance(entry, str):
            raise RewardError(entry)
    return [float(entry) for entry in episode_reward]  # type: ignore[arg-type]


@part("turn_reward")
@dataclass(frozen=True)
class TurnReward:
    """Moves the environment's reward from the end of an episode to the turns that earned it.

        token reward_t += weight r_k at the last token chosen in turn k,   reward -= weight sum_k r_k

    The return of an episode stays what it was; returns to go (REINFORCE++) and GAE then credit a turn with what comes
    after it only. Advantages of whole completions (GRPO, RLOO) do not change.

    Args:
        weight: of the environment's reward in the sum of rewards. With a `WeightedSum` this part stands behind it, and
            `weight` is the environment's there.

    Raises:
        ValueError: the rows are no episodes, or have no reward.

    Source: rewards of a Markov decision process over turns, as in "VAGEN" (2025) and verl-agent; the split is exact.
    """

    weight: float = 1.0

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        if rows.reward is None or COLUMN not in rows.columns:
            raise ValueError("turn_reward moves the reward of an environment: train on a task of several turns")
        earned = self.weight * rows.columns[COLUMN] * rows.mask
        reward = rows.reward.clone()
        reward[:, 0] -= earned.sum(1)
        tokens = earned if rows.token_reward is None else rows.token_reward + earned
        return rows.with_(reward=reward, token_reward=tokens.to(torch.float32))
