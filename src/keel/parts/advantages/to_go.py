"""Advantages of single tokens from rewards of single tokens, held against the group."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, scalar_reward
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.stream import discounted_sum
from keel.statistics.stats import Stats


@part("centred_to_go", paper=69)
@dataclass(frozen=True)
class CentredToGo:
    """A_t = (R - mean R) + (P_t - mean P_t), P_t the token rewards from t on, both means over the group.

    A token is credited with what follows it, not with what was earned before. The second mean is over what is still to
    come at the same position, 0 for completions that have ended: a baseline that does not look at the token. Without
    token rewards this is `group_centre`; a group of one, or one that agrees in everything, has 0.

    Raises:
        ValueError: several reward columns (put a WeightedSum before it), or none.

    Source: rewards-to-go as in REINFORCE++, 2025, with the group's mean as a baseline; "Process Reinforcement through
    Implicit Rewards", 2025, subtracts the group's mean reward of a token before it sums, which lets the length of what
    follows into the baseline.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        groups = Groups.of(rows, ~reward.isnan())
        known = (groups.weight > 0)[:, None]
        outcome = torch.where(
            groups.broadcast(groups.tied(reward)), 0.0, reward - groups.broadcast(groups.mean(reward))
        )
        found = torch.where(known, outcome[:, None], 0.0)
        if rows.token_reward is not None:
            found = found + self._process(rows, rows.token_reward, groups)
        own = rows.mask & ~reward.isnan()[:, None]
        return rows.with_(advantage=torch.where(own, found, torch.zeros_like(found)))

    def _process(self, rows: Rows, token_reward: Float[Tensor, "B T"], groups: Groups) -> Float[Tensor, "B T"]:
        to_go = discounted_sum(token_reward, rows.mask, 1.0)
        weight = groups.weight[:, None].to(to_go)
        kept = torch.where(weight > 0, to_go, torch.zeros_like(to_go))
        zero = to_go.new_zeros(groups.count, to_go.shape[1])
        total = zero.index_add(0, groups.index, weight * kept)
        share = to_go.new_zeros(groups.count, 1).index_add(0, groups.index, weight)
        mean = groups.broadcast(ratio(total, share.expand_as(total)))
        return to_go - mean
