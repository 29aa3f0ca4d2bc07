"""Rewards bent before the advantages: by how rare a completion is in its group, and by whom it beats."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.anchored import sequence_log_prob
from keel.parts.rewards.curation import LIMIT, scalar_reward
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

REFERENCES = "reference_rewards"  # feature [B, M] with the rewards of M reference completions of each row's prompt
UPPER = 1.0364333894937898  # 85% quantile of the normal distribution
SHIFT = 3.0  # reward that `shifted` asks for beyond the reference's
STOP = 0.95  # a shaped reward above it has little left to gain
Shape = Literal["sigmoid", "tanh", "log_sigmoid", "centred", "uncentred", "shifted"]


@part("unlikeliness", paper=209)
@dataclass(frozen=True)
class Unlikeliness:
    """r (1 - penalty rank / G) where r > 0: of the successes of a group, the likelier earn less.

    rank counts the completions of the group, failures included, whose log old per token is lower, ties by half; the
    least likely has 0. On enumerated rows rank / G is the probability of a less likely completion. Rewards of 0 and
    below stay as they are, for the factor would raise them.

    Args:
        penalty: what the likeliest completion loses, nearly; 0 changes nothing.

    Raises:
        ValueError: penalty outside [0, 1], or several reward columns (put a WeightedSum before it).

    Source: "Rewarding the Unlikely: Lifting GRPO Beyond Distribution Sharpening", 2025.
    """

    penalty: float = 0.25
    needs = (LogProb(of=("old",)),)

    def __post_init__(self) -> None:
        if not 0 <= self.penalty <= 1:
            raise ValueError(f"penalty must be in [0, 1], not {self.penalty}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        reward = scalar_reward(rows)
        score = sequence_log_prob(rows, stats, "old") / rows.lengths.clamp(min=1)
        share = share_below(score, Groups.of(rows, ~reward.isnan())).to(reward.dtype)
        bent = torch.where(reward > 0, reward * (1 - self.penalty * share), reward)
        return rows.with_(reward=bent[:, None])


def share_below(score: Float[Tensor, "B"], groups: Groups) -> Float[Tensor, "B"]:
    """rank / G: the share of a row's group that lies below it, other rows at the same score by half."""
    together = (groups.index[:, None] == groups.index[None]) & (groups.weight > 0)
    weight = groups.weight.to(score.dtype)
    below = (together & (score[None] < score[:, None])).to(score.dtype) @ weight
    level = (together & (score[None] == score[:, None])).to(score.dtype) @ weight - weight
    return ratio(below + level / 2, groups.broadcast(groups.sum(weight)))


@part("preference_as_reward", paper=213)
@dataclass(frozen=True)
class PreferenceAsReward:
    """The probability, by Bradley and Terry, that a completion beats one of the reference.

        sigmoid       r' = mean_m sigmoid(k (r - r_m))        in (0, 1), steepest where r is the reference's
        tanh          mean_m tanh(k (r - r_m))
        log_sigmoid   log sigmoid(k (r - q)),  q = mean + 1.036 std of the r_m
        centred       k (r - mean r_m)                        unbounded
        uncentred     sigmoid(k r)                            changes when a constant is added to all rewards
        shifted       mean_m sigmoid(k (r - 3 - r_m))         slow at par; a control that should do worse

    r_m are the rewards of completions of the same prompt by the reference: `rows.features["reference_rewards"]` if
    there are any (NaN for missing ones), else the other completions of the group, weighted with ref / old. While the
    policy is near the reference the latter are as good; far from it few of them count. In training the feature is the
    column `reference_rewards` of the data, or, with `references`, what the reference's completions earned when a prompt
    first came; each prompt's are remembered. A KL in the reward comes after. The metric `par/saturated` is the share of
    rewards above 0.95 among the bounded: most of them say that it is time to stop.

    Args:
        k: steepness, per unit of reward.
        shape: one of the six.
        references: completions of the reference that are drawn and scored for each prompt; 0 takes the group's.
        against: name of the reference model.

    Raises:
        ValueError: k not positive and finite, an unknown shape, negative references, or several reward columns (put a
            WeightedSum before it).

    Source: "Reward Shaping to Mitigate Reward Hacking in RLHF", 2025, which scores 10 completions of the initial policy
    beforehand; the weights ref / old are Keel's.
    """

    k: float = 1.0
    shape: Shape = "sigmoid"
    references: int = 0
    against: str = "ref"

    def __post_init__(self) -> None:
        if self.references < 0:
            raise ValueError(f"references must not be negative, got {self.references}")
        if not 0 < self.k < math.inf:
            raise ValueError(f"k must be positive and finite, not {self.k}")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape '{self.shape}' is not one of {', '.join(get_args(Shape))}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def init(self) -> dict[str, Any]:
        """What the reference's completions earned, by the number of their prompt."""
        return {"known": {}}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Remembers the reference rewards of new prompts; those of which none could be measured are tried again."""
        shaped = scalar_reward(rows)[rows.main]
        if self.shape not in ("centred", "log_sigmoid") and bool((~shaped.isnan()).any()):
            metrics["par/saturated"] = float((shaped[~shaped.isnan()] > STOP).double().mean())
        if not self.references or REFERENCES not in rows.features:
            return state
        known = dict(state["known"])
        found = rows.features[REFERENCES]
        for number, values in zip(rows.data_index.tolist(), found.tolist(), strict=True):
            if str(number) not in known and any(value == value for value in values):
                known[str(number)] = values
        return {**state, "known": known}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any] | None = None) -> Rows:
        reward = scalar_reward(rows)
        if REFERENCES in rows.features:
            others = rows.features[REFERENCES].to(reward)
            weight = (~others.isnan()).to(reward.dtype)
        else:
            others = reward.expand(len(rows), len(rows))
            weight = self._odds(rows, stats, reward)
        bent = shaped(reward, torch.where(weight > 0, others, 0.0), weight, self.k, self.shape)
        return rows.with_(reward=torch.where(reward.isnan(), reward, bent)[:, None])

    def _odds(self, rows: Rows, stats: Stats, reward: Float[Tensor, "B"]) -> Float[Tensor, "B B"]:
        """ref / old of the rows (columns) that a row is held against: those of its group, where sampled the others."""
        groups = Groups.of(rows, ~reward.isnan())
        gap = sequence_log_prob(rows, stats, self.against) - sequence_log_prob(rows, stats, "old")
        odds = groups.weight * gap.clamp(-LIMIT, LIMIT).exp()
        together = groups.index[:, None] == groups.index[None]
        if not rows.exact:
            together = together & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        return (together * odds).to(reward.dtype)


def shaped(
    reward: Float[Tensor, "B"],
    reference: Float[Tensor, "B M"],
    weight: Float[Tensor, "B M"],
    k: float,
    shape: str,
) -> Float[Tensor, "B"]:
    """The rewards held against weighted reference rewards; as against an equal where there are none."""
    share = ratio(weight, weight.sum(1, keepdim=True).expand_as(weight))
    alone = share.sum(1) == 0
    if shape == "uncentred":
        return torch.sigmoid(k * reward)
    if shape in ("sigmoid", "tanh", "shifted"):
        gap = torch.where(alone[:, None], torch.zeros_like(reference), reward[:, None] - reference)
        gap = k * (gap - SHIFT if shape == "shifted" else gap)
        won = torch.tanh(gap) if shape == "tanh" else torch.sigmoid(gap)
        share = torch.where(alone[:, None], torch.full_like(share, 1 / max(1, share.shape[1])), share)
        return (share * won).sum(1)
    mean = torch.where(alone, reward, (share * reference).sum(1))
    if shape == "centred":
        return k * (reward - mean)
    size = ratio(torch.ones_like(mean), share.square().sum(1))
    variance = (share * (reference - mean[:, None]).square()).sum(1) * ratio(size, (size - 1).clamp(min=0))
    return torch.nn.functional.logsigmoid(k * (reward - mean - UPPER * variance.sqrt()))
