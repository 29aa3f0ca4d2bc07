"""Objectives that tell the good completions of a prompt from the bad ones, and a trust region without a clip."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Aggregation, Groups, ratio, returns, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Score = Literal["log_likelihood", "ratio"]
OLD = LogProb(of=("old",))


@part("discrimination", paper=[77, 79])
@dataclass(frozen=True)
class Discrimination:
    """Minus the score of a prompt's good completions above the soft maximum of those of its bad ones.

        J = sum_P w s / sum_P w - temperature log mean_Q exp(s / temperature),   w = exp((1 - L / max_length) / length)
        s = mean_t log pi(y_t)   (log_likelihood)   or   mean_t pi(y_t) / pi_old(y_t)   (ratio)

    P are the completions with R of at least `threshold`, Q the others; the loss is minus the mean of J over all
    prompts, where one without P or without Q counts 0. The bad ones are pushed down in proportion to
    softmax_Q(s / temperature); with temperature inf all alike (DisCO-b). No deviation divides by the difficulty of a
    prompt. With a finite `length_temperature` short good answers are learnt more than long ones (DRPO), but no good one
    is ever pushed down.

    Args:
        score: of a completion.
        temperature: tau, in units of the score; inf takes the mean.
        length_temperature: lambda of the preference for short good completions; inf is none.
        max_length: tokens of the longest completion.
        threshold: return from which on a completion is good.

    Raises:
        ValueError: an unknown score, a temperature that is not positive, or max_length below 1.

    Source: "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization", 2025; "DRPO:
    Efficient Reasoning via Decoupled Reward Policy Optimization", 2025. The releases report a constant in place of the
    soft maximum's value; the gradient is the same.
    """

    score: Score = "log_likelihood"
    temperature: float = 10.0
    length_temperature: float = math.inf
    max_length: int = 8192
    threshold: float = 0.5
    additive = False

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score '{self.score}' is not one of {', '.join(get_args(Score))}")
        for name in ("temperature", "length_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy; for the ratio, the one that sampled, too."""
        return (LogProb(), OLD) if self.score == "ratio" else (LogProb(),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        value = returns(rows)
        scored, good = ~value.isnan(), value >= self.threshold
        score = self.scores(rows, stats)
        right, wrong = Groups.of(rows, scored & good), Groups.of(rows, scored & ~good)
        weight = self.preference(rows, right).to(score.dtype)
        above = ratio(right.sum(weight * score), right.sum(weight))
        both = (right.sum(weight) > 0) & (wrong.sum(wrong.weight) > 0)
        gain = torch.where(both, above - self._below(score, wrong), torch.zeros_like(above))
        return -weighted_mean(gain, prompt_weight(Groups.of(rows, scored)).to(gain.dtype))

    def scores(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """s of each row."""
        each = stats[LogProb()]
        if self.score == "ratio":
            each = torch.where(rows.mask, each - stats[OLD], torch.zeros_like(each)).clamp(-LIMIT, LIMIT).exp()
        return ratio(torch.where(rows.mask, each, torch.zeros_like(each)).sum(1), rows.lengths.to(each.dtype))

    def preference(self, rows: Rows, right: Groups) -> Float[Tensor, "B"]:
        """Weights of the good completions, the largest of a prompt 1 before that of the row."""
        if math.isinf(self.length_temperature):
            return right.weight
        short = (1 - rows.lengths.to(right.weight.dtype) / self.max_length) / self.length_temperature
        top = right.broadcast(right.range(short)[1])
        return torch.where(right.weight > 0, right.weight * (short - top).exp(), torch.zeros_like(short))

    def _below(self, score: Float[Tensor, "B"], wrong: Groups) -> Float[Tensor, "N"]:
        """The soft maximum of the bad completions' scores."""
        if math.isinf(self.temperature):
            return wrong.mean(score)
        top = wrong.range(score.detach())[1]
        top = torch.where(top.isfinite(), top, torch.zeros_like(top))
        counted = wrong.weight > 0
        gap = torch.where(counted, (score - wrong.broadcast(top)) / self.temperature, torch.zeros_like(score))
        mean = wrong.mean(gap.exp())
        return top + self.temperature * torch.where(mean > 0, mean, torch.ones_like(mean)).log()


def prompt_weight(groups: Groups) -> Float[Tensor, "N"]:
    """How much a prompt counts among prompts: as its rows do on average, however many of them are scored."""
    weight = groups.sum(groups.weight)
    return weight if groups.exact else ratio(weight, groups.sum((groups.weight > 0).to(weight)))


@part("kl_hinge", paper=79)
@dataclass(frozen=True)
class KLHinge:
    """coef / 2 [K - delta]_+^2,   K = mean over tokens of log old - log pi, an estimate of KL(old || pi).

    Its gradient is coef [K - delta]_+ times that of K: none inside the trust region, where K may well be negative.

    Args:
        coef: beta.
        delta: KL per token, in nats, that is free.

    Raises:
        ValueError: a negative coef or delta.

    Source: "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization", 2025.
    """

    coef: float = 1e3
    delta: float = 1e-4
    needs = (LogProb(), OLD)
    additive = False

    def __post_init__(self) -> None:
        for name in ("coef", "delta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        moved = Aggregation("token_mean")(stats[OLD] - stats[LogProb()], rows)
        return self.coef / 2 * (moved - self.delta).clamp(min=0).square()
