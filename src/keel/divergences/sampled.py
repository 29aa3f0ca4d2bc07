"""f-divergences from samples: a value to look at, and a surrogate whose gradient is that of the divergence.

The two are different functions: the derivative of an unbiased value is in general not an unbiased derivative. With
u = pi / ref, rho = pi / pi_old and sg the stop-gradient:

    samples      value           surrogate
    policy       f(u) / u        sg(f'(u)) log pi
    old          rho f(u) / u    sg(rho f'(u)) log pi
    reference    f(u)            sg(u f'(u)) log pi

Each value has the mean D_f(pi || ref), each surrogate's gradient the mean grad D_f(pi || ref). On the policy's samples
-f'(u) is a pseudo-reward, from which any baseline may be subtracted.

Source: "Aligning Language Models with Preferences through f-divergence Minimization", 2023.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence

Samples = Literal["policy", "old", "reference"]
SAMPLES: tuple[str, ...] = get_args(Samples)


def sampled(
    divergence: FDivergence,
    samples: Samples,
    log_pi: Float[Tensor, "*n"],
    log_ref: Float[Tensor, "*n"],
    log_old: Float[Tensor, "*n"] | None = None,
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Value and surrogate of each sample, as in the table above; nothing is clamped.

    Args:
        divergence: which one, policy first.
        samples: who drew them: the policy, an older one, or the reference.
        log_pi: live log-probabilities of tokens or of whole sequences; the gradient flows through these alone.
        log_ref: those of the reference.
        log_old: those of the older policy.

    Returns:
        (value, surrogate); the value has no gradient, and the surrogate's own value means nothing.

    Raises:
        ValueError: an unknown source of samples, or samples of an older policy without `log_old`.
    """
    if samples not in SAMPLES:
        raise ValueError(f"samples '{samples}' is not one of {', '.join(SAMPLES)}")
    log_u = (log_pi - log_ref).detach()
    if samples == "reference":
        return divergence.f(log_u), divergence.u_f_prime(log_u) * log_pi
    value, slope = divergence.f_over_u(log_u), divergence.f_prime(log_u)
    if samples == "policy":
        return value, slope * log_pi
    if log_old is None:
        raise ValueError("samples of an older policy need its log-probabilities")
    rho = (log_pi - log_old).detach().exp()
    return rho * value, rho * slope * log_pi


def term(value: Float[Tensor, "*n"], surrogate: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """sg(value) + surrogate - sg(surrogate): the number of the one with the gradient of the other.

    >>> import torch
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = term(torch.tensor(5.0), 3 * x)
    >>> y.item(), torch.autograd.grad(y, x)[0].item()
    (5.0, 3.0)
    """
    return value.detach() + (surrogate - surrogate.detach())
