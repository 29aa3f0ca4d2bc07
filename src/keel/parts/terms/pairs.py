"""Losses of pairs: a link of two scores, and what reads only one side of them.

    loss = sum_i m_i c_i u_i link(beta S_w, beta S_l, offset)_i / sum_i m_i

`keel.parts.terms.scores` has the scores, `keel.parts.terms.links` the links.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Pairs, Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Noise = Literal["conservative", "robust"]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of N pairs, or N rows that have no partner.

    Args:
        rows, stats: the whole batch.
        index: the rows of this side, [N].
        partner: those of the other side, [N]; None where there is none.
    """

    rows: Rows
    stats: Stats
    index: Int[Tensor, "N"]
    partner: Int[Tensor, "N"] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mask(self) -> Bool[Tensor, "N T"]:
        """Tokens of the completions."""
        return self.rows.mask[self.index]

    @property
    def lengths(self) -> Int[Tensor, "N"]:
        """Tokens of each completion."""
        return self.rows.lengths[self.index]

    @property
    def other_lengths(self) -> Int[Tensor, "N"]:
        """Tokens of each partner.

        Raises:
            MethodError: these rows have none.
        """
        if self.partner is None:
            raise MethodError("this reads the other completion of a pair, and these rows have none")
        return self.rows.lengths[self.partner]

    def tokens(self, functional: Functional) -> Float[Tensor, "N T"]:
        """Numbers of a functional, 0 off the completion."""
        found = self.stats[functional][self.index]
        return torch.where(self.mask, found, torch.zeros_like(found))


@runtime_checkable
class Score(Protocol):
    """What a completion earns, [N]; `difference_only` where a constant of its prompt is undetermined."""

    @property
    def difference_only(self) -> bool:
        """Whether a constant of the prompt is undetermined."""
        ...

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        """The score of each completion, before beta."""
        ...


def check_beta(beta: float) -> None:
    """That a loss learns what the data prefer.

    Raises:
        ValueError: it is 0 or less, infinite or NaN.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}: 0 knows no policy, less learns the opposite")


@runtime_checkable
class Link(Protocol):
    """A loss of two scores, [N]; `both` where it changes if the same number is added to both of them."""

    @property
    def both(self) -> bool:
        """Whether a common shift of both scores changes the loss."""
        ...

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        """To be decreased, where `chosen` is preferred by at least `offset`."""
        ...


@runtime_checkable
class PairWeight(Protocol):
    """A factor of each pair, [N], which the loss holds constant."""

    def __call__(self, chosen: Side, rejected: Side) -> Float[Tensor, "N"]:
        """The factors."""
        ...


def sides(rows: Rows, stats: Stats, pairs: Pairs) -> tuple[Side, Side]:
    """The chosen and the rejected side of a batch's pairs."""
    return (
        Side(rows, stats, pairs.chosen, pairs.rejected),
        Side(rows, stats, pairs.rejected, pairs.chosen),
    )


@part("pair_loss")
@dataclass(frozen=True)
class PairLoss:
    """coef * sum_i m_i c_i u_i L_i / sum_i m_i over the pairs of a batch.

        L     = p l(w, l, o) + (1 - p) l(l, w, -o)                                  conservative
        L     = (p l(w, l, o) - (1 - p) l(l, w, -o)) / (2 p - 1)                   robust: unbiased under flipped labels
        l     = link(beta S_w, beta S_l, o),    o = offset + margin * gap
        p     = q (1 - eps) + (1 - q) eps,      q the pair's label, eps = label_smoothing

    m_i is the measure of a pair (it counts in the denominator), c_i its coefficient and u_i = sg(weight).

    Args:
        link: of both scores.
        score: S, of both sides, or of the chosen one where `rejected` is given.
        beta: factor of the scores.
        rejected: S of the rejected side, where it differs.
        offset: by which the chosen score has to lead, in units of the link.
        margin: factor of the gap; 0 leaves it out.
        gap: a number of each pair, held constant; None takes the offset that the data state for it.
        label_smoothing: eps, the share of pairs whose order is taken to be wrong.
        noise: how labels that are not certain enter.
        weight: u, a factor of each pair.
        coef: of the whole; 0 drops the term.

    Returns:
        A number; 0 without any pair.

    Raises:
        MethodError: a link that is not invariant to a common shift of both scores, with scores that are known only up
            to a constant of the prompt, or with such scores that are scaled apart.
        ValueError: a label smoothing outside [0, 0.5), beta of 0, or an unknown kind of noise.

    Source: the common form of DPO and its relatives.
    """

    link: Link
    score: Score
    beta: float = 0.1
    rejected: Score | None = None
    offset: float = 0.0
    margin: float = 0.0
    gap: PairWeight | None = None
    label_smoothing: float = 0.0
    noise: Noise = "conservative"
    weight: PairWeight | None = None
    coef: float = 1.0
    reads = "pairs"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), not {self.label_smoothing}")
        check_beta(self.beta)
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise '{self.noise}' is not one of {', '.join(get_args(Noise))}")
        for score in self._scores:
            if self.link.both and score.difference_only:
                raise MethodError(
                    "this link reads each score by itself, and these are known only up to a constant of the prompt",
                    type(self.link).__name__,
                    "Take a link of their difference, such as log_sigmoid, or the score of the reverse KL.",
                )
        if len({getattr(score, "scale", 1.0) for score in self._scores if score.difference_only}) > 1:
            what = "the constant of the prompt that these scores leave open cancels only where their scales are equal"
            raise MethodError(what, "rejected.scale", "Take the score of the reverse KL.")

    @property
    def additive(self) -> bool:
        """Whether slices that keep pairs whole add up: all parts read one pair at a time, unless one says otherwise."""
        parts = [self.link, *self._scores, self.weight, self.gap]
        return all(getattr(item, "additive", True) for item in parts)

    @property
    def _scores(self) -> tuple[Score, ...]:
        return (self.score,) if self.rejected is None else (self.score, self.rejected)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the scores, of the weight and of the gap."""
        return part_needs(*self._scores, self.weight, self.gap)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the scores and of the weight."""
        return part_heads(*self._scores, self.weight)

    def scores(self, rows: Rows, stats: Stats) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """beta S of both sides."""
        chosen, rejected = sides(rows, stats, pairs_of(rows))
        return self.beta * self.score(chosen), self.beta * (self.rejected or self.score)(rejected)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        pairs = pairs_of(rows)
        first, second = self.scores(rows, stats)
        gap = pairs.offset if self.gap is None or not self.margin else self.gap(*sides(rows, stats, pairs)).detach()
        offset = self.offset + self.margin * gap.to(first)
        label = pairs.label.to(first)
        right = label * (1 - self.label_smoothing) + (1 - label) * self.label_smoothing
        loss = self.link(first, second, offset)
        if bool((right < 1).any()):
            turned = self.link(second, first, -offset)
            if self.noise == "conservative":
                loss = right * loss + (1 - right) * turned
            else:
                loss = (right * loss - (1 - right) * turned) / (2 * right - 1)
        factor = pairs.coef.to(first)
        if self.weight is not None:
            factor = factor * self.weight(*sides(rows, stats, pairs)).detach()
        measure = pairs.measure.to(first)
        whole = measure.sum() if rows.totals is None else rows.totals.pairs
        return self.coef * ratio((measure * factor * loss).sum(), whole)

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """What TRL logs of pairs: rewards/chosen, rejected, accuracies and margins; logps/chosen and rejected, sums."""
        pairs = pairs_of(rows)
        chosen, rejected = self.scores(rows, stats)
        measure = pairs.measure.to(chosen)

        def mean(values: Tensor) -> Tensor:
            return ratio((measure * values).sum(), measure.sum())

        right = (chosen > rejected).to(chosen) + 0.5 * (chosen == rejected).to(chosen)
        said = {}
        if LogProb() in stats:
            for name, side in zip(("chosen", "rejected"), sides(rows, stats, pairs), strict=True):
                said[f"logps/{name}"] = mean(side.tokens(LogProb()).to(chosen).sum(1))
        return said | {
            "rewards/chosen": mean(chosen),
            "rewards/rejected": mean(rejected),
            "rewards/accuracies": mean(right),
            "rewards/margins": mean(chosen - rejected),
        }


def pairs_of(rows: Rows) -> Pairs:
    """The pairs of a batch.

    Raises:
        MethodError: it has none.
    """
    if rows.pairs is None:
        raise MethodError(
            "this loss compares pairs, and the batch has none", None, "Give `prompt`, `chosen`, `rejected`."
        )
    return rows.pairs


def part_needs(*items: Any) -> tuple[Functional, ...]:
    """The functionals that several parts read, each once."""
    return tuple(dict.fromkeys(f for item in items for f in getattr(item, "needs", ()) or ()))


def part_heads(*items: Any) -> tuple[str, ...]:
    """The heads that several parts read, each once."""
    return tuple(dict.fromkeys(head for item in items for head in getattr(item, "heads_read", ())))


class ReadsScore:
    """A part that reads what its score reads."""

    score: Score

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the score."""
        return part_needs(self.score)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the score."""
        return part_heads(self.score)
