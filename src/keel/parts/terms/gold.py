"""The likelihood of a gold answer that stands beside each pair."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


@part("gold_likelihood")
@dataclass(frozen=True)
class GoldLikelihood:
    """-log pi(y_t) of gold answers, which the loop puts into the mask "nll" in place of the chosen completions.

    Source: "Triple Preference Optimization", 2024.
    """

    needs = (LogProb(),)
    additive = True
    reads_gold = True

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return -stats[LogProb()]
