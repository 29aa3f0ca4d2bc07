"""Surrogates: f(rho) in the loss -A f(rho), for the ratio rho = pi / pi_old of a token or a sequence."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Aggregation, ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

LIMIT = 20.0  # log-ratios beyond +-20 are cut before exp, which would overflow


@runtime_checkable
class Objective(Protocol):
    """(log_ratio, log_prob, advantage) -> A * f(rho), all [B, T].

    One that looks beyond its token names what it reads in `needs`, be it nothing, and is called with the rows and their
    statistics, too; with `additive` False where slices of a batch do not add up.
    """

    def __call__(
        self,
        log_ratio: Float[Tensor, "B T"],
        log_prob: Float[Tensor, "B T"],
        advantage: Float[Tensor, "B T"],
        *batch: Any,
    ) -> Float[Tensor, "B T"]:
        """What the step increases, at each token."""
        ...


@part("log_prob")
@dataclass(frozen=True)
class LogLikelihood:
    """A log pi: REINFORCE."""

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        return advantage * log_prob


@part("unclipped")
@dataclass(frozen=True)
class Unclipped:
    """A rho."""

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        return advantage * log_ratio.clamp(-LIMIT, LIMIT).exp()


@part("clipped")
@dataclass(frozen=True)
class Clipped:
    """min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon_high)), and at least dual * A where A < 0.

    Args:
        epsilon: clip range below 1.
        epsilon_high: above 1; None means epsilon, larger is DAPO's clip-higher.
        dual: c of the dual clip, above 1; None is off.

    Raises:
        ValueError: a negative range, or dual not above 1.

    Source: PPO, 2017; DAPO, 2025; dual clip: "Mastering Complex Control in MOBA Games", 2020.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon < 0 or (self.epsilon_high is not None and self.epsilon_high < 0):
            raise ValueError("epsilon and epsilon_high must not be negative")
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"dual must be above 1, not {self.dual}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        rho = log_ratio.clamp(-LIMIT, LIMIT).exp()
        low, high = self.bounds
        gain = torch.minimum(advantage * rho, advantage * rho.clamp(low, high))
        if self.dual is None:
            return gain
        return torch.where(advantage < 0, torch.maximum(gain, self.dual * advantage), gain)

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the ratio is cut."""
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


@part("cispo")
@dataclass(frozen=True)
class CISPO:
    """sg(clip(rho, low, high)) A log pi: every token keeps its gradient, only its weight is bounded.

    Args:
        low, high: absolute bounds of the ratio (0 and 5 in TRL; 0.8 and 1.28 in verl).

    Raises:
        ValueError: low above high.

    Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", 2025.
    """

    low: float = 0.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"bounds must satisfy 0 <= low <= high, not {self.low}, {self.high}")

    def __call__(self, log_ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
        return log_ratio.clamp(-LIMIT, LIMIT).exp().clamp(self.low, self.high).detach() * advantage * log_prob

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the ratio is cut."""
        return self.low, self.high


@part("surrogate")
@dataclass(frozen=True)
class Surrogate:
    """The policy term A f(rho) at each token.

    Args:
        f: the form.
        level: token: rho_t = pi(y_t) / pi_old(y_t). sequence: the geometric mean over the counted tokens of a row,
            given to each of them, its gradient that of exp(sg(log s) + log pi_t - sg(log pi_t)) (GSPO). trajectory:
            the product over the row, given to each of its tokens.
    """

    f: Objective
    level: Literal["token", "sequence", "trajectory"] = "token"

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both log-probabilities, and what the objective names."""
        return (LogProb(), LogProb(of=("old",)), *getattr(self.f, "needs", ()))

    @property
    def additive(self) -> bool:
        """As the objective says."""
        return getattr(self.f, "additive", True)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        """A f(rho), [B, T].

        Raises:
            ValueError: the rows have no advantage.
        """
        if rows.advantage is None:
            raise ValueError("the surrogate needs an advantage: the method's chain `advantage` is empty")
        batch = (rows, stats) if hasattr(self.f, "needs") else ()
        return self.f(self.log_ratio(rows, stats), stats[LogProb()], rows.advantage, *batch)

    def log_ratio(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        """log rho at the chosen level, 0 off the mask."""
        log_prob = stats[LogProb()]
        difference = torch.where(rows.mask, log_prob - stats[LogProb(of=("old",))], torch.zeros_like(log_prob))
        if self.level == "token":
            return difference
        if self.level == "trajectory":
            return difference.sum(1, keepdim=True) * rows.mask
        mean = ratio(difference.detach().sum(1), rows.lengths.to(difference.dtype))
        return (mean[:, None] + log_prob - log_prob.detach()) * rows.mask

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """Share of tokens that the clip silences, below and above, and the approximate KL from old to policy."""
        assert rows.advantage is not None
        log_ratio = self.log_ratio(rows, stats).detach()
        mean = Aggregation("token_mean")
        out = {"approx_kl": mean(torch.expm1(log_ratio) - log_ratio, rows)}
        bounds = getattr(self.f, "bounds", None)
        if bounds is not None:
            rho = log_ratio.exp()
            low = ((rho < bounds[0]) & (rows.advantage < 0)).float()
            high = ((rho > bounds[1]) & (rows.advantage > 0)).float()
            out["clip_ratio/low_mean"] = mean(low, rows)
            out["clip_ratio/high_mean"] = mean(high, rows)
            out["clip_ratio/region_mean"] = mean(low + high, rows)
        return out
