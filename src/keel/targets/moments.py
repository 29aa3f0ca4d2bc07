"""Targets with prescribed moments: the nearest distribution to the reference under which features have given means."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MAX_STEPS = 200
TOLERANCE = 1e-12  # of the moments, relative to the spread of each feature
ROUNDING = 1e-8  # an error that Newton's method may stop at when it gets no smaller
EDGE = 1e-7  # a moment this close to the edge of what is reachable, relative to the spread, has no finite multiplier
RANK = 1e-12  # eigenvalues of the covariance below this share of the largest are directions without variation


@dataclass(frozen=True)
class MomentFit:
    """The multipliers of an exponential family, with what says whether they can be trusted.

    Args:
        multipliers: lambda, shape [K].
        log_z: log E_weight[exp(lambda . phi)] at each leading index, shape [*n].
        moments: the means of the features that were reached, shape [K].
        kl: mean over the leading indices of KL(p_lambda || weight), nats.
        iterations: Newton steps.
        effective_samples: 1 / sum_s p_s^2 at each leading index, shape [*n].
        largest_weight: max_s p_s at each leading index, shape [*n].
        standard_error: of each multiplier, shape [K], from the spread of the samples; None for listed outcomes.
        risk: KL(p_lambda* || p_lambda) to expect from the finite number of samples, nats; None for listed outcomes.
    """

    multipliers: Float[Tensor, "K"]
    log_z: Float[Tensor, "*n"]
    moments: Float[Tensor, "K"]
    kl: float
    iterations: int
    effective_samples: Float[Tensor, "*n"]
    largest_weight: Float[Tensor, "*n"]
    standard_error: Float[Tensor, "K"] | None = None
    risk: float | None = None


def fit_multipliers(
    features: Float[Tensor, "*n S K"],
    moments: Float[Tensor, "K"],
    log_weight: Float[Tensor, "*n S"] | None = None,
    sampled: bool = False,
) -> MomentFit:
    """The multipliers lambda with mean over leading indices of E_{p_lambda}[phi] = m.

        p_lambda(x | n) = a(x | n) exp(lambda . phi(x, n)) / Z_n,     minimise  mean_n log Z_n(lambda) - lambda . m

    By Newton's method with the covariance of the features as Hessian and a halving line search. The result minimises
    the mean KL(p || a) over all p with these moments.

    Args:
        features: phi, shape [*n, S, K].
        moments: m, shape [K].
        log_weight: log a, shape [*n, S], need not be normalised: log-probabilities of listed outcomes; for samples
            log(a / proposal), or None for samples of a itself.
        sampled: the S outcomes are independent samples: standard errors and risk are of interest.

    Raises:
        ValueError: moments that no distribution on these outcomes has, or only one at the edge, with the direction.

    Source: "A Distributional Approach to Controlled Text Generation", Khalifa et al., 2021.
    """
    phi, m = features.double(), moments.double()
    if phi.shape[-1] != len(m):
        raise ValueError(f"{phi.shape[-1]} features need as many moments, not {len(m)}")
    weight = torch.zeros_like(phi[..., 0]) if log_weight is None else log_weight.double()
    log_a = weight.log_softmax(-1).reshape(-1, phi.shape[-2])
    flat = phi.reshape(-1, *phi.shape[-2:])
    spread = _check_each(flat, log_a, m)
    scaled, wanted = (flat - m) / spread, torch.zeros_like(m)
    found, steps = _newton(scaled, log_a, wanted, m, spread)
    p = _tilted(scaled, log_a, found).exp()
    multipliers = found / spread
    reached = torch.einsum("ns,nsk->nk", p, flat)
    log_z = (log_a + flat @ multipliers).logsumexp(-1)
    shape = phi.shape[:-2]
    fit = MomentFit(
        multipliers=multipliers,
        log_z=log_z.reshape(shape),
        moments=reached.mean(0),
        kl=float(multipliers @ reached.mean(0) - log_z.mean()),
        iterations=steps,
        effective_samples=(1 / p.square().sum(-1)).reshape(shape),
        largest_weight=p.amax(-1).reshape(shape),
    )
    if not sampled:
        return fit
    error, risk = _uncertainty(scaled, p)
    return MomentFit(**{**vars(fit), "standard_error": error / spread, "risk": risk})


def projection_risk(
    features: Float[Tensor, "S K"],
    log_projection: Float[Tensor, "S"],
    log_truth: Float[Tensor, "S"] | None,
    samples: int,
) -> float:
    """What KL(projection || fit) to expect if the moments are means of `samples` draws of the truth.

        tr(J^{-1} V) / (2 n),     J = Cov_projection[phi],  V = Cov_truth[phi];     K / (2 n) if they are the same

    Args:
        features: phi, shape [S, K].
        log_projection: log-probabilities of the member of the family with the truth's moments, shape [S].
        log_truth: log-probabilities of what is sampled, shape [S]; None takes the projection.
        samples: n.

    Source: "MLE convergence speed to information projection of exponential family", Sheena.
    """
    j = _covariance(features.double()[None], log_projection.double().exp()[None])
    v = j if log_truth is None else _covariance(features.double()[None], log_truth.double().exp()[None])
    return float(torch.linalg.pinv(j, hermitian=True).mul(v).sum() / (2 * samples))


def _check_each(phi: Tensor, log_a: Tensor, m: Tensor) -> Tensor:
    """The spread of each feature; raises where a moment is out of its range."""
    gone = (log_a == -torch.inf)[..., None]
    highest = phi.masked_fill(gone, -torch.inf).amax(1).mean(0)
    lowest = phi.masked_fill(gone, torch.inf).amin(1).mean(0)
    spread = highest - lowest
    for k in range(len(m)):
        low, high, asked = float(lowest[k]), float(highest[k]), float(m[k])
        if not low + EDGE * (high - low) < asked < high - EDGE * (high - low):
            if low == high == asked:
                continue  # it holds whatever the multiplier is
            hint = " A mean at the end itself is a set: use `pointwise`." if asked in (low, high) else ""
            raise ValueError(
                f"moment {k} = {asked:g} cannot be reached: on these outcomes its mean can only lie strictly between "
                f"{low:g} and {high:g}.{hint}"
            )
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _newton(phi: Tensor, log_a: Tensor, wanted: Tensor, m: Tensor, spread: Tensor) -> tuple[Tensor, int]:
    """Minimise the dual; the features are centred at the wanted moments and scaled by their spread."""
    current, value = torch.zeros_like(wanted), _dual(phi, log_a, torch.zeros_like(wanted))
    error = math.inf
    for step in range(MAX_STEPS):
        p = _tilted(phi, log_a, current).exp()
        gradient = torch.einsum("ns,nsk->nk", p, phi).mean(0)
        stalled = error <= ROUNDING and float(gradient.abs().max()) >= error / 2  # no better than rounding allows
        error = float(gradient.abs().max())
        if error < TOLERANCE or stalled:
            return current, step
        _check_direction(phi, log_a, current, m, spread)
        direction = _newton_direction(_covariance(phi, p), gradient)
        slope, size = float(gradient @ direction), 1.0
        while size > 1e-15 and _dual(phi, log_a, current + size * direction) > value + 1e-4 * size * slope:
            size /= 2
        if size <= 1e-15 or not slope < 0:
            break
        current = current + size * direction
        value = _dual(phi, log_a, current)
    if error <= ROUNDING:
        return current, step
    _check_direction(phi, log_a, current, m, spread, EDGE)
    raise ValueError(
        f"the moments {m.tolist()} were not reached together: features that are functions of one another need moments "
        "that agree"
    )


def _newton_direction(covariance: Tensor, gradient: Tensor) -> Tensor:
    """The shortest Newton step, nothing along combinations of features that do not vary."""
    values, vectors = torch.linalg.eigh(covariance)
    varies = values > RANK * values.max().clamp(min=1e-300)
    inverse = torch.where(varies, 1 / values, torch.zeros_like(values))
    return -(vectors * inverse) @ (vectors.T @ gradient)


def _check_direction(
    phi: Tensor, log_a: Tensor, multipliers: Tensor, m: Tensor, spread: Tensor, edge: float = 1e-9
) -> None:
    """Raise if the present direction separates the wanted moments from everything that can be reached."""
    size = float(multipliers.norm())
    if not size:
        return
    along = phi @ (multipliers / size)
    reach = float(along.masked_fill(log_a == -torch.inf, -torch.inf).amax(1).mean())
    if reach <= edge:
        d = (multipliers / spread) / (multipliers / spread).norm()
        combination = " + ".join(f"{float(c):.3g} phi_{k}" for k, c in enumerate(d))
        raise ValueError(
            f"the moments {m.tolist()} cannot be reached together: on these outcomes the mean of {combination} is at "
            f"most {float(d @ m) + reach * size / float((multipliers / spread).norm()):.4g}, and they ask for "
            f"{float(d @ m):.4g}"
        )


def _dual(phi: Tensor, log_a: Tensor, multipliers: Tensor) -> float:
    return float((log_a + phi @ multipliers).logsumexp(-1).mean())


def _tilted(phi: Tensor, log_a: Tensor, multipliers: Tensor) -> Tensor:
    return (log_a + phi @ multipliers).log_softmax(-1)


def _covariance(phi: Tensor, p: Tensor) -> Tensor:
    """Mean over the leading index of the covariance under p, [K, K]."""
    centred = phi - torch.einsum("ns,nsk->nk", p, phi)[:, None]
    return torch.einsum("ns,nsk,nsl->kl", p, centred, centred) / len(p)


def _uncertainty(phi: Tensor, p: Tensor) -> tuple[Tensor, float]:
    """Delta method for self-normalised weights: H^{-1} Var H^{-1}, and the KL that it costs, tr(H^{-1} Var) / 2."""
    centred = phi - torch.einsum("ns,nsk->nk", p, phi)[:, None]
    variance = torch.einsum("ns,nsk,nsl->kl", p.square(), centred, centred) / len(p) ** 2
    inverse = torch.linalg.pinv(_covariance(phi, p), hermitian=True)
    return (inverse @ variance @ inverse).diagonal().sqrt(), float((inverse * variance).sum() / 2)
