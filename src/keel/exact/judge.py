"""Best-of-k under a judge that may be wrong, in closed form up to one integral.

k answers y_i ~ N(m, s^2), a judge with reward r(y) = -(y - c)^2, and the truth y*. The error of the answer picked is

    best of k         e_k = int_0^inf k (1 - G(d))^(k-1) sum_{y = c + d, c - d} n(y) (y - y*)^2 dd
    softmax(r / T)    e_k = k int E[(y - y*)^2 e^(v - e^v)] E[e^(-e^v)]^(k-1) dz,    v = z + r(y) / T

with n the density of the answers and G(d) = P(|y - c| <= d). The second is best-of-k for r / T + Gumbel noise. With an
aligned judge, c = y*, e_k ~ 1 / (2 n(y*)^2 k^2); otherwise e_k -> (c - y*)^2, and if that is more than what a few tries
give, there is an optimal k beyond which trying more does harm. None of this holds for discrete rewards.

Source: the setting is that of "Demystifying LLM-as-a-Judge: Analytically Tractable Model for Inference-Time Scaling",
2025, for given m and s; the integrals are derived here.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, roots_legendre

Tries = int | Sequence[int] | np.ndarray  # one number, or several
FAR = 14.0  # standard deviations beyond which no answer lies
PIECE = 24  # nodes on each interval of the quadrature
NEAR = (-38.0, 5.0)  # beyond which e^(v - e^v) is 0


def best_of_k_error(m: float, s: float, c: float, y_star: float, k: Tries) -> Float[np.ndarray, "*K"]:
    """E[(y - y*)^2] of the one of k answers that the judge likes best; see the module.

    >>> best_of_k_error(-1.0, 1.0, 0.8, 0.0, [1, 8, 64]).round(6).tolist()
    [2.0, 0.379049, 0.610924]

    Args:
        m, s: mean and standard deviation of the answers.
        c: centre of the judge.
        y_star: the truth.
        k: tries, a number or several.

    Raises:
        ValueError: s not above 0, or k below 1.
    """
    tries = _checked(s, k)
    reach = abs(m - c) + FAR * s
    distance, weight = _nodes(np.r_[0.0, s * 2.0 ** np.arange(-30, 0), np.arange(s, reach, s), reach])
    total = np.zeros((len(tries), len(distance)))
    outside = ndtr(-(c + distance - m) / s) + ndtr((c - distance - m) / s)
    kept = tries[:, None] * outside ** (tries[:, None] - 1)
    for y in (c + distance, c - distance):
        total += kept * _density((y - m) / s) / s * (y - y_star) ** 2
    return (total @ weight).reshape(np.shape(k))


def softmax_of_k_error(
    m: float, s: float, c: float, y_star: float, k: Tries, temperature: float
) -> Float[np.ndarray, "*K"]:
    """E[(y - y*)^2] where one of k answers is drawn with probability softmax(r / T); see the module.

    >>> softmax_of_k_error(-1.0, 1.0, 0.8, 0.0, [1, 8, 64], 1.0).round(6).tolist()
    [2.0, 0.386251, 0.3724]

    Args:
        m, s, c, y_star, k: see `best_of_k_error`, the limit of T -> 0.
        temperature: T.

    Raises:
        ValueError: s or temperature not above 0, or k below 1.
    """
    tries = _checked(s, k)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    root = math.sqrt(temperature)
    reach = (abs(m - c) + FAR * s) / root  # of x = |y - c| / sqrt(T)
    end = reach**2 - NEAR[0]
    steps = np.concatenate([2.0 ** np.arange(math.log2(end)), np.arange(s / root / 2, reach, s / root / 2) ** 2])
    z, weight = _nodes(np.r_[np.linspace(NEAR[0], 0, 9), np.sort(steps[steps < end]), end])
    low = np.sqrt(np.clip(z - NEAR[1], 0, None)).clip(max=reach)
    high = np.sqrt(np.clip(z - NEAR[0], 0, None)).clip(max=reach)
    node, share = _nodes(np.linspace(0, 1, 13))
    x = low[:, None] + (high - low)[:, None] * node
    v = z[:, None] - x**2
    measure = (high - low)[:, None] * share * root / s
    below = ndtr(-(c + root * high - m) / s) + ndtr((c - root * high - m) / s)  # P(v < NEAR[0]), where e^(-e^v) is 1
    error = np.zeros_like(z)
    for y in (c + root * x, c - root * x):
        density = _density((y - m) / s) * measure
        below = below + (density * np.exp(-np.exp(v))).sum(1)
        error = error + (density * (y - y_star) ** 2 * np.exp(v - np.exp(v))).sum(1)
    found = tries[:, None] * below ** (tries[:, None] - 1) * error
    return (found @ weight).reshape(np.shape(k))


def optimal_k(m: float, s: float, c: float, y_star: float, largest: int = 1024) -> int:
    """The k in 1 .. largest with the smallest error, `largest` itself where more is always better.

    >>> optimal_k(-1.0, 1.0, 0.8, 0.0)
    7

    Raises:
        ValueError: s not above 0, or largest below 1.
    """
    return 1 + int(np.argmin(best_of_k_error(m, s, c, y_star, range(1, largest + 1))))


def optimal_temperature(m: float, s: float, c: float, y_star: float, k: int) -> float:
    """The temperature in [0.001, 1000] s^2 with the smallest error of softmax-of-k.

    Raises:
        ValueError: s not above 0, or k below 1.
    """
    _checked(s, k)

    def error(log_t: float) -> float:
        return float(softmax_of_k_error(m, s, c, y_star, k, s**2 * math.exp(log_t)))

    grid = np.linspace(math.log(1e-3), math.log(1e3), 25)
    place = int(np.argmin([error(t) for t in grid]))
    bounds = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return s**2 * math.exp(minimize_scalar(error, bounds=bounds, method="bounded").x)


def aligned_limit(m: float, s: float, y_star: float, k: int) -> float:
    """1 / (2 n(y*)^2 k^2), what the error with an aligned judge comes to for large k.

    P(|y - y*| > d for all k) -> exp(-2 n(y*) k d): the smallest distance is exponential, its square has this mean.

    Raises:
        ValueError: s not above 0, or k below 1.
    """
    _checked(s, k)
    density = math.exp(-(((y_star - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
    return 1 / (2 * density**2 * k**2)


def _checked(s: float, k: Tries) -> Float[np.ndarray, "K"]:
    tries = np.atleast_1d(np.asarray(k, dtype=float))
    if not s > 0:
        raise ValueError(f"s must be positive, not {s}")
    if not len(tries) or tries.min() < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return tries


def _density(x: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _nodes(edges: Float[np.ndarray, "E"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Gauss-Legendre nodes and weights on each interval between the edges."""
    node, weight = roots_legendre(PIECE)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, np.diff(edges)[:, None] / 2
    return (middle + half * node).ravel(), (half * weight).ravel()
