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

from keel.core.aggregate import Groups, returns, weighted_mean
from keel.core.errors import KeelError, UserError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats
from keel.targets.moments import MomentFit, fit_multipliers

Samples = Literal["policy", "old", "behaviour", "reference"]
Memory = dict[str, Any]
MOMENTS = "moments"  # under which `moment_features` leaves the features of each row


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


@part("moment_target", paper=3)
@dataclass(frozen=True)
class MomentTarget:
    """The nearest distribution to the reference whose features have given means: P = ref exp(lambda . phi).

    A moment of 1 of a feature with values in [0, 1] cannot be met by a finite lambda: it is met exactly by
    P = ref [phi = 1], and one of 0 by P = ref [phi = 0]. The other lambdas are given, or fitted: until `fit_batches`
    batches are seen, their features and log ref - log q are kept, and after each of them Newton's method minimises
    the mean over prompts of log Z(lambda) - lambda . m on all that is kept. lambda is 0 in the first batch, so that the
    policy is still the reference; from then on the weights ref / q make up for its movement. Then it stays.

    Args:
        names: of the features, in the order of the column `moments` (see the transform `moment_features`).
        moments: the mean that each shall have.
        multipliers: lambda; None fits it. That of a moment of 0 or 1 is not used.
        fit_batches: batches from which lambda is fitted.
        track: step of lambda after the fit; 0 leaves it as it is.
        against: name of the reference.
        samples: what draws the rows, where that is measured when a batch is observed; else what was recorded.

    Raises:
        ValueError: not one moment, or multiplier, for each name; fit_batches below 1, or track below 0.
        UserError: after the last fit, a moment that nothing near the reference can have.

    Source: "A Distributional Approach to Controlled Text Generation", 2021.
    """

    names: tuple[str, ...] = ("reward",)
    moments: tuple[float, ...] = (0.5,)
    multipliers: tuple[float, ...] | None = None
    fit_batches: int = 4
    track: float = 0.0
    against: str = "ref"
    samples: Samples = "old"

    def __post_init__(self) -> None:
        check_samples(self.samples)
        for what, values in (("moments", self.moments), ("multipliers", self.multipliers or self.moments)):
            if not self.names or len(values) != len(self.names):
                raise ValueError(f"{len(self.names)} features need as many {what}, not {len(values)}")
        if self.fit_batches < 1:
            raise ValueError(f"fit_batches must be at least 1, not {self.fit_batches}")
        if not self.track >= 0:
            raise ValueError(f"track must not be negative, got {self.track}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference."""
        return (LogProb(of=(self.against,)),)

    @property
    def fitted(self) -> tuple[int, ...]:
        """Places of the features that have a finite multiplier."""
        return tuple(k for k, moment in enumerate(self.moments) if moment not in (0.0, 1.0))

    def init(self) -> Memory:
        """The multipliers, the batches seen, and what was kept of them."""
        start = self.multipliers or (0.0,) * len(self.names)
        done = self.multipliers is not None or not self.fitted
        return {
            "multipliers": torch.tensor(start, dtype=torch.float64),
            "batches": self.fit_batches if done else 0,
            "features": torch.zeros(0, 0, len(self.names), dtype=torch.float64),
            "log_weight": torch.zeros(0, 0, dtype=torch.float64),
        }

    def settled(self, state: Memory) -> bool:
        """Whether the multipliers stay as they are."""
        return self._done(state) and (self.track == 0 or not self.fitted)

    def _done(self, state: Memory) -> bool:
        return bool(state["batches"] >= self.fit_batches)

    def __call__(self, rows: Rows, stats: Stats, state: Memory) -> Float[Tensor, "B"]:
        phi, score = self.features(rows), of(self.against, rows, stats)
        for k, moment in enumerate(self.moments):
            if k in self.fitted:
                score = score + state["multipliers"][k].to(score) * phi[:, k].to(score)
            else:
                off = phi[:, k] != moment
                score = torch.where(off, torch.where(phi[:, k].isnan(), math.nan, -math.inf), score)
        return score

    def features(self, rows: Rows) -> Float[Tensor, "B K"]:
        """phi of each row.

        Raises:
            KeelError: the rows have no column for it, or one of another width.
        """
        phi = rows.features.get(MOMENTS)
        if phi is None or phi.shape[1] != len(self.names):
            raise KeelError(f"the rows have no '{MOMENTS}' of {len(self.names)} features", "moment_target")
        return phi

    def observe(self, rows: Rows, log_weight: Float[Tensor, "B"], metrics: dict, state: Memory) -> Memory:
        """Keep the batch, and fit again, until `fit_batches` are seen; metrics say the moments and the multipliers.

        Args:
            log_weight: log ref - log q.
        """
        phi, weight = self.features(rows).double().cpu(), (rows.weight * rows.main).double().cpu()
        valid = (weight > 0) & ~phi.isnan().any(1)
        for k, name in enumerate(self.names):
            metrics[f"moments/{name}"] = float(weighted_mean(phi[:, k], weight * valid))
        if not self._done(state) and bool(valid.any()):
            log_weight = log_weight.double().cpu() + weight.log()  # enumerated rows count at their probability
            state = self._fit(rows.group.cpu()[valid], phi[valid], log_weight[valid], metrics, state)
        elif self.track and bool(valid.any()):
            multipliers = state["multipliers"].clone()
            for k in self.fitted:
                multipliers[k] += self.track * (self.moments[k] - metrics[f"moments/{self.names[k]}"])
            state = state | {"multipliers": multipliers}
        for k in self.fitted:
            metrics[f"multipliers/{self.names[k]}"] = float(state["multipliers"][k])
        return state

    def _fit(self, group: Tensor, phi: Tensor, log_weight: Tensor, metrics: dict, state: Memory) -> Memory:
        features, weights = by_group(group, phi, log_weight)
        features, weights = _joined(state["features"], features, 0.0), _joined(state["log_weight"], weights, -math.inf)
        wanted, inner = list(self.fitted), weights
        for k, moment in enumerate(self.moments):  # a hard constraint comes first: ref given that it holds
            if k not in wanted:
                inner = inner.masked_fill(features[..., k] != moment, -math.inf)
        usable = (inner > -math.inf).any(1)
        multipliers, last = state["multipliers"].clone(), state["batches"] + 1 >= self.fit_batches
        if bool(usable.any()):
            asked = torch.tensor([self.moments[k] for k in wanted], dtype=torch.float64)
            found = _fitted(features[usable][..., wanted], asked, inner[usable], last)
            if found is not None:
                multipliers[wanted] = found.multipliers
                metrics["moments/kl"] = found.kl
        if last:  # what was kept is no longer needed
            features, weights = features[:0], weights[:0]
        kept = {"features": features, "log_weight": weights}
        return {"multipliers": multipliers, "batches": state["batches"] + 1, **kept}


def by_group(
    group: Tensor, features: Float[Tensor, "B K"], log_weight: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "N G K"], Float[Tensor, "N G"]]:
    """Rows side by side in their groups; places without a row have weight 0."""
    order = torch.argsort(group, stable=True)
    ids, counts = group[order].unique_consecutive(return_counts=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.arange(len(ids)).repeat_interleave(counts)
    width = int(counts.max())
    wide = features.new_zeros(len(ids), width, features.shape[1])
    weights = log_weight.new_full((len(ids), width), -math.inf)
    wide[index, place], weights[index, place] = features[order], log_weight[order]
    return wide, weights


def _joined(kept: Tensor, new: Tensor, padding: float) -> Tensor:
    """Groups of two batches, padded to the larger size."""
    width = max(kept.shape[1], new.shape[1])
    parts = []
    for part_ in (kept, new):
        wide = part_.new_full((part_.shape[0], width, *part_.shape[2:]), padding)
        wide[:, : part_.shape[1]] = part_
        parts.append(wide)
    return torch.cat(parts)


def within_reach(
    features: Float[Tensor, "N G K"], moments: Float[Tensor, "K"], log_weight: Float[Tensor, "N G"]
) -> Float[Tensor, "K"]:
    """The moments, each at least 2% of its range away from the ends of what weights on these rows can give it."""
    gone = (log_weight == -math.inf)[..., None]
    highest = features.masked_fill(gone, -math.inf).amax(1).mean(0)
    lowest = features.masked_fill(gone, math.inf).amin(1).mean(0)
    room = 0.02 * (highest - lowest)
    return torch.minimum(torch.maximum(moments, lowest + room), highest - room)


def _fitted(features: Tensor, moments: Tensor, log_weight: Tensor, last: bool) -> MomentFit | None:
    """The fit, before the last one with moments that can be reached; None where even these exclude one another."""
    try:
        return fit_multipliers(features, moments, log_weight)
    except ValueError as error:
        if last:
            fix = "Ask for less, or show more of the reference: raise num_generations or fit_batches."
            raise UserError(f"{error}; this is of the reference's completions", "moments", fix) from error
    try:
        return fit_multipliers(features, within_reach(features, moments, log_weight), log_weight)
    except ValueError:
        return None


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, not {value}")
