"""How good an order is: NDCG, reciprocal rank and recall of L lists of at most N items.

Items of equal scores are taken to be in every order equally often, and the numbers are expectations over it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import ratio


def ndcg(
    scores: Float[Tensor, "L N"], relevance: Float[Tensor, "L N"], valid: Bool[Tensor, "L N"], k: int
) -> Float[Tensor, "L"]:
    """sum_{rank <= k} (2^y - 1) / log2(1 + rank), over what the best order gives; 0 where nothing is relevant.

    >>> scores, valid = torch.tensor([[0.1, 0.3, 0.2]]), torch.ones(1, 3, dtype=torch.bool)
    >>> round(float(ndcg(scores, torch.tensor([[2.0, 0.0, 1.0]]), valid, 3)), 4)  # second, then first
    0.5869

    Args:
        scores: by which the items are ordered, the largest first.
        relevance: y, at least 0.
        valid: where there is an item.
        k: ranks that count.
    """
    gain = torch.where(valid, torch.exp2(relevance) - 1, 0.0)
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    discount = torch.where(rank <= k, 1 / (1 + rank.to(scores)).log2(), 0.0)
    reached = (gain * _expected(discount, scores, valid)).sum(1)
    return ratio(reached, (gain.sort(1, descending=True).values * discount).sum(1))


def recall(
    scores: Float[Tensor, "L N"], relevance: Float[Tensor, "L N"], valid: Bool[Tensor, "L N"], k: int
) -> Float[Tensor, "L"]:
    """Share of the relevant items (y > 0) among the first k; 0 where nothing is relevant."""
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    relevant = (valid & (relevance > 0)).to(scores)
    return ratio((relevant * _expected((rank <= k).to(scores), scores, valid)).sum(1), relevant.sum(1))


def mean_reciprocal_rank(
    scores: Float[Tensor, "L N"], relevance: Float[Tensor, "L N"], valid: Bool[Tensor, "L N"]
) -> Float[Tensor, "L"]:
    """1 / rank of the first relevant item (y > 0); 0 where nothing is relevant.

    Where m relevant ones are among t items of equal scores, the first of them is the j-th with the probability
    C(t - j, m - 1) / C(t, m).
    """
    relevant = valid & (relevance > 0)
    best = torch.where(relevant, scores, -torch.inf).amax(1, keepdim=True) if scores.shape[1] else scores
    before = (valid & (scores > best)).sum(1, keepdim=True)
    tied = valid & (scores == best)
    size, good = tied.sum(1, keepdim=True), (tied & relevant).sum(1, keepdim=True)
    place = torch.arange(1, scores.shape[1] + 1, device=scores.device)[None, :]
    left = size - place
    possible = (left >= good - 1) & (good > 0)
    log_share = _log_choose(left.clamp(min=0), (good - 1).clamp(min=0).expand_as(left)) - _log_choose(size, good)
    share = torch.where(possible, log_share.exp(), 0.0)
    return (share / (before + place)).sum(1).to(scores)


def _expected(
    of_rank: Float[Tensor, "N"], scores: Float[Tensor, "L N"], valid: Bool[Tensor, "L N"]
) -> Float[Tensor, "L N"]:
    """The mean of a number of the rank over all orders of items with equal scores."""
    above = (valid[:, None, :] & (scores[:, None, :] > scores[:, :, None])).sum(2)
    tied = (valid[:, None, :] & (scores[:, None, :] == scores[:, :, None])).sum(2)
    total = torch.cat([of_rank.new_zeros(1), of_rank.cumsum(0)])
    found = (total[above + tied] - total[above]) / tied.clamp(min=1)
    return torch.where(valid, found, 0.0)


def _log_choose(n: Int[Tensor, "*s"], m: Int[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """log of n over m; meaningless for m above n."""
    n, m = n.double(), m.double()
    return torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma((n - m).clamp(min=0) + 1)
