"""A KL whose rows have weights of their own."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Aggregation
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.penalties import Ratio, SampledKL
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats


@part("row_weighted_kl", paper=14)
@dataclass(frozen=True)
class RowWeightedKL:
    """coef * mean over rows of kappa_i times the mean over the row's tokens of k(log pi - log ref).

    A mean over rows whatever the aggregation of the method, so that kappa weighs completions and not their lengths.
    Rows without the column of kappa have kappa 1; `difficulty_kl_weight` leaves one.

    Args:
        coef: beta.
        estimator, against, ratio: as in `SampledKL`; k3 without a ratio has the gradient of KL(ref || policy).
        column: of kappa.

    Raises:
        ValueError: a negative coef, an unknown estimator or ratio.

    Source: "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization", 2025.
    """

    coef: float = 1e-3
    estimator: str = "k3"
    against: str = "ref"
    ratio: Ratio = "none"
    column: str = "kl_weight"
    additive = True

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        _ = self._penalty

    @property
    def _penalty(self) -> SampledKL:
        return SampledKL(self.estimator, self.against, self.ratio)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the KL."""
        return self._penalty.needs

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        values = self._penalty(rows, stats)
        if self.column in rows.columns:
            values = values * rows.columns[self.column][:, None].to(values)
        return self.coef * Aggregation("sequence_mean_token_mean")(values, rows)
