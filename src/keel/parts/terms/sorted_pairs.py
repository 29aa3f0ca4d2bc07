"""Pairs compared by rank: the distribution of chosen scores has to dominate that of rejected ones, not pair by pair."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss, Side, check_beta, pairs_of, sides
from keel.parts.terms.scores import LogRatio
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Compared = Literal["margins", "completions"]


@part("sorted_pairs")
@dataclass(frozen=True)
class SortedPairs:
    """Alignment by optimal transport: the k-th smallest of one side against the k-th smallest of the other.

        L = sum_k m_k [ (1 - eps) softplus(-beta z_k) + eps softplus(beta z_k) ] / sum_k m_k

        margins        z = sort(c - r) - sort(c0 - r0):   the policy's margins against the reference's (AOT)
        completions    z = sort(c - c0) - sort(r - r0):   chosen against rejected ones, which need no pairs (unpaired)

    with c and r the log-probabilities of chosen and rejected completions, c0 and r0 the reference's. Weighted pairs
    are matched as the quantiles of their weights are, so that a pair of weight 2 is the pair twice. A single pair is
    that of cDPO.

    Args:
        compared: margins or completions.
        beta: factor of the differences.
        label_smoothing: eps.
        against: name of the reference model.
        coef: of the whole; 0 drops the term.

    Returns:
        A number; 0 without any pair.

    Raises:
        ValueError: beta of 0, a label smoothing outside [0, 0.5), or what is compared is unknown.
        MethodError: pairs with a label or a coefficient of their own, which sorting would tear from them.

    Source: "Distributional Preference Alignment of LLMs via Optimal Transport", 2024, as in TRL.
    """

    compared: Compared = "margins"
    beta: float = 0.1
    label_smoothing: float = 0.0
    against: str = "ref"
    coef: float = 1.0
    additive = False
    reads = "pairs"

    def __post_init__(self) -> None:
        if self.compared not in get_args(Compared):
            raise ValueError(f"compared '{self.compared}' is not one of {', '.join(get_args(Compared))}")
        check_beta(self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), not {self.label_smoothing}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Policy and reference."""
        return (LogProb(), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        pairs = pairs_of(rows)
        if bool((pairs.label != 1).any()) or bool((pairs.coef != 1).any()):
            raise MethodError(
                "some pairs have a probability or a coefficient of their own, and sorted scores belong to no pair",
                "sorted_pairs",
                "Leave them out of the data, or take dpo.",
            )
        first, second = self._sides(*sides(rows, stats, pairs))
        measure = pairs.measure.to(first)
        left, right, share = matched(first.detach(), second.detach(), measure)
        z = self.beta * (first[left] - second[right])
        eps = self.label_smoothing
        loss = softplus(-z) if eps == 0 else (1 - eps) * softplus(-z) + eps * softplus(z)
        return self.coef * ratio((share * loss).sum(), measure.sum())

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """What TRL logs of pairs, of the pairs as the data have them."""
        return PairLoss(LogSigmoid(), LogRatio((self.against,)), self.beta).metrics(rows, stats)

    def _sides(self, chosen: Side, rejected: Side) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        if self.compared == "completions":
            score = LogRatio((self.against,))
            return score(chosen), score(rejected)
        own, ref = LogRatio(()), self._reference
        return own(chosen) - own(rejected), ref(chosen) - ref(rejected)

    def _reference(self, side: Side) -> Float[Tensor, "N"]:
        found = side.tokens(LogProb(of=(self.against,)))
        return found.to(torch.promote_types(found.dtype, torch.float32)).sum(1)


def matched(
    first: Float[Tensor, "N"], second: Float[Tensor, "N"], measure: Float[Tensor, "N"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"], Float[Tensor, "M"]]:
    """Which entries of two lists stand at the same quantile, and for how much of the measure.

    >>> left, right, share = matched(torch.tensor([3.0, 1.0]), torch.tensor([5.0, 6.0]), torch.ones(2))
    >>> left.tolist(), right.tolist(), share.tolist()
    ([1, 0], [0, 1], [1.0, 1.0])
    """
    orders = [values.argsort(stable=True) for values in (first, second)]
    ends = [measure[order].double().cumsum(0) for order in orders]
    cuts = torch.cat(ends).sort().values
    begins = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    kept = cuts > begins
    middle = ((begins + cuts) / 2)[kept]
    places = [torch.searchsorted(end, middle).clamp(max=max(0, len(end) - 1)) for end in ends]
    return orders[0][places[0]], orders[1][places[1]], (cuts - begins)[kept].to(measure)
