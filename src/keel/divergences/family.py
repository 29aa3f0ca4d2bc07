"""f-divergences by name, in one convention, and those of one's own.

    D_f(p || q) = sum_x q f(p / q),   f convex, f(1) = f'(1) = 0,   p the policy, q the reference

The names say the order of the arguments, because "forward" and "reverse" change places between papers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import nearest
from keel.divergences import generators
from keel.divergences.generators import Generator

ALIASES = {
    "reverse_kl": "kl_policy_ref",
    "forward_kl": "kl_ref_policy",
    "jensen_shannon": "js",
    "pearson": "chi2_policy_ref",
    "chi2": "chi2_policy_ref",
    "neyman": "chi2_ref_policy",
    "total_variation": "tv",
    "squared_hellinger": "hellinger",
    "amari": "alpha",
    "cressie_read": "alpha",
}
_PLAIN: dict[str, Callable[[], Generator]] = {
    "kl_policy_ref": generators.kl_policy_ref,
    "kl_ref_policy": generators.kl_ref_policy,
    "jeffreys": generators.jeffreys,
    "chi2_policy_ref": generators.pearson,
    "chi2_ref_policy": generators.neyman,
    "tv": generators.total_variation,
    "hellinger": generators.squared_hellinger,
    "kl_chi2": generators.kl_chi2,
}
_WITH_PARAMETER: dict[str, tuple[Callable[[float], Generator], float | None]] = {
    "alpha": (generators.alpha, None),
    "js": (generators.jensen_shannon, 0.5),
}
_DUAL = {
    "kl_policy_ref": "kl_ref_policy",
    "kl_ref_policy": "kl_policy_ref",
    "chi2_policy_ref": "chi2_ref_policy",
    "chi2_ref_policy": "chi2_policy_ref",
    "alpha": "alpha",
    "js": "js",
    "jeffreys": "jeffreys",
    "tv": "tv",
    "hellinger": "hellinger",
}
_OWN: dict[str, Generator] = {}
NAMES = (*_PLAIN, *_WITH_PARAMETER)


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence: its generator in log-space, and its value and gradient over a whole vocabulary.

    Args:
        name: kl_policy_ref, kl_ref_policy, jeffreys, js, alpha, chi2_policy_ref, chi2_ref_policy, tv, hellinger,
            kl_chi2, an alias, or one registered with `own_divergence`.
        parameter: the a of `alpha`; the weight of the reference in `js`, 1/2 if not given.
        scale: factor k of the generator.

    Raises:
        ValueError: an unknown name, a parameter that is missing or not wanted, or a scale that is not positive.

    >>> FDivergence("reverse_kl")
    FDivergence(name='kl_policy_ref', parameter=None, scale=1.0)
    """

    name: str
    parameter: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        name = ALIASES.get(self.name, self.name)
        object.__setattr__(self, "name", name)
        if name not in (*NAMES, *_OWN):
            known = (*NAMES, *ALIASES, *_OWN)
            raise ValueError(f"there is no divergence '{name}'.{nearest(name, known)} Divergences: {', '.join(NAMES)}.")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"the scale of a divergence must be positive, not {self.scale}")
        if name not in _WITH_PARAMETER and self.parameter is not None:
            raise ValueError(f"divergence '{name}' has no parameter")
        if name in _WITH_PARAMETER and self.parameter is None:
            default = _WITH_PARAMETER[name][1]
            if default is None:
                raise ValueError(f"divergence '{name}' needs its parameter, such as '{name}:0.5'")
            object.__setattr__(self, "parameter", default)
        _ = self.generator

    @property
    def generator(self) -> Generator:
        """The unscaled generator."""
        if self.name in _OWN:
            return _OWN[self.name]
        if self.name in _PLAIN:
            return _PLAIN[self.name]()
        assert self.parameter is not None
        return _WITH_PARAMETER[self.name][0](self.parameter)

    def __str__(self) -> str:
        """As `f_divergence` reads it."""
        wanted = self.parameter is not None and self.parameter != _WITH_PARAMETER[self.name][1]
        name = f"{self.name}:{self.parameter:g}" if wanted else self.name
        return name if self.scale == 1 else f"{self.scale:g}*{name}"

    def scaled(self, k: float) -> "FDivergence":
        """k D."""
        return replace(self, scale=self.scale * k)

    def per_curvature(self) -> "FDivergence":
        """Divided by f''(1), so that near p = q every divergence is half of Pearson's chi-square.

        Raises:
            ValueError: the generator has no curvature at 1 (total variation).
        """
        if not self.generator.curvature:
            raise ValueError(f"{self.name} has no curvature at u = 1, so beta cannot be stated per curvature")
        return self.scaled(1 / self.generator.curvature)

    @property
    def dual(self) -> "FDivergence":
        """The divergence with its arguments exchanged, D(q || p).

        Raises:
            ValueError: it has no name (kl_chi2, and registered ones).
        """
        if self.name not in _DUAL:
            raise ValueError(f"the dual of '{self.name}' has no name here; exchange the arguments instead")
        parameter = None if self.parameter is None else 1 - self.parameter
        return FDivergence(_DUAL[self.name], parameter, self.scale)

    # -- the generator -------------------------------------------------------------------------------------------

    def f(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f(u)."""
        g = self.generator
        return self.scale * _at_zero(log_u, g.f_at_zero, g.f)

    def f_over_u(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f(u) / u, the value of one sample of p."""
        g = self.generator
        return self.scale * -_at_zero(-log_u, -g.f_prime_at_infinity, lambda l: -g.f_over_u(-l))

    def f_prime(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f'(u)."""
        g = self.generator
        return self.scale * _at_zero(log_u, g.f_prime_at_zero, g.f_prime)

    def f_second(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f''(u)."""
        return self.scale * self.generator.f_second(log_u)

    def f_prime_inverse(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """log u with f'(u) = t; -inf (u = 0) below f'(0+), +inf from f'(inf) on."""
        return self.generator.f_prime_inverse(t / self.scale)

    def conjugate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f*(t) = sup over u >= 0 of t u - f(u), with its flat branch -f(0) where u = 0, and inf beyond f'(inf)."""
        g, s = self.generator, t / self.scale
        log_u = g.f_prime_inverse(s)
        u = log_u.exp()
        inside = torch.isfinite(log_u)
        at = torch.where(inside, log_u, torch.zeros_like(log_u))
        value = torch.where(inside, s * u - g.f(at), torch.full_like(s, -g.f_at_zero))
        return self.scale * torch.where(log_u == math.inf, torch.full_like(s, math.inf), value)

    @property
    def f_at_zero(self) -> float:
        """f(0), what a lost outcome costs, per unit of reference mass."""
        return self.scale * self.generator.f_at_zero

    @property
    def f_prime_at_zero(self) -> float:
        """f'(0+); if it is finite, optima have outcomes of probability exactly 0."""
        return self.scale * self.generator.f_prime_at_zero

    @property
    def f_prime_at_infinity(self) -> float:
        """f'(inf), what mass outside the reference's support costs, per unit."""
        return self.scale * self.generator.f_prime_at_infinity

    @property
    def curvature(self) -> float:
        """f''(1)."""
        return self.scale * self.generator.curvature

    @property
    def maximum(self) -> float:
        """f(0) + f'(inf), the value for disjoint supports."""
        return self.f_at_zero + self.f_prime_at_infinity

    # -- over a whole vocabulary ---------------------------------------------------------------------------------

    def value(self, log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
        """D(p || q) in nats, from normalised log-probabilities; -inf is an outcome without mass."""
        l, p, q = _log_ratio(log_p, log_q), log_p.exp(), log_q.exp()
        above = l > 0
        less = torch.where(above, torch.zeros_like(l), l)
        more = torch.where(above, l, torch.zeros_like(l))
        terms = torch.where(above, _product(p, self.f_over_u(more)), _product(q, self.f(less)))
        return terms.sum(-1)

    def gradient(self, log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """dD / dz for the logits z of p: p (f'(u) - sum p f'(u))."""
        l, p, q = _log_ratio(log_p, log_q), log_p.exp(), log_q.exp()
        finite = torch.isfinite(l)
        l = torch.where(finite, l, torch.zeros_like(l))
        below = l < 0
        g = self.generator
        slope = torch.where(below, q * g.u_f_prime(l.clamp(max=0)), p * g.f_prime(l.clamp(min=0)))
        slope = self.scale * torch.where(finite, slope, torch.zeros_like(slope))
        return slope - p * slope.sum(-1, keepdim=True)


def f_divergence(text: "str | FDivergence") -> FDivergence:
    """A divergence from its name, with its parameter after a colon: `js`, `alpha:0.5`, `js:0.1`.

    Raises:
        ValueError: an unknown name, or a parameter that does not fit.

    >>> f_divergence("alpha:0.5").f_prime_at_infinity
    2.0
    """
    if isinstance(text, FDivergence):
        return text
    name, colon, parameter = text.partition(":")
    if not colon:
        return FDivergence(name)
    try:
        number = float(parameter)
    except ValueError:
        raise ValueError(f"'{parameter}' in '{text}' is not a number") from None
    return FDivergence(name, number)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log u, 0 where both are without mass."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.where(neither, torch.zeros_like(log_p), log_p - log_q)


def _at_zero(log_u: Tensor, limit: float, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function, and its limit at u = 0."""
    zero = log_u == -math.inf
    value = function(torch.where(zero, torch.zeros_like(log_u), log_u))
    return torch.where(zero, torch.full_like(value, limit), value)


def _product(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, 0 where the weight is 0."""
    return torch.where(weight > 0, weight * values, torch.zeros_like(values))
