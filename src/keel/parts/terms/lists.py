"""Losses of ranked lists: every completion of a prompt is an item, and is compared with all others at once.

`columns["score"]` is the relevance of an item and `columns["position"]` its place in the data, from 0. Items without a
token (cut off, say) are left out of their list.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.aggregate import ratio, weighted_mean
from keel.core.errors import DataError, MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import ReadsScore, Score, Side, check_beta
from keel.parts.terms.ranking import mean_reciprocal_rank, ndcg, recall
from keel.parts.terms.scores import LogRatio
from keel.statistics.stats import Stats

Weighting = Literal["ndcg", "discount", "reciprocal"]


@dataclass(frozen=True, eq=False)
class Lists:
    """The items of a batch, list by list: L lists of at most N items.

    Args:
        index: row of each item, [L, N]; any row where there is none.
        valid: where there is an item, [L, N].
        relevance, position: of each item, [L, N].
        weight: of each list, the mean of its rows', [L].
    """

    index: Int[Tensor, "L N"]
    valid: Bool[Tensor, "L N"]
    relevance: Float[Tensor, "L N"]
    position: Float[Tensor, "L N"]
    weight: Float[Tensor, "L"]

    @staticmethod
    def of(rows: Rows) -> "Lists":
        """The lists of a batch.

        Raises:
            MethodError: the rows do not say how relevant they are.
        """
        missing = [name for name in ("score", "position") if name not in rows.columns]
        if missing:
            what = f"this loss reads ranked lists, and the rows have no column '{missing[0]}'"
            raise MethodError(what, None, "Give `prompt`, `completions` and `scores`.")
        counted = (rows.main & rows.mask.any(1)).nonzero().flatten()
        _, group = rows.group[counted].unique(return_inverse=True)
        order = group.argsort(stable=True)
        sizes = group.bincount() if len(group) else group.new_zeros(0)
        item = torch.arange(int(sizes.max()) if len(sizes) else 0, device=rows.device)
        valid = item[None, :] < sizes[:, None]
        start = (sizes.cumsum(0) - sizes)[:, None]
        index = counted[order][torch.where(valid, start + item[None, :], start)] if len(counted) else valid.long()
        weight = ratio((rows.weight[index] * valid).sum(1), sizes.to(rows.weight))
        relevance, position = rows.columns["score"][index], rows.columns["position"][index]
        return Lists(index, valid, relevance.to(rows.weight), position.to(rows.weight), weight)

    def scores(self, score: Score, rows: Rows, stats: Stats) -> Float[Tensor, "L N"]:
        """What each item earns; 0 where there is none."""
        found = score(Side(rows, stats, self.index[self.valid]))
        return found.new_zeros(self.valid.shape).masked_scatter(self.valid, found)


def beaten_by(scores: Float[Tensor, "L N"], others: Bool[Tensor, "L N N"]) -> Float[Tensor, "L N"]:
    """log sum_j exp(s_j - s_i) over the others j of item i; 0 for an item without any, which has to be left out.

    A single other gives s_j - s_i to the last bit.
    """
    gap = scores[:, None, :] - scores[:, :, None]
    alone = ~others.any(2, keepdim=True)
    gap = torch.where(others, gap, torch.full_like(gap, -math.inf))
    return torch.where(alone, torch.zeros_like(gap), gap).logsumexp(2) * ~alone[..., 0]


@part("list_ranking", paper=81)
@dataclass(frozen=True)
class ListRanking(ReadsScore):
    """-(1 / N) sum_i w_i log sigmoid(-z_i), z_i = log mean_{j != i} exp(beta (S_j - S_i)), averaged over lists.

        ndcg          w_i = (2^y_i - 1) / log2(1 + tau_i)
        discount      w_i = 1 / log2(1 + tau_i)
        reciprocal    w_i = (2^y_i - 1) / tau_i

    y is the relevance of an item and tau its position in the data, from 1. An item of relevance 0 has no weight of its
    own, but all others are compared with it. Two items of relevance 1 and 0, the better one first, are half of DPO on
    the same scores. A list of one item says nothing and does not count.

    Args:
        score: S; the paper's is the mean log-ratio of an item's tokens.
        beta: factor of the scores.
        weighting: what w is.
        coef: of the whole; 0 drops the term.
        k: of the metrics ndcg@k and recall@k.

    Returns:
        A number; 0 without any list.

    Raises:
        ValueError: beta of 0, k below 1, or an unknown weighting.
        DataError: a negative relevance, which would reward a wrong order.

    Source: "In-context Ranking Preference Optimization", 2025. Its items stand in one completion, here each is a
    completion; its code adds up the lists of a batch, and gives an item without tokens the score -100.
    """

    score: Score = LogRatio(norm="mean")
    beta: float = 1.0
    weighting: Weighting = "ndcg"
    coef: float = 1.0
    k: int = 5
    additive = False
    reads = "lists"

    def __post_init__(self) -> None:
        _check(self.beta, self.k)
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting '{self.weighting}' is not one of {', '.join(get_args(Weighting))}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        lists = Lists.of(rows)
        scores = self.beta * lists.scores(self.score, rows, stats)
        count = lists.valid.sum(1, keepdim=True).to(scores)
        log_mean = beaten_by(scores, _others(lists)) - (count - 1).clamp(min=1).log()
        weight = torch.where(lists.valid, self._weights(lists), 0.0).to(scores)
        each = ratio((weight * softplus(log_mean)).sum(1), count[:, 0])
        return self.coef * weighted_mean(each, (lists.weight * (count[:, 0] > 1)).to(each))

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """ndcg@k, mrr and recall@k of the order that beta S gives."""
        return ranking_metrics(Lists.of(rows), self.score, self.beta, self.k, rows, stats)

    def _weights(self, lists: Lists) -> Float[Tensor, "L N"]:
        if bool((lists.relevance[lists.valid] < 0).any()):
            what = "the relevance of an item is negative"
            raise DataError(what, "scores", "Take numbers from 0 up, 0 for what is not relevant.")
        rank = lists.position + 1
        gain = torch.expm1(lists.relevance * math.log(2.0))
        if self.weighting == "reciprocal":
            return gain / rank
        return (torch.ones_like(gain) if self.weighting == "discount" else gain) / (1 + rank).log2()


@part("plackett_luce")
@dataclass(frozen=True)
class PlackettLuce(ReadsScore):
    """sum_i -log( e^{s_i} / (e^{s_i} + sum_{j worse than i} e^{s_j}) ), s = beta S, averaged over lists.

    The likelihood of an order in which each item is picked among those that are left. Items of equal relevance are not
    compared with each other. One good item is told from all bad ones by a softmax (S-DPO); two items are DPO.

    Args:
        score: S.
        beta: factor of the scores.
        coef: of the whole; 0 drops the term.
        k: of the metrics ndcg@k and recall@k.

    Returns:
        A number; 0 without any list in which two items differ.

    Raises:
        ValueError: beta of 0, or k below 1.

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023, its appendix on
    rankings; "On Softmax Direct Preference Optimization for Recommendation", 2024.
    """

    score: Score = LogRatio()
    beta: float = 0.1
    coef: float = 1.0
    k: int = 5
    additive = False
    reads = "lists"

    def __post_init__(self) -> None:
        _check(self.beta, self.k)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        lists = Lists.of(rows)
        scores = self.beta * lists.scores(self.score, rows, stats)
        worse = _others(lists) & (lists.relevance[:, None, :] < lists.relevance[:, :, None])
        picked = worse.any(2)
        each = torch.where(picked, softplus(beaten_by(scores, worse)), torch.zeros_like(scores)).sum(1)
        return self.coef * weighted_mean(each, (lists.weight * picked.any(1)).to(each))

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """ndcg@k, mrr and recall@k of the order that beta S gives."""
        return ranking_metrics(Lists.of(rows), self.score, self.beta, self.k, rows, stats)


@torch.no_grad()
def ranking_metrics(lists: Lists, score: Score, beta: float, k: int, rows: Rows, stats: Stats) -> dict[str, Tensor]:
    """Means over the lists in which something is relevant, by their weight.

    Items of equal scores count as being in every order equally often, so that a policy that has learnt nothing gets
    what chance would give.
    """
    scores = beta * lists.scores(score, rows, stats)
    relevance = torch.where(lists.valid, lists.relevance, 0.0).to(scores).clamp(min=0)
    weight = (lists.weight * (relevance > 0).any(1)).to(scores)
    return {
        f"ranking/ndcg@{k}": weighted_mean(ndcg(scores, relevance, lists.valid, k), weight),
        "ranking/mrr": weighted_mean(mean_reciprocal_rank(scores, relevance, lists.valid), weight),
        f"ranking/recall@{k}": weighted_mean(recall(scores, relevance, lists.valid, k), weight),
    }


def _others(lists: Lists) -> Bool[Tensor, "L N N"]:
    same = torch.eye(lists.valid.shape[1], dtype=torch.bool, device=lists.valid.device)
    return lists.valid[:, :, None] & lists.valid[:, None, :] & ~same


def _check(beta: float, k: int) -> None:
    check_beta(beta)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
