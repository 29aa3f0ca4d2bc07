"""Terms of reward models beside the loss of pairs."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import ReadsScore, Score, pairs_of, sides
from keel.parts.terms.scores import HeadScore
from keel.statistics.stats import Stats


@part("centring")
@dataclass(frozen=True)
class Centring(ReadsScore):
    """coef * sum_i m_i (R_w + R_l)_i^2 / sum_i m_i: pairs leave a constant undetermined, and this takes the one near 0.

    Args:
        coef: 0.01 in the literature; 0 drops the term.
        score: R.

    Source: Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward
        Hacking", 2023; `center_rewards_coefficient` in TRL.
    """

    coef: float = 0.01
    score: Score = HeadScore()
    additive = False
    reads = "pairs"

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        pairs = pairs_of(rows)
        chosen, rejected = sides(rows, stats, pairs)
        total = self.score(chosen) + self.score(rejected)
        measure = pairs.measure.to(total)
        return self.coef * ratio((measure * total.square()).sum(), measure.sum())
