"""What a reward that can be measured says about one that cannot: correlation, the bound, the safe coefficient."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean
from keel.exact.occupancy import proxy_of


@dataclass(frozen=True)
class ProxyReport:
    """A policy under a proxy reward and under the true one.

    Args:
        correlation: R of the two under the reference.
        sd_true, sd_proxy: their standard deviations under the reference.
        safe_coefficient: sd_proxy sqrt(1 - R^2): with it, proxy - coefficient sqrt(chi2) never loses true reward.
        chi2: of the policy's completions (or occupancy) against the reference's.
        proxy_gain, true_gain: mean rewards of the policy less those of the reference.
        least_true_gain: what the proxy's gain promises of the true one at the least; nan for R <= 0.
    """

    correlation: float
    sd_true: float
    sd_proxy: float
    safe_coefficient: float
    chi2: float
    proxy_gain: float
    true_gain: float
    least_true_gain: float


def proxy_report(
    proxy: Float[Tensor, "n"],
    true: Float[Tensor, "n"],
    log_ratio: Float[Tensor, "n"],
    reference_proxy: Float[Tensor, "m"],
    reference_true: Float[Tensor, "m"],
    weight: Float[Tensor, "n"] | None = None,
    reference_weight: Float[Tensor, "m"] | None = None,
) -> ProxyReport:
    """How far a proxy can be trusted, from completions of a policy and of its reference.

        gain_true / sd_true  >=  ( gain_proxy / sd_proxy - sqrt((1 - R^2) chi2) ) / R,    chi2 = E_policy[u] - 1

    Args:
        proxy, true: rewards of the policy's completions.
        log_ratio: log u = log policy - log reference of each.
        reference_proxy, reference_true: rewards of the reference's completions.
        weight, reference_weight: probabilities where all outcomes are listed; None weighs alike.

    Raises:
        ValueError: a reward that is constant under the reference.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024.
    """
    own = torch.ones_like(proxy) if weight is None else weight
    other = torch.ones_like(reference_proxy) if reference_weight is None else reference_weight
    share = (other / other.sum()).double()
    seen = proxy_of(reference_true.double()[None], reference_proxy.double()[None], share[None])
    gains = [
        float(weighted_mean(there.double(), own.double()) - (share * here.double()).sum())
        for there, here in ((proxy, reference_proxy), (true, reference_true))
    ]
    chi2 = float(weighted_mean(torch.expm1(log_ratio.double()), own.double()))
    least = seen.least_true_gain(gains[0], chi2) if seen.correlation > 0 else float("nan")
    return ProxyReport(
        seen.correlation, seen.sd_true, seen.sd_proxy, seen.safe_coefficient, chi2, gains[0], gains[1], least
    )
