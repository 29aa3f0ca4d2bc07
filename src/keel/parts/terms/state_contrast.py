"""A contrastive term on the states that a reward model reads."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from keel.core.aggregate import ratio
from keel.core.choice import counter_seed, uniforms
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import pairs_of
from keel.statistics.functionals import State
from keel.statistics.stats import Stats

On = Literal["states", "differences"]


def info_nce(
    first: Float[Tensor, "n D"], second: Float[Tensor, "n D"], weight: Float[Tensor, "n"], temperature: float
) -> Float[Tensor, ""]:
    """sum_i w_i [ log sum_j w_j exp(cos(a_i, b_j) / t) - cos(a_i, b_i) / t ] / sum_i w_i.

    With weights of 1 it is the cross-entropy of finding i's own second view among all n; 0 for n = 1.

    >>> eye = torch.eye(2)
    >>> round(float(info_nce(eye, eye, torch.ones(2), 1.0)), 6)  # log(e + 1) - 1
    0.313262
    """
    cosine = normalize(first, dim=1) @ normalize(second, dim=1).T / temperature
    others = (cosine + weight.log()).logsumexp(1)
    return ratio((weight * (others - cosine.diagonal())).nan_to_num(0.0).sum(), weight.sum())


@part("contrastive", paper=199)
@dataclass(frozen=True)
class Contrastive:
    """coef * InfoNCE between two dropout views of each state, so that states of different texts stay apart.

        L = -mean_i log( exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t) ),    a, b = h * m / (1 - p)

    h is the last state of each completion of a pair, or h_w - h_l; m are masks of dropout that the row's identity
    draws, so that neither order nor split of a batch changes them. They act on the last state, since today's models
    hold no dropout of their own.

    Args:
        coef: of the whole; 0 drops the term.
        on: states, or differences of the two states of a pair.
        temperature: t; 0.05 in SimCSE.
        dropout: p of the two views.
        seed: of the masks.

    Raises:
        ValueError: temperature not above 0, dropout outside [0, 1), or an unknown `on`.

    Source: "Secrets of RLHF in Large Language Models Part II", 2024, after "SimCSE", 2021.
    """

    coef: float = 0.1
    on: On = "states"
    temperature: float = 0.05
    dropout: float = 0.1
    seed: int = 0
    additive = False
    reads = "pairs"
    needs = (State(),)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.on not in get_args(On):
            raise ValueError(f"on '{self.on}' is not one of {', '.join(get_args(On))}")

    def views(self, row: Int[Tensor, "n"], state: Float[Tensor, "n D"]) -> list[Float[Tensor, "n D"]]:
        """Two views of each state."""
        owner, places = row.repeat_interleave(state.shape[1]), torch.arange(state.shape[1], device=row.device)
        found = []
        for view in (0, 1):
            start = counter_seed("contrastive", self.seed, view) >> 20
            kept = uniforms(owner, (start + places).repeat(len(row))) >= self.dropout
            found.append(state * kept.view(state.shape) / (1 - self.dropout))
        return found

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        pairs, state = pairs_of(rows), stats[State()]
        measure = pairs.measure.to(state)
        if self.on == "differences":
            row, weight = rows.row[pairs.chosen], measure
            found = state[pairs.chosen] - state[pairs.rejected]
        else:
            each = state.new_zeros(len(rows))
            for side in (pairs.chosen, pairs.rejected):
                each = each.scatter_reduce(0, side, measure, "amax")
            index = each.nonzero().flatten()  # a completion of several pairs stands here once
            row, weight, found = rows.row[index], each[index], state[index]
        first, second = self.views(row, found)
        return self.coef * info_nce(first, second, weight, self.temperature)
