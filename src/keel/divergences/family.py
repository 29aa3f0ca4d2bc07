"""f-divergences by name, in one convention, and those of one's own.

    D_f(p || q) = sum_x q f(p / q),   f convex, f(1) = f'(1) = 0,   p the policy, q the reference

The names say the order of the arguments, because "forward" and "reverse" change places between papers.
"""

import math
from collections.abc import Callable, Iterator
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
_BLOCK = 1 << 18  # numbers
_FAR = 1e8  # a log-ratio whose powers still fit fp32


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence: its generator in log-space, and its value and gradient over a whole vocabulary.

    Args:
        name: kl_policy_ref, kl_ref_policy, jeffreys, js, alpha, chi2_policy_ref, chi2_ref_policy, tv, hellinger,
            kl_chi2, an alias, or one registered with `keel.divergences.own.own_divergence`.
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
            known = (*NAMES, *_OWN)
            close = nearest(name, (*known, *ALIASES))
            raise ValueError(f"there is no divergence '{name}'.{close} Divergences: {', '.join(known)}.")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"the scale of a divergence must be positive, not {self.scale}")
        if name not in _WITH_PARAMETER and self.parameter is not None:
            raise ValueError(f"divergence '{name}' has no parameter")
        if name in _WITH_PARAMETER and self.parameter is None:
            default = _WITH_PARAMETER[name][1]
            if default is None:
                raise ValueError(f"divergence '{name}' needs its parameter, such as '{name}:0.5'")
            object.__setattr__(self, "parameter", default)
        if self.parameter is not None and not math.isfinite(self.parameter):
            raise ValueError(f"the parameter of divergence '{name}' must be finite, not {self.parameter}")
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
        name = f"{self.name}:{_number(self.parameter)}" if wanted and self.parameter is not None else self.name
        return name if self.scale == 1 else f"{_number(self.scale)}*{name}"

    def scaled(self, k: float) -> "FDivergence":
        """k D."""
        return replace(self, scale=self.scale * k)

    def per_curvature(self) -> "FDivergence":
        """Divided by f''(1), so that near p = q every divergence is half of Pearson's chi-square.

        Raises:
            ValueError: the generator has no curvature at 1 (total variation).
        """
        if not self.curvature:
            raise ValueError(f"{self.name} has no curvature at u = 1, so beta cannot be stated per curvature")
        return self.scaled(1 / self.curvature)

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

    # -- the generator, in fp32 at least -------------------------------------------------------------------------

    def f(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f(u)."""
        g, log_u = self.generator, _precise(log_u)
        less, more = _sides(log_u)
        value = torch.where(log_u > 0, more.exp() * g.f_over_u(more), g.f(less))
        top = math.inf if g.f_prime_at_infinity > 0 else 0.0
        return self.scale * _with_limits(log_u, value, g.f_at_zero, top)

    def f_over_u(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f(u) / u, the value of one sample of p."""
        g, log_u = self.generator, _precise(log_u)
        less, more = _sides(log_u)
        value = torch.where(log_u < 0, (-less).exp() * g.f(less), g.f_over_u(more))
        bottom = math.inf if g.f_at_zero > 0 else 0.0
        return self.scale * _with_limits(log_u, value, bottom, g.f_prime_at_infinity)

    def f_prime(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f'(u)."""
        g, log_u = self.generator, _precise(log_u)
        value = g.f_prime(log_u.clamp(-_FAR, _FAR))
        return self.scale * _with_limits(log_u, value, g.f_prime_at_zero, g.f_prime_at_infinity)

    def u_f_prime(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """u f'(u), the slope in log u; an infinite log u counts as the largest that the type's u can hold."""
        log_u = _precise(log_u)
        bound = -math.log(torch.finfo(log_u.dtype).tiny)
        less, more = _sides(torch.where(log_u.isinf(), log_u.clamp(-bound, bound), log_u))
        g = self.generator
        return self.scale * torch.where(log_u > 0, more.exp() * g.f_prime(more), g.u_f_prime(less))

    def f_second(self, log_u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f''(u)."""
        return self.scale * self.generator.f_second(_precise(log_u))

    def f_prime_inverse(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """log u with f'(u) = t; -inf (u = 0) below f'(0+), +inf from f'(inf) on."""
        return self.generator.f_prime_inverse(_precise(t) / self.scale)

    def conjugate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """f*(t) = sup over u >= 0 of t u - f(u), with its flat branch -f(0) where u = 0, and inf beyond f'(inf)."""
        g, s = self.generator, t.double() / self.scale  # t u and f(u) nearly cancel where u is large
        if g.conjugate is not None:
            return (self.scale * g.conjugate(s)).to(t)
        log_u = g.f_prime_inverse(s)
        u = log_u.exp()
        inside = torch.isfinite(log_u)
        at = torch.where(inside, log_u, torch.zeros_like(log_u))
        value = torch.where(inside, s * u - g.f(at), torch.full_like(s, -g.f_at_zero))
        return (self.scale * torch.where(log_u == math.inf, torch.full_like(s, math.inf), value)).to(t)

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
        """D(p || q) in nats, at least in fp32, from normalised log-probabilities; -inf is an outcome without mass.

        It is inf where p and q differ in support and f(0) or f'(inf) says so.
        """
        log_u, p, q = _log_ratio(log_p, log_q)
        g, near = self.generator, log_u.clamp(-_FAR, _FAR)
        if g.terms is not None:
            terms = g.terms(near, p, q)
        else:
            less, more = _sides(log_u)
            terms = torch.where(near > 0, _product(p, g.f_over_u(more)), _product(q, g.f(less)))
        terms = torch.where(log_u == -math.inf, _times(q, g.f_at_zero), terms)
        return self.scale * torch.where(log_u == math.inf, _times(p, g.f_prime_at_infinity), terms).sum(-1)

    def gradient(self, log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """dD / dz for the logits z of p: p (f'(u) - sum p f'(u)), always finite, at least in fp32.

        Outcomes that cost infinitely much are left out: no step of finite size would pay for them.
        """
        log_u, p, q = _log_ratio(log_p, log_q)
        g, near = self.generator, log_u.clamp(-_FAR, _FAR)
        if g.slopes is not None:
            slopes = g.slopes(near, p, q)
        else:
            less, more = _sides(log_u)
            slopes = torch.where(near > 0, _product(p, g.f_prime(more)), _product(q, g.u_f_prime(less)))
        top = g.f_prime_at_infinity if math.isfinite(g.f_prime_at_infinity) else 0.0
        slopes = torch.where(log_u == math.inf, top * p, slopes.masked_fill(log_u == -math.inf, 0.0))
        bound = torch.finfo(slopes.dtype).max / (4 * slopes.shape[-1])
        slopes = (self.scale * slopes).clamp(-bound, bound)
        return slopes - p * slopes.sum(-1, keepdim=True)

    def value_(
        self, log_u: Float[Tensor, "n V"], p: Float[Tensor, "n V"], q: Float[Tensor, "n V"]
    ) -> Float[Tensor, "n"]:
        """`value` in fewer passes over memory, from the log-ratio, which is written over, and both distributions.

        It is inf or nan where an outcome lacks mass in a way that matters: then ask `value`.
        """
        g = self.generator
        if g.terms_ is not None:
            return self.scale * g.terms_(log_u, p, q).sum(-1)
        parts = [self._terms(*part).sum(-1) for part in _blocks(log_u, p, q)]
        return self.scale * (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))

    def _terms(self, log_u: Tensor, p: Tensor, q: Tensor) -> Tensor:
        g = self.generator
        if g.terms is not None:
            return g.terms(log_u, p, q)
        less, more = log_u.clamp(max=0), log_u.clamp(min=0)
        return torch.where(log_u > 0, _product(p, g.f_over_u(more)), _product(q, g.f(less)))

    def slopes_(
        self, log_u: Float[Tensor, "n V"], p: Float[Tensor, "n V"], q: Float[Tensor, "n V"]
    ) -> Float[Tensor, "n V"]:
        """p f'(u) where `value_` is finite; log u is written over. `gradient` is what of it is across p."""
        if self.generator.slopes_ is not None:
            self.generator.slopes_(log_u, p, q)
        else:
            for part, p_part, q_part in _blocks(log_u, p, q):
                part.copy_(self._slopes(part, p_part, q_part))
        return log_u if self.scale == 1.0 else log_u.mul_(self.scale)

    def _slopes(self, log_u: Tensor, p: Tensor, q: Tensor) -> Tensor:
        g = self.generator
        if g.slopes is not None:
            return g.slopes(log_u, p, q)
        less, more = log_u.clamp(max=0), log_u.clamp(min=0)
        return torch.where(log_u > 0, _product(p, g.f_prime(more)), _product(q, g.u_f_prime(less)))

    @property
    def reads_q(self) -> bool:
        """Whether `value_` and `slopes_` read q."""
        return self.name != "kl_policy_ref"


def f_divergence(text: "str | FDivergence") -> FDivergence:
    """A divergence from its name: `js`, with a parameter `alpha:0.5`, with a factor `4*js:0.1`.

    Raises:
        ValueError: an unknown name, or a parameter or a factor that does not fit.

    >>> f_divergence("alpha:0.5").f_prime_at_infinity
    2.0
    >>> print(f_divergence("4*jensen_shannon"))
    4*js
    """
    if isinstance(text, FDivergence):
        return text
    factor, star, rest = text.rpartition("*")
    name, colon, parameter = rest.partition(":")
    return FDivergence(
        name.strip(),
        _read_number(parameter, text) if colon else None,
        _read_number(factor, text) if star else 1.0,
    )


def _read_number(written: str, text: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise ValueError(f"'{written}' in '{text}' is not a number") from None


def _number(x: float) -> str:
    """The shortest form that reads back as the same number."""
    return f"{x:g}" if float(f"{x:g}") == x else repr(x)


def _precise(numbers: Tensor) -> Tensor:
    """In fp32 at least: bf16 has three digits."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _log_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log u, p and q; log u is 0 where both are without mass."""
    log_p, log_q = _precise(log_p), _precise(log_q)
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    return (log_p - log_q).masked_fill(neither, 0.0), log_p.exp(), log_q.exp()


def _sides(log_u: Tensor) -> tuple[Tensor, Tensor]:
    """log u below 0 and above it, each 0 on the other side; limits stand for what lies beyond the bound."""
    return log_u.clamp(-_FAR, 0), log_u.clamp(0, _FAR)


def _with_limits(log_u: Tensor, values: Tensor, at_zero: float, at_infinity: float) -> Tensor:
    """The values, and the limits at u = 0 and at u = inf."""
    return values.masked_fill(log_u == -math.inf, at_zero).masked_fill(log_u == math.inf, at_infinity)


def _times(weight: Tensor, constant: float) -> Tensor:
    """weight * constant, 0 where the weight is 0."""
    return weight * constant if math.isfinite(constant) else torch.where(weight > 0, constant, 0.0).to(weight)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same outcomes of each, few enough that what is made of them stays in the cache."""
    width = max(1, _BLOCK // max(1, len(tensors[0])))
    return zip(*(t.split(width, -1) for t in tensors), strict=True)


def _product(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, 0 where the weight is 0."""
    return (weight * values).masked_fill(weight == 0, 0.0)
