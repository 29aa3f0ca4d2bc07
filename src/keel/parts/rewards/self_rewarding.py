"""A policy that judges its own completions: its scores, how far two versions of it agree, and the pairs they make."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.anchored import sequence_log_prob
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Agreement = Literal["prompt", "mean", "none"]
SAME = 1e-4  # nats of a whole completion, below which two models are one
Place = tuple[Literal["current", "anchor", "future"], int]


@part("self_score", paper=127)
@dataclass(frozen=True)
class SelfScore:
    """The reward of a completion is the policy's own: S(y) = log scorer(y) - log initial(y).

    In a group where the scorer still is the initial model it is the mean log-probability of a token, which does not
    favour short answers as the sum would.

    Args:
        initial: name of the model before training.
        scorer: who scores: old, the policy as it is, or the name of a model that it was.

    Source: "CREAM: Consistency Regularized Self-Rewarding Language Models", 2025.
    """

    initial: str = "ref"
    scorer: str = "old"

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both models."""
        return (LogProb(of=(self.scorer,)), LogProb(of=(self.initial,)))

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        return rows.with_(reward=own_score(rows, stats, self.scorer, self.initial)[:, None])


def own_score(rows: Rows, stats: Stats, model: str, initial: str) -> Float[Tensor, "B"]:
    """log model(y) - log initial(y); log model per token in groups where the two are one."""
    whole = sequence_log_prob(rows, stats, model)
    score = whole - sequence_log_prob(rows, stats, initial)
    groups = Groups.of(rows)
    moved = score.new_zeros(groups.count).scatter_reduce(0, groups.index, score.abs(), "amax")
    return torch.where(groups.broadcast(moved) > SAME, score, ratio(whole, rows.lengths.to(whole)))


@part("rank_agreement", paper=127)
@dataclass(frozen=True)
class RankAgreement:
    """The label of a pair is how far two versions of the policy agree on the order of its group, C = (tau + 1) / 2.

    tau is Kendall's, between the scores of old and those of an earlier version; of equals the one with the lower row id
    comes first. With C the pair's loss is C l(m) + (1 - C) l(-m), which for DPO has its minimum at
    beta m = log(C / (1 - C)) and nothing to learn at C = 1/2. It stands behind what makes the pairs.

    Args:
        previous: name of the earlier version.
        initial: name of the model before training.
        agreement: C of each prompt, the mean over the prompts of the batch, or none, which leaves the labels.

    Raises:
        ValueError: an unknown kind of agreement.
        MethodError: there are no pairs.

    Source: "CREAM: Consistency Regularized Self-Rewarding Language Models", 2025; there the mean is of the data set.
    """

    previous: str = "past"
    initial: str = "ref"
    agreement: Agreement = "mean"

    def __post_init__(self) -> None:
        if self.agreement not in get_args(Agreement):
            raise ValueError(f"agreement '{self.agreement}' is not one of {', '.join(get_args(Agreement))}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The three models."""
        return tuple(LogProb(of=(name,)) for name in dict.fromkeys(("old", self.previous, self.initial)))

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` tells C."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        pairs = rows.pairs
        if pairs is None:
            raise MethodError("it labels pairs, and there are none yet", "transforms", "Put it behind PairUp.")
        now = own_score(rows, stats, "old", self.initial)
        before = own_score(rows, stats, self.previous, self.initial)
        agreed = consistency(rows, now, before)
        rows = rows.with_(columns={**rows.columns, "consistency": agreed})
        if self.agreement == "none":
            return rows
        label = agreed[pairs.chosen]
        if self.agreement == "mean":
            weight = pairs.measure
            label = torch.ones_like(label) * ratio((weight * label).sum(), weight.sum())
        return rows.with_(pairs=replace(pairs, label=label.to(pairs.label)))

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """The mean C of the batch."""
        main = rows.main.to(rows.columns["consistency"])
        metrics["pairs/consistency"] = float(ratio((rows.columns["consistency"] * main).sum(), main.sum()))
        return state


def consistency(rows: Rows, now: Float[Tensor, "B"], before: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """C = (tau + 1) / 2 of each row's group: the share of its pairs that both scores order alike; 1 without any."""
    together = (rows.group[:, None] == rows.group[None]) & rows.main[:, None] & rows.main[None]
    together &= ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    same = (_above(now, rows.row) == _above(before, rows.row)) & together
    groups = Groups.of(rows)
    alike, every = (groups.sum(pairs.sum(1).to(now)) for pairs in (same, together))
    return groups.broadcast(torch.where(every > 0, ratio(alike, every), torch.ones_like(every)))


def kendall_tau(first: Float[Tensor, "n"], second: Float[Tensor, "n"]) -> float:
    """Kendall's tau of two rankings without ties: of equals the earlier one comes first.

    >>> scores = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 1, 3, 5, 4])
    >>> round(kendall_tau(*scores), 6)
    0.6

    Raises:
        ValueError: fewer than two entries.
    """
    count = len(first)
    if count < 2:
        raise ValueError("a ranking has at least two entries")
    order = torch.arange(count)
    same = (_above(first, order) == _above(second, order)) & ~torch.eye(count, dtype=torch.bool)
    return 2 * float(same.sum()) / (count * (count - 1)) - 1


def temporal_pair(
    current: Sequence[float], anchor: Sequence[float] = (), future: Sequence[float] = ()
) -> tuple[Place, Place] | None:
    """Chosen and rejected completion of a prompt, or None where the one is not above the other.

        chosen     argmax future   if max future > max current,    else argmax current
        rejected   argmin anchor   if min anchor < min current,    else argmin current

    Without a look-ahead this is the first phase; without an anchor, either, plain self-rewarding. Of equals the earlier
    one is taken. One judge has to score all: the current model.

    >>> temporal_pair((6, 8, 5), (4, 7, 3), (9, 2, 7))
    (('future', 0), ('anchor', 2))

    Args:
        current: scores of the current model's completions.
        anchor: of the initial model's.
        future: of those of a model that was trained one round ahead.

    Raises:
        ValueError: no scores of the current model.

    Source: "Temporal Self-Rewarding Language Models: Decoupling Chosen-Rejected via Past-Future", 2025.
    """
    if not current:
        raise ValueError("the current model's completions have no scores")
    best: tuple[float, Place] = (max(current), ("current", list(current).index(max(current))))
    worst: tuple[float, Place] = (min(current), ("current", list(current).index(min(current))))
    if future and max(future) > best[0]:
        best = (max(future), ("future", list(future).index(max(future))))
    if anchor and min(anchor) < worst[0]:
        worst = (min(anchor), ("anchor", list(anchor).index(min(anchor))))
    return (best[1], worst[1]) if best[0] > worst[0] else None


def _above(score: Float[Tensor, "n"], identity: Int[Tensor, "n"]) -> Tensor:
    """Whether the row stands above the column, [n, n]; of equals the one with the lower identity does."""
    tied = score[:, None] == score[None]
    return (score[:, None] > score[None]) | (tied & (identity[:, None] < identity[None]))
