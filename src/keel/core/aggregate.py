"""Means, spreads and shares over tokens, rows and groups: the only place where Keel divides by a count.

Two kinds of weight meet here. Over a batch, `weight` is a frequency: a row of weight 2 counts as two rows. Within a
group only the proportions count, because a group of weight 2 stands for two equal groups: n is the effective number of
rows (sum w)^2 / sum w^2, which is the plain count for equal weights.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.rows import Rows, Totals

Mode = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]


def ratio(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0.

    >>> float(ratio(torch.tensor(3.0), 0.0))
    0.0
    """
    denominator = torch.as_tensor(denominator, dtype=numerator.dtype, device=numerator.device)
    empty = denominator == 0
    return torch.where(empty, torch.zeros_like(numerator), numerator / torch.where(empty, 1.0, denominator))


def token_weight(rows: Rows) -> Float[Tensor, "B T"]:
    """Weight of each token in a batch mean: row weight times leaves below it, 0 where the loss does not count it."""
    return rows.loss_mask * rows.weight[:, None] * rows.mult


def totals(rows: Rows) -> Totals:
    """The denominators of a whole optimiser step; on a slice that carries them, those of the step."""
    if rows.totals is not None:
        return rows.totals
    weight = rows.weight * rows.main
    return Totals(
        tokens=float(token_weight(rows).sum()),
        sequences=float((weight * rows.loss_mask.any(1)).sum()),
        rows=float(weight.sum()),
        pairs=0.0 if rows.pairs is None else float(rows.pairs.measure.sum()),
    )


@dataclass(frozen=True)
class Aggregation:
    """How a loss per token becomes one number.

    With w the row weights, m the mask and L_i = sum_t m_it:

        token_mean                  sum(w m l) / sum(w m)
        sequence_mean_token_mean    sum_i w_i (sum_t m l)_i / L_i  /  sum_i w_i [L_i > 0]
        sequence_mean_token_sum     sum_i w_i (sum_t m l)_i  /  sum_i w_i
        constant                    sum(w m l) / (sum_i w_i * max_length)

    The denominators are those of the whole optimiser step, also when the rows are a slice of it. One of 0 gives 0.

    Args:
        mode: one of the four.
        max_length: the fixed length of `constant`, in tokens.

    Raises:
        ValueError: an unknown mode, or `constant` without a positive `max_length`.

    Source: the four conventions of GRPO, DAPO, RLOO and Dr. GRPO.
    """

    mode: Mode = "token_mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"aggregation mode '{self.mode}' is not one of {', '.join(get_args(Mode))}")
        if self.mode == "constant" and not (self.max_length and self.max_length > 0):
            raise ValueError("aggregation 'constant' needs max_length, the fixed number of tokens to divide by")

    def __call__(
        self,
        values: Float[Tensor, "B T"],
        rows: Rows,
        where: Bool[Tensor, "B T"] | None = None,
        per: Literal["batch", "where"] = "batch",
    ) -> Float[Tensor, ""]:
        """The aggregate of `values` over the counted tokens, within `where` if given.

        Args:
            values: per-token numbers; those off the mask are ignored, NaN included.
            where: tokens to which the numerator is confined.
            per: whose tokens the denominator counts, those of the batch or those of `where`.
        """
        counted = rows.loss_mask if where is None else rows.loss_mask & where
        own = where is not None and per == "where"
        weight = rows.weight * rows.main
        tokens = counted * weight[:, None] * rows.mult
        values = torch.where(counted, values, torch.zeros_like(values))
        of = _totals_within(rows, counted) if own else totals(rows)
        if self.mode == "sequence_mean_token_mean":
            base = (counted if own else rows.loss_mask) * rows.mult
            per_row = ratio((values * rows.mult).sum(1), base.sum(1).to(values.dtype))
            return ratio((weight * per_row).sum(), of.sequences)
        total = (values * tokens).sum()
        if self.mode == "token_mean":
            return ratio(total, of.tokens)
        if self.mode == "sequence_mean_token_sum":
            return ratio(total, of.rows)
        return ratio(total, of.rows * float(self.max_length or 0))


def _totals_within(rows: Rows, counted: Bool[Tensor, "B T"]) -> Totals:
    weight = rows.weight * rows.main
    has = counted.any(1)
    return Totals(
        tokens=float((counted * weight[:, None] * rows.mult).sum()),
        sequences=float((weight * has).sum()),
        rows=float((weight * has).sum()),
    )


def masked_mean(values: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, ""]:
    """Mean over the counted tokens of a batch, weighted by row weight."""
    return Aggregation("token_mean")(values, rows)


def weighted_mean(values: Float[Tensor, "*n"], weight: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """sum(w x) / sum(w); entries of weight 0 are ignored, NaN included."""
    values = torch.where(weight > 0, values, torch.zeros_like(values))
    return ratio((weight * values).sum(), weight.sum())


def weighted_std(values: Float[Tensor, "*n"], weight: Float[Tensor, "*n"], exact: bool = False) -> Float[Tensor, ""]:
    """Standard deviation with frequency weights, dividing by sum(w) - 1, or by sum(w) where `exact`.

    >>> float(weighted_std(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])))
    1.4142135381698608
    """
    mean = weighted_mean(values, weight)
    centred = torch.where(weight > 0, values - mean, torch.zeros_like(values))
    count = weight.sum() if exact else (weight.sum() - 1).clamp(min=0)
    return ratio((weight * centred.square()).sum(), count).sqrt()


def weighted_quantile(values: Float[Tensor, "*n"], q: float, weight: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """The smallest value below or at which a share of at least `q` of the weight lies; NaN without any weight.

    Raises:
        ValueError: q outside [0, 1].
    """
    if not 0 <= q <= 1:
        raise ValueError(f"quantile must be in [0, 1], not {q}")
    kept = weight > 0
    if not bool(kept.any()):
        return torch.full((), float("nan"), dtype=values.dtype, device=values.device)
    ordered, order = values[kept].sort()
    share = weight[kept][order].double().cumsum(0)
    place = torch.searchsorted(share, share[-1] * (q - 1e-12))
    return ordered[place.clamp(max=len(ordered) - 1)]


def top_share(values: Float[Tensor, "B T"], share: float, weight: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The largest values that together hold `share` of the weight, at least one of them; ties at the edge are kept.

    Raises:
        ValueError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    kept = weight > 0
    if share == 0 or not bool(kept.any()):
        return torch.zeros_like(kept)
    ordered, order = values[kept].sort(descending=True)
    before = weight[kept][order].double().cumsum(0) - weight[kept][order]
    edge = ordered[int((before + 1e-9 < share * weight[kept].double().sum()).sum().clamp(min=1)) - 1]
    return kept & (values >= edge)


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows seen as groups, reduced by id and never by position; only `valid` rows count.

    Args:
        index: place of each row's group among the sorted group ids, shape [B].
        count: number of groups.
        weight: in-group weight of a row, 0 for rows that do not count, shape [B].
        exact: enumerated rows, for which nothing is corrected for sample size.
    """

    index: Int[Tensor, "B"]
    count: int
    weight: Float[Tensor, "B"]
    exact: bool

    @staticmethod
    def of(rows: Rows, valid: Bool[Tensor, "B"] | None = None) -> "Groups":
        """The groups of a batch; rows of other streams never count."""
        ids, index = rows.group.unique(return_inverse=True)
        counted = rows.main if valid is None else rows.main & valid
        return Groups(index, len(ids), rows.weight * counted, rows.exact)

    def sum(self, values: Float[Tensor, "B"]) -> Float[Tensor, "N"]:
        """Plain sum over the rows of each group."""
        return values.new_zeros(self.count).index_add(0, self.index, values)

    def size(self) -> Float[Tensor, "N"]:
        """Effective number of rows of each group, (sum w)^2 / sum w^2."""
        return ratio(self.sum(self.weight).square(), self.sum(self.weight.square()))

    def mean(self, values: Float[Tensor, "B"]) -> Float[Tensor, "N"]:
        """Mean of each group, 0 for one without valid rows."""
        return ratio(self.sum(self.weight * self._counted(values)), self.sum(self.weight))

    def std(self, values: Float[Tensor, "B"]) -> Float[Tensor, "N"]:
        """Unbiased standard deviation of each group (n - 1), population where exact; 0 for a single row."""
        centred = self._counted(values) - self.mean(values)[self.index]
        variance = ratio(self.sum(self.weight * centred.square()), self.sum(self.weight))
        if not self.exact:
            size = self.size()
            variance = variance * ratio(size, (size - 1).clamp(min=0))
        return variance.clamp(min=0).sqrt()

    def range(self, values: Float[Tensor, "B"]) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """Smallest and largest value of each group; (inf, -inf) for one without valid rows."""
        edges = []
        for infinity, how in ((float("inf"), "amin"), (float("-inf"), "amax")):
            counted = torch.where(self.weight > 0, values, infinity)
            edges.append(values.new_full((self.count,), infinity).scatter_reduce(0, self.index, counted, how))
        return edges[0], edges[1]

    def tied(self, values: Float[Tensor, "B"]) -> Bool[Tensor, "N"]:
        """Groups whose valid rows all have the same value."""
        low, high = self.range(values)
        return low >= high

    def broadcast(self, per_group: Tensor) -> Tensor:
        """[N] -> [B]."""
        return per_group[self.index]

    def _counted(self, values: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return torch.where(self.weight > 0, values, torch.zeros_like(values))


def returns(rows: Rows) -> Float[Tensor, "B"]:
    """What a completion earned: its scalar reward plus the sum over its mask of the token rewards; NaN if unscored.

    Raises:
        ValueError: several reward columns are left (a WeightedSum makes them one), or there is no reward at all.
    """
    if rows.reward is None:
        raise ValueError("these rows have no reward")
    if rows.reward.shape[1] != 1:
        raise ValueError(f"returns need one reward column, not {rows.reward.shape[1]}: add a WeightedSum transform")
    total = rows.reward[:, 0]
    if rows.token_reward is not None:
        total = total + torch.where(rows.mask, rows.token_reward, torch.zeros_like(rows.token_reward)).sum(1)
    return total


def scalar_reward(rows: Rows) -> Float[Tensor, "B"]:
    """The one reward of each row; NaN where there is none.

    Raises:
        ValueError: no reward, or several columns.
    """
    if rows.reward is None or rows.reward.shape[1] != 1:
        found = "none" if rows.reward is None else str(rows.reward.shape[1])
        raise ValueError(f"this part reads one reward column, and there are {found}: put a WeightedSum before it")
    return rows.reward[:, 0]
