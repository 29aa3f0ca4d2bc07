"""Maps of whole log-ratios or log-probabilities, applied after the sum or the mean over tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.divergences.family import FDivergence, f_divergence

LARGEST = 80.0  # an exponent whose exponential fits fp32
_RATES = {
    "kl_ref_policy": 1.0,
    "jeffreys": 1.0,
    "chi2_policy_ref": 1.0,
    "chi2_ref_policy": 2.0,
    "hellinger": 0.5,
    "kl_chi2": 1.0,
    "kl_policy_ref": 0.0,
    "js": 0.0,
}  # the largest factor of log u in an exponent of f'


@part("f_prime", paper=10)
@dataclass(frozen=True)
class FPrime:
    """f'(u), u = pi / ref of the whole completion: the score of DPO held by D_f in place of the reverse KL.

    At the optimum of E_pi[r] - beta D_f the reward is beta f'(u) plus a constant of the prompt, so that only
    differences of scores mean anything, but for the reverse KL, where f' is the log-ratio. Exponents are cut at 80.

    Args:
        divergence: a name that `f_divergence` reads, in its convention: the paper's Jensen-Shannon is "2*js", its alpha
            is "alpha:1-a" (TRL's coefficient is 1 - a, too).

    Raises:
        ValueError: an unknown divergence, or one whose f' is flat (total variation), from which nothing can be learnt.

    Source: Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", 2024.
    """

    divergence: str = "kl_ref_policy"

    def __post_init__(self) -> None:
        if not self._f.curvature:
            raise ValueError(f"f' of '{self.divergence}' is flat: no loss of it has a gradient")

    @property
    def _f(self) -> FDivergence:
        return f_divergence(self.divergence)

    @property
    def difference_only(self) -> bool:
        """Whether a constant of the prompt is undetermined."""
        return self._f.name != "kl_policy_ref"

    def __call__(self, log_ratio: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        kind = self._f
        rate = abs(1 - (kind.parameter or 0.0)) if kind.name == "alpha" else _RATES.get(kind.name, 1.0)
        bound = LARGEST / rate if rate else torch.inf
        return kind.f_prime(log_ratio.clamp(-bound, bound))


@part("alpha_reward")
@dataclass(frozen=True)
class AlphaReward:
    """(1 - exp(-alpha z)) / alpha; z itself at alpha 0. Exponents are cut at 80.

    Args:
        alpha: how much the reward bends: above 0 unlikely completions are pushed harder.

    Source: Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", 2025.
    """

    alpha: float = 0.25

    @property
    def difference_only(self) -> bool:
        """Whether a constant of the prompt is undetermined, as for an f-divergence."""
        return self.alpha != 0

    def __call__(self, log_ratio: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        if self.alpha == 0:
            return log_ratio
        return -torch.expm1((-self.alpha * log_ratio).clamp(max=LARGEST)) / self.alpha


@part("log_odds")
@dataclass(frozen=True)
class LogOdds:
    """log(p / (1 - p)), z = log p <= 0: ORPO's odds of a completion by the mean log-probability of its tokens.

    Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024.
    """

    difference_only = False

    def __call__(self, log_ratio: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        z = log_ratio.clamp(max=-1e-20)  # a completion of probability 1 has finite odds, too
        likely = z > -0.6931
        near, far = torch.where(likely, z, -1.0), torch.where(likely, -1.0, z)
        return z - torch.where(likely, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))
