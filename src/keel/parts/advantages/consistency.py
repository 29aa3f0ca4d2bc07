"""Advantages that look at how much the answers of a group agree, and compare groups where they do."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns, weighted_mean, weighted_std
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage
from keel.statistics.stats import Stats

Blend = Literal["soft_forced", "soft", "forced", "local", "global"]
GLOBAL = "global_advantage"  # column [B, T] with the advantage across prompts
ANSWER = "answer"  # column [B] with a number for each different answer


@part("answer_consistency", paper=76)
@dataclass(frozen=True)
class AnswerConsistency:
    """Splits the step between the advantage within a group and one across groups, by the entropy of the answers.

        H = -sum_a f_a log2 f_a                          f_a the share of answer a in the group
        w = sigmoid(sharpness (H - midpoint)),           0 where all rewards of the group are the same ("forced")
        R_q = mean(R) (1 - lam H),                       lam = (1 - 1 / G) / log2 G
        A_global = (R_q - mean) / (std + epsilon)        over the prompts of the batch

    The advantage that is there becomes w A, and the column `global_advantage` holds (1 - w) A_global, for a second
    surrogate (`SecondSurrogate`). A group that agrees on a wrong answer is pushed down, one that agrees on the right
    one up. Where prompts do not differ, or there is one alone, A_global is 0.

    Two answers are the same if the column `answer` of the rows says so; without that column, if the last `tail` chosen
    tokens agree.

    Args:
        sharpness, midpoint: of the blend, H in bits.
        blend: soft_forced; soft (without the factor), forced (w = 1 unless tied), local (w = 1), global (w = 0).
        coefficient: discount R_q by the entropy; else lam = 0.
        tail: tokens that are compared; None compares whole completions.
        epsilon: added to the deviation.

    Raises:
        ValueError: an unknown blend, a negative sharpness, or tail below 1.

    Source: "COPO: Consistency-Aware Policy Optimization", 2025; comparing tokens is Keel's.
    """

    sharpness: float = 20.0
    midpoint: float = 0.5
    blend: Blend = "soft_forced"
    coefficient: bool = True
    tail: int | None = None
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend '{self.blend}' is not one of {', '.join(get_args(Blend))}")
        if self.sharpness < 0:
            raise ValueError(f"sharpness must not be negative, got {self.sharpness}")
        if self.tail is not None and self.tail < 1:
            raise ValueError(f"tail must be at least 1, not {self.tail}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        local, value = advantage(rows), returns(rows)
        groups = Groups.of(rows, ~value.isnan())
        entropy = answer_entropy(answers(rows, self.tail), groups).to(value.dtype)
        share = self._local_share(entropy, groups.tied(value))
        across = groups.broadcast((1 - share) * self._across(groups, value, entropy))
        scored = (groups.weight > 0)[:, None] & rows.mask
        columns = {**rows.columns, GLOBAL: torch.where(scored, across[:, None], torch.zeros_like(local))}
        return rows.with_(advantage=groups.broadcast(share)[:, None] * local, columns=columns)

    def _local_share(self, entropy: Float[Tensor, "N"], tied: Tensor) -> Float[Tensor, "N"]:
        """w of each group."""
        if self.blend in ("soft", "soft_forced"):
            share = torch.sigmoid(self.sharpness * (entropy - self.midpoint))
        else:
            share = torch.full_like(entropy, 0.0 if self.blend == "global" else 1.0)
        return torch.where(tied, torch.zeros_like(share), share) if "forced" in self.blend else share

    def _across(self, groups: Groups, value: Float[Tensor, "B"], entropy: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """A_global of each group."""
        size = groups.size().to(value.dtype)
        lam = ratio(1 - ratio(torch.ones_like(size), size), size.clamp(min=1).log2())
        lam = lam if self.coefficient else torch.zeros_like(lam)
        worth = groups.mean(value) * (1 - lam * entropy)
        weight = groups.sum(groups.weight).to(value.dtype)
        if not groups.exact:
            weight = ratio(weight, groups.sum((groups.weight > 0).to(weight)))
        spread = weighted_std(worth, weight, groups.exact)
        centred = worth - weighted_mean(worth, weight)
        return centred / (spread + self.epsilon) if bool(spread > 0) else torch.zeros_like(centred)


def answers(rows: Rows, tail: int | None = None) -> Int[Tensor, "B"]:
    """A number for each different answer: the column `answer`, or the last `tail` chosen tokens of each row."""
    if ANSWER in rows.columns:
        return rows.columns[ANSWER].unique(return_inverse=True)[1]
    width = max(1, rows.tokens.shape[1] if tail is None else min(tail, rows.tokens.shape[1]))
    from_end = rows.lengths[:, None] - rows.mask.long().cumsum(1)
    used = rows.mask & (from_end < width)
    last = rows.tokens.new_full((len(rows), width + 1), -1)
    last = last.scatter(1, torch.where(used, from_end, width), torch.where(used, rows.tokens, -1))
    return last[:, :width].unique(dim=0, return_inverse=True)[1]


def answer_entropy(answer: Int[Tensor, "B"], groups: Groups) -> Float[Tensor, "N"]:
    """-sum_a f_a log2 f_a of each group, in bits."""
    same = (groups.index[:, None] == groups.index[None]) & (answer[:, None] == answer[None])
    share = ratio(same.to(groups.weight.dtype) @ groups.weight, groups.broadcast(groups.sum(groups.weight)))
    return groups.mean(-share.clamp(min=torch.finfo(share.dtype).tiny).log2()).clamp(min=0)
