"""f-divergences of one's own: checked when they are registered, then known to `f_divergence` by name.

    own_divergence("triangular", lambda u: (u - 1) ** 2 / (u + 1))

Whatever is not given comes from f: slopes by autograd, the inverse slope by bisection, limits by extrapolation. All is
evaluated in fp64.

Source: Csiszar, "Information-type measures of difference of probability distributions", 1967.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keel.divergences import family
from keel.divergences.family import FDivergence
from keel.divergences.generators import INF, Generator, Map, in_fp64

_GRID = torch.linspace(-8.0, 8.0, 321, dtype=torch.float64)  # log u; its middle is u = 1
_FAR = 150.0  # log u at which limits are read: fourth powers of u fit fp64
_EDGE = 300.0  # log u beyond which nothing changes: squares fit
_STEP = 1e-5


@dataclass(frozen=True)
class _Given:
    """What the user gave, as functions of x = log u in fp64, and what autograd makes of it."""

    f: Map
    f_prime: Map

    def f_second(self, x: Tensor) -> Tensor:
        """f''(u), by central differences in log u."""
        return (self.f_prime(x + _STEP) - self.f_prime(x - _STEP)) / (2 * _STEP) * (-x).exp()


def own_divergence(
    name: str,
    f: Callable[[Tensor], Tensor],
    f_prime: Callable[[Tensor], Tensor] | None = None,
    *,
    argument: Literal["u", "log_u"] = "u",
    f_prime_inverse: Callable[[Tensor], Tensor] | None = None,
    conjugate: Callable[[Tensor], Tensor] | None = None,
    f_at_zero: float | None = None,
    f_prime_at_zero: float | None = None,
    f_prime_at_infinity: float | None = None,
    replace: bool = False,
) -> FDivergence:
    """Register D_f under a name, after checking that f is a generator.

    f is checked on u from e^-8 to e^8 for finite values, for convexity and for f(1) = 0. If f'(1) = c is not 0, the
    generator is f - c (u - 1), which has the same divergence, and a warning says so; all else that was given is moved
    along.

    Args:
        name: how `f_divergence` finds it.
        f: the generator, elementwise on tensors.
        f_prime: its derivative in u; autograd by default.
        argument: whether f, f_prime and the value of f_prime_inverse are in terms of u, or of log u.
        f_prime_inverse: slope -> u or log u; bisection by default.
        conjugate: t -> f*(t), for all t; by default t u - f(u) at the inverse slope.
        f_at_zero, f_prime_at_zero, f_prime_at_infinity: f(0), f'(0+), f'(inf); extrapolated by default.
        replace: allow a name that was registered before.

    Raises:
        ValueError: the name is taken or unfit, f is not a generator, or what was given contradicts f; with the u.

    Source: the standard form of R. Csiszar's f-divergences; f - c (u - 1) leaves D_f unchanged.

    >>> own_divergence("doctest_triangular", lambda u: (u - 1) ** 2 / (u + 1), replace=True).f_at_zero
    1.0
    """
    _check_name(name, replace)
    given = _in_log_u(name, f, f_prime, argument)
    _check_generator(name, given)
    if f_prime is not None:
        _check_slope(name, given)
    inverse = None if f_prime_inverse is None else _log_inverse(f_prime_inverse, argument)
    _check_inverse_and_conjugate(name, given, inverse, conjugate)
    limits = (
        _limit(given.f, -_FAR, f"f(0) of '{name}'", "f_at_zero") if f_at_zero is None else f_at_zero,
        -_limit(lambda x: -given.f_prime(x), -_FAR, f"f'(0+) of '{name}'", "f_prime_at_zero")
        if f_prime_at_zero is None
        else f_prime_at_zero,
        _limit(given.f_prime, _FAR, f"f'(inf) of '{name}'", "f_prime_at_infinity")
        if f_prime_at_infinity is None
        else f_prime_at_infinity,
    )
    family._OWN[name] = _generator(name, given, inverse, conjugate, limits)
    return FDivergence(name)


def _generator(
    name: str, given: _Given, inverse: Map | None, conjugate: Map | None, limits: tuple[float, float, float]
) -> Generator:
    """In standard form: everything of f, moved by c (u - 1)."""
    c, kink = _slope_at_one(given)
    if c:
        warnings.warn(f"divergence '{name}': f'(1) = {c:g}, so {c:g} (u - 1) is subtracted from f", stacklevel=3)
    at_zero, slope_at_zero, slope_at_infinity = limits[0] + c, limits[1] - c, limits[2] - c

    def f(x: Tensor) -> Tensor:
        x = x.clamp(-_EDGE, _EDGE)
        return given.f(x) - c * torch.expm1(x)

    def slope(x: Tensor) -> Tensor:
        found = given.f_prime(x.clamp(-_EDGE, _EDGE)) - c
        edge = torch.where(x > 0, slope_at_infinity, slope_at_zero).to(found)
        return torch.where(found.isnan(), edge, found)  # inf - inf, far out

    def log_inverse(t: Tensor) -> Tensor:
        found = _bisect(slope, t) if inverse is None else inverse(t + c)
        found = torch.where(t >= slope_at_infinity, torch.full_like(t, INF), found)
        return torch.where(t <= slope_at_zero, torch.full_like(t, -INF), found)

    def over_u(x: Tensor) -> Tensor:
        value = f(x)
        return torch.where(value.isfinite(), value * (-x).exp(), torch.full_like(value, slope_at_infinity))

    curvature = 0.0 if kink else float(given.f_second(torch.zeros(1, dtype=torch.float64)))
    return Generator(
        f=in_fp64(f),
        f_over_u=in_fp64(over_u),
        f_prime=in_fp64(slope),
        u_f_prime=in_fp64(lambda x: x.clamp(-_EDGE, _EDGE).exp() * slope(x)),
        f_second=in_fp64(lambda x: given.f_second(x.clamp(-_EDGE, _EDGE))),
        f_prime_inverse=in_fp64(log_inverse),
        f_at_zero=at_zero,
        f_prime_at_zero=slope_at_zero,
        f_prime_at_infinity=slope_at_infinity,
        curvature=curvature if curvature > 1e-7 else 0.0,
        conjugate=None if conjugate is None else in_fp64(lambda t: conjugate(t + c) - c),
    )


# -- what was given ----------------------------------------------------------------------------------------------------


def _in_log_u(name: str, f: Callable, f_prime: Callable | None, argument: str) -> _Given:
    if argument not in ("u", "log_u"):
        raise ValueError(f"argument must be 'u' or 'log_u', not '{argument}'")
    of_log = (lambda x: f(x.exp())) if argument == "u" else f
    if f_prime is not None:
        return _Given(of_log, (lambda x: f_prime(x.exp())) if argument == "u" else f_prime)

    def by_autograd(x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            value = of_log(at)
            if not value.requires_grad:
                raise ValueError(f"divergence '{name}': autograd finds no derivative of f; give f_prime")
            (slope,) = torch.autograd.grad(value.sum(), at, create_graph=x.requires_grad)
        return slope * (-x).exp()

    return _Given(of_log, by_autograd)


def _log_inverse(inverse: Callable, argument: str) -> Map:
    return (lambda t: inverse(t).log()) if argument == "u" else inverse


def _slope_at_one(given: _Given) -> tuple[float, bool]:
    """f'(1), 0 if that is a subgradient; and whether f has a kink there."""
    below, at, above = given.f_prime(torch.tensor([-1e-6, 0.0, 1e-6], dtype=torch.float64)).tolist()
    kink = above - below > 1e-3
    if (kink and below <= 0 <= above) or abs(at) < 1e-9:
        return 0.0, kink
    return at, kink


def _bisect(slope: Map, t: Tensor) -> Tensor:
    """log u with f'(u) = t, f' rising."""
    low, high = torch.full_like(t, -_EDGE), torch.full_like(t, _EDGE)
    with torch.no_grad():
        for _ in range(64):
            middle = (low + high) / 2
            beyond = slope(middle) >= t
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (low + high) / 2


def _limit(function: Map, edge: float, what: str, argument: str) -> float:
    """The limit of a rising function, from a third, two thirds and the whole way to an edge: inf, or Aitken's value."""
    first, second, third = function(torch.tensor([edge / 3, 2 * edge / 3, edge], dtype=torch.float64)).tolist()
    before, after = second - first, third - second
    if third == INF or after >= 0.95 * before > 1e-9:
        return INF
    if abs(after) <= 1e-12 * max(1.0, abs(third)):
        return third
    if not after <= 0.7 * before:
        raise ValueError(f"{what} cannot be told from its values far out; give {argument}=")
    return third + after**2 / (before - after)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_name(name: str, replace: bool) -> None:
    if name in (*family.NAMES, *family.ALIASES):
        raise ValueError(f"divergence '{name}' is one of Keel's own; choose another name")
    if name in family._OWN and not replace:
        raise ValueError(f"there is a divergence '{name}' already; choose another name, or pass replace=True")
    if not name.isidentifier():
        raise ValueError(f"the name of a divergence must consist of letters, digits and underscores, not '{name}'")


def _check_generator(name: str, given: _Given) -> None:
    values = given.f(_GRID)
    if not isinstance(values, Tensor) or values.shape != _GRID.shape:
        raise ValueError(f"divergence '{name}': f must map a tensor to one of the same shape")
    if not bool(values.isfinite().all()):
        raise ValueError(f"divergence '{name}': f is {_at(values, ~values.isfinite())}")
    at_one = float(values[len(_GRID) // 2])
    if abs(at_one) > 1e-9:
        raise ValueError(f"divergence '{name}': f(1) is {at_one:g} and must be 0")
    u = _GRID.exp()
    slopes = values.diff() / u.diff()
    noise = 1e-9 * slopes.abs() + 1e-14 * values.abs()[1:] / u.diff()
    drop = slopes[:-1] - slopes[1:] > noise[:-1] + noise[1:]
    if bool(drop.any()):
        raise ValueError(f"divergence '{name}': f is not convex at u = {float(u[1:-1][drop][0]):.4g}")
    if float((slopes[-1] - slopes[0]).abs()) < 1e-12:
        raise ValueError(f"divergence '{name}': f is a straight line, so that its divergence is 0 everywhere")
    derivative = given.f_prime(_GRID)
    if not bool(derivative.isfinite().all()):
        raise ValueError(f"divergence '{name}': f' is {_at(derivative, ~derivative.isfinite())}")


def _check_slope(name: str, given: _Given) -> None:
    """A slope that was given lies between the secants of f on both sides."""
    x, step = _GRID, 1e-4
    u, f = x.exp(), given.f(x)
    left, right = (
        (f - given.f(x - step)) / (u - (x - step).exp()),
        (given.f(x + step) - f) / ((x + step).exp() - u),
    )
    slope = given.f_prime(x)
    noise = 1e-6 * (1 + slope.abs()) + 1e-11 * f.abs() / u
    wrong = (slope < left - noise) | (slope > right + noise)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        found = f"{float(slope[i]):.6g} at u = {float(u[i]):.4g}, where f rises by {float((left + right)[i]) / 2:.6g}"
        raise ValueError(f"divergence '{name}': f_prime is {found}")


def _check_inverse_and_conjugate(name: str, given: _Given, inverse: Map | None, conjugate: Map | None) -> None:
    u, slope = _GRID.exp(), given.f_prime(_GRID)
    if inverse is not None:
        back = given.f_prime(inverse(slope))
        wrong = (back - slope).abs() > 1e-6 * (1 + slope.abs())
        if bool((wrong | back.isnan()).any()):
            i = int((wrong | back.isnan()).nonzero()[0])
            found = f"u = {float(inverse(slope)[i].exp()):.6g} for the slope of u = {float(u[i]):.4g}"
            raise ValueError(f"divergence '{name}': f_prime_inverse gives {found}")
    if conjugate is not None:
        wanted, got = u * slope - given.f(_GRID), conjugate(slope)
        scale = 1 + (u * slope).abs() + given.f(_GRID).abs()
        wrong = ((got - wanted).abs() > 1e-6 * scale) | got.isnan()
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            what = f"f*({float(slope[i]):.6g}) is {float(got[i]):.6g}, but t u - f(u) there, at u = {float(u[i]):.4g},"
            raise ValueError(f"divergence '{name}': {what} is {float(wanted[i]):.6g}")


def _at(values: Tensor, where: Tensor) -> str:
    """The first of the values so marked, and where it is."""
    i = int(where.nonzero()[0])
    return f"{float(values[i])} at u = {float(_GRID[i].exp()):.4g}"
