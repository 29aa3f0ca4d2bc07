"""Pairs whose rejected side may be of an earlier model, and whose chosen side of one that is a round ahead."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, scalar_reward
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Pairs, Rows, Stream
from keel.parts.rewards.pairing import count_pairs
from keel.rollouts.beside import AUTHOR
from keel.statistics.stats import Stats

ANCHORED, AHEAD = "pairs/anchored", "pairs/ahead"


@part("temporal_pairs", paper=194)
@dataclass(frozen=True)
class TemporalPairs:
    """One pair of each prompt, out of completions of three models that one judge has scored.

        chosen     argmax future   if max future > max current,    else argmax current
        rejected   argmin anchor   if min anchor < min current,    else argmin current

    Only where the chosen one scores higher. Of equals the one with the lower row id is taken. Rows beside the batch
    that are in a pair become rows of it. See `temporal_pair` for one prompt.

    Args:
        anchor, future: which of the rollout's `beside` they are, counted from 1; 0 for none.

    Raises:
        ValueError: a negative number, or twice the same.
        MethodError: no models draw beside the policy, or there are several rewards.

    Source: "Temporal Self-Rewarding Language Models: Decoupling Chosen-Rejected via Past-Future", 2025.
    """

    anchor: int = 1
    future: int = 2

    def __post_init__(self) -> None:
        if min(self.anchor, self.future) < 0 or (self.anchor and self.anchor == self.future):
            raise ValueError(f"anchor and future are two models beside, or 0, not {self.anchor} and {self.future}")

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` counts."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        if AUTHOR not in rows.columns:
            raise MethodError("no other model draws beside the policy", "rollout.beside", "Add CompletionsOf('ref').")
        score, author, groups = scalar_reward(rows), rows.columns[AUTHOR], Groups.of(rows)
        own = ~score.isnan() & (author == 0)
        future, anchor = (~score.isnan() & (author == i) & (author > 0) for i in (self.future, self.anchor))
        chosen = _further(rows, score, groups, future, own)
        rejected = _further(rows, -score, groups, anchor, own)
        there = (chosen >= 0) & (rejected >= 0)
        gap = torch.where(there, score[chosen.clamp(min=0)] - score[rejected.clamp(min=0)], 0.0)
        keep = there & (gap > 0)
        chosen, rejected, gap = chosen[keep], rejected[keep], gap[keep]
        weight, size = groups.sum(rows.weight.to(score) * own), groups.sum(own.to(score))
        measure = (weight if rows.exact else ratio(weight, size))[keep]
        stream = rows.stream.index_fill(0, torch.cat([chosen, rejected]), int(Stream.MAIN))
        one = torch.ones_like(gap)
        return rows.with_(stream=stream, pairs=Pairs(chosen, rejected, measure, one, one, gap))

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Counts: pairs, the share of groups with any, the mean gap; and who wrote both sides."""
        assert rows.pairs is not None
        author, number = rows.columns[AUTHOR], max(1, len(rows.pairs.chosen))
        metrics |= count_pairs(rows)
        metrics[ANCHORED] = float((author[rows.pairs.rejected] > 0).sum()) / number
        metrics[AHEAD] = float((author[rows.pairs.chosen] > 0).sum()) / number
        return state


def _further(
    rows: Rows, height: Float[Tensor, "B"], groups: Groups, other: Bool[Tensor, "B"], own: Bool[Tensor, "B"]
) -> Int[Tensor, "N"]:
    """The highest row of each group: that of `other` where it is strictly above the own one; -1 where there is none."""
    mine, theirs = _top(rows, height, groups, own), _top(rows, height, groups, other)
    above = height[theirs.clamp(min=0)] > height[mine.clamp(min=0)]
    return torch.where((theirs >= 0) & ((mine < 0) | above), theirs, mine)


def _top(rows: Rows, height: Float[Tensor, "B"], groups: Groups, pool: Bool[Tensor, "B"]) -> Int[Tensor, "N"]:
    """The highest row of each group within a pool, of equals the one with the lowest row id; -1 where it is empty."""
    index = pool.nonzero().flatten()
    index = index[rows.row[index].argsort(descending=True)]
    index = index[height[index].argsort(stable=True)]  # the highest last
    found = torch.full((groups.count,), -1, dtype=torch.long, device=rows.device)
    place = torch.arange(len(index), device=rows.device)
    last = found.scatter_reduce(0, groups.index[index], place, "amax")
    return torch.where(last >= 0, index[last.clamp(min=0)], last) if len(index) else found
