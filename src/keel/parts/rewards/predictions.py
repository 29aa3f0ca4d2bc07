"""Targets that stand beside the rows before a loss reads them: the policy's own earlier predictions.

A memory holds, for each example of the data, what was predicted at each token of its completion when it last came.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats
from keel.statistics.teachers import TopTokens

Memory = dict[str, Any]


@part("earlier_predictions", paper=168)
@dataclass(frozen=True)
class EarlierPredictions:
    """Transform that gives each row what the policy predicted for the same example when it came the last time.

        columns teacher_ids, teacher_logp [B, T, k]    its k likeliest tokens, renormalised
        column target_share [B]                        alpha (e + 1) / epochs, e = earlier visits, alpha at most

    On the first visit the prediction is the token of the data itself, so that the target is that of supervised
    learning whatever the share. Read first, then written: what is used in a pass comes from the one before. An example
    whose completion has changed begins anew. The memory grows with the data, by 2 k numbers for each token.

    Args:
        alpha: share of the prediction at the end.
        epochs: passes over the data until then.
        k: tokens that are kept; the whole vocabulary where k is no less.

    Raises:
        ValueError: alpha outside [0, 1], or epochs or k below 1.

    Source: "Self-Knowledge Distillation with Progressive Refinement of Targets", 2021 (PS-KD), which keeps the whole
    distribution of a small label set.
    """

    alpha: float = 0.8
    epochs: int = 3
    k: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        for name in ("epochs", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """What the policy predicts before the update."""
        return (TopTokens(self.k, ("old",)),)

    def init(self) -> Memory:
        """Nothing seen."""
        return {
            "index": torch.zeros(0, dtype=torch.long),
            "visits": torch.zeros(0, dtype=torch.long),
            "tokens": torch.zeros(0, 0, dtype=torch.long),
            "ids": torch.zeros(0, 0, self.k, dtype=torch.long),
            "logp": torch.zeros(0, 0, self.k),
        }

    def __call__(self, rows: Rows, stats: Stats, state: Memory) -> Rows:
        ids, logp = self._named(stats[self.needs[0]])
        slot, known = _slots(rows, state)
        first = torch.zeros_like(ids)
        first[..., 0] = rows.tokens
        certain = torch.full_like(logp, -torch.inf)
        certain[..., 0] = 0.0
        visits = torch.zeros_like(rows.data_index)
        if len(state["index"]):
            width = rows.tokens.shape[1]
            there = known[:, None, None]
            ids = torch.where(there, _cut(state["ids"].to(ids)[slot], width), first)
            logp = torch.where(there, _cut(state["logp"].to(logp)[slot], width), certain)
            visits = torch.where(known, state["visits"].to(visits)[slot], visits)
        else:
            ids, logp = first, certain
        share = (self.alpha * (visits.to(logp) + 1) / self.epochs).clamp(max=self.alpha)
        columns = {"teacher_ids": ids, "teacher_logp": logp, "target_share": share}
        return rows.with_(columns={**rows.columns, **columns})

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: Memory) -> Memory:
        """Take in what was predicted for these rows; of several rows of one example, that of the largest row id."""
        order = rows.row.argsort()
        later = rows.data_index[order][:, None] == rows.data_index[order][None]
        kept = order[~later.triu(1).any(1)]
        rows, (ids, logp) = rows.select(kept), self._named(stats[self.needs[0]][kept])
        slot, known = _slots(rows, state)
        tokens = torch.where(rows.mask, rows.tokens, -1)
        new = {"index": rows.data_index, "tokens": tokens, "ids": ids, "logp": logp.float()}
        visits = torch.zeros_like(rows.data_index)
        if len(state["index"]):
            visits = torch.where(known, state["visits"].to(visits)[slot], visits)
        new["visits"] = visits + 1
        left = ~torch.isin(state["index"], rows.data_index.cpu())
        width = max(tokens.shape[1], state["tokens"].shape[1])
        return {name: torch.cat([_wide(state[name][left], width), _wide(new[name].cpu(), width)]) for name in state}

    def _named(self, found: Float[Tensor, "B T K"]) -> tuple[Int[Tensor, "B T k"], Float[Tensor, "B T k"]]:
        """Tokens and log-probabilities of a measurement, filled up to k where the vocabulary is smaller."""
        k = (found.shape[-1] - 1) // 2
        ids, logp = found[..., :k].long(), found[..., k : 2 * k]
        room = (0, self.k - k)
        return torch.nn.functional.pad(ids, room), torch.nn.functional.pad(logp, room, value=-torch.inf)


def _slots(rows: Rows, state: Memory) -> tuple[Int[Tensor, "B"], Bool[Tensor, "B"]]:
    """The place of each row's example in the memory, and whether its completion is remembered there."""
    index = state["index"].to(rows.device)
    if not len(index):
        return torch.zeros_like(rows.data_index), torch.zeros_like(rows.data_index, dtype=torch.bool)
    order = index.argsort()
    place = torch.searchsorted(index[order], rows.data_index).clamp(max=len(index) - 1)
    slot = order[place]
    width = max(rows.tokens.shape[1], state["tokens"].shape[1])
    own = torch.nn.functional.pad(torch.where(rows.mask, rows.tokens, -1), (0, width - rows.tokens.shape[1]), value=-1)
    kept = state["tokens"].to(rows.device)[slot]
    kept = torch.nn.functional.pad(kept, (0, width - kept.shape[1]), value=-1)
    return slot, (index[slot] == rows.data_index) & (own == kept).all(1)


def _cut(kept: Tensor, width: int) -> Tensor:
    """[B, T, k] with this many tokens."""
    short = max(0, width - kept.shape[1])
    return torch.nn.functional.pad(kept, (0, 0, 0, short))[:, :width]


def _wide(kept: Tensor, width: int) -> Tensor:
    """A field of the memory with room for this many tokens."""
    if kept.dim() == 1:
        return kept
    room = (0, 0) * (kept.dim() - 2) + (0, width - kept.shape[1])
    return torch.nn.functional.pad(kept, room, value=-1 if kept.dim() == 2 else 0)
