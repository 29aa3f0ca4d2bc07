"""Tokens and rows that leave the loss and its denominators, after all statistics of the group were taken."""

from dataclasses import dataclass

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.weights.mismatch import OLD, Level, at_level, check_band, mismatch, within
from keel.statistics.stats import Stats


@part("reject_mismatch")
@dataclass(frozen=True)
class RejectMismatch:
    """Leaves out tokens, or rows, whose ratio w = pi_old / pi_behaviour is outside [low, high], and weighs no other.

    They stay in the group's statistics, for their rewards are what they are.

    Args:
        low, high: what is kept.
        level: whose ratio is judged: of the token, of the row (the product), or the row's geometric mean.

    Raises:
        ValueError: not 0 <= low < high, another level, or rows without the sampler's log-probabilities.

    Source: rollout correction of verl, where the statistic of its `k1` thresholds is -log w: "0.5_5" there is w in
    [1/5, 2].
    """

    low: float = 0.5
    high: float = 2.0
    level: Level = "token"
    needs = (OLD,)

    def __post_init__(self) -> None:
        check_band(self.low, self.high, self.level)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        judged = at_level(mismatch(rows, stats, "reject_mismatch"), rows, self.level)
        return rows.with_(owner=rows.owner & within(judged, self.low, self.high))
