"""Good completions from beside the batch, in the places of rows of the batch."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.parts.advantages.group import GroupCentre, GroupStd, advantage
from keel.statistics.stats import Stats

REPLACED = "rows/replaced"
MAIN, CANDIDATE = int(Stream.MAIN), int(Stream.CANDIDATE)


@part("replace_with_candidates", paper=50)
@dataclass(frozen=True)
class ReplaceWithCandidates:
    """S good completions from the stream CANDIDATE take the places of S rows of the batch, with A = 1 on all tokens.

        good:   A = (R - mean) / (std + epsilon) > threshold, in their own groups
        S = min(largest, number of good ones);   half of it, rounded down, where they were drawn colder than the batch

    With advantage 1 they are REINFORCE on completions that are right: their expected gradient is
    E_{y ~ pi^T}[r(y) grad log pi(y)], a pull to the tempered distribution, which moves the entropy towards its own. Of
    both sorts the first S in the order of their row ids are taken, which has nothing to do with their place in the
    batch. A row that leaves is in no denominator. It belongs behind what sets the advantage of the batch; with
    importance weights between sampler and trainer there is nothing left of the other temperature.

    Args:
        largest: S at most; 0 leaves the batch as it is.
        threshold: A above which a completion is good.
        epsilon: added to the deviation.

    Raises:
        ValueError: a negative setting, or candidates whose temperature is not in the rows' columns.

    Source: "Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", 2025. The
    release takes the first ones of the batch, which are those of the prompts with candidates.
    """

    largest: int = 60
    threshold: float = 0.05
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("largest", "threshold", "epsilon"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` counts."""
        return {}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the number of rows that were replaced in the metrics."""
        metrics[REPLACED] = float(rows.columns["replacing"].sum()) if "replacing" in rows.columns else 0.0
        return state

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        candidate = rows.stream == CANDIDATE
        if not bool(candidate.any()) or not self.largest:
            return rows
        good = candidate & (self._credit(rows, stats) > self.threshold)
        count = float((rows.weight * good).sum().clamp(max=self.largest))
        if self._colder(rows):
            count = count // 2
        entering, leaving = (first(rows, which, count) for which in (good, rows.main))
        weight = torch.where(candidate, entering, rows.weight - leaving)
        known = candidate | rows.main  # rows of other streams stay where they are
        here = known & (weight > 0)
        before = advantage(rows)
        return rows.with_(
            weight=torch.where(here, weight, rows.weight),
            stream=torch.where(known, torch.where(here, MAIN, CANDIDATE), rows.stream),
            advantage=torch.where((entering > 0)[:, None], rows.mask.to(before), before),
            columns={**rows.columns, "replacing": entering},
        )

    def _credit(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """A of the candidates among themselves; rows of the batch do not count."""
        stream = torch.where(rows.stream == CANDIDATE, MAIN, CANDIDATE)
        alone = GroupStd(self.epsilon)(GroupCentre()(rows.with_(stream=stream), stats), stats)
        return advantage(alone).amax(1)

    def _colder(self, rows: Rows) -> bool:
        if "temperature" not in rows.columns:
            raise ValueError("replace_with_candidates needs rows.columns['temperature'], which rollout.extra records")
        heat = rows.columns["temperature"]
        return bool(heat[rows.stream == CANDIDATE].max() < heat[rows.main].max()) if bool(rows.main.any()) else False


def first(rows: Rows, which: Tensor, count: float) -> Float[Tensor, "B"]:
    """How much of the weight of each row is among the first `count` of those, in the order of row ids."""
    order = rows.row.argsort(stable=True)
    weight = (rows.weight * which)[order]
    before = weight.cumsum(0) - weight
    taken = torch.minimum((count - before).clamp(min=0), weight)
    return torch.zeros_like(taken).index_copy(0, order, taken)
