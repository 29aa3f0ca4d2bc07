"""A user's own loss function, held to the objective that it is meant for.

The expected gradient of the loss is exact: see `keel.verify.batches`. It is compared with that of the objective on
worlds near the reference and far from it, with sequences of one length and of several; and where it is another one,
`keel.verify.identify` says which.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import UserError
from keel.divergences.family import f_divergence
from keel.verify.batches import (
    SPACES,
    Baseline,
    Batch,
    Situation,
    everything,
    expected_gradient,
    reached,
    situations,
)
from keel.verify.calling import Shape, UserLoss, depends_on_order, load_loss, user_loss
from keel.verify.identify import Candidate, Distance, Identified, Identifier, gradient_error, state_gradient
from keel.verify.objectives import Level, Objective
from keel.verify.world import World

Status = Literal["holds", "falls short", "no objective"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True)
class Row:
    """One world.

    Args:
        lengths: which space.
        distance: of the policy from the reference, "near" or "far".
        seed: of the world.
        on_policy: whether the policy itself sampled.
        gradient_relative_error: of the gradient, after the best step size; None without an objective.
        cosine: between the step and the objective's gradient.
        scale: the loss's gradient per unit of the objective's.
    """

    lengths: str
    distance: str
    seed: int
    on_policy: bool
    gradient_relative_error: float | None
    cosine: float | None
    scale: float | None


@dataclass(frozen=True)
class LossReport:
    """What a loss function follows, and how far that is from what was meant.

    Args:
        name: where the function is.
        objective: the stated one in one line, or None.
        status: "holds" if the error is within the tolerance on all on-policy worlds; "no objective" if none was stated.
        gradient_relative_error: the largest on-policy one.
        cosine: the smallest on-policy one.
        follows: the objective that the on-policy gradients are those of, or the nearest one.
        follows_off_policy: the same where an older policy sampled.
        residual: what `follows` leaves over, relative.
        beta: the coefficient that the loss really has, where `follows` has one.
        field_asymmetry: |J - J'| / |J + J'| of the gradient field on-policy; 0 if it is the gradient of something.
        findings: what is wrong, in words.
        rows: the worlds.
        arguments: which argument received what.
        precision: "float64" or "float32".
    """

    name: str
    objective: str | None
    status: Status
    gradient_relative_error: float | None
    cosine: float | None
    follows: str
    follows_off_policy: str
    residual: float
    beta: float | None
    field_asymmetry: float
    findings: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)
    precision: str = "float64"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {**asdict(self), "findings": list(self.findings), "rows": [asdict(row) for row in self.rows]}


def verify_loss(
    loss: str | Callable[..., Any],
    *,
    objective: str | None = None,
    level: Level = "sequence",
    beta: float | None = None,
    group: int = 4,
    baseline: Baseline = "exact",
    advantage_shape: Shape | None = None,
    seeds: tuple[int, ...] = (0, 1),
) -> LossReport:
    """Hold a loss function to an objective, and say which one it follows.

    Args:
        loss: `file.py:name`, `package.module:name`, or the function.
        objective: "reward" for E_pi[r] alone, or a divergence: E_pi[r] - beta D(pi, ref); None only identifies.
        level: over whole sequences, or per state with the visited states held.
        beta: coefficient; the function's own default if it has one. It is handed to the function, too.
        group: sequences of a call.
        baseline: of the advantages: the exact expectation of the reward, or the group's mean.
        advantage_shape: "row" ([B]) or "token" ([B, T]); None finds it out.
        seeds: of the worlds.

    Raises:
        UserError: the function cannot be found or called, or the objective is unknown or lacks its coefficient.
    """
    if group < 4:
        raise UserError(f"groups of {group} could be mistaken for tokens or rows", "group", "Use at least 4.")
    function = load_loss(loss) if isinstance(loss, str) else loss
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    on, off = situations(seeds, on_policy=True), situations(seeds, on_policy=False)
    trials = {lengths: _trial(_first(on, lengths).world(), group) for lengths in SPACES}
    called = user_loss(function, name, trials, beta=beta, advantage=advantage_shape)
    meant = _objective(objective, level, beta, called)
    ordered = any(depends_on_order(called, batch) for batch in trials.values())

    def gradient(world: World) -> Float[Tensor, "X V"]:
        return expected_gradient(called, world, group, baseline=baseline, ordered=ordered)

    live, past = _identifiers(on, off)
    found = {s: gradient(i.worlds[s]) for i in (live, past) for s in i.where}
    rows = [_row(s, found[s], meant, i.worlds[s]) for i in (live, past) for s in i.where]
    follows = live.identify(found)
    errors = [row.gradient_relative_error for row in rows if row.on_policy and row.gradient_relative_error is not None]
    cosines = [row.cosine for row in rows if row.on_policy and row.cosine is not None]
    tolerance = TOLERANCE[called.form.dtype]
    status: Status = "no objective" if meant is None else ("holds" if max(errors) <= tolerance else "falls short")
    return LossReport(
        name=name,
        objective=None if meant is None else str(meant),
        status=status,
        gradient_relative_error=max(errors, default=None),
        cosine=min(cosines, default=None),
        follows=follows.follows,
        follows_off_policy=past.identify(found).follows,
        residual=follows.residual,
        beta=follows.beta,
        field_asymmetry=field_asymmetry(gradient, _first(on, next(iter(SPACES)), "far").world()),
        findings=tuple(_findings(found, live, follows, meant, rows, ordered, tolerance)),
        rows=tuple(rows),
        arguments=called.arguments,
        precision=str(called.form.dtype).removeprefix("torch."),
    )


@cache
def _identifiers(on: tuple[Situation, ...], off: tuple[Situation, ...]) -> tuple[Identifier, Identifier]:
    """They do not depend on the loss, so one pair serves all."""
    return Identifier(on), Identifier(off, on_policy=False)


def field_asymmetry(gradient: Callable[[World], Float[Tensor, "X V"]], world: World, step: float = 1e-4) -> float:
    """|J - J'| / |J + J'| for the Jacobian J of an on-policy gradient field, by central differences.

    A field that is the gradient of some function has a symmetric Jacobian.
    """
    columns = []
    for i in range(world.policy.numel()):
        nudge = torch.zeros_like(world.policy)
        nudge.view(-1)[i] = step
        ahead, behind = (gradient(world.at(world.policy + sign * nudge)) for sign in (1, -1))
        columns.append((ahead - behind).flatten() / (2 * step))
    jacobian = torch.stack(columns, 1)
    both = float((jacobian + jacobian.T).norm())
    return float((jacobian - jacobian.T).norm()) / both if both else 0.0


def _objective(name: str | None, level: Level, beta: float | None, loss: UserLoss) -> Objective | None:
    if name is None:
        return None
    if name == "reward":
        return Objective("reward")
    try:
        kind = f_divergence(name)
    except ValueError as error:
        raise UserError(str(error), "--objective", "Or reward, for E[r] alone.") from None
    coefficient = beta if beta is not None else loss.default_beta
    if coefficient is None:
        raise UserError(f"the coefficient of {name} is not stated", "--objective", "Add --beta 0.1.")
    return Objective("reward", str(kind), level, coefficient)


def _first(where: tuple[Situation, ...], lengths: str, distance: str = "near") -> Situation:
    return next(s for s in where if s.lengths == lengths and s.distance == distance)


def _trial(world: World, group: int) -> Batch:
    """Different sequences in one group."""
    rows = everything(world, world.policy.clone().requires_grad_())
    return rows.select(torch.arange(group) % len(rows.reward))


def _row(where: Situation, found: Float[Tensor, "X V"], meant: Objective | None, world: World) -> Row:
    facts = (where.lengths, where.distance, where.seed, where.on_policy)
    if meant is None:
        return Row(*facts, None, None, None)
    wanted = state_gradient(meant, world) if meant.level == "state" else meant.gradient(world)[0]
    error, cosine, scale = gradient_error(found, wanted)
    return Row(*facts, error, cosine, scale)


def _findings(
    found: dict[Situation, Float[Tensor, "X V"]],
    live: Identifier,
    follows: Identified,
    meant: Objective | None,
    rows: list[Row],
    ordered: bool,
    tolerance: float,
) -> list[str]:
    """What is worth saying in words."""
    texts = []
    if ordered:
        texts.append("the loss changes when the rows of a group change places")
    leak = max(_leak(found[s], live.worlds[s]) for s in live.where)
    if leak > 1e-9:
        texts.append(f"up to {leak:.0%} of the gradient acts on tokens after the end: the mask is ignored or shifted")
    texts += [
        f"the gradient never reaches token {t + 1} of the {SPACES[lengths].horizon} ({lengths})"
        for lengths in SPACES
        for t in _silent(found, live, lengths)
    ]
    if follows.exact and follows.scale and max(follows.scale) < 0 and follows.candidate and follows.candidate.gain:
        texts.append("the sign is wrong: a step of gradient descent on this loss lowers the objective")
    if meant is None:
        return texts
    if follows.exact and follows.candidate == _candidate(meant) and follows.beta is not None:
        ratio = follows.beta / meant.beta
        if abs(ratio - 1) > tolerance:
            texts.append(f"the divergence is the stated one, but its coefficient is {follows.beta:.6g}")
    worst = {
        lengths: max(r.gradient_relative_error or 0.0 for r in rows if r.on_policy and r.lengths == lengths)
        for lengths in SPACES
    }
    equal, ended = worst.values()
    if equal <= tolerance < ended:
        texts.append("exact where all sequences have one length; short and long ones get different weights")
    return texts


def _candidate(meant: Objective) -> Candidate:
    """The stated objective among the candidates."""
    return Candidate("exact", ((1.0, Distance(meant.divergence, meant.level)),) if meant.divergence else ())


def _leak(found: Float[Tensor, "X V"], world: World) -> float:
    """Share of the gradient at states that no sequence reaches."""
    dead = ~reached(world.space)
    whole = float(found.norm())
    return float(found[dead].norm()) / whole if whole else 0.0


def _silent(found: dict[Situation, Float[Tensor, "X V"]], live: Identifier, lengths: str) -> list[int]:
    """Positions at which the gradient is 0 in every world, though the reward's is not."""
    space, start, silent = SPACES[lengths], 0, []
    for t in range(space.horizon):
        level = slice(start, start + space.vocab**t)
        start += space.vocab**t
        if all(float(found[s][level].abs().max()) < 1e-12 for s in live.where if s.lengths == lengths):
            silent.append(t)
    return silent if len(silent) < space.horizon else []
