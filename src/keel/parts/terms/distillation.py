"""Distillation losses of single tokens, [B, T]: what the policy should take over from a teacher at each position."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.family import f_divergence
from keel.parts.weights.drawn import MixtureWeight
from keel.statistics.functionals import Divergence, Entropy, Functional, LogProb
from keel.statistics.stats import Stats
from keel.statistics.teachers import LogProbsAt, PlackettLuce
from keel.statistics.transforms import Temperature

Tail = Literal["bucket", "renormalise"]
IDS, LOG_PROBS, REST, SHARE = "teacher_ids", "teacher_logp", "teacher_rest", "target_share"


@part("teacher_divergence")
@dataclass(frozen=True)
class TeacherDivergence:
    """tau^2 D(policy_tau, teacher_tau) over the whole vocabulary at each position, w of its state.

    The gradient of a softened distribution shrinks as 1 / tau^2, for which the factor makes up. The visited states are
    held fixed: what a token does to later states is not in the gradient.

    Args:
        kind: an f-divergence by name, policy first: kl_ref_policy is KL(teacher || policy), "forward KL",
            kl_policy_ref KL(policy || teacher), js:0.1 GKD's with weight 0.1 on the teacher ...
        against: name of the teacher.
        temperature: tau of the policy, beside the one of the rollout.
        teacher_temperature: of the teacher; None takes the same.
        squared: multiply by tau^2 (the policy's times the teacher's temperature).
        correction: weight of a state that a mixture of policy and teacher has visited: none, or pi_old / mixture of
            what led to it (prefix), or of the token itself (token); rows of the policy have weight 1.
        cap: largest weight.

    Raises:
        ValueError: an unknown kind or correction, or a temperature that is not positive.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; "On-Policy Distillation of Language
    Models: Learning from Self-Generated Mistakes" (GKD), 2024.
    """

    kind: str = "kl_ref_policy"
    against: str = "teacher"
    temperature: float = 1.0
    teacher_temperature: float | None = None
    squared: bool = True
    correction: Literal["none", "prefix", "token"] = "none"
    cap: float | None = None
    additive = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(f_divergence(self.kind)))
        if self.correction not in ("none", "prefix", "token"):
            raise ValueError(f"correction must be none, prefix or token, not '{self.correction}'")
        if self.teacher_temperature is not None and not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature must be positive, not {self.teacher_temperature}")
        _ = self.needs

    @property
    def needs(self) -> tuple[Functional, ...]:
        """One divergence, and the policy that sampled where states are weighted."""
        heats = (self.temperature, self.teacher_temperature)
        found = Divergence(self.kind, self.against, temperature=heats[0], against_temperature=heats[1])
        return (found, *(() if self._weight is None else self._weight.needs))

    @property
    def _weight(self) -> MixtureWeight | None:
        return None if self.correction == "none" else MixtureWeight(self.correction, self.cap)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        other = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        value = stats[self.needs[0]] * (self.temperature * other if self.squared else 1.0)
        return value if self._weight is None else value * self._weight(rows, stats)


@part("balanced_kl", paper=7)
@dataclass(frozen=True)
class BalancedKL:
    """tau^2 (wF KL(teacher || policy) + wR KL(policy || teacher)), the stronger one by the gap of the entropies.

        (wF, wR) = (nu, 1)  where H(teacher) > H(policy): the policy is too sure, and covering raises its entropy
                   (1, nu)  elsewhere, ties included: the policy is too diffuse, and mode-seeking lowers it

    Entropies and divergences are those at temperature tau; the gate has no gradient. nu = 1 is Jeffreys' divergence.

    Args:
        nu: weight of the stronger one, at least 1.
        temperature: tau.
        against: name of the teacher.

    Raises:
        ValueError: nu below 1, or a temperature that is not positive.

    Source: "BD-KD: Balancing the Divergences for Online Knowledge Distillation", 2024, of which the weights are a
    reconstruction; the paper trains the teacher as well, here it is frozen.
    """

    nu: float = 2.0
    temperature: float = 1.0
    against: str = "teacher"
    additive = True

    def __post_init__(self) -> None:
        if self.nu < 1:
            raise ValueError(f"nu must be at least 1, not {self.nu}")
        _ = self.needs

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Both divergences and both entropies."""
        heat = None if self.temperature == 1.0 else Temperature(self.temperature)
        return (
            Divergence("kl_ref_policy", self.against, temperature=self.temperature),
            Divergence("kl_policy_ref", self.against, temperature=self.temperature),
            Entropy(transform=heat),
            Entropy(of=(self.against,), transform=heat),
        )

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        forward, reverse, own, teacher = (stats[need] for need in self.needs)
        sure = teacher.detach() > own.detach()
        covering, seeking = (torch.where(sure, self.nu, 1.0), torch.where(sure, 1.0, self.nu))
        return self.temperature**2 * (covering.to(forward) * forward + seeking.to(forward) * reverse)


@part("listwise_distillation", paper=15)
@dataclass(frozen=True)
class ListwiseDistillation:
    """Likelihood of the teacher's ranking of the vocabulary, the token of the data first; see `PlackettLuce`.

    Each choice has the teacher's probability as its weight: a teacher that is sure of the data's token leaves the
    cross-entropy. It is used alone, without a cross-entropy beside it. Its minimiser is not the teacher.

    Args:
        k: tokens that are ranked beside that of the data; None ranks all, which sorts the vocabulary.
        temperature: of the teacher's weights.
        renormalise: weights that sum to 1 over what is ranked; False keeps the teacher's probabilities.
        against: name of the teacher.

    Raises:
        ValueError: k below 1, or a temperature that is not positive.

    Source: "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025.
    """

    k: int | None = 32
    temperature: float = 1.0
    renormalise: bool = False
    against: str = "teacher"
    additive = True

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The list loss of each position."""
        return (PlackettLuce(self.against, self.k, self.temperature, self.renormalise),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        return stats[self.needs[0]]


@part("stored_divergence")
@dataclass(frozen=True)
class StoredDivergence:
    """D(policy, teacher) from the k likeliest tokens of the teacher that the rows' columns hold.

        bucket        k + 1 outcomes: the named tokens, and all others as one. At most the divergence over the
                      vocabulary, which it is where k is the vocabulary
        renormalise   both distributions given that the token is a named one: the mass that the policy has elsewhere
                      costs nothing

    The columns are teacher_ids and teacher_logp, [B, T, k], and teacher_rest, [B, T], the log-mass that is not named.

    Args:
        kind: an f-divergence by name, policy first.
        tail: which of the two.

    Raises:
        ValueError: an unknown kind or tail, or rows without these columns.

    Source: top-k distillation, as common; `keel.train.teachers.store_top_k` writes the columns.
    """

    kind: str = "kl_ref_policy"
    tail: Tail = "bucket"
    additive = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(f_divergence(self.kind)))
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, not '{self.tail}'")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy at the named tokens."""
        return (LogProbsAt(IDS, rest=self.tail == "bucket"),)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        _check_columns(rows)
        own, teacher = stats[self.needs[0]], rows.columns[LOG_PROBS].to(stats[self.needs[0]])
        if self.tail == "bucket":
            teacher = torch.cat([teacher, rows.columns[REST].to(teacher)[..., None]], -1)
        else:
            own = own - own.logsumexp(-1, keepdim=True)
            teacher = teacher.log_softmax(-1)
        counted = rows.mask[..., None]
        nothing = own.new_full((), -math.log(own.shape[-1]))  # padding holds anything
        return f_divergence(self.kind).value(own.where(counted, nothing), teacher.where(counted, nothing))


@part("mixed_target", paper=168)
@dataclass(frozen=True)
class MixedTarget:
    """Cross-entropy to (1 - alpha) [the token of the data] + alpha P, P the distribution that the rows' columns hold.

        -(1 - alpha) log pi(y_t) - alpha sum_i P_i log pi_i,    the gradient of a logit pi_v - target_v

    P is that of the named tokens, renormalised over them. Rows say alpha themselves, in their column target_share.

    Raises:
        ValueError: rows without the columns.

    Source: "Self-Knowledge Distillation with Progressive Refinement of Targets", 2021 (PS-KD).
    """

    additive = True

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy at the token of the data, and at the named tokens."""
        return (LogProb(), LogProbsAt(IDS))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        _check_columns(rows, SHARE)
        own = stats[LogProbsAt(IDS)]
        known = rows.columns[LOG_PROBS].to(own).where(rows.mask[..., None], 0.0).softmax(-1)
        cross = -torch.where(known > 0, known * own, torch.zeros_like(own)).sum(-1)
        alpha = rows.columns[SHARE].to(own)[:, None]
        return (1 - alpha) * -stats[LogProb()] + alpha * cross


def _check_columns(rows: Rows, *more: str) -> None:
    for name in (IDS, LOG_PROBS, *more):
        if name not in rows.columns:
            raise ValueError(f"the rows have no column '{name}': a transform, or the data, must bring it")
