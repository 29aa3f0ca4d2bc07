"""The generators of f-divergences, as functions of the log-ratio l = log u, u = p / q.

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

Map = Callable[[Tensor], Tensor]
LOG2 = math.log(2)
INF = math.inf


@dataclass(frozen=True)
class Generator:
    """One convex function in the forms that a stable computation needs, all elementwise.

    Args:
        f: f(u).
        f_over_u: f(u) / u, the generator of D_f(q || p) at 1 / u.
        f_prime: f'(u).
        u_f_prime: u f'(u).
        f_second: f''(u).
        f_prime_inverse: t -> log u with f'(u) = t; -inf below f'(0+), +inf from f'(inf) on.
        f_at_zero: f(0).
        f_prime_at_zero: f'(0+).
        f_prime_at_infinity: f'(inf) = lim f(u) / u.
        curvature: f''(1).
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


def exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series where the difference would cancel.

    >>> float(exp_remainder(torch.tensor(1e-6)))
    5.000002...e-13
    """
    near = x.abs() < 0.1
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.zeros_like(small)
    for n in range(11, 1, -1):
        series = (series * small) + 1 / math.factorial(n)
    return torch.where(near, series * small.square(), torch.expm1(torch.where(near, 0.0, x)) - torch.where(near, 0.0, x))


def kl_policy_ref() -> Generator:
    """u log u - u + 1: KL(p || q)."""
    return Generator(
        f=lambda l: l.exp() * exp_remainder(-l),
        f_over_u=lambda l: exp_remainder(-l),
        f_prime=lambda l: l,
        u_f_prime=lambda l: l.exp() * l,
        f_second=lambda l: (-l).exp(),
        f_prime_inverse=lambda t: t,
        f_at_zero=1.0,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=INF,
        curvature=1.0,
    )


def kl_ref_policy() -> Generator:
    """-log u + u - 1: KL(q || p)."""
    return Generator(
        f=exp_remainder,
        f_over_u=lambda l: (-l).exp() * exp_remainder(l),
        f_prime=lambda l: -torch.expm1(-l),
        u_f_prime=torch.expm1,
        f_second=lambda l: (-2 * l).exp(),
        f_prime_inverse=lambda t: _where_below(t, 1.0, lambda s: -torch.log1p(-s)),
        f_at_zero=INF,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=1.0,
        curvature=1.0,
    )


def jeffreys() -> Generator:
    """(u - 1) log u: KL(p || q) + KL(q || p)."""
    return Generator(
        f=lambda l: torch.expm1(l) * l,
        f_over_u=lambda l: -torch.expm1(-l) * l,
        f_prime=lambda l: l - torch.expm1(-l),
        u_f_prime=lambda l: l.exp() * l + torch.expm1(l),
        f_second=lambda l: (-l).exp() + (-2 * l).exp(),
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

    def log_m(l: Tensor) -> Tensor:  # log(m / q)
        large = math.log1p(-b) + l + torch.log1p(b / (1 - b) * (-l.clamp(min=1.0)).exp())
        return torch.where(l > 1, large, torch.log1p((1 - b) * torch.expm1(l.clamp(max=1.0))))

    def entropy(x: Tensor) -> Tensor:  # v log v - v + 1
        return x.exp() * exp_remainder(-x)

    def over_m(l: Tensor) -> Tensor:
        a = log_m(l)
        return b * entropy(-a) + (1 - b) * entropy(l - a)

    top = -(1 - b) * math.log(1 - b)
    return Generator(
        f=lambda l: log_m(l).exp() * over_m(l),
        f_over_u=lambda l: (log_m(l) - l).exp() * over_m(l),
        f_prime=lambda l: (1 - b) * (l - log_m(l)),
        u_f_prime=lambda l: (1 - b) * l.exp() * (l - log_m(l)),
        f_second=lambda l: b * (1 - b) * (-l - log_m(l)).exp(),
        f_prime_inverse=lambda t: _where_below(
            t, top, lambda s: math.log(b) + s / (1 - b) - torch.log1p(-(1 - b) * (s / (1 - b)).exp())
        ),
        f_at_zero=-b * math.log(b),
        f_prime_at_zero=-INF,
        f_prime_at_infinity=top,
        curvature=b * (1 - b),
    )


def alpha(a: float) -> Generator:
    """(u^a - a u - (1 - a)) / (a (a - 1)); a = 1 is KL(p || q), a = 0 KL(q || p)."""
    if abs(a - 1) < 1e-7:
        return kl_policy_ref()
    if abs(a) < 1e-7:
        return kl_ref_policy()
    flat = 1 / (1 - a)
    return Generator(
        f=lambda l: (exp_remainder(a * l) - a * exp_remainder(l)) / (a * (a - 1)),
        f_over_u=lambda l: (exp_remainder((a - 1) * l) - (1 - a) * exp_remainder(-l)) / (a * (a - 1))
        if a != 0.5
        else 4 * torch.expm1(-l / 2).square() / 2,
        f_prime=lambda l: torch.expm1((a - 1) * l) / (a - 1),
        u_f_prime=lambda l: ((a * l).exp() - l.exp()) / (a - 1),
        f_second=lambda l: ((a - 2) * l).exp(),
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
        f=lambda l: torch.expm1(l).square(),
        f_over_u=lambda l: torch.expm1(l) * -torch.expm1(-l),
        f_prime=lambda l: 2 * torch.expm1(l),
        u_f_prime=lambda l: 2 * l.exp() * torch.expm1(l),
        f_second=lambda l: torch.full_like(l, 2.0),
        f_prime_inverse=lambda t: torch.log1p(t.clamp(min=-2.0) / 2),
        f_at_zero=1.0,
        f_prime_at_zero=-2.0,
        f_prime_at_infinity=INF,
        curvature=2.0,
    )


def neyman() -> Generator:
    """(1 - u)^2 / u: chi-square turned round, sum (p - q)^2 / p."""
    return Generator(
        f=lambda l: torch.expm1(l) * -torch.expm1(-l),
        f_over_u=lambda l: torch.expm1(-l).square(),
        f_prime=lambda l: -torch.expm1(-2 * l),
        u_f_prime=lambda l: l.exp() - (-l).exp(),
        f_second=lambda l: 2 * (-3 * l).exp(),
        f_prime_inverse=lambda t: _where_below(t, 1.0, lambda s: -torch.log1p(-s) / 2),
        f_at_zero=INF,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=1.0,
        curvature=2.0,
    )


def total_variation() -> Generator:
    """|u - 1| / 2: sum |p - q| / 2. Its inverse slope is a set at -1/2 and 1/2; the value nearest u = 1 is taken."""
    return Generator(
        f=lambda l: torch.expm1(l).abs() / 2,
        f_over_u=lambda l: torch.expm1(-l).abs() / 2,
        f_prime=lambda l: l.sign() / 2,
        u_f_prime=lambda l: l.exp() * l.sign() / 2,
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
        f=lambda l: torch.expm1(l / 2).square() / 2,
        f_over_u=lambda l: torch.expm1(-l / 2).square() / 2,
        f_prime=lambda l: -torch.expm1(-l / 2) / 2,
        u_f_prime=lambda l: (l.exp() - (l / 2).exp()) / 2,
        f_second=lambda l: (-1.5 * l).exp() / 4,
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
        f=lambda l: kl.f(l) + torch.expm1(l).square() / 2,
        f_over_u=lambda l: kl.f_over_u(l) - torch.expm1(l) * torch.expm1(-l) / 2,
        f_prime=lambda l: l + torch.expm1(l),
        u_f_prime=lambda l: l.exp() * (l + torch.expm1(l)),
        f_second=lambda l: (-l).exp() + 1,
        f_prime_inverse=lambda t: _log_omega(t + 1),
        f_at_zero=1.5,
        f_prime_at_zero=-INF,
        f_prime_at_infinity=INF,
        curvature=2.0,
    )


def _where_below(t: Tensor, bound: float, inverse: Map) -> Tensor:
    """`inverse` below a bound, +inf from it on."""
    below = t < bound
    return torch.where(below, inverse(torch.where(below, t, torch.full_like(t, bound - 1))), torch.full_like(t, INF))


def _log_omega(x: Tensor) -> Tensor:
    """log w with w + log w = x: Lambert's W of e^x."""
    w = torch.from_numpy(wrightomega(x.detach().double().cpu().numpy())).to(x)
    return torch.where(x < -30, x, x - w)
