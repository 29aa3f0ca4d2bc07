"""Pairs and win rates among the completions of a prompt, by their rewards or by a judge that compares two at a time.

    P(i beats j) = sigmoid((r_i - r_j) / temperature),   1 or 1/2 or 0 at temperature 0,   or what the judge said

A judge is asked in the loop, once for each pair and order; its answers stand in `features["judge"]` [B, G], the column
being the other completion's `columns["judge/place"]` within the group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, scalar_reward
from keel.core.choice import uniforms
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Pairs, Rows, Stream
from keel.parts.rewards.anchored import sequence_log_prob
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

How = Literal["all", "best_worst", "random"]
Labels = Literal["best", "sampled", "expected"]
JUDGE, PLACE = "judge", "judge/place"  # a feature and a column
WIN_RATE = "win_rate"  # column: P(a completion beats one of the opponent's)
SHARES = "win_rate/ess"  # column: effective share of the others, where they stand for another model
_SHUFFLE = 4_000_037  # counter of the order in which rows are paired, beyond every position of a token
Number = Callable[[Int[Tensor, "N"], Int[Tensor, "N"]], Float[Tensor, "N"]]


@part("pair_up")
@dataclass(frozen=True)
class PairUp:
    """Pairs of completions of a prompt by their rewards, for the losses of pairs.

        all          every two of a group
        best_worst   the best and the worst of a group; of equals the one with the lower (higher) row id
        random       as many disjoint pairs as there are, in an order that the row ids decide

        best         the higher reward is preferred; ties are dropped
        sampled      the label is drawn: P(i beats j) = sigmoid((r_i - r_j) / temperature)
        expected     both labels, with these probabilities

    Every pair has its gap r_w - r_l as its offset. Rows without a reward are in no pair. On enumerated rows, labels
    enter with their probabilities, and random pairs are all pairs, a completion with itself included. A pair counts as
    the product of its rows' weights over the mean weight of the group.

    Args:
        how: which pairs.
        labels: which of a pair is preferred.
        temperature: of the labels; 0 leaves nothing but ties to chance.
        min_gap: of the rewards of a pair, below which it is dropped.

    Raises:
        ValueError: an unknown choice, a negative number, or several reward columns (put a WeightedSum before it).

    Source: the common form of online preference optimisation; drawn labels as INPO and online IPO ask for.
    """

    how: How = "all"
    labels: Labels = "best"
    temperature: float = 1.0
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` counts."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        reward = scalar_reward(rows)
        valid = rows.main & ~reward.isnan()

        def gap(i: Tensor, j: Tensor) -> Tensor:
            return reward[i] - reward[j]

        def probability(i: Tensor, j: Tensor) -> Tensor:
            return bradley_terry(gap(i, j), self.temperature)

        return rows.with_(pairs=pairs_among(rows, valid, reward, gap, probability, self))

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Counts: pairs, the share of groups with any, the mean gap."""
        metrics |= count_pairs(rows)
        return state


@part("judge_pairs")
@dataclass(frozen=True)
class JudgePairs:
    """Pairs of completions of a prompt by a judge that compares two of them.

    The judge is a function `judge(prompts, firsts, seconds, **columns)` that returns, for each pair, the probability
    that the first one wins, or None where it cannot say. It is asked in both orders, and the mean is taken:
    P(i beats j) = (p_ij + 1 - p_ji) / 2, which makes it antisymmetric. Where it fails, the group leaves the batch, as
    with rewards. The column `win_rate` is the mean over the others; best and worst are by it. The offset of a pair is
    2 P - 1.

    Args:
        judge: as module:function, which runs in a worker process under the time limit of rewards.
        how, labels: see `PairUp`; with "best" a pair at 1/2 is dropped.
        min_gap: of 2 P - 1, below which a pair is dropped.

    Raises:
        ValueError: an unknown choice, a negative gap, or no judge.
        MethodError: there are no answers of the judge.

    Source: pairwise judges of OnlineDPO, Nash-MD and INPO.
    """

    judge: str
    how: How = "all"
    labels: Labels = "best"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if not self.judge:
            raise ValueError("judge must be module:function")

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` counts."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        won = judged(rows)

        def probability(i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i == j, 0.5, won[i, j])

        def gap(i: Tensor, j: Tensor) -> Tensor:
            return 2 * probability(i, j) - 1

        known = ~won.isnan() & rows.main[None] & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        share = ratio((won.nan_to_num() * known).sum(1), known.sum(1).to(won))
        valid = rows.main & known.any(1)
        columns = {**rows.columns, WIN_RATE: torch.where(valid, share, torch.nan)}
        return rows.with_(pairs=pairs_among(rows, valid, share, gap, probability, self), columns=columns)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Counts: pairs, the share of groups with any, the mean gap."""
        metrics |= count_pairs(rows)
        return state


@part("win_rates", paper=26)
@dataclass(frozen=True)
class WinRates:
    """The reward of a completion: P(y beats an opponent's completion) - 1/2, from the others of its group.

        P(i beats opponent) = sum_j w_j P(i beats j) / sum_j w_j,   j the others,   w_j = (opponent / old)(y_j)^share

    With `drawn` the others are those that the opponent has drawn (`rollout.beside`), each with w = 1. Otherwise they
    were drawn by the policy. Without an opponent they stand for it (self-play); with one they are weighted so that they
    stand for the geometric mixture old^(1 - share) opponent^share, which a share of 1 makes the opponent itself. On
    enumerated rows all completions play, at their probabilities. The column `win_rate` keeps P, and
    `win_rate/ess` the effective share of those that were played against.

    A completion that also plays against itself, at 1/2, has a reward of (G - 1) / G that size. With a leave-one-out
    baseline, which sees each of its games from the other side, too, that makes the policy gradient unbiased.

    Args:
        temperature: of P(i beats j) = sigmoid((r_i - r_j) / temperature); 0 compares.
        opponent: name of a model; "old" is the policy itself.
        share: of the opponent in the mixture.
        judge: module:function of a pairwise judge, whose answers take the place of the rewards'.
        own: a completion plays against itself, too.
        drawn: the others are candidates beside the group; a group without any has no rewards.

    Raises:
        ValueError: a share outside [0, 1], a negative temperature, or several reward columns.

    Source: "Nash Learning from Human Feedback", 2023, and "Accelerating Nash Learning from Human Feedback via Mirror
    Prox", 2025, where the opponent's completions are drawn by it.
    """

    temperature: float = 1.0
    opponent: str = "old"
    share: float = 1.0
    judge: str | None = None
    own: bool = False
    drawn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], not {self.share}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")

    @property
    def weighs(self) -> bool:
        """Whether the others stand for another model than the one that drew them."""
        return self.opponent != "old" and self.share > 0 and not self.drawn

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both policies, where the others are weighted."""
        return (LogProb(of=("old",)), LogProb(of=(self.opponent,))) if self.weighs else ()

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` tells the effective share."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        won = judged(rows) if self.judge is not None else self._by_reward(rows)
        alone = torch.eye(len(rows), dtype=torch.bool, device=rows.device) & ~won.isnan().all(1)
        won = torch.where(alone, 0.5, won)  # a judge is not asked to compare a completion with itself
        others = rows.stream == int(Stream.CANDIDATE) if self.drawn else rows.main
        plays = ~won.isnan() & rows.main[:, None] & others[None]
        if not rows.exact and not self.own:
            plays &= ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        weight = (rows.weight.to(won) * plays).masked_fill(~plays, 0.0)
        if self.weighs:
            ahead = sequence_log_prob(rows, stats, self.opponent) - sequence_log_prob(rows, stats, "old")
            log = self.share * ahead.to(won)
            top = log[None].expand_as(won).masked_fill(weight == 0, -torch.inf).amax(1, keepdim=True)
            weight = weight * torch.where(weight > 0, (log[None] - top).exp(), torch.zeros_like(weight))
        rate = ratio((weight * won.nan_to_num()).sum(1), weight.sum(1))
        rate = torch.where(weight.sum(1) > 0, rate, torch.nan)
        share = ratio(ratio(weight.sum(1).square(), weight.square().sum(1)), (weight > 0).sum(1).to(won))
        columns = {**rows.columns, WIN_RATE: rate, SHARES: share}
        return rows.with_(reward=(rate - 0.5)[:, None], columns=columns)

    def _by_reward(self, rows: Rows) -> Float[Tensor, "B B"]:
        reward = scalar_reward(rows)
        won = bradley_terry(reward[:, None] - reward[None], self.temperature)
        return torch.where(rows.group[:, None] == rows.group[None], won, torch.nan)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """The mean effective share of the others, 1 where they stand for themselves."""
        known = rows.main & ~rows.columns[WIN_RATE].isnan()
        metrics[SHARES] = float(ratio((rows.columns[SHARES] * known).sum(), known.sum()))
        return state


def bradley_terry(gap: Float[Tensor, "*n"], temperature: float) -> Float[Tensor, "*n"]:
    """P(i beats j) of r_i - r_j: sigmoid(gap / temperature); at temperature 0 a comparison, 1/2 for a tie.

    >>> bradley_terry(torch.tensor([-1.0, 0.0, 1.0]), 0.0).tolist()
    [0.0, 0.5, 1.0]
    """
    if temperature == 0:
        return torch.where(gap.isnan(), gap, (1 + gap.sign()) / 2)
    return (gap / temperature).sigmoid()


def judged(rows: Rows) -> Float[Tensor, "B B"]:
    """What the judge said of row against row, NaN where it said nothing.

    Raises:
        MethodError: it was not asked.
    """
    if JUDGE not in rows.features:
        raise MethodError(
            "this reads what a pairwise judge says, and the rows have none", None, "Train online with `judge`."
        )
    said = rows.features[JUDGE][:, rows.columns[PLACE].clamp(min=0)]
    together = (rows.group[:, None] == rows.group[None]) & (rows.columns[PLACE] >= 0)
    return torch.where(together, said, torch.nan)


def rows_to_compare(rows: Rows, how: How | Literal["beside"]) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """The pairs that a judge is to be asked about, each once: of random pairs those, else every two of a group; or, of
    each group, its rows with the candidates beside them.
    """
    if how == "beside":
        candidate = rows.stream == int(Stream.CANDIDATE)
        together = (rows.group[:, None] == rows.group[None]) & rows.main[:, None] & candidate[None]
        first, second = together.nonzero(as_tuple=True)
        return first, second
    return _chosen_pairs(rows, rows.main, rows.weight, "random" if how == "random" else "all")


def pairs_among(
    rows: Rows,
    valid: Bool[Tensor, "B"],
    score: Float[Tensor, "B"],
    gap: Number,
    probability: Number,
    asked: PairUp | JudgePairs,
) -> Pairs:
    """The pairs that a part asks for.

    Args:
        valid: rows that may be in a pair.
        score: by which best and worst are found.
        gap: of two rows, antisymmetric; NaN leaves the pair out.
        probability: that the first of two rows wins.
        asked: how, labels and min_gap.
    """
    first, second = _chosen_pairs(rows, valid, score, asked.how)
    turned = rows.row[first] > rows.row[second]  # a pair is the same in whatever order its rows stand
    first, second = torch.where(turned, second, first), torch.where(turned, first, second)
    lead = gap(first, second)
    keep = (lead.abs() >= asked.min_gap) & ((lead != 0) | (asked.labels != "best"))
    first, second, lead = first[keep], second[keep], lead[keep]
    wins = probability(first, second)
    better = lead >= 0
    if asked.labels == "sampled" and not rows.exact:
        better = uniforms(rows.row[first], rows.row[second]) < wins
    label = torch.where(better, wins, 1 - wins) if asked.labels == "expected" or rows.exact else torch.ones_like(wins)
    label = torch.ones_like(wins) if asked.labels == "best" else label
    return Pairs(
        chosen=torch.where(better, first, second),
        rejected=torch.where(better, second, first),
        measure=_measure(rows, valid, first, second),
        coef=torch.ones_like(wins),
        label=label,
        offset=torch.where(better, lead, -lead),
    )


def _chosen_pairs(
    rows: Rows, valid: Bool[Tensor, "B"], score: Float[Tensor, "B"], how: How
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Rows of the pairs, without an order within them."""
    index = valid.nonzero().flatten()
    group = rows.group[index]
    if how == "all" or (how == "random" and rows.exact):
        together = (group[:, None] == group[None]).triu(0 if rows.exact else 1)
        first, second = together.nonzero(as_tuple=True)
        return index[first], index[second]
    if how == "random":
        order = uniforms(rows.row[index], _SHUFFLE).argsort()
    else:
        order = rows.row[index].argsort(descending=True)
        order = order[score[index][order].argsort(stable=True)]  # the worst first, of equals the higher row id
    order = order[group[order].argsort(stable=True)]
    index, group = index[order], group[order]
    counts = group.unique_consecutive(return_counts=True)[1]
    start = counts.cumsum(0) - counts
    if how == "best_worst":
        first, last = index[start], index[start + counts - 1]
        return first[counts > 1], last[counts > 1]
    place = torch.arange(len(index), device=index.device) - start.repeat_interleave(counts)
    leads = (place % 2 == 0) & (place + 1 < counts.repeat_interleave(counts))
    at = leads.nonzero().flatten()
    return index[at], index[at + 1]


def _measure(
    rows: Rows, valid: Bool[Tensor, "B"], first: Int[Tensor, "N"], second: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """w_i w_j over the mean weight of the group; of enumerated rows the probability of the pair, in any order."""
    groups = Groups.of(rows, valid)
    total, count = groups.sum(groups.weight), groups.sum(valid.to(rows.weight))
    product = rows.weight[first] * rows.weight[second]
    if rows.exact:
        return ratio(product * torch.where(first == second, 1.0, 2.0), groups.broadcast(total)[first])
    return ratio(product * groups.broadcast(count)[first], groups.broadcast(total)[first])


def count_pairs(rows: Rows) -> dict[str, float]:
    """pairs/number; pairs/groups, the share of groups with a pair; pairs/gap, the mean lead of the chosen one."""
    assert rows.pairs is not None
    pairs = rows.pairs
    every = rows.group[rows.main].unique()
    return {
        "pairs/number": float(len(pairs.chosen)),
        "pairs/groups": len(rows.group[pairs.chosen].unique()) / max(1, len(every)),
        "pairs/gap": float(ratio((pairs.measure * pairs.offset).sum(), pairs.measure.sum())),
    }


def _check(asked: PairUp | JudgePairs) -> None:
    for name, allowed in (("how", How), ("labels", Labels)):
        if getattr(asked, name) not in get_args(allowed):
            raise ValueError(f"{name} '{getattr(asked, name)}' is not one of {', '.join(get_args(allowed))}")
    if asked.min_gap < 0:
        raise ValueError(f"min_gap must not be negative, not {asked.min_gap}")
