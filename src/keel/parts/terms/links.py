"""Links of two scores: losses that fall as the chosen score leads the rejected one.

w and l are the scores of the chosen and of the rejected completion, beta included, and z = w - l - offset. Links that
read each score by itself (`both`) take half of the offset off w and add the other half to l.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from keel.core.registry import part
from keel.divergences.family import f_divergence

LOGISTIC = "logistic"  # the convex function of `Bregman` that is DPO
LIMIT = 20.0  # |log R| beyond which a Bregman loss goes on as a straight line


@part("log_sigmoid")
@dataclass(frozen=True)
class LogSigmoid:
    """-log sigmoid(S_w - S_l - offset): the Bradley-Terry likelihood of DPO.

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023.
    """

    both = False

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return softplus(offset - (chosen - rejected))


@part("hinge")
@dataclass(frozen=True)
class Hinge:
    """max(0, margin - z).

    Args:
        margin: lead from which on nothing is learnt, in units of the scores.

    Source: Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023; with scores against a
    reference as in TRL.
    """

    margin: float = 1.0
    both = False

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return (self.margin + offset - (chosen - rejected)).clamp(min=0)


@part("squared_to_target")
@dataclass(frozen=True)
class SquaredToTarget:
    """((z - target) / unit)^2.

    With scores beta S, target 1/2 and unit beta it is IPO's (S_w - S_l - 1 / (2 beta))^2; with target 0 and a gap of
    rewards as the offset it is REBEL's.

    Args:
        target: the lead that is wanted.
        unit: what the distance is measured in.

    Raises:
        ValueError: a unit of 0.

    Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023 (IPO);
    Gao et al., "REBEL: Reinforcement Learning via Regressing Relative Rewards", 2024.
    """

    target: float = 0.5
    unit: float = 1.0
    both = False

    def __post_init__(self) -> None:
        if self.unit == 0:
            raise ValueError("unit must not be 0: the distance is divided by it")

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return ((chosen - rejected - offset - self.target) / self.unit).square()


@part("exo_pair")
@dataclass(frozen=True)
class EXO:
    """KL(Bernoulli(q) || Bernoulli(1 - epsilon)), q = sigmoid(z): the reverse KL where DPO has the forward one.

    Args:
        epsilon: probability that the order of a pair is wrong; at 0 the divergence is infinite.

    Raises:
        ValueError: epsilon outside (0, 0.5).

    Source: Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", 2024, eq. 16.
    """

    epsilon: float = 1e-3
    both = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must be in (0, 0.5), not {self.epsilon}: without noise the loss is infinite")

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        z = chosen - rejected - offset
        right, wrong = torch.tensor([1 - self.epsilon, self.epsilon], dtype=z.dtype, device=z.device).log()
        return z.sigmoid() * (logsigmoid(z) - right) + (-z).sigmoid() * (logsigmoid(-z) - wrong)


@part("nca_pair")
@dataclass(frozen=True)
class NCA:
    """-log sigmoid(w) - log sigmoid(-w) / 2 - log sigmoid(-l) / 2: each completion against noise, K = 2.

    Source: Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", 2024.
    """

    both = True

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        first, second = chosen - offset / 2, rejected + offset / 2
        return softplus(-first) + 0.5 * softplus(first) + 0.5 * softplus(second)


@part("bco_pair")
@dataclass(frozen=True)
class BCOPair:
    """-log sigmoid(w - shift) - log sigmoid(-(l - shift)): a classifier of good and bad, its logit the score.

    Args:
        shift: delta, what lies between the scores of good and of bad; a controller can follow their running mean.

    Source: Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", 2024; TRL has no shift.
    """

    shift: float = 0.0
    both = True

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        first, second = chosen - offset / 2, rejected + offset / 2
        return softplus(self.shift - first) + softplus(second - self.shift)


@part("apo_zero")
@dataclass(frozen=True)
class APOZero:
    """1 - sigmoid(w) + sigmoid(l): chosen completions become likelier, rejected ones less likely.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions", 2024, eq. 7.
    """

    both = True

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return (offset / 2 - chosen).sigmoid() + (rejected + offset / 2).sigmoid()


@part("apo_down")
@dataclass(frozen=True)
class APODown:
    """sigmoid(w) + 1 - sigmoid(z): both become less likely, the rejected one more so.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions", 2024, eq. 8.
    """

    both = True

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return (chosen - offset / 2).sigmoid() + (offset - (chosen - rejected)).sigmoid()


@part("sppo_hard")
@dataclass(frozen=True)
class SPPOHard:
    """((w - 1/2)^2 + (l + 1/2)^2) / unit^2: the winner's score goes to 1/2, the loser's to -1/2.

    Args:
        unit: the beta of the scores, with which it is (a - 1 / (2 beta))^2 + (d + 1 / (2 beta))^2 for log-ratios a, d.

    Raises:
        ValueError: a unit of 0.

    Source: Wu et al., "Self-Play Preference Optimization for Language Model Alignment", 2024, with hard labels.
    """

    unit: float = 0.1
    both = True

    def __post_init__(self) -> None:
        if self.unit == 0:
            raise ValueError("unit must not be 0: the distance is divided by it")

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        first, second = chosen - offset / 2, rejected + offset / 2
        return ((first - 0.5) / self.unit).square() + ((second + 0.5) / self.unit).square()


@part("discopop")
@dataclass(frozen=True)
class DiscoPOP:
    """(1 - k) (-log sigmoid(z)) + k exp(-z), k = sigmoid(z / tau): a loss that a language model found.

    It does not fall everywhere: at tau 0.05 its slope at z = 0 is +0.78, so that pairs whose scores are equal get into
    the wrong order first and may stay there.

    Args:
        tau: temperature of the blend.

    Raises:
        ValueError: tau that is not positive.

    Source: Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models", 2024, eq. 5.
    """

    tau: float = 0.05
    both = False

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, not {self.tau}")

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        z = chosen - rejected - offset
        exponential = (logsigmoid(z / self.tau) - z).exp()  # k exp(-z), which alone would be 0 * inf far below 0
        return (-z / self.tau).sigmoid() * softplus(-z) + exponential


@part("bregman")
@dataclass(frozen=True)
class Bregman:
    """h'(R) R - h(R) - h'(1 / R), R = exp(-z), h convex: the ratio of preferences matched in a Bregman divergence.

    The minimum over a population of pairs is DPO's for every h, but with labels that are certain most h let the loss
    fall without bound. Beyond |log R| = 20 the loss goes on as a straight line.

    Args:
        h: "logistic" ([R log R - (1 + R) log(1 + R)] / 2), which is DPO; or the generator of any divergence that
            `f_divergence` reads, up to a constant of the loss. "alpha:1+k" is Basu's power divergence of order k, and
            "0.25*alpha:1+k" the scaled one, whose gradient at R = 1 is DPO's.

    Raises:
        ValueError: an unknown h, or one without curvature.

    Source: Kim et al., "Preference Optimization by Estimating the Ratio of the Data Distribution", 2025.
    """

    h: str = LOGISTIC
    both = False

    def __post_init__(self) -> None:
        if self.h != LOGISTIC and not f_divergence(self.h).curvature:
            raise ValueError(f"'{self.h}' has no curvature: its loss would not know the order of a pair")

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        if self.h == LOGISTIC:
            return softplus(offset - (chosen - rejected))
        generator, log_ratio = f_divergence(self.h), offset - (chosen - rejected)
        near = log_ratio.clamp(-LIMIT, LIMIT)
        value = generator.u_f_prime(near) - generator.f(near) - generator.f_prime(-near)
        edge = near.detach()
        slope = (2 * edge).exp() * generator.f_second(edge) + (-edge).exp() * generator.f_second(-edge)
        return value + slope * (log_ratio - near)
