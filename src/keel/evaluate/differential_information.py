"""What an update adds to a policy: the ratio of the new to the old likelihoods, normalised, and its entropy.

    D_{q/p}(y) = (q(y) / p(y)) / sum_y' q(y') / p(y')

DPO with coefficient beta has pi* as its optimum exactly where D_{ref/rejected} is proportional to D_{pi*/ref}^beta.
Little entropy means that few completions have gained, so that their likelihood rises; much entropy goes with chosen
completions whose likelihood falls although the margin grows. It is the entropy of a ratio, not that of the policy.

Source: "Differential Information: An Information-Theoretic Perspective on Preference Optimization", 2025.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def differential_information(log_q: Float[Tensor, "*Q Y"], log_p: Float[Tensor, "*Q Y"]) -> Float[Tensor, "*Q Y"]:
    """log D_{q/p} over a finite set of completions; log-probabilities need no normalisation.

    >>> ref, new = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    >>> differential_information(new, ref).exp().tolist()
    [0.10256..., 0.25641..., 0.64102...]

    Raises:
        ValueError: p is 0 somewhere: the ratio needs a reference of full support.
    """
    if bool((log_p == -math.inf).any()):
        raise ValueError("log_p must be finite: the ratio needs a reference that gives everything some probability")
    return (log_q - log_p).log_softmax(-1)


def information_entropy(log_q: Float[Tensor, "*Q Y"], log_p: Float[Tensor, "*Q Y"]) -> Float[Tensor, "*Q"]:
    """H = -sum_y D log D in nats, at most log Y; the largest where p and q are equal.

    Raises:
        ValueError: p is 0 somewhere.
    """
    log_d = differential_information(log_q, log_p)
    d = log_d.exp()
    return -torch.where(d > 0, d * log_d, torch.zeros_like(d)).sum(-1)


@dataclass(frozen=True)
class InformationEstimate:
    """The entropy of the ratio, estimated from K samples.

    Args:
        entropy: in nats; biased at small K, as all self-normalised estimates are.
        log_z: log sum_y q(y) / p(y), the estimate of the normaliser.
        effective_samples: (sum w)^2 / sum w^2 of the K importance weights, between 1 and K. Weights of whole sequences
            have a huge variance: near 1, the entropy says nothing.
    """

    entropy: Float[Tensor, "*Q"]
    log_z: Float[Tensor, "*Q"]
    effective_samples: Float[Tensor, "*Q"]


def estimate_information(
    log_ratio: Float[Tensor, "*Q K"], log_proposal: Float[Tensor, "*Q K"], enumerated: bool = False
) -> InformationEstimate:
    """The entropy of D_{q/p} from completions y_k that a proposal s has drawn.

        log w_k = log(q / p)(y_k) - log s(y_k),    W = softmax(log w),    H = log Z - sum_k W_k log(q / p)(y_k)

    with log Z = logsumexp(log w) - log K.

    Args:
        log_ratio: log(q / p) of each completion, summed over its tokens.
        log_proposal: log s of each completion, the same way.
        enumerated: the K completions are all there are, each once, and s is 1 / K: then the estimate is exact.

    Raises:
        ValueError: no samples; or enumerated ones whose proposal is not uniform.

    Source: the module's; K = 32 a prompt there.
    """
    count = log_ratio.shape[-1]
    if not count:
        raise ValueError("log_ratio must have at least one sample")
    if enumerated and not torch.allclose(log_proposal, torch.full_like(log_proposal, -math.log(count))):
        raise ValueError("log_proposal must be -log K where every completion stands once")
    log_w = log_ratio - log_proposal
    weight = log_w.softmax(-1)
    log_z = log_w.logsumexp(-1) - math.log(count)
    return InformationEstimate(log_z - (weight * log_ratio).sum(-1), log_z, 1 / weight.square().sum(-1))


def rejected_sampler(
    log_ref: Float[Tensor, "*Q Y"], log_target: Float[Tensor, "*Q Y"], beta: float
) -> Float[Tensor, "*Q Y"]:
    """log pi_l = log ref + beta (log ref - log target) - log Z: who should draw the rejected completions.

    With chosen ones from the reference and rejected ones from pi_l, DPO at this beta has the target as its optimum.
    """
    return (log_ref + beta * (log_ref - log_target)).log_softmax(-1)


def dpo_optimum(
    log_ref: Float[Tensor, "*Q Y"], log_chosen: Float[Tensor, "*Q Y"], log_rejected: Float[Tensor, "*Q Y"], beta: float
) -> Float[Tensor, "*Q Y"]:
    """The policy to which DPO goes where chosen and rejected completions are drawn independently.

        log pi = log ref + (log chosen - log rejected) / beta - log Z

    Of two completions of which one is from either sampler, y is the chosen one with the probability
    sigmoid(log(chosen / rejected)(y) - log(chosen / rejected)(y')), and DPO fits beta log(pi / ref) to that.

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    return (log_ref + (log_chosen - log_rejected) / beta).log_softmax(-1)


def power_law_gap(
    log_ref: Float[Tensor, "*Q Y"], log_rejected: Float[Tensor, "*Q Y"], log_target: Float[Tensor, "*Q Y"], beta: float
) -> Float[Tensor, "*Q"]:
    """How far D_{ref/rejected} is from D_{target/ref}^beta, normalised: half the sum of absolute differences.

    0 is the condition under which DPO at this beta has the target as its optimum.
    """
    found = differential_information(log_ref, log_rejected).exp()
    wanted = (beta * (log_target - log_ref)).softmax(-1)
    return 0.5 * (found - wanted).abs().sum(-1)
