"""From a budget to its beta: the tilt with a given KL or a given reward, and how far a policy is from that frontier."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.targets.target import Target, kl_divergence, masked_product

HALVINGS = 120


@dataclass(frozen=True)
class Budget:
    """A point of the frontier of reward against KL(policy || ref).

    Args:
        inverse_beta: lambda = 1 / beta, shape [*n]; inf where the budget allows the reference on the best outcomes.
        log_prob: log phi, phi = q e^{lambda r} / Z, shape [*n, S].
        reward: E_phi[r], shape [*n].
        kl: KL(phi || q) in nats, shape [*n].
    """

    inverse_beta: Float[Tensor, "*n"]
    log_prob: Float[Tensor, "*n S"]
    reward: Float[Tensor, "*n"]
    kl: Float[Tensor, "*n"]

    @property
    def beta(self) -> Float[Tensor, "*n"]:
        """1 / lambda; 0 where lambda is infinite."""
        return 1 / self.inverse_beta

    @property
    def target(self) -> Target:
        """As a target."""
        return Target(self.log_prob)


def budget(
    log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], kl: float | Float[Tensor, "*n"], shared: bool = False
) -> Budget:
    """The most reward for a KL(policy || q) of at most `kl`.

        KL(phi_lambda || q) = lambda E_phi[r] - log Z(lambda) = kl;     lambda = inf if kl >= -log q(best outcomes)

    Args:
        log_ref: log q, shape [*n, S]; normalised here.
        reward: finite, shape [*n, S].
        kl: nats, not negative; one number, or one for each leading index.
        shared: one lambda for all leading indices, whose mean KL is the (then single) budget.

    Raises:
        ValueError: a negative budget, or one for each prompt where lambda is shared.

    Source: "Asymptotics of Language Model Alignment", Yang et al., 2024.
    """
    wanted = torch.as_tensor(kl, dtype=torch.float64)
    if bool((wanted < -1e-9).any()):
        raise ValueError(f"a KL budget must not be negative, not {kl}")
    return _point(log_ref, reward, wanted.clamp(min=0), lambda log_phi, log_q, _: kl_divergence(log_phi, log_q), shared)


def beta_for_reward(
    log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"], wanted: float | Float[Tensor, "*n"]
) -> Budget:
    """The tilt with E[r] = `wanted`, which is the nearest distribution to q, in KL(policy || q), with that reward.

    Raises:
        ValueError: less than the reference has, or more than any outcome has.
    """
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    now = masked_product(log_ref.double().softmax(-1), reward.double()).sum(-1)
    most = reward.double().masked_fill(log_ref == -math.inf, -math.inf).amax(-1)
    if bool((wanted < now - 1e-12).any()) or bool((wanted > most + 1e-12).any()):
        raise ValueError(
            f"a reward of {wanted.tolist()} is out of reach: the reference has {now.tolist()}, the best outcome "
            f"{most.tolist()}"
        )
    return _point(log_ref, reward, wanted, lambda log_phi, _, r: masked_product(log_phi.exp(), r).sum(-1), False)


def frontier_gap(
    log_p: Float[Tensor, "*n S"], log_ref: Float[Tensor, "*n S"], reward: Float[Tensor, "*n S"]
) -> Float[Tensor, "*n"]:
    """How far a policy is from the best policy at its own KL, in nats; 0 exactly for tilts of the reference.

        F(p) = KL(p || phi) = lambda (E_phi[r] - E_p[r]),     phi the tilt with KL(phi || q) = KL(p || q)

    It is inf where the policy's KL reaches -log q(best outcomes) and the policy is not on them alone.

    Args:
        log_p: normalised log-probabilities of the policy, shape [*n, S].
        log_ref: log q, shape [*n, S].
        reward: shape [*n, S].
    """
    log_q = log_ref.double().log_softmax(-1)
    phi = budget(log_q, reward, kl_divergence(log_p.double(), log_q))
    return phi.target.gap(log_p.double()).clamp(min=0).to(log_p)


def _point(log_ref: Tensor, reward: Tensor, wanted: Tensor, measure: Callable, shared: bool) -> Budget:
    """Bisection on log lambda for a quantity that grows with it."""
    log_q, r = log_ref.double().log_softmax(-1), reward.double()
    if not bool(r.isfinite().all()):
        raise ValueError("rewards must be finite")
    if shared and wanted.ndim:
        raise ValueError("one lambda for all prompts has one budget")
    level = r.masked_fill(log_q == -math.inf, -math.inf).amax(-1, keepdim=True)
    deficit = (level - r).clamp(min=0)
    span = deficit.masked_fill(log_q == -math.inf, 0).amax(-1)
    scale = span.amax() if shared else span
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))

    def at(log_s: Tensor) -> tuple[Tensor, Tensor]:
        """phi with lambda = e^s / span, and the quantity; the best outcomes alone for s = inf."""
        rate = (log_s.exp() / scale).expand(span.shape)[..., None]
        gain = torch.where(deficit == 0, torch.zeros_like(deficit), -rate * deficit)
        log_phi = (log_q + gain).log_softmax(-1)
        found = measure(log_phi, log_q, r)
        return log_phi, found.mean() if shared else found

    low = torch.full_like(scale, -50.0)
    high = torch.full_like(scale, 50.0)
    limit = at(torch.full_like(scale, math.inf))[1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = at(middle)[1] > wanted
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    log_s = torch.where(wanted >= limit, torch.full_like(low, math.inf), (low + high) / 2)
    log_s = torch.where(wanted <= at(torch.full_like(scale, -math.inf))[1], torch.full_like(low, -math.inf), log_s)
    log_phi, _ = at(log_s)
    inverse = (log_s.exp() / scale).expand(span.shape)
    gained = masked_product(log_phi.exp(), r).sum(-1)
    return Budget(inverse, log_phi, gained, kl_divergence(log_phi, log_q))
