"""Pairs whose rejected side is drawn so that a plain DPO has a stated policy as its optimum."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, scalar_reward
from keel.core.choice import uniforms
from keel.core.drawing import draw
from keel.core.registry import part
from keel.core.rows import Pairs, Rows
from keel.parts.rewards.anchored import sequence_log_prob
from keel.parts.rewards.pairing import count_pairs
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Rejected = Literal["drawn", "weighted"]
SHARES = "pairs/ess"  # column: effective share of the completions from which a rejected one is drawn
_PICK = 4_000_039  # counter of the choice of the rejected completion, beyond every position of a token


@part("informed_pairs", paper=59)
@dataclass(frozen=True)
class InformedPairs:
    """Each completion of the reference is preferred over one of the optimal rejected sampler; there is no label.

        rejected(y)  ~  ref(y) (ref / target)(y)^beta / Z

    With chosen completions from ref, DPO at beta has the target as its optimum. Where the target is the tilt
    ref exp(r / (beta temperature)) / Z this is ref(y) exp(-r / temperature) / Z: what the rejected side is worth, and
    not who wins, holds the reward. The rejected sampler is resampled from the other completions of the group, with the
    weights (ref / target)^beta, normalised over them; that is exact as the group grows.

        drawn       one rejected completion for each chosen one, by its row id
        weighted    all of them, at their probabilities

    Enumerated rows take all pairs, a completion with itself included.

    Args:
        rejected: drawn or weighted.
        temperature: of the reward.
        target: name of a model, which takes the reward's place.
        beta: of the loss; read with a target.
        initial: name of the reference, which is to draw the completions.

    Raises:
        ValueError: an unknown choice, a temperature or beta that is not positive, or several reward columns.

    Source: "Differential Information: An Information-Theoretic Perspective on Preference Optimization", 2025.
    """

    rejected: Rejected = "drawn"
    temperature: float = 1.0
    target: str | None = None
    beta: float = 0.1
    initial: str = "ref"

    def __post_init__(self) -> None:
        if self.rejected not in get_args(Rejected):
            raise ValueError(f"rejected '{self.rejected}' is not one of {', '.join(get_args(Rejected))}")
        for name in ("temperature", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both models, where the target is one."""
        return () if self.target is None else (LogProb(of=(self.initial,)), LogProb(of=(self.target,)))

    def init(self) -> dict[str, float]:
        """Nothing to remember: `observe` counts."""
        return {}

    def log_weight(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """log of (ref / target)^beta, up to a constant of the prompt; NaN for a row without a reward."""
        if self.target is None:
            return -scalar_reward(rows) / self.temperature
        ahead = sequence_log_prob(rows, stats, self.target) - sequence_log_prob(rows, stats, self.initial)
        return -self.beta * ahead

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Any]) -> Rows:
        log_weight = self.log_weight(rows, stats)
        valid = rows.main & ~log_weight.isnan()
        together = (rows.group[:, None] == rows.group[None]) & valid[:, None] & valid[None]
        if not rows.exact:
            together &= ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        known = together & (rows.weight > 0)[None]
        log = (log_weight + rows.weight.log())[None].expand(together.shape).masked_fill(~known, -torch.inf)
        share = torch.where(known.any(1, keepdim=True), log.softmax(1), 0.0).nan_to_num(0.0)
        spread = ratio(share.sum(1), share.square().sum(1)) / known.sum(1).clamp(min=1)
        columns = {**rows.columns, SHARES: spread}
        chosen, other = known.nonzero(as_tuple=True)
        part = share[chosen, other]
        if self.rejected == "drawn" and not rows.exact:
            chosen = known.any(1).nonzero().flatten()
            order = rows.row.argsort()  # so that the pick does not depend on where the rows stand
            other = order[draw(share[chosen][:, order], uniforms(rows.row[chosen], _PICK))]
            part = torch.ones_like(share[chosen, other])
        scale = Groups.of(rows, valid)
        mean = ratio(scale.sum(scale.weight), scale.sum(valid.to(rows.weight)))
        measure = (rows.weight if rows.exact else scale.broadcast(mean))[chosen] * part
        one = torch.ones_like(measure)
        gap = (log_weight[other] - log_weight[chosen]).to(one)
        return rows.with_(pairs=Pairs(chosen, other, measure, one, one, gap), columns=columns)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Counts: pairs, the share of groups with any, the mean gap; and the mean effective share."""
        metrics |= count_pairs(rows)
        metrics[SHARES] = float(ratio((rows.columns[SHARES] * rows.main).sum(), rows.main.sum()))
        return state
