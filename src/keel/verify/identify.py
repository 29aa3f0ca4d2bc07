"""Which objective a gradient follows, when it need not be the one that was meant.

The expected gradients g of a loss on several worlds are compared with

    a * R - b * D,     R the gradient of the expected reward, D that of a divergence, a and b numbers

for every candidate (R, D). One a and b must serve all worlds of equal length, near the reference and far from it; so a
match to six digits is no accident. b / a is the coefficient that the loss really has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from keel.verify.batches import Situation
from keel.verify.objectives import Level, Objective
from keel.verify.world import World

EXACT = 1e-6
"""Relative residual up to which a gradient is that of a candidate."""

KINDS = (
    "kl_policy_ref",
    "kl_ref_policy",
    "js",
    "jeffreys",
    "chi2_policy_ref",
    "chi2_ref_policy",
    "hellinger",
    "tv",
)
Gain = Literal["exact", "surrogate", "no ratio"]
Against = Literal["ref", "old"]
GAINS: dict[Gain, str] = {"exact": "E[r]", "surrogate": "token-ratio surrogate of E[r]", "no ratio": "E_old[A log pi]"}
Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Distance:
    """What may be subtracted from a reward.

    Args:
        kind: a divergence; or "log_ratio", the expected log(sampler / reference) as a reward, which the policy's own
            log-probabilities do not enter.
        level: over sequences, or per state with the visited states held at the sampler's.
        against: the reference, or the policy that sampled.
    """

    kind: str
    level: Level = "sequence"
    against: Against = "ref"

    def __str__(self) -> str:
        """As the reports name it."""
        kind = self.kind if self.against == "ref" else self.kind.replace("ref", "old")
        return f"{kind}, {'sequences' if self.level == 'sequence' else 'states held'}"

    def gradient(self, world: World) -> Float[Tensor, "X V"]:
        """In the policy's logits."""
        if self.kind == "log_ratio":
            penalised = replace(world, reward=world.log_probs("old") - world.log_probs("ref"))
            return gain_gradient("exact" if self.level == "sequence" else "surrogate", penalised)
        there = world if self.against == "ref" else replace(world, ref=world.old)
        policy = there.table("policy")
        value = Objective("reward", self.kind, self.level, 1.0).distance(policy, there)
        (found,) = torch.autograd.grad(value, policy.table)
        return found[0]


@dataclass(frozen=True)
class Candidate:
    """A reward and what is subtracted from it, both up to a coefficient.

    Args:
        gain: which gradient of the reward, or None.
        penalty: distances with their signs and relative weights.
    """

    gain: Gain | None = "exact"
    penalty: tuple[tuple[float, Distance], ...] = ()

    def text(self, beta: float | None, over_lengths: tuple[float, float] | None = None) -> str:
        """In one line, with coefficients.

        Args:
            beta: coefficient of the penalty; relative to the reward's, where there is a reward.
            over_lengths: smallest and largest one, where it is not the same for all lengths.
        """
        reward = "" if self.gain is None else GAINS[self.gain]
        if not self.penalty:
            return reward
        inner = " ".join(f"{'-' if weight < 0 else '+'} {distance}" for weight, distance in self.penalty)
        inner = inner.removeprefix("+ ")
        inner = f"({inner})" if len(self.penalty) > 1 else inner
        if beta is None:
            low, high = over_lengths or (0.0, 0.0)
            return f"{reward} - ({low:.3g} to {high:.3g}, by length) {inner}".strip()
        coefficient = "" if self.gain is None else f"{abs(beta):.4g} "
        return f"{reward} {'-' if beta >= 0 else '+'} {coefficient}{inner}".strip()


@dataclass(frozen=True)
class Identified:
    """The candidate nearest to what was measured.

    Args:
        follows: in words; "nearest: ..., misses by ..." where none is exact.
        exact: its residual is at most `EXACT`.
        residual: |g - a R + b D| / |g|, over all worlds.
        beta: b / a; None without a penalty or a reward, and where it is not the same for all lengths.
        scale: a for each space.
        candidate: what was fitted; None if the gradient is zero.
    """

    follows: str
    exact: bool
    residual: float
    beta: float | None = None
    scale: tuple[float, ...] = ()
    candidate: Candidate | None = None


def candidates(*, on_policy: bool = True) -> tuple[Candidate, ...]:
    """The simplest first. On-policy, what differs only in how the sampler enters is left out."""
    gains: tuple[Gain, ...] = ("exact",) if on_policy else ("exact", "surrogate", "no ratio")
    levels: tuple[Level, ...] = ("sequence", "state")
    single = [Distance(kind, level) for level in levels for kind in KINDS]
    penalties: list[tuple[tuple[float, Distance], ...]] = [((1.0, distance),) for distance in single]
    for first in levels:
        for second in levels:
            forward, reverse = Distance("kl_ref_policy", second), Distance("kl_policy_ref", first)
            penalties.append(((1.0, reverse), (-1.0, forward)))
    if not on_policy:
        penalties += [((1.0, Distance("log_ratio", level)),) for level in levels]
        penalties += [((1.0, Distance(kind, "state", "old")),) for kind in ("kl_policy_ref", "kl_ref_policy")]
    found = [Candidate(gain) for gain in gains]
    found += [Candidate(None, penalty) for penalty in penalties]
    return (*found, *(Candidate(gain, penalty) for penalty in penalties for gain in gains))


def gain_gradient(gain: Gain, world: World) -> Float[Tensor, "X V"]:
    """The gradient of the reward's part, in the policy's logits.

    exact       grad E_pi[r]
    surrogate   E_old[ r sum_t grad rho_t ], rho_t = pi_t / old_t: what a ratio per token gives
    no ratio    E_old[ (r - E_old[r]) sum_t grad log pi_t ]
    """
    if gain == "exact":
        return Objective("reward").gradient(world)[0]
    policy, old = world.table("policy"), world.table("old")
    rows = world.space.rows()
    tokens = rows.tokens[..., None]
    live = policy.hidden(rows).log_softmax(-1).gather(-1, tokens)[..., 0]
    past = old.hidden(rows).log_softmax(-1).gather(-1, tokens)[..., 0].detach()
    weight = world.log_probs("old")[0].exp()
    reward = world.reward[0] - (weight * world.reward[0]).sum()
    each = (live - past).exp() if gain == "surrogate" else live
    value = (weight * reward * (each * rows.mask).sum(1)).sum()
    (found,) = torch.autograd.grad(value, policy.table)
    return found[0]


Gradients = Mapping[Situation, Float[Tensor, "X V"]]


class Identifier:
    """Candidates with their gradients on given worlds, computed once for any number of losses.

    Args:
        where: the worlds.
        on_policy: which candidates to try.
        among: the candidates, in place of those.
    """

    def __init__(
        self, where: Sequence[Situation], *, on_policy: bool = True, among: tuple[Candidate, ...] | None = None
    ):
        self.where = tuple(where)
        self.worlds = {situation: situation.world() for situation in self.where}
        self.candidates = candidates(on_policy=on_policy) if among is None else among
        self._known: dict[tuple[object, Situation], np.ndarray] = {}

    def identify(self, gradients: Gradients) -> Identified:
        """The simplest candidate within `EXACT`, or the nearest one.

        Args:
            gradients: of losses to be minimised, one for each world.
        """
        found = {s: gradients[s].detach().double().numpy().ravel() for s in self.where}
        if max(float(np.abs(g).max()) for g in found.values()) < 1e-12:
            return Identified("nothing: the expected gradient is 0", True, 0.0)
        for candidate in self.candidates:
            residual, coefficients = self._fit(candidate, found, _any_sign)
            if residual <= EXACT:
                return _described(residual, candidate, coefficients)
        fits = [(*self._fit(candidate, found, solve), candidate) for candidate in self.candidates for solve in _SIGNS]
        residual, coefficients, candidate = min(fits, key=lambda fit: fit[0])
        return _described(residual, candidate, coefficients)

    def _fit(
        self, candidate: Candidate, found: dict[Situation, np.ndarray], solve: Solver
    ) -> tuple[float, list[np.ndarray]]:
        """Relative residual over all worlds, and the coefficients (a, b) of each space."""
        left, coefficients = 0.0, []
        for lengths in dict.fromkeys(s.lengths for s in self.where):
            here = [s for s in self.where if s.lengths == lengths]
            norms = [float(np.linalg.norm(found[s])) or 1.0 for s in here]  # every world counts the same
            target = np.concatenate([found[s] / n for s, n in zip(here, norms, strict=True)])
            columns = np.concatenate([self._columns(candidate, s) / n for s, n in zip(here, norms, strict=True)])
            solution = solve(columns, target)
            left += float(np.square(target - columns @ solution).sum())
            coefficients.append(solution)
        return float(np.sqrt(left / len(self.where))), coefficients

    def _columns(self, candidate: Candidate, where: Situation) -> np.ndarray:
        """R and -D side by side, for ascent on the loss: the gradient that a loss to be minimised has."""
        columns = []
        if candidate.gain is not None:
            columns.append(-self._gradient(candidate.gain, where))
        if candidate.penalty:
            columns.append(sum(weight * self._gradient(d, where) for weight, d in candidate.penalty))  # type: ignore[arg-type]
        return np.stack(columns, 1)

    def _gradient(self, what: "Gain | Distance", where: Situation) -> np.ndarray:
        key = (what, where)
        if key not in self._known:
            world = self.worlds[where]
            found = what.gradient(world) if isinstance(what, Distance) else gain_gradient(what, world)
            self._known[key] = found.detach().numpy().ravel()
        return self._known[key]


def _described(residual: float, candidate: Candidate, coefficients: list[np.ndarray]) -> Identified:
    scale = tuple(float(c[0]) for c in coefficients)
    exact, beta = residual <= EXACT, None
    if candidate.gain is None:
        text = candidate.text(scale[0])
    elif not candidate.penalty:
        text = candidate.text(None)
    else:
        ratios = [float(c[1] / c[0]) if c[0] else float("inf") for c in coefficients]
        low, high = min(ratios), max(ratios)
        low, high = (0.0 if abs(ratio) < EXACT else ratio for ratio in (low, high))
        beta = ratios[0] if high - low <= 1e-5 * max(abs(low), abs(high)) else None
        text = candidate.text(beta, (low, high))
    if candidate.gain is not None and max(scale) < 0:
        text = f"the opposite of {text}"
    if not exact:
        text = (
            f"{'nearest' if residual < 0.1 else 'nothing on the list; nearest'}: {text}; misses by {_percent(residual)}"
        )
    return Identified(text, exact, residual, beta, scale, candidate)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _any_sign(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    solution, *_ = np.linalg.lstsq(columns, target, rcond=None)
    return solution


def _positive(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    return nnls(columns, target)[0]


def _negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -nnls(columns, -target)[0]


_SIGNS = (_positive, _negative)  # the objective, and its opposite


def gradient_error(found: Float[Tensor, "X V"], wanted: Float[Tensor, "X V"]) -> tuple[float, float, float]:
    """How far a loss's gradient is from an objective's, whatever the step size.

    The step size eta >= 0 is the one that brings -eta * found nearest to `wanted`.

    Args:
        found: gradient of a loss to be minimised.
        wanted: gradient of an objective to be increased.

    Returns:
        |wanted + eta found| / |wanted|; the cosine between -found and wanted; 1 / eta, 0 if there is none.
    """
    step = -found.double()
    along, length, target = float((step * wanted).sum()), float(step.square().sum()), float(wanted.square().sum())
    if length == 0 or target == 0:
        return (0.0 if length == target else 1.0), 0.0, 0.0
    eta = max(0.0, along / length)
    error = float((wanted - eta * step).norm()) / target**0.5
    return error, along / (length * target) ** 0.5, (1 / eta if eta else 0.0)


def state_gradient(objective: Objective, world: World) -> Float[Tensor, "X V"]:
    """The gradient of an objective whose visited states are held at the sampler's, the reward's included.

    On-policy the reward's part is the exact gradient (the policy gradient theorem); off-policy it is the one of the
    token-ratio surrogate, the usual first-order approximation.
    """
    reward = gain_gradient("surrogate", world)
    if not objective.divergence:
        return reward
    return reward - objective.beta * Distance(objective.divergence, "state").gradient(world)
