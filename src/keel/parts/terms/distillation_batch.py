"""Distillation losses of whole batches: how the positions of the policy lie to those of the teacher, and to each other.

Both compare all counted positions of a batch with each other, [N, N] numbers; the vocabulary enters in bins.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keel.core.aggregate import ratio, token_weight
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats
from keel.statistics.teachers import Binned


@part("sinkhorn_distillation", paper=6)
@dataclass(frozen=True)
class SinkhornDistillation:
    """coef * sum_ij P_ij C_ij, the transport between the policy's and the teacher's rows of a batch.

        C_ij = |p_i - q_j|_1,   P from `iterations` rounds of scaling exp(-C / eps) to the positions' shares

    p_i, q_j are the distributions at the counted positions, at temperature tau, over bins of the vocabulary. The
    gradient goes through C and through the rounds. The total mass is 1 (the authors' is N, so that coef here is theirs
    times N). A permutation of the positions changes nothing: the loss does not tie a position to its own teacher row,
    and stands beside a cross-entropy or a KL that does.

    Args:
        coef: of the loss.
        temperature: tau, of both.
        epsilon: strength of the entropy; small ones find the best assignment.
        iterations: rounds.
        bins: of the vocabulary, token v in bin v mod bins; with fewer than tokens, C is a lower bound.
        against: name of the teacher.

    Raises:
        ValueError: a negative coef, or a temperature, epsilon, number of rounds or of bins that is not positive.

    Source: "Sinkhorn Distance Minimization for Knowledge Distillation", 2024 (SinKD).
    """

    coef: float = 0.1
    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 20
    bins: int = 1024
    against: str = "teacher"
    additive = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        for name in ("temperature", "epsilon", "iterations", "bins"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both models' probabilities."""
        return (
            Binned(self.bins, temperature=self.temperature),
            Binned(self.bins, (self.against,), self.temperature),
        )

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        weight = token_weight(rows)
        counted = weight > 0
        own, teacher = (stats[need][counted] for need in self.needs)
        if not len(own):
            return own.new_zeros(())
        share = ratio(weight[counted].to(own), weight.sum().to(own))
        cost = torch.cdist(own, teacher.detach(), p=1)
        return self.coef * (sinkhorn_plan(cost, share, share, self.epsilon, self.iterations) * cost).sum()


def sinkhorn_plan(
    cost: Float[Tensor, "N M"],
    row: Float[Tensor, "N"],
    column: Float[Tensor, "M"],
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Float[Tensor, "N M"]:
    """exp(-cost / epsilon) after rounds of scaling its rows, then its columns, to these masses, in log-space.

    >>> plan = sinkhorn_plan(torch.tensor([[0., 1.], [1., 0.]]), torch.ones(2), torch.ones(2), 0.5, 3)
    >>> [round(x, 4) for x in plan.flatten().tolist()]
    [0.8808, 0.1192, 0.1192, 0.8808]
    """
    log_plan = -cost / epsilon + column.log()
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + row.log()[:, None]
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + column.log()
    return log_plan.exp()


@part("relational_match", paper=128)
@dataclass(frozen=True)
class RelationalMatch:
    """coef * mean over pairs of positions of (S(p_i, p_j) - S(q_i, q_j))^2: likenesses as the teacher has them.

        js      S is the Jensen-Shannon divergence in nats, as in the paper
        gram    S = sum_v sqrt(p_iv p_jv), the product of the rows sqrt(p) of unit length: one matrix product

    p_i, q_i are the policy's and the teacher's distributions at the counted positions of the batch. Only relations
    between positions matter, not which token is likely: it stands beside another loss.

    Args:
        coef: of the loss.
        space: of S.
        bins: of the vocabulary; see `SinkhornDistillation`.
        against: name of the teacher.

    Raises:
        ValueError: a negative coef, an unknown space, or bins below 1.

    Source: "Encoding Time-Series Explanations through Self-Supervised Model Behavior Consistency", 2023.
    """

    coef: float = 1.0
    space: Literal["js", "gram"] = "js"
    bins: int = 256
    against: str = "teacher"
    additive = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        if self.space not in ("js", "gram"):
            raise ValueError(f"space must be js or gram, not '{self.space}'")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, not {self.bins}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both models' probabilities."""
        return (Binned(self.bins), Binned(self.bins, (self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        weight = token_weight(rows)
        counted = weight > 0
        own, teacher = (stats[need][counted] for need in self.needs)
        w = weight[counted].to(own)
        like = jensen_shannon if self.space == "js" else bhattacharyya
        gap = (like(own) - like(teacher.detach())).square()
        pairs = w.sum().square() - (0.0 if rows.exact else w.sum())  # a position is no pair with itself
        return self.coef * ratio((w[:, None] * w * gap).sum(), pairs.clamp(min=0.0))


def jensen_shannon(p: Float[Tensor, "N K"]) -> Float[Tensor, "N N"]:
    """JS(p_i, p_j) = H((p_i + p_j) / 2) - (H(p_i) + H(p_j)) / 2 in nats, row by row, so that no [N, N, K] exists.

    >>> round(float(jensen_shannon(torch.eye(2))[0, 1]), 6) == round(math.log(2), 6)
    True
    """

    def middle(row: Tensor) -> Tensor:
        return _entropy((row + p) / 2)

    lines = [checkpoint(middle, row, use_reentrant=False) if p.requires_grad else middle(row) for row in p]
    own = _entropy(p)
    return (torch.stack(lines) if lines else p.new_zeros(0, 0)) - (own[:, None] + own) / 2


def bhattacharyya(p: Float[Tensor, "N K"]) -> Float[Tensor, "N N"]:
    """sum_v sqrt(p_iv p_jv), 1 less the squared Hellinger distance."""
    root = p.clamp(min=torch.finfo(p.dtype).tiny).sqrt()
    return root @ root.T


def gram_match(own: Float[Tensor, "N D"], teacher: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    """mean_ij ((u u')_ij - (v v')_ij)^2 of rows u and v of unit length; the widths may differ.

    >>> u, v = torch.eye(2), torch.tensor([[1., 0.], [1., 1.]])
    >>> round(float(gram_match(u, v)), 4)
    0.25
    """
    u, v = (torch.nn.functional.normalize(rows, dim=-1) for rows in (own, teacher))
    return (u @ u.T - v @ v.T).square().mean()


def _entropy(p: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    safe = p.clamp(min=math.ulp(0.0) if p.dtype == torch.float64 else torch.finfo(p.dtype).tiny)
    return -(p * safe.log()).sum(-1)
