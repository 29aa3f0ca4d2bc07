"""Where a method comes to rest: its expected update followed to the end, preconditioned by the Fisher information."""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from keel.verify.world import World


class Regularised(Protocol):
    """An objective with a coefficient and an exact gradient."""

    @property
    def beta(self) -> float:
        """The coefficient."""
        ...

    def gradient(self, world: World) -> Float[Tensor, "Q X V"]:
        """Of the objective in the logits."""
        ...


Field = Callable[[World], Float[Tensor, "Q X V"]]
STEPS = 400
STILL = 1e-10  # largest change of a probability that counts as rest
SHRINK = 0.9  # of the step where the direction turns; a field with jumps, that of total variation, turns all the time
REACH = 40.0  # logits farther than this below the largest hold no mass that matters


def fixed_point(field: Field, world: World, objective: Regularised) -> World:
    """The world with the policy at which the update vanishes, reached from the reference.

    The field is followed along the natural gradient of the tabular softmax,

        dz(s, a) = eta g(s, a) / (d(s) pi(a|s)),

    whose fixed points are those of the field itself, d(s) being the probability of visiting a state. The step eta is
    1 / beta in units of the objective (one step of soft policy iteration), and smaller whenever the direction turns.

    Args:
        field: from a world, whose policy is also its sampler, to the expected update in the logits.
        objective: gives the unit of the step.
    """
    logits = world.ref.clone()
    eta = 0.5 * _unit(field, world, objective) / (objective.beta or 0.5)
    before: Tensor | None = None
    for _ in range(STEPS):
        direction = natural_gradient(field(world.at(logits)), world.at(logits))
        if before is not None and bool((direction * before).sum() < 0):
            eta *= SHRINK
        step = eta * direction
        step = step * min(1.0, 5.0 / float(step.abs().max().clamp(min=1e-30)))
        moved = (logits + step).log_softmax(-1).clamp(min=-REACH)
        change = float((moved.softmax(-1) - logits.softmax(-1)).abs().max())
        logits, before = moved, direction
        if change < STILL:
            break
    return world.at(logits)


def natural_gradient(gradient: Float[Tensor, "Q X V"], world: World) -> Float[Tensor, "Q X V"]:
    """The gradient over the probability of reaching and choosing, centred in each state; 0 in states never reached."""
    policy = world.table()
    prob = policy.table.detach().softmax(-1)
    visits = torch.zeros(prob.shape[:2], dtype=prob.dtype)
    for prompt in range(world.space.prompts):
        rows = world.space.rows(prompt)
        weight = policy.log_prob(rows).exp().detach()[:, None] * rows.mask
        visits[prompt].index_add_(0, world.space.prefix_index(rows.tokens).flatten(), weight.flatten())
    mass = visits[..., None] * prob
    direction = torch.where(mass > 1e-12, gradient / mass.clamp(min=1e-12), torch.zeros_like(gradient))
    return direction - (prob * direction).sum(-1, keepdim=True)


def total_variation(one: Float[Tensor, "Q S"], other: Float[Tensor, "Q S"]) -> float:
    """Largest total variation over prompts, from log-probabilities."""
    return float((one.exp() - other.exp()).abs().sum(-1).max() / 2)


def _unit(field: Field, world: World, objective: Regularised) -> float:
    """How much larger the objective's gradient is than the field, where the policy is the reference."""
    start = world.at(world.ref)
    update = field(start).norm()
    return float(objective.gradient(start).norm() / update) if update > 0 else 1.0
