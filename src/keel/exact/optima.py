"""The exact optimum of a regularised objective in an enumerable world, with all that one reports of it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence
from keel.targets.target import Target
from keel.targets.tilt import f_tilt


@dataclass(frozen=True)
class Optimum:
    """What maximises E[r] - beta D(policy || ref), for each prompt.

    Args:
        log_prob: of the optimum, shape [*Q, S]; -inf where it has no mass.
        prob: shape [*Q, S].
        value: of the objective, shape [*Q].
        reward: E[r], shape [*Q].
        divergence: D(optimum || ref), shape [*Q].
        kl: KL(optimum || ref) in nats, whatever the divergence, shape [*Q].
        entropy: nats, shape [*Q].
        multiplier: of the normalisation, in units of reward, shape [*Q]; beta log Z for KL(policy || ref).
    """

    log_prob: Float[Tensor, "*Q S"]
    prob: Float[Tensor, "*Q S"]
    value: Float[Tensor, "*Q"]
    reward: Float[Tensor, "*Q"]
    divergence: Float[Tensor, "*Q"]
    kl: Float[Tensor, "*Q"]
    entropy: Float[Tensor, "*Q"]
    multiplier: Float[Tensor, "*Q"]


def optimum(
    reward: Float[Tensor, "*Q S"],
    ref_log_prob: Float[Tensor, "*Q S"],
    beta: float,
    divergence: str | FDivergence = "kl_policy_ref",
) -> Optimum:
    """The optimum over all policies of E[r] - beta D(policy || ref), by enumeration.

    Args:
        reward: of each outcome, finite, shape [*Q, S].
        ref_log_prob: log-probabilities of the reference, shape [*Q, S]; normalised here.
        beta: strength of the regulariser, positive.
        divergence: a name such as `kl_policy_ref`, `js`, `alpha:0.5`, or an `FDivergence`.

    Raises:
        ValueError: beta is not positive, or a reward is not finite.
    """
    found = f_tilt(ref_log_prob, reward, beta, divergence)
    target = Target(found.log_prob)
    log_ref = ref_log_prob.log_softmax(-1).to(found.log_prob)
    return Optimum(
        log_prob=found.log_prob,
        prob=found.log_prob.exp(),
        value=found.value,
        reward=found.reward,
        divergence=found.divergence,
        kl=FDivergence("kl_policy_ref").value(found.log_prob, log_ref),
        entropy=target.entropy(),
        multiplier=found.multiplier,
    )
