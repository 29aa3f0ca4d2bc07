"""How much more often a policy visits a place than the reference does, learnt from visits of both."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.aggregate import weighted_mean
from keel.models.state_head import StateHead, fit


def discriminator_loss(
    policy: Float[Tensor, "n"],
    reference: Float[Tensor, "m"],
    policy_weight: Float[Tensor, "n"] | None = None,
    reference_weight: Float[Tensor, "m"] | None = None,
) -> Float[Tensor, ""]:
    """E_policy[softplus(-d)] + E_reference[softplus(d)], least where d = log(mu_policy / mu_reference).

    Args:
        policy, reference: d at what either visits.
        policy_weight, reference_weight: of the visits; None weighs them alike.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024.

    >>> float(discriminator_loss(torch.zeros(3), torch.zeros(2))) / 2  # log 2: it knows nothing
    0.6931471824645996
    """
    own = torch.ones_like(policy) if policy_weight is None else policy_weight
    other = torch.ones_like(reference) if reference_weight is None else reference_weight
    return weighted_mean(softplus(-policy), own) + weighted_mean(softplus(reference), other)


def fit_density_ratio(
    policy: Float[Tensor, "n D"],
    reference: Float[Tensor, "m D"],
    *,
    width: int = 256,
    epochs: int = 20,
    batch_size: int = 2048,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> StateHead:
    """A head whose number at a place is d = log(mu_policy / mu_reference); `keel.parts.rewards.occupancy.slope` makes a
    reward of it.

    A completion of a language model needs none: its d is the log-ratio of the two likelihoods.

    Args:
        policy, reference: features of the states and actions that either visits.
        width, epochs, batch_size, learning_rate, seed: of the head and its training.

    Raises:
        DataError: no visits.
        ValueError: visits of one side only.
    """
    if bool(len(policy)) != bool(len(reference)):
        raise ValueError("a ratio needs visits of the policy and of the reference")
    own = torch.cat([torch.ones(len(policy)), torch.zeros(len(reference))]).bool().to(policy.device)
    both = len(policy) + len(reference)
    share = torch.where(own, both / max(1, len(policy)), both / max(1, len(reference)))  # 2 on average

    def loss(d: Float[Tensor, "b 1"], places: Tensor) -> Float[Tensor, ""]:
        each = torch.where(own[places], softplus(-d[:, 0]), softplus(d[:, 0]))
        return (share[places] * each).mean()

    settings = {"width": width, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    return fit(torch.cat([policy, reference]), loss, learning_rate=learning_rate, **settings)
