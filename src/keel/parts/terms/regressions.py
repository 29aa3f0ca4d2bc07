"""Log-ratios of whole completions, regressed on a number that each completion has earned."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("win_rate_regression")
@dataclass(frozen=True)
class WinRateRegression:
    """coef * E[ (log pi(y) / model(y) - (P(y) - 1/2) / beta)^2 ],   P a completion's win rate.

    The log-ratio is that of the whole completion. A model that is held constant for long steps, with 1/2 for the log of
    the normaliser, gives pi = model exp(P / beta) / Z up to that guess. Where both sides of a pair are read with
    P = 1 and P = 0 this is SPPO's hard loss, for two rows.

    Args:
        beta: 1 / eta of the paper.
        against: name of the model of the last iteration; "old" is the one that drew the batch.
        column: of the rows, with P; NaN leaves a row out.
        coef: of the term; 0 drops it.

    Returns:
        A number, the mean over the main rows that have a P.

    Raises:
        ValueError: beta not positive.
        MethodError: the rows have no such column.

    Source: "Self-Play Preference Optimization for Language Model Alignment", 2024.
    """

    beta: float = 0.001
    against: str = "old"
    column: str = "win_rate"
    coef: float = 1.0
    additive = False

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The live policy and the model."""
        return (LogProb(), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        if self.column not in rows.columns:
            what = f"the rows have no column '{self.column}'"
            raise MethodError(what, "win_rate_regression", "Put the transform WinRates into the method.")
        log_ratio = stats[LogProb()] - stats[LogProb(of=(self.against,))]
        log_ratio = torch.where(rows.mask, log_ratio, torch.zeros_like(log_ratio)).sum(1)
        rate = rows.columns[self.column].to(log_ratio)
        weight = rows.weight.to(log_ratio) * (rows.main & ~rate.isnan())
        missed = log_ratio - (rate.nan_to_num() - 0.5) / self.beta
        return self.coef * ratio((weight * missed.square()).sum(), weight.sum())
