"""A further policy term beside the method's surrogate, on an advantage of its own."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.surrogate import Clipped, Objective, Surrogate
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


@part("second_surrogate", paper=76)
@dataclass(frozen=True)
class SecondSurrogate:
    """-A f(rho) at each token, with the advantage from a column of the rows.

    It is a policy term, which the weights of the method multiply as they do the surrogate; they see this advantage.

    Args:
        f: the form.
        column: name of the column, [B, T]; rows that do not have it give their advantage.
        level: of the ratio, see `Surrogate`.

    Source: COPO (2025) steps along an advantage within groups and one across them, each clipped for itself.
    """

    f: Objective = Clipped()
    column: str = "global_advantage"
    level: Literal["token", "sequence", "trajectory"] = "token"
    needs = (LogProb(), LogProb(of=("old",)))
    additive = True

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return -Surrogate(self.f, self.level)(self.credited(rows), stats)

    def credited(self, rows: Rows) -> Rows:
        """The rows with the advantage that it steps along."""
        return rows.with_(advantage=rows.columns.get(self.column, rows.advantage))
