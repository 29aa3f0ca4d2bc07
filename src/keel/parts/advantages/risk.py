"""Advantages from the distribution of rewards: value at risk of bundles of prompts."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns, weighted_mean, weighted_quantile
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import broadcast
from keel.statistics.stats import Stats

Credit = Literal["share", "same", "std"]
ROUNDING = 1e-5  # a sum of centred rewards this small beside its terms is 0: a share of it would be anything


@part("bundle_risk", paper=90)
@dataclass(frozen=True)
class BundleRisk:
    """The policy gradient of a range of quantiles and a lower tail of the summed reward of K prompts.

        X_j = sum over the K prompts of the j-th completion's R          one "paper" of the bundle
        RVaR_j = ([X - q_low]_+ - [X - q_high]_+) / (high - low),   CVaR_j = -[q_low - X]_+ / low
        A_j = (tail CVaR_j + RVaR_j) / (1 + tail) / (std of X in the bundle + epsilon)
        natural:  RVaR_j - (q_high - q_low) / (high - low);   seeking:  RVaR_j + [X - q_high]_+ / (1 - high)

    and the completion i of prompt k gets of its paper's A: its share (R_i - mean_k) / sum_k (R - mean_k), equal shares
    where that sum is 0 (share); all of it (same); or A / (std of its prompt + epsilon) (std). A bundle in which all
    papers are alike gets 0. The quantiles are those of all batches: q <- q + rate (level - P(X < q)), the first time
    the batch's own.

    Which completion is the j-th, and which prompts share a bundle, is decided by the hashes of the rows. Prompts that
    are left over widen the bundles; X is K times the mean, so that they stay comparable. Enumerated rows are bundles of
    one prompt.

    Args:
        bundle_size: K.
        low, high: levels of the quantiles.
        tail: weight of the lower tail; without it, low may be 0.
        rate: step of the quantiles.
        credit: share, same or std.
        scale: divide by the deviation of the bundle.
        epsilon: added to deviations.
        natural: take the range's width off, so that what lies above it gets 0 and not all advantages are positive.
        seeking: reward the upper tail, too; a control whose entropy should collapse.

    Raises:
        ValueError: bundle_size below 1, levels out of order, a tail (of either side) without room, or a rate outside
            [0, 1].

    Source: "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", 2025.
    """

    bundle_size: int = 5
    low: float = 0.2
    high: float = 0.8
    tail: float = 1.5
    rate: float = 0.1
    credit: Credit = "share"
    scale: bool = True
    epsilon: float = 1e-6
    natural: bool = False
    seeking: bool = False

    def __post_init__(self) -> None:
        if self.bundle_size < 1:
            raise ValueError(f"bundle_size must be at least 1, not {self.bundle_size}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"levels must satisfy 0 <= low < high <= 1, not low={self.low}, high={self.high}")
        if self.tail < 0 or (self.tail > 0 and self.low == 0):
            raise ValueError(f"tail must not be negative, and needs low above 0: tail={self.tail}, low={self.low}")
        if self.seeking and self.high == 1:
            raise ValueError("seeking needs high below 1")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be in [0, 1], not {self.rate}")
        if self.credit not in get_args(Credit):
            raise ValueError(f"credit '{self.credit}' is not one of {', '.join(get_args(Credit))}")

    def init(self) -> dict[str, Tensor]:
        """Both quantiles; NaN before the first batch."""
        return {"low": torch.tensor(torch.nan), "high": torch.tensor(torch.nan)}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        value, groups, paper, total = self._papers(rows)
        low, high = self._quantiles(rows, groups, total, state)
        gain = risk(total, low.to(total), high.to(total), self.low, self.high, self.tail)
        width = (high - low).to(total)
        if self.natural:
            gain = gain - width / (self.high - self.low) / (1 + self.tail)
        if self.seeking:
            gain = gain + (total - high.to(total)).clamp(min=0) / (1 - self.high) / (1 + self.tail)
        if self.scale:
            gain = gain / (groups.broadcast(groups.std(total)) + self.epsilon)
        gain = torch.where(groups.broadcast(groups.tied(total)), torch.zeros_like(gain), gain)
        gain = self._credited(gain, value, groups, paper)
        gain = torch.where(groups.weight > 0, gain, torch.zeros_like(gain))
        return broadcast(rows, gain.to(returns(rows).dtype))

    def observe(self, rows: Rows, stats: Stats, metrics: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantiles moved towards their levels."""
        _, groups, _, total = self._papers(rows)
        new = {}
        for name, quantile in zip(("low", "high"), self._quantiles(rows, groups, total, state), strict=True):
            first = bool(state[name].isnan())
            below = weighted_mean((total < quantile.to(total)).to(total), groups.weight.to(total))
            moved = quantile.to(total) + (0.0 if first else self.rate) * (getattr(self, name) - below)
            new[name] = moved.cpu() if bool(moved.isfinite()) else state[name]
        return new

    def _quantiles(
        self, rows: Rows, groups: Groups, total: Float[Tensor, "B"], state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not bool(state["low"].isnan()):
            return state["low"], state["high"]
        weight = groups.weight.to(total)
        return weighted_quantile(total, self.low, weight), weighted_quantile(total, self.high, weight)

    def _papers(self, rows: Rows) -> tuple[Tensor, Groups, "Papers", Float[Tensor, "B"]]:
        """Returns of the rows, their groups, the papers, and X of each row's paper; in fp64, equals being equal."""
        value = returns(rows).double()
        groups = Groups.of(rows, ~value.isnan())
        counted = groups.weight > 0
        paper = papers(rows, counted, 1 if rows.exact else self.bundle_size)
        value = torch.where(counted, value, torch.zeros_like(value))
        total = self.bundle_size * ratio(paper.sum(value), paper.sum(torch.ones_like(value)))
        return value, groups, paper, total

    def _credited(
        self, gain: Float[Tensor, "B"], value: Float[Tensor, "B"], groups: Groups, paper: "Papers"
    ) -> Float[Tensor, "B"]:
        if self.credit == "same":
            return gain
        if self.credit == "std":
            return gain / (groups.broadcast(groups.std(value)) + self.epsilon)
        return credit_shares(gain, value - groups.broadcast(groups.mean(value)), paper)


def risk(
    total: Float[Tensor, "B"], q_low: Tensor, q_high: Tensor, low: float, high: float, tail: float
) -> Float[Tensor, "B"]:
    """(tail CVaR + RVaR) / (1 + tail) at known quantiles."""
    between = ((total - q_low).clamp(min=0) - (total - q_high).clamp(min=0)) / (high - low)
    return (between - tail * ratio((q_low - total).clamp(min=0), low)) / (1 + tail)


def credit_shares(gain: Float[Tensor, "B"], centred: Float[Tensor, "B"], paper: "Papers") -> Float[Tensor, "B"]:
    """Each row's part of its paper's gain, in proportion to its centred reward; the parts add up to the gain."""
    total, count = paper.sum(centred), paper.sum(torch.ones_like(centred))
    equal = ratio(torch.ones_like(count), count)
    return gain * torch.where(total.abs() <= ROUNDING * paper.sum(centred.abs()), equal, ratio(centred, total))


@dataclass(frozen=True, eq=False)
class Papers:
    """Which rows make up a paper, one of each prompt of a bundle.

    Args:
        index: of each row's paper.
        share: 1 over the copies of a row in the batch, 0 for rows that do not count.
    """

    index: Int[Tensor, "B"]
    share: Float[Tensor, "B"]

    def sum(self, values: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Over the prompts of each row's paper."""
        total = values.new_zeros(len(values)).index_add(0, self.index, self.share.to(values) * values)
        return total[self.index]


def papers(rows: Rows, counted: Bool[Tensor, "B"], size: int) -> Papers:
    """Rows of the same place in their prompts, within bundles of at least `size` prompts, if there are as many.

    Rows of one hash are copies of one completion; rows that do not count are alone.
    """
    cells, place = torch.stack([rows.data_index, rows.row], 1).unique(dim=0, return_inverse=True)
    copies = torch.zeros(len(cells), dtype=torch.float64, device=rows.device).index_add(0, place, counted.double())
    used = copies > 0
    prompts, prompt = cells[:, 0].unique(return_inverse=True)
    rank = used.long().cumsum(0) - 1
    first = rank.new_full((len(prompts),), len(cells)).scatter_reduce(0, prompt[used], rank[used], "amin")
    largest = torch.iinfo(torch.long).max
    key = rank.new_full((len(prompts),), largest).scatter_reduce(0, prompt[used], cells[used, 1], "amin")
    number = int((key < largest).sum())
    position = key.argsort().argsort()  # by a hash, so that neighbours in the data are not bundled
    bundle = position * max(1, number // size) // max(1, number)
    alone = -1 - torch.arange(len(cells), device=rows.device)
    index = torch.where(used, bundle[prompt] * len(cells) + rank - first[prompt], alone)
    share = ratio(counted.double(), copies[place])
    return Papers(index.unique(return_inverse=True)[1][place], share)
