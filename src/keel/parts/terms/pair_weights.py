"""Numbers of each pair that are no score: weights of its loss, and what its scores should lie apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.parts.terms.pairs import Side
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.squared_mass import LogSquaredMass

_LIVE = LogProb()
_MASS = LogSquaredMass(stop=("policy",))


@part("wpo")
@dataclass(frozen=True)
class WPO:
    """exp(mean_t q_t) of the chosen completion times that of the rejected one: pairs that the policy would write.

        q_t = log pi(y_t)                              basic
        q_t = log pi(y_t) - log sum_v pi_v^2           aligned: 1 on average for what the policy samples

    Args:
        aligned: which of the two; aligned is what the authors and TRL take.

    Source: Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024.
    """

    aligned: bool = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy's log-probability, and its mass squared."""
        return (_LIVE, _MASS) if self.aligned else (_LIVE,)

    def __call__(self, chosen: Side, rejected: Side) -> Float[Tensor, "N"]:
        return (self._mean(chosen) + self._mean(rejected)).exp()

    def _mean(self, side: Side) -> Float[Tensor, "N"]:
        values = side.tokens(_LIVE).detach()
        if self.aligned:
            values = values - side.tokens(_MASS).detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return ratio(values.sum(1), side.lengths.to(values))


@part("score_gap")
@dataclass(frozen=True)
class ScoreGap:
    """score_w - score_l of the data, or its logarithm: by how much the chosen completion is the better one.

    Args:
        log: take the logarithm, which needs gaps above 0.

    Raises:
        MethodError: the data have no scores.

    Source: Amini et al., "Direct Preference Optimization with an Offset", 2024 (with the logarithm); Gao et al.,
    "REBEL: Reinforcement Learning via Regressing Relative Rewards", 2024.
    """

    log: bool = False

    def __call__(self, chosen: Side, rejected: Side) -> Float[Tensor, "N"]:
        scores = chosen.rows.columns.get("score")
        if scores is None:
            raise MethodError("this reads the score of each completion, and the data have none", "score_gap")
        gap = scores[chosen.index] - scores[rejected.index]
        return gap.clamp(min=torch.finfo(gap.dtype).tiny).log() if self.log else gap
