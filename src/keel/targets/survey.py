"""Which distribution settings ask for: targets of listed outcomes, side by side with their reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.targets.budget import budget
from keel.targets.moments import MomentFit, fit_multipliers
from keel.targets.partition import Partition, log_z_samples, log_z_sum
from keel.targets.target import best_of_n, kl_divergence, moments
from keel.targets.tilt import f_tilt

ROUNDING = 1e-4  # by which probabilities may miss the sum 1


@dataclass(frozen=True)
class Listed:
    """The outcomes of one prompt that are known.

    Args:
        names: of the outcomes, S of them.
        log_ref: log-probability under the reference, shape [S]; together at most 1, the rest is unseen.
        reward: shape [S].
        modes: what an outcome counts as, such as its final answer; outcomes of one mode are counted together.
        prompt: as it is shown.
        samples: outcome of each draw of the reference, shape [G], where the outcomes were found by sampling.

    Raises:
        ValueError: no outcomes, lengths that differ, a reward that is not finite, or more than 1 in all.
    """

    names: tuple[str, ...]
    log_ref: Float[Tensor, "S"]
    reward: Float[Tensor, "S"]
    modes: tuple[str, ...]
    prompt: str = ""
    samples: Int[Tensor, "G"] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.log_ref), len(self.reward), len(self.modes)}
        if lengths == {0} or len(lengths) > 1:
            raise ValueError("every outcome needs a name, a reference probability, a reward and a mode")
        if not bool(self.reward.isfinite().all()):
            raise ValueError("rewards must be finite")
        total = float(self.log_ref.exp().sum())
        if not 0 < total <= 1 + ROUNDING:
            raise ValueError(f"the probabilities of the reference sum to {total:.6g}, which is not at most 1")

    @property
    def unseen(self) -> float:
        """Reference probability of everything that is not listed."""
        rest = 1 - float(self.log_ref.exp().sum())
        return rest if rest > ROUNDING else 0.0


@dataclass(frozen=True)
class Wish:
    """One way to ask for a distribution; exactly one of beta, kl_budget, best_of and moments is given.

    Args:
        divergence: of the penalty, with beta.
        beta: of E[r] - beta D(policy || ref).
        kl_budget: the most reward for this mean KL(policy || ref), one beta for all prompts.
        best_of: the best of so many draws.
        moments: means by name: `reward`, `good`, or a mode.

    Raises:
        ValueError: none of the four, or more than one.
    """

    divergence: FDivergence = field(default_factory=lambda: f_divergence("kl_policy_ref"))
    beta: float | None = None
    kl_budget: float | None = None
    best_of: float | None = None
    moments: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if [self.beta, self.kl_budget, self.best_of, self.moments].count(None) != 3:
            raise ValueError("give one of beta, kl_budget, best_of and moments")

    @property
    def label(self) -> str:
        """A few words."""
        if self.beta is not None:
            return f"{self.divergence}, beta {self.beta:g}"
        if self.kl_budget is not None:
            return f"KL budget {self.kl_budget:g}"
        if self.best_of is not None:
            return f"best of {self.best_of:g}"
        return ", ".join(f"E[{name}] = {value:g}" for name, value in (self.moments or {}).items())


@dataclass(frozen=True)
class Facts:
    """A distribution over the listed outcomes, in numbers that are means over prompts.

    Args:
        reward: E[r].
        entropy: nats.
        kl: KL(distribution || reference), nats.
        good: mass on good outcomes; it and what follows are means over the prompts that have a good outcome.
        largest: mass of the likeliest good mode.
        largest_of_good: its share of the good mass.
        surviving: good modes with at least `keep` of the mass.
        effective: exp of the entropy of the shares of the good modes: how many equal ones they are worth.
    """

    reward: float
    entropy: float
    kl: float
    good: float
    largest: float
    largest_of_good: float
    surviving: float
    effective: float


@dataclass(frozen=True)
class Found:
    """The distribution that a wish asks for.

    Args:
        wish: what was asked.
        facts: of the distribution.
        log_prob: shape [n, S], -inf on padding.
        beta: asked for or solved; 0 where the best outcomes alone are wanted; None where there is none.
        divergence, value: D(target || ref) and E[r] - beta D, means over prompts; None without a penalty.
        partition: log Z, for tilts with KL(policy || ref).
        fit: of the multipliers, for moments.
    """

    wish: Wish
    facts: Facts
    log_prob: Float[Tensor, "n S"]
    beta: float | None = None
    divergence: float | None = None
    value: float | None = None
    partition: Partition | None = None
    fit: MomentFit | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers but the probabilities."""
        wish, fit = self.wish, self.fit
        errors = None if fit is None else fit.standard_error
        return {
            "label": wish.label,
            "divergence": None if self.beta is None else str(wish.divergence),
            "beta": self.beta,
            "kl_budget": wish.kl_budget,
            "best_of": wish.best_of,
            "moments": None if wish.moments is None else dict(wish.moments),
            **asdict(self.facts),
            "regulariser": self.divergence,
            "value": self.value,
            "log_z": None if self.partition is None else self.partition.to_json(),
            "multipliers": None if fit is None else fit.multipliers.tolist(),
            "multipliers_standard_error": None if errors is None else errors.tolist(),
            "multipliers_risk": None if fit is None else fit.risk,
        }


@dataclass(frozen=True)
class Survey:
    """Targets of listed outcomes.

    Args:
        prompts: their outcomes.
        good_from: the lowest reward of a good outcome; None takes the highest reward there is.
        keep: share of the target from which a mode counts as surviving.
    """

    prompts: tuple[Listed, ...]
    good_from: float | None = None
    keep: float = 0.01

    @cached_property
    def threshold(self) -> float:
        """The lowest reward of a good outcome."""
        if self.good_from is not None:
            return self.good_from
        return max(float(listed.reward[listed.log_ref > -math.inf].max()) for listed in self.prompts)

    @cached_property
    def log_ref(self) -> Float[Tensor, "n S"]:
        """Log-probabilities of the reference, normalised over what is listed; -inf on padding."""
        return self._padded([listed.log_ref for listed in self.prompts], -math.inf).log_softmax(-1)

    @cached_property
    def reward(self) -> Float[Tensor, "n S"]:
        """Rewards; 0 on padding."""
        return self._padded([listed.reward for listed in self.prompts], 0.0)

    @cached_property
    def good(self) -> Bool[Tensor, "n S"]:
        """Good outcomes that the reference has."""
        return (self.reward >= self.threshold) & (self.log_ref > -math.inf)

    def modes(self, place: int, log_prob: Float[Tensor, "n S"]) -> dict[str, float]:
        """Mass of the good outcomes of each mode of a prompt, the heaviest under the reference first."""
        listed = self.prompts[place]
        places = self.good[place].nonzero()[:, 0].tolist()
        weights = {name: 0.0 for name in (listed.modes[i] for i in places)}
        masses = dict(weights)
        for i in places:
            weights[listed.modes[i]] += float(self.log_ref[place, i].exp())
            masses[listed.modes[i]] += float(log_prob[place, i].exp())
        return {name: masses[name] for name in sorted(weights, key=weights.__getitem__, reverse=True)}

    def facts(self, log_prob: Float[Tensor, "n S"]) -> Facts:
        """A distribution in numbers."""
        p = log_prob.exp()
        held = [self.modes(place, log_prob) for place in range(len(self.prompts))]
        held = [masses for masses in held if masses]
        return Facts(
            reward=float((p * self.reward).sum(-1).mean()),
            entropy=-float(torch.where(p > 0, p * log_prob, torch.zeros_like(p)).sum(-1).mean()),
            kl=float(kl_divergence(log_prob, self.log_ref).mean()),
            good=_mean([sum(masses.values()) for masses in held]),
            largest=_mean([max(masses.values()) for masses in held]),
            largest_of_good=_mean([_share(max(masses.values()), sum(masses.values())) for masses in held]),
            surviving=_mean([sum(mass >= self.keep for mass in masses.values()) for masses in held]),
            effective=_mean([_effective(list(masses.values())) for masses in held]),
        )

    @cached_property
    def reference(self) -> Facts:
        """The reference in numbers."""
        return self.facts(self.log_ref)

    @property
    def good_modes(self) -> float:
        """Number of good modes, mean over the prompts that have one."""
        held = [len(self.modes(place, self.log_ref)) for place in range(len(self.prompts))]
        return _mean([count for count in held if count])

    def find(self, wish: Wish) -> Found:
        """The distribution that a wish asks for.

        Raises:
            ValueError: the wish cannot be met.
        """
        if wish.best_of is not None:
            log_p = best_of_n(self.log_ref, self.reward, wish.best_of).log_prob()
            return Found(wish, self.facts(log_p), log_p)
        if wish.moments is not None:
            return self._moments(wish, wish.moments)
        if wish.kl_budget is not None:
            point = budget(self.log_ref, self.reward, wish.kl_budget, shared=True)
            beta = float(point.beta[0])
            log_p = point.log_prob
        else:
            beta = float(wish.beta or 0.0)
            log_p = f_tilt(self.log_ref, self.reward, beta, wish.divergence).log_prob
        facts = self.facts(log_p)
        tilted = wish.divergence.name == "kl_policy_ref"
        cost = facts.kl * wish.divergence.scale if tilted else self._cost(wish, beta)
        partition = self._partition(beta * wish.divergence.scale) if tilted and 0 < beta < math.inf else None
        value = facts.reward - (beta * cost if beta < math.inf else 0.0)
        return Found(wish, facts, log_p, beta, cost, value, partition)

    def _cost(self, wish: Wish, beta: float) -> float:
        return float(f_tilt(self.log_ref, self.reward, beta, wish.divergence).divergence.mean())

    def _partition(self, beta: float) -> Partition:
        drawn = [listed.samples for listed in self.prompts]
        if any(samples is None for samples in drawn):
            return log_z_sum(self.log_ref + self.reward / beta)
        index = torch.stack([samples for samples in drawn if samples is not None])
        return log_z_samples(self.reward.gather(-1, index) / beta)

    def _moments(self, wish: Wish, means: Mapping[str, float]) -> Found:
        features = torch.stack([self._feature(name) for name in means], -1)
        wanted = torch.tensor(list(means.values()), dtype=torch.float64)
        try:
            fit = self._multipliers(features, wanted)
        except ValueError as error:
            raise ValueError(f"moments {', '.join(means)}: {error}") from None
        log_p = moments(self.log_ref, features, fit.multipliers).log_prob()
        return Found(wish, self.facts(log_p), log_p, fit=fit)

    def _multipliers(self, features: Float[Tensor, "n S K"], wanted: Float[Tensor, "K"]) -> MomentFit:
        """From the samples where there are some, which also tell the error."""
        drawn = [listed.samples for listed in self.prompts]
        if any(samples is None for samples in drawn):
            return fit_multipliers(features, wanted, self.log_ref)
        index = torch.stack([samples for samples in drawn if samples is not None])
        spread = index[..., None].expand(*index.shape, features.shape[-1])
        return fit_multipliers(features.gather(-2, spread), wanted, sampled=True)

    def _feature(self, name: str) -> Float[Tensor, "n S"]:
        if name == "reward":
            return self.reward
        if name == "good":
            return self.good.double()
        has = [[float(mode == name) for mode in listed.modes] for listed in self.prompts]
        if not any(any(row) for row in has):
            raise ValueError(f"there is no mode '{name}' for a moment; others are `reward` and `good`")
        return self._padded([torch.tensor(row, dtype=torch.float64) for row in has], 0.0)

    def _padded(self, rows: Sequence[Tensor], value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True, padding_value=value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _effective(masses: Sequence[float]) -> float:
    total = sum(masses)
    shares = [mass / total for mass in masses if mass > 0] if total > 0 else []
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else math.nan
