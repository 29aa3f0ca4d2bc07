"""Weights for tokens that good and bad completions of a prompt share, at their beginning or their end."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.stats import Stats


def shared_run(
    tokens: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"], good: Bool[Tensor, "B"], bad: Bool[Tensor, "B"], rows: Rows
) -> Bool[Tensor, "B T"]:
    """The leading tokens of each row that a good and a bad row of its group both have at the same place, run by run."""
    width, vocabulary = tokens.shape[1], int(tokens.max()) + 1
    place = torch.arange(width, device=tokens.device)
    _, group = rows.group.unique(return_inverse=True)
    _, key = ((group[:, None] * width + place) * vocabulary + tokens).unique(return_inverse=True)
    held = []
    for side in (good, bad):
        count = torch.zeros(int(key.max()) + 1, dtype=torch.long, device=tokens.device)
        counted = (side[:, None] & valid).long()
        held.append(count.index_add(0, key.flatten(), counted.flatten())[key] > 0)
    both = held[0] & held[1] & valid & (good | bad)[:, None]
    return both.long().cumprod(1).bool()


@part("conflict", paper=30)
@dataclass(frozen=True)
class ConflictWeight:
    """Weight of the tokens that completions with A > 0 and with A < 0 have in common, from the first token on, or back
    from the last.

        `amplify` where A > 0, `suppress` where A < 0, 1 elsewhere;   the product for the two directions

    What all completions begin or end with, such as a tag of the format, is then not pushed down by the bad ones. Tokens
    are compared at the same place, counted from the beginning or the end of what the model chose, up to the first that
    differs. The signs are those of the advantage before `entropy_penalty` has changed it. An update needs whole groups.

    Args:
        amplify, suppress: weights in the good and in the bad rows.

    Returns:
        Weights [B, T], 1 where nothing is shared.

    Raises:
        ValueError: a negative weight.

    Source: "GTPO: Trajectory-Based Policy Optimization in Large Language Models", 2025. The authors' code divides a
    row's loss by the number of its conflicts, too, which the paper does not state: `ConflictShare`.
    """

    amplify: float = 2.0
    suppress: float = 0.0

    def __post_init__(self) -> None:
        if self.amplify < 0 or self.suppress < 0:
            raise ValueError(f"amplify and suppress must not be negative, got {self.amplify} and {self.suppress}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        advantage = rows.columns.get("outcome_advantage", rows.advantage)
        assert advantage is not None
        total = (advantage * rows.mask).sum(1)
        counted = rows.main & (rows.weight > 0)
        good, bad = counted & (total > 0), counted & (total < 0)
        weight = torch.ones_like(advantage)
        if not bool(rows.mask.any()):
            return weight
        order = torch.argsort((~rows.mask).long(), dim=1, stable=True)  # counted tokens first, in their order
        steps = torch.arange(order.shape[1], device=rows.device)
        for place in (steps.expand_as(order), (rows.lengths[:, None] - 1 - steps).clamp(min=0)):
            index = order.gather(1, place)
            valid = steps < rows.lengths[:, None]
            shared = shared_run(rows.tokens.gather(1, index), valid, good, bad, rows)
            factor = torch.where(good[:, None], self.amplify, self.suppress).to(weight)
            factor = torch.where(shared, factor, torch.ones_like(weight))
            # places beyond the row point at its first token again, with factor 1
            weight = weight * torch.ones_like(weight).scatter_reduce(1, index, factor, "prod")
        return weight


@part("conflict_share", paper=30)
@dataclass(frozen=True)
class ConflictShare:
    """1 / max(1, n), n the tokens of a row that `ConflictWeight` finds in a good and in a bad completion.

    Returns:
        Weights [B, T], the same on all tokens of a row.

    Source: the authors' code of GTPO, where it stands beside the weights of `ConflictWeight`.
    """

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        shared = (ConflictWeight(0.0, 0.0)(rows, stats) == 0) & rows.mask
        count = shared.sum(1, keepdim=True).clamp(min=1)
        return (1 / count).to(rows.weight).expand(rows.tokens.shape)
