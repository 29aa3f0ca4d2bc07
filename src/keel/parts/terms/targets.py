"""Target distributions as parts: the unnormalised log-score of each row.

    score(y) = log P(y),     p = P / Z     for each prompt

A target knows nothing of how a policy is brought to it; see `keel.parts.terms.matching`. Rows that a target cannot
score are NaN and are left out.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, returns
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Samples = Literal["policy", "old", "behaviour", "reference"]
Memory = dict[str, Any]


@runtime_checkable
class Target(Protocol):
    """Called as target(rows, stats); one with memory has `init`, gets its state as well, and observes batches."""

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The frozen functionals that it reads."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B"]:
        """log P of each row, NaN where there is none."""
        ...


def sequence(log_prob: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, "B"]:
    """log pi(y | x): the sum over the mask, at least in fp32."""
    wide = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
    return torch.where(rows.mask, wide, torch.zeros_like(wide)).sum(1)


def of(model: str, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
    """log-probability of whole sequences under a model by name."""
    return sequence(stats[LogProb(of=(model,))], rows)


def sampler_needs(samples: Samples) -> tuple[Functional, ...]:
    """What `sampler_log_prob` reads."""
    model = {"policy": "policy", "old": "old", "reference": "ref"}.get(samples)
    return () if model is None else (LogProb(of=(model,)),)


def sampler_log_prob(samples: Samples, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
    """log q(y | x) of what drew the rows, without gradient.

    Args:
        samples: policy, as it is now; old, as it was when the batch was prepared; behaviour, the numbers recorded when
            the rows were drawn; reference.

    Raises:
        ValueError: behaviour, but nothing was recorded.
    """
    if samples != "behaviour":
        return of({"reference": "ref"}.get(samples, samples), rows, stats).detach()
    if "behaviour" not in rows.logp:
        raise ValueError("these rows do not say with which probability they were drawn: use samples='old'")
    return sequence(rows.logp["behaviour"], rows)


def check_samples(samples: str) -> None:
    """Refuse an unknown sampler.

    Raises:
        ValueError: not one of policy, old, behaviour, reference.
    """
    if samples not in get_args(Samples):
        raise ValueError(f"samples '{samples}' is not one of {', '.join(get_args(Samples))}")


@part("tilt_target", paper=[3, 19])
@dataclass(frozen=True)
class TiltTarget:
    """log P = log ref + r / beta: the optimum of E[r] - beta KL(policy || ref), with Z = E_ref[exp(r / beta)].

    Args:
        beta: positive.
        against: name of the reference.

    Raises:
        ValueError: beta is not positive.

    Source: "RL with KL penalties is better viewed as Bayesian inference", 2022.
    """

    beta: float = 0.1
    against: str = "ref"

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference."""
        return (LogProb(of=(self.against,)),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        return of(self.against, rows, stats) + returns(rows) / self.beta


@part("posterior_target", paper=216)
@dataclass(frozen=True)
class PosteriorTarget:
    """log P = log ref + log p(good | y): the reference, given that the answer is a good one.

        exponential   log p(good | y) = (r - centre) / gamma             the tilt with beta = gamma
        sigmoid       log p(good | y) = log sigmoid((r - centre) / gamma)   better than an answer of reward `centre`

    Args:
        gamma: positive, in units of reward.
        centre: in units of reward; without effect on an exponential likelihood, whose Z takes it up.
        likelihood: exponential or sigmoid.
        against: name of the reference.

    Raises:
        ValueError: gamma is not positive, or an unknown likelihood.

    Source: "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
    2024.
    """

    gamma: float = 1.0
    centre: float = 0.0
    likelihood: Literal["exponential", "sigmoid"] = "exponential"
    against: str = "ref"

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)
        if self.likelihood not in ("exponential", "sigmoid"):
            raise ValueError(f"likelihood '{self.likelihood}' is not one of exponential, sigmoid")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference."""
        return (LogProb(of=(self.against,)),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        logit = (returns(rows) - self.centre) / self.gamma
        good = logit if self.likelihood == "exponential" else torch.nn.functional.logsigmoid(logit)
        return of(self.against, rows, stats) + good


@part("teacher_target")
@dataclass(frozen=True)
class TeacherTarget:
    """log P = log teacher, with Z = 1: another model's distribution, at the temperature of the rollout.

    Args:
        model: name of the teacher among the method's models.
    """

    model: str = "teacher"
    normalised = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The teacher."""
        return (LogProb(of=(self.model,)),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        return of(self.model, rows, stats)


@part("log_linear_target")
@dataclass(frozen=True)
class LogLinearTarget:
    """log P = sum_k w_k log pi_k: a geometric mean of models, or beyond one of them where a weight is negative.

    Args:
        models: names among the method's models.
        weights: one for each.

    Raises:
        ValueError: not one weight for each model.
    """

    models: tuple[str, ...] = ("ref",)
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.models or len(self.models) != len(self.weights):
            raise ValueError(f"{len(self.models)} models need as many weights, not {len(self.weights)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The models."""
        return tuple(LogProb(of=(model,)) for model in self.models)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        scores = [w * of(model, rows, stats) for model, w in zip(self.models, self.weights, strict=True)]
        return torch.stack(scores).sum(0)


@part("best_of_n_target")
@dataclass(frozen=True)
class BestOfNTarget:
    """The law of the best of n draws of the reference, with Z = 1.

        log P(y) = log ref(y) + log[(F^n - F-^n) / (F - F-)],     F the cumulative distribution of the reward under ref

    F at the row's reward and F- just below it are those of the row's own group, weighted by ref / q: exact where the
    rows are enumerated, an estimate otherwise, which needs groups well above n.

    Args:
        n: draws of which the best is taken, at least 1.
        against: name of the reference.
        samples: what drew the rows, q; see `sampler_log_prob`.

    Raises:
        ValueError: n below 1.

    Source: "BOND: Aligning LLMs with Best-of-N Distillation", 2024.
    """

    n: int = 4
    against: str = "ref"
    samples: Samples = "old"
    normalised = True

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.n < 1:
            raise ValueError(f"best-of-n needs n of at least 1, not {self.n}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference, and what drew the rows."""
        return (LogProb(of=(self.against,)), *sampler_needs(self.samples))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        reward, log_ref = returns(rows), of(self.against, rows, stats)
        log_weight = log_ref - sampler_log_prob(self.samples, rows, stats)
        groups = Groups.of(rows, ~reward.isnan())
        top = groups.broadcast(groups.range(log_weight)[1])
        counted = groups.weight > 0
        mass = torch.where(counted, groups.weight * (log_weight - top).exp(), torch.zeros_like(top))
        mass = mass / groups.broadcast(groups.sum(mass)).clamp(min=torch.finfo(mass.dtype).tiny)
        together = groups.index[:, None] == groups.index[None]
        below = (together & (reward[None] < reward[:, None])).to(mass.dtype) @ mass
        upto = (together & (reward[None] <= reward[:, None])).to(mass.dtype) @ mass
        ratio = (below / upto.clamp(min=torch.finfo(mass.dtype).tiny)).clamp(max=1.0)
        level = (self.n - 1) * upto.log() + torch.log1p(-ratio.pow(self.n)) - torch.log1p(-ratio)
        return torch.where(counted, log_ref + level, torch.full_like(level, math.nan))


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, not {value}")
