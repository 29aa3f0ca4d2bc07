"""Early-learning regularisation: what a model believed of each example so far pulls against labels that are wrong.

    t  <-  decay t + (1 - decay) sg[p / sum p]        of each example, 0 before its first visit
    R   =  log(1 - <t, p>)

R is added to a cross-entropy. It falls as p agrees with t, and where p is sure its gradient stands against that of a
label which says otherwise:  dR/dz_j = p_j (<t, p> - t_j) / (1 - <t, p>).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.choice import row_ids
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import Score, pairs_of, sides
from keel.parts.terms.scores import HeadScore
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats

SMALLEST = 1e-4  # probabilities are kept this far from 0 and 1
_WIDE = 1 << 20  # completions of a prompt at most


def early_target(before: Float[Tensor, "*n C"], probs: Float[Tensor, "*n C"], decay: float) -> Float[Tensor, "*n C"]:
    """decay t + (1 - decay) p / sum p, without gradient; p is clamped to [1e-4, 1 - 1e-4].

    >>> early_target(torch.zeros(3), torch.tensor([0.7, 0.2, 0.1]), 0.7).tolist()
    [0.21..., 0.06..., 0.03...]
    """
    kept = probs.detach().clamp(SMALLEST, 1 - SMALLEST)
    return decay * before + (1 - decay) * kept / kept.sum(-1, keepdim=True)


def early_penalty(probs: Float[Tensor, "*n C"], target: Float[Tensor, "*n C"]) -> Float[Tensor, "*n"]:
    """R = log(1 - <t, p>) of class probabilities [*n, C], clamped as for the targets.

    >>> p = torch.tensor([0.7, 0.2, 0.1])
    >>> round(float(early_penalty(p, early_target(torch.zeros(3), p, 0.7))), 6)
    -0.176737
    """
    return torch.log1p(-(target * probs.clamp(SMALLEST, 1 - SMALLEST)).sum(-1))


@part("early_learning", paper=120)
@dataclass(frozen=True)
class EarlyLearning:
    """coef * sum_i m_i log(1 - <t_i, p_i>) / sum_i m_i over pairs, p = (sigmoid(beta (S_w - S_l)), the rest).

    A pair is a classification of two classes. Its running mean t is kept by the number of the preference and the
    places of both completions in it, and is that of this batch already; p within t is that of the policy with which the
    batch was prepared.

    Args:
        coef: lambda. Where the model is sure of p and t agrees, the gradient of a wrong label is overcome for lambda
            above 2 p / (2 p - 1): 3.5 at p = .7, 2.25 at .9. 0 drops the term.
        decay: of the running mean.
        score: S.
        beta: factor of the scores.

    Returns:
        A number; 0 without any pair.

    Raises:
        ValueError: a negative coef, or decay outside [0, 1).
        MethodError: pairs that do not come from data, so that none is seen twice.

    Source: "Early-Learning Regularization Prevents Memorization of Noisy Labels", 2020, of classes; decay .7 and lambda
    3 there for ten of them.
    """

    coef: float = 3.0
    decay: float = 0.7
    score: Score = HeadScore()
    beta: float = 1.0
    additive = True
    reads = "pairs"

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, not {self.coef}: the term is added to the loss")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the score, of the live policy and of the one before the batch."""
        own = tuple(getattr(self.score, "needs", ()))
        return tuple(dict.fromkeys([*own, *map(_before, own)]))

    @property
    def observes(self) -> tuple[Functional, ...]:
        """What `observe` reads, measured before the update."""
        return tuple(dict.fromkeys(map(_before, getattr(self.score, "needs", ()))))

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the score."""
        return tuple(getattr(self.score, "heads_read", ()))

    def init(self) -> dict[str, Tensor]:
        """The running means [M, 2] and, in ascending order, whose they are [M]."""
        return {"key": torch.zeros(0, dtype=torch.long), "target": torch.zeros(0, 2, dtype=torch.float64)}

    def __call__(self, rows: Rows, stats: Stats, state: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        pairs = pairs_of(rows)
        probs, old = self._probs(rows, stats), self._probs(rows, self._of_old(stats))
        target = early_target(_known(state, _keys(rows)).to(probs), old, self.decay)
        measure = pairs.measure.to(probs)
        whole = measure.sum() if rows.totals is None else rows.totals.pairs
        return self.coef * ratio((measure * early_penalty(probs, target)).sum(), whole)

    @torch.no_grad()
    def observe(
        self, rows: Rows, stats: Stats, metrics: dict[str, float], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Takes the pairs of the batch into their running means; logs <t, p>, how far both agree."""
        pairs, keys = pairs_of(rows), _keys(rows)
        if not len(keys):
            return dict(state)
        old = self._probs(rows, self._of_old(stats))
        fresh = early_target(_known(state, keys).to(old), old, self.decay)
        measure = pairs.measure.to(old)
        metrics["early/agreement"] = float(ratio((measure * (fresh * old).sum(1)).sum(), measure.sum()))
        own, place = keys.unique(return_inverse=True)
        total = fresh.new_zeros(len(own), 2).index_add(0, place, fresh).double().cpu()
        mean = total / place.bincount(minlength=len(own)).to(total)[:, None]
        own = own.cpu()
        rest = ~torch.isin(state["key"], own)
        key = torch.cat([state["key"][rest], own])
        order = key.argsort()
        return {"key": key[order], "target": torch.cat([state["target"][rest], mean])[order]}

    def _probs(self, rows: Rows, stats: Stats) -> Float[Tensor, "N 2"]:
        chosen, rejected = sides(rows, stats, pairs_of(rows))
        margin = self.beta * (self.score(chosen) - self.score(rejected))
        return torch.stack([margin, -margin], -1).sigmoid()

    def _of_old(self, stats: Stats) -> Stats:
        """The statistics as they were before the batch."""
        return stats.merged({f: stats[_before(f)] for f in getattr(self.score, "needs", ())})


def _before(functional: Functional) -> Functional:
    """The same of the policy before the batch; those of other models as they are."""
    of = tuple("old" if name == "policy" else name for name in functional.of)
    return replace(functional, of=of)  # type: ignore[type-var]


def _keys(rows: Rows) -> Int[Tensor, "N"]:
    """What a pair is called in every pass over the data."""
    if "position" not in rows.columns:
        what = "it remembers pairs of the data, and these rows come from elsewhere"
        raise MethodError(what, "early_learning", "Train on preferences.")
    pairs, place = pairs_of(rows), rows.columns["position"]
    return row_ids(0, 0, rows.data_index[pairs.chosen], place[pairs.chosen] * _WIDE + place[pairs.rejected])


def _known(state: Mapping[str, Tensor], keys: Int[Tensor, "N"]) -> Float[Tensor, "N 2"]:
    """The running means so far; 0 for pairs that were never seen."""
    own = keys.cpu()
    if not len(state["key"]):
        return torch.zeros(len(own), 2, dtype=torch.float64)
    place = torch.searchsorted(state["key"], own).clamp(max=len(state["key"]) - 1)
    return torch.where((state["key"][place] == own)[:, None], state["target"][place], 0.0)
