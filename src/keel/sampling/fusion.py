"""Logit arithmetic: what small experts have learned, added to a large model, with coefficients solved for each token.

    P_a = softmax(L + sum_j a_j (F_j - S))

of large logits L, small ones S and small experts' F_j. A shift that the large model should make as far as the small one
did has KL(P_a || P_L) = KL(P_F || P_S): along a ray from a = 0 the left side never falls (it is the KL along an
exponential family), so bisection finds a.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.chain import Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.joint import joined

ITERATIONS = 40  # of the bisection: a is known to 2^-40 of its range
SETTLED = 1e-6  # nats below which an expert says what the small model says, and any a would do
CERTAIN = 1e4  # logits by which a token gains that only the expert thinks possible
COARSE, FINE = 0.1, 0.02  # steps of the grid


@part("dynamic_logit_fusion", paper=24)
@dataclass(frozen=True)
class DynamicFusion:
    """Kernel that moves the large model as far, in KL, as small experts moved from their own base; see the module.

    The main chain is the large model. Where an expert rules a token out, the proposal may too, and SMC then finds only
    that part of the tilt which the proposal can reach.

    Args:
        base: name of the chain of the small base model.
        experts: names of the chains of its experts.
        coefficient: the same a for every token and expert, as in proxy tuning; None solves for it.
        limit: largest a.
        active: with several experts "all", or for each token the "one" that moved farthest.
        search: for several active experts "ray" or "grid"; see `solve_coefficients`.

    Raises:
        ValueError: no expert, limit not above 0, a negative coefficient, or an unknown choice.

    Source: "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", NeurIPS 2024; a constant
    coefficient is "Tuning Language Models by Proxy", 2024.
    """

    base: str = "small"
    experts: tuple[str, ...] = ("expert",)
    coefficient: float | None = None
    limit: float = 2.0
    active: Literal["all", "one"] = "all"
    search: Literal["ray", "grid"] = "ray"

    def __post_init__(self) -> None:
        if not self.experts:
            raise ValueError("experts must name one chain at least")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, not {self.limit}")
        if self.coefficient is not None and not 0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient must not be negative, but is {self.coefficient}")
        _one_of("active", self.active, "all", "one")
        _one_of("search", self.search, "ray", "grid")

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the other chains."""
        return (self.base, *self.experts)

    def log_q(self, chain: TokenChain, x: Prefix, rng: Choice, beta: float) -> Float[Tensor, "B V"]:
        """See `Kernel`."""
        large, small, experts = self._read(chain, x)
        fused = fused_logits(large, small, experts, self._solve(large, small, experts))
        return torch.where(x.done[:, None], large.to(fused), fused)

    def coefficients(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B J"]:
        """The coefficients with which each state goes on; 0 for finished ones."""
        return self._solve(*self._read(chain, x)).masked_fill(x.done[:, None], 0.0)

    def _read(
        self, chain: TokenChain, x: Prefix
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"], Float[Tensor, "B J V"]]:
        both = joined(chain, self)
        experts = torch.stack([both.other(name, x) for name in self.experts], 1)
        return both.log_probs(x), both.other(self.base, x), experts

    @torch.no_grad()
    def _solve(
        self, large: Float[Tensor, "B V"], small: Float[Tensor, "B V"], experts: Float[Tensor, "B J V"]
    ) -> Float[Tensor, "B J"]:
        if self.coefficient is not None:
            return torch.full(experts.shape[:2], self.coefficient, dtype=torch.float64, device=large.device)
        if self.active == "one":
            return solve_one(large, small, experts, self.limit)
        return solve_coefficients(large, small, experts, self.limit, self.search)


def fused_logits(
    large: Float[Tensor, "B V"], small: Float[Tensor, "B V"], experts: Float[Tensor, "B J V"], a: Float[Tensor, "B J"]
) -> Float[Tensor, "B V"]:
    """L + sum_j a_j (F_j - S), in fp64.

    A token that the large model rules out stays out. Where an expert and the small base both rule a token out, the
    expert has nothing to say about it. Where nothing would be left, the large model speaks alone.

    >>> one = lambda *logits: torch.tensor([logits])
    >>> fused_logits(one(2., 0., 0.), one(1., 0., 0.), one(1., 2., 0.)[:, None], torch.tensor([[.5]])).tolist()
    [[2.0, 1.0, 0.0]]
    """
    large = large.double()
    fused = torch.where(large == -math.inf, large, large + _sum(a.double(), _shifts(small, experts)))
    lost = (fused == -math.inf).all(-1, keepdim=True)
    return torch.where(lost, large, fused)


def solve_coefficient(
    large: Float[Tensor, "B V"], small: Float[Tensor, "B V"], expert: Float[Tensor, "B V"], limit: float = 2.0
) -> Float[Tensor, "B"]:
    """a in [0, limit] with KL(P_a || P_L) = KL(P_F || P_S), by bisection.

    0 where the expert says what the small model says (a KL below 1e-6), `limit` where no a moves far enough.

    >>> L, S, F = (torch.tensor([logits]) for logits in ([2., 0., 0.], [1., 0., 0.], [1., 2., 0.]))
    >>> round(float(solve_coefficient(L, S, F)), 6)
    1.055334
    """
    target = _targets(small, expert[:, None])[:, 0]
    return _along(large, _shifts(small, expert[:, None])[:, 0], target, limit)


def solve_one(
    large: Float[Tensor, "B V"], small: Float[Tensor, "B V"], experts: Float[Tensor, "B J V"], limit: float = 2.0
) -> Float[Tensor, "B J"]:
    """The coefficient of the expert that moved farthest from the small model; 0 for the others."""
    targets = _targets(small, experts)
    most, chosen = targets.max(-1)
    direction = torch.zeros_like(targets).scatter(1, chosen[:, None], 1.0)
    return _along(large, _sum(direction, _shifts(small, experts)), most, limit)[:, None] * direction


def solve_coefficients(
    large: Float[Tensor, "B V"],
    small: Float[Tensor, "B V"],
    experts: Float[Tensor, "B J V"],
    limit: float = 2.0,
    search: Literal["ray", "grid"] = "ray",
) -> Float[Tensor, "B J"]:
    """argmin over a in [0, limit]^J of sum_j (KL(P_a || P_L) - KL_j)^2, with KL_j = KL(P_{F_j} || P_S).

    The sum is J (KL(P_a || P_L) - mean_j KL_j)^2 + a constant: for several experts it fixes how far to move, not in
    which direction, and a whole surface of a is optimal.

        ray    the optimum in proportion to the KL_j, so that who has learned nothing adds nothing; by bisection
        grid   the best point of a grid of step 0.1, then of one of step 0.02 around it: 21^J + 11^J evaluations

    Raises:
        ValueError: an unknown search.
    """
    _one_of("search", search, "ray", "grid")
    targets = _targets(small, experts)
    goal = targets.mean(-1)
    if search == "ray":
        direction = targets / targets.amax(-1, keepdim=True).clamp(min=SETTLED)
        return _along(large, _sum(direction, _shifts(small, experts)), goal, limit)[:, None] * direction
    coarse = torch.arange(0, limit + COARSE / 2, COARSE).tolist()
    fine = torch.arange(-COARSE, COARSE + FINE / 2, FINE).tolist()
    found = _best(large, small, experts, goal, torch.zeros_like(targets), coarse, limit)
    found = _best(large, small, experts, goal, found, fine, limit)
    return found.masked_fill((goal < SETTLED)[:, None], 0.0)


def divergence(p: Float[Tensor, "*n V"], q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """KL(softmax p || softmax q) in fp64; tokens that p rules out count nothing."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    gap = torch.where(log_p == -math.inf, torch.zeros_like(log_p), log_p - log_q)
    return (log_p.exp() * gap).sum(-1).clamp(min=0)


def _targets(small: Float[Tensor, "B V"], experts: Float[Tensor, "B J V"]) -> Float[Tensor, "B J"]:
    """KL_j; finite where an expert says what the small model rules out."""
    return divergence(experts, small[:, None].expand_as(experts)).clamp(max=CERTAIN)


def _shifts(small: Float[Tensor, "B V"], experts: Float[Tensor, "B J V"]) -> Float[Tensor, "B J V"]:
    """F_j - S; 0 where both are -inf, large where S alone is."""
    base, learned = small.double()[:, None], experts.double()
    neither = (base == -math.inf) & (learned == -math.inf)
    return torch.where(neither, torch.zeros_like(learned), learned - base).clamp(max=CERTAIN)


def _sum(a: Float[Tensor, "B J"], shifts: Float[Tensor, "B J V"]) -> Float[Tensor, "B V"]:
    """sum_j a_j (F_j - S); an expert with a = 0 is silent even about tokens that it rules out."""
    return torch.where(a[..., None] == 0, torch.zeros_like(shifts), a[..., None] * shifts).sum(1)


def _along(
    large: Float[Tensor, "B V"], shift: Float[Tensor, "B V"], target: Float[Tensor, "B"], limit: float
) -> Float[Tensor, "B"]:
    """s in [0, limit] with KL(softmax(L + s shift) || P_L) = target."""
    large = large.double()
    shift = torch.where(large == -math.inf, torch.zeros_like(shift), shift)

    def short(s: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        return divergence(large + s[:, None] * shift, large) < target

    low, high = torch.zeros_like(target), torch.full_like(target, limit)
    missed = short(high)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        more = short(middle)
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    found = torch.where(missed, torch.full_like(high, limit), (low + high) / 2)
    return found.masked_fill(target < SETTLED, 0.0)


def _best(
    large: Float[Tensor, "B V"],
    small: Float[Tensor, "B V"],
    experts: Float[Tensor, "B J V"],
    goal: Float[Tensor, "B"],
    centre: Float[Tensor, "B J"],
    steps: list[float],
    limit: float,
) -> Float[Tensor, "B J"]:
    """The point of a grid around a centre whose KL from the large model is closest to the goal; the first of equals."""
    least, found = torch.full_like(goal, math.inf), centre
    for offset in itertools.product(steps, repeat=experts.shape[1]):
        a = (centre + centre.new_tensor(offset)).clamp(0, limit)
        miss = (divergence(fused_logits(large, small, experts, a), large) - goal).abs()
        better = miss < least
        least, found = torch.where(better, miss, least), torch.where(better[:, None], a, found)
    return found


def _one_of(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not '{value}'")
