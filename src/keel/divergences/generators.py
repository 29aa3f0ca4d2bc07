"""The generators of f-divergences, as functions of the log-ratio x = log u, u = p / q.

    D_f(p || q) = sum_x q f(u),     f convex,   f(1) = 0,   f'(1) = 0

The first argument p is the policy. All forms avoid u where it may overflow, and 1 - u where it cancels; outcomes that
one of the two distributions lacks are served by the limits f(0) and f'(inf).

Source: Csiszar, "Information-type measures of difference of probability distributions", 1967; Amari's alpha family.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import wrightomega
from torch import Tensor
from torch.nn.functional import softplus

Map = Callable[[Tensor], Tensor]
LOG2 = math.log(2)
INF = math.inf


@dataclass(frozen=True)
class Generator:
    """One convex function in the forms that a stable computation needs, all elementwise.

    Args:
        f: f(u); exact for u <= 1, where the family asks for it.
        f_over_u: f(u) / u, the generator of D_f(q || p) at 1 / u; exact for u >= 1.
        f_prime: f'(u).
        u_f_prime: u f'(u); exact for u <= 1.
        f_second: f''(u).
        f_prime_inverse: t -> log u with f'(u) = t; -inf below f'(0+), +inf from f'(inf) on.
        f_at_zero: f(0).
        f_prime_at_zero: f'(0+).
        f_prime_at_infinity: f'(inf) = lim f(u) / u.
        curvature: f''(1).
        conjugate: t -> f*(t); None leaves it to the inverse slope, t u - f(u).
        terms: (x, p, q) -> q f(u), where p and q at hand spare the exponentials of x.
        slopes: (x, p, q) -> p f'(u), likewise.
        terms_, slopes_: the same, written over x; the terms only in sum, for p and q that sum to 1 and an exact x.
    """

    f: Map
    f_over_u: Map
    f_prime: Map
    u_f_prime: Map
    f_second: Map
    f_prime_inverse: Map
    f_at_zero: float
    f_prime_at_zero: float
    f_prime_at_infinity: float
    curvature: float
    conjugate: Map | None = None
    terms: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    terms_: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    slopes_: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def in_fp64(function: Map) -> Map:
    """The function, evaluated in fp64."""
    return lambda x: function(x.double()).to(x)


def exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series where the difference would cancel.

    >>> round(float(exp_remainder(torch.tensor(1e-6))) * 1e13, 4)
    5.0
    """
    near = x.abs() < (2e-4 if x.dtype == torch.float64 else 0.03)
    return torch.where(near, x.square() * (0.5 + x * (1 / 6 + x / 24)), torch.expm1(x) - x)


def entropy_remainder(x: Tensor) -> Tensor:
    """u log u - u + 1 at u = e^x, without the overflow of e^-x nor the cancellation at 0.

    >>> float(entropy_remainder(torch.tensor(-200.0)))
    1.0
    """
    near = x.abs() < 1
    close = torch.where(near, x, torch.zeros_like(x))
    return torch.where(near, close.exp() * exp_remainder(-close), x.exp() * x - torch.expm1(x))


def kl_policy_ref() -> Generator:
    """u log u - u + 1: KL(p || q)."""
    return Generator(
        f=entropy_remainder,
        f_over_u=lambda x: exp_remainder(-x),
        f_prime=lambda x: x,
        u_f_prime=lambda x: x.exp() * x,
        f_second=lambda x: (-x).exp(),
        f_prime_inverse=lambda t: t,
        f_at_zero=1.0,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=INF,
        curvature=1.0,
        terms=lambda x, p, q: p * (x - 1) + q,
        slopes=lambda x, p, q: p * x,
        terms_=lambda x, p, q: x.mul_(p),
        slopes_=lambda x, p, q: x.mul_(p),
    )


def kl_ref_policy() -> Generator:
    """-log u + u - 1: KL(q || p)."""
    return Generator(
        f=exp_remainder,
        f_over_u=lambda x: entropy_remainder(-x),
        f_prime=lambda x: -torch.expm1(-x),
        u_f_prime=torch.expm1,
        f_second=lambda x: (-2 * x).exp(),
        f_prime_inverse=lambda t: _where_below(t, 1.0, lambda s: -torch.log1p(-s)),
        f_at_zero=INF,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=1.0,
        curvature=1.0,
        terms=lambda x, p, q: p - q * (x + 1),
        slopes=lambda x, p, q: p - q,
        terms_=lambda x, p, q: x.mul_(q).neg_(),
        slopes_=lambda x, p, q: torch.sub(p, q, out=x),
    )


def jeffreys() -> Generator:
    """(u - 1) log u: KL(p || q) + KL(q || p)."""
    return Generator(
        f=lambda x: torch.expm1(x) * x,
        f_over_u=lambda x: -torch.expm1(-x) * x,
        f_prime=lambda x: x - torch.expm1(-x),
        u_f_prime=lambda x: x.exp() * x + torch.expm1(x),
        f_second=lambda x: (-x).exp() + (-2 * x).exp(),
        f_prime_inverse=lambda t: -_log_omega(1 - t),
        f_at_zero=INF,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=INF,
        curvature=2.0,
    )


def jensen_shannon(b: float = 0.5) -> Generator:
    """b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p.

    Raises:
        ValueError: b outside (0, 1); the ends are the two KLs only after division by b or 1 - b.
    """
    if not 0 < b < 1:
        raise ValueError(f"the weight of a Jensen-Shannon divergence must lie strictly between 0 and 1, not {b:g}")

    def log_m(x: Tensor) -> Tensor:  # log(m / q)
        large = math.log1p(-b) + x + torch.log1p(b / (1 - b) * (-x.clamp(min=1.0)).exp())
        return torch.where(x > 1, large, torch.log1p((1 - b) * torch.expm1(x.clamp(max=1.0))))

    def against_m(x: Tensor) -> Tensor:  # log(p / m), for any x
        return -math.log1p(-b) - softplus(math.log(b / (1 - b)) - x, threshold=50)

    def log_p_over_m(x: Tensor) -> Tensor:  # exact near 0, and where x - log_m cancels
        return torch.where(x > 1, against_m(x), x - log_m(x.clamp(max=1.0)))

    def over_m(x: Tensor) -> Tensor:
        return b * entropy_remainder(-log_m(x)) + (1 - b) * entropy_remainder(log_p_over_m(x))

    def reference_against_m(x: Tensor) -> Tensor:  # log(q / m)
        return -math.log(b) - softplus(x + math.log((1 - b) / b), threshold=50)

    top = -(1 - b) * math.log(1 - b)
    return Generator(
        f=lambda x: log_m(x).exp() * over_m(x),
        f_over_u=lambda x: (-log_p_over_m(x)).exp() * over_m(x),
        f_prime=lambda x: (1 - b) * log_p_over_m(x),
        u_f_prime=lambda x: (1 - b) * x.exp() * log_p_over_m(x),
        f_second=lambda x: b * (1 - b) * (-x - log_m(x)).exp(),
        f_prime_inverse=lambda t: _where_below(
            t, top, lambda s: math.log(b) + s / (1 - b) - torch.log1p(-(1 - b) * (s / (1 - b)).exp())
        ),
        f_at_zero=-b * math.log(b),
        f_prime_at_zero=-INF,
        f_prime_at_infinity=top,
        curvature=b * (1 - b),
        terms=lambda x, p, q: (1 - b) * p * against_m(x) + b * q * reference_against_m(x),
        slopes=lambda x, p, q: (1 - b) * p * against_m(x),
    )


def alpha(a: float) -> Generator:
    """(u^a - a u - (1 - a)) / (a (a - 1)); a = 1 is KL(p || q), a = 0 KL(q || p)."""
    if abs(a - 1) < 1e-7:
        return kl_policy_ref()
    if abs(a) < 1e-7:
        return kl_ref_policy()
    flat = 1 / (1 - a)
    precise = in_fp64 if abs(a * (a - 1)) < 0.05 else _as_it_is  # the numerators vanish at 0 and at 1
    return Generator(
        f=precise(lambda x: (exp_remainder(a * x) - a * exp_remainder(x)) / (a * (a - 1))),
        f_over_u=precise(lambda x: (exp_remainder((a - 1) * x) - (1 - a) * exp_remainder(-x)) / (a * (a - 1))),
        f_prime=lambda x: torch.expm1((a - 1) * x) / (a - 1),
        u_f_prime=precise(lambda x: ((a * x).exp() - x.exp()) / (a - 1)),
        f_second=lambda x: ((a - 2) * x).exp(),
        f_prime_inverse=(
            (lambda t: torch.log1p((a - 1) * t.clamp(min=flat)) / (a - 1))
            if a > 1
            else (lambda t: _where_below(t, flat, lambda s: torch.log1p((a - 1) * s) / (a - 1)))
        ),
        f_at_zero=1 / a if a > 0 else INF,
        f_prime_at_zero=flat if a > 1 else -INF,
        f_prime_at_infinity=flat if a < 1 else INF,
        curvature=1.0,
    )


def pearson() -> Generator:
    """(u - 1)^2: chi-square, sum (p - q)^2 / q."""
    return Generator(
        f=lambda x: torch.expm1(x).square(),
        f_over_u=lambda x: torch.expm1(x) * -torch.expm1(-x),
        f_prime=lambda x: 2 * torch.expm1(x),
        u_f_prime=lambda x: 2 * x.exp() * torch.expm1(x),
        f_second=lambda x: torch.full_like(x, 2.0),
        f_prime_inverse=lambda t: torch.log1p(t.clamp(min=-2.0) / 2),
        f_at_zero=1.0,
        f_prime_at_zero=-2.0,
        f_prime_at_infinity=INF,
        curvature=2.0,
    )


def neyman() -> Generator:
    """(1 - u)^2 / u: chi-square turned round, sum (p - q)^2 / p."""
    return Generator(
        f=lambda x: torch.expm1(x) * -torch.expm1(-x),
        f_over_u=lambda x: torch.expm1(-x).square(),
        f_prime=lambda x: -torch.expm1(-2 * x),
        u_f_prime=lambda x: x.exp() - (-x).exp(),
        f_second=lambda x: 2 * (-3 * x).exp(),
        f_prime_inverse=lambda t: _where_below(t, 1.0, lambda s: -torch.log1p(-s) / 2),
        f_at_zero=INF,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=1.0,
        curvature=2.0,
    )


def total_variation() -> Generator:
    """|u - 1| / 2: sum |p - q| / 2. Its inverse slope is a set at -1/2 and 1/2; the value nearest u = 1 is taken."""
    return Generator(
        f=lambda x: torch.expm1(x).abs() / 2,
        f_over_u=lambda x: torch.expm1(-x).abs() / 2,
        f_prime=lambda x: x.sign() / 2,
        u_f_prime=lambda x: x.exp() * x.sign() / 2,
        f_second=torch.zeros_like,
        f_prime_inverse=lambda t: torch.where(t.abs() <= 0.5, torch.zeros_like(t), t.sign() * INF),
        f_at_zero=0.5,
        f_prime_at_zero=-0.5,
        f_prime_at_infinity=0.5,
        curvature=0.0,
    )


def squared_hellinger() -> Generator:
    """(sqrt u - 1)^2 / 2: 1 - sum sqrt(p q)."""
    return Generator(
        f=lambda x: torch.expm1(x / 2).square() / 2,
        f_over_u=lambda x: torch.expm1(-x / 2).square() / 2,
        f_prime=lambda x: -torch.expm1(-x / 2) / 2,
        u_f_prime=lambda x: (x.exp() - (x / 2).exp()) / 2,
        f_second=lambda x: (-1.5 * x).exp() / 4,
        f_prime_inverse=lambda t: _where_below(t, 0.5, lambda s: -2 * torch.log1p(-2 * s)),
        f_at_zero=0.5,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=0.5,
        curvature=0.25,
    )


def kl_chi2() -> Generator:
    """u log u - u + 1 + (u - 1)^2 / 2: KL(p || q) + chi-square / 2."""
    kl = kl_policy_ref()
    return Generator(
        f=lambda x: kl.f(x) + torch.expm1(x).square() / 2,
        f_over_u=lambda x: kl.f_over_u(x) - torch.expm1(x) * torch.expm1(-x) / 2,
        f_prime=lambda x: x + torch.expm1(x),
        u_f_prime=lambda x: x.exp() * (x + torch.expm1(x)),
        f_second=lambda x: (-x).exp() + 1,
        f_prime_inverse=lambda t: _log_omega(t + 1),
        f_at_zero=1.5,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=INF,
        curvature=2.0,
    )


def _as_it_is(function: Map) -> Map:
    return function


def _where_below(t: Tensor, bound: float, inverse: Map) -> Tensor:
    """`inverse` below a bound, +inf from it on."""
    below = t < bound
    return torch.where(below, inverse(torch.where(below, t, torch.full_like(t, bound - 1))), torch.full_like(t, INF))


def _log_omega(x: Tensor) -> Tensor:
    """log w with w + log w = x: Lambert's W of e^x."""
    w = torch.from_numpy(wrightomega(x.detach().double().cpu().numpy())).to(x)
    return torch.where(x < -30, x, x - w)
