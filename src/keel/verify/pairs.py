"""Methods that learn from comparisons, on worlds where every comparison and its probability is known.

Completions are drawn by the reference, and of two the one with reward r_i is preferred with probability
sigmoid(r_i - r_j), as Bradley and Terry have it. A method claims that the policy which minimises its loss over this
population is the optimum of a regularised reward; that, and not the gradient on the way, is what it is held to.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.rows import Pairs, Rows, cat
from keel.exact.space import SequenceSpace
from keel.exact.states import endings
from keel.tasks.preferences import Kind
from keel.verify.world import World

LOWEST = -40.0  # log-probability below which no mass matters


def preference_rows(world: World, reads: Kind, beta: float = 1.0) -> Rows:
    """Every comparison of two completions of a prompt, or every completion with each label, at its probability.

    Of pairs and lists, each comparison brings two rows of its own, the preferred one first; the row's weight is the
    probability of the comparison, and the mask "nll" holds the preferred completions. What the data say of each
    completion of a pair is its reward; of a list, which of the two is preferred. Of labels, sigmoid(r - c) is the
    probability of the label 1, with c such that ref exp((r - c) / beta) is normalised.
    """
    prompts = range(world.space.prompts)
    return cat([_labels(world, q, beta) if reads == "labels" else _pairs(world, q, reads) for q in prompts])


def _pairs(world: World, prompt: int, reads: Kind) -> Rows:
    prob, reward = world.log_probs("ref")[prompt].exp(), world.reward[prompt]
    first, second = (~torch.eye(len(prob), dtype=torch.bool)).nonzero(as_tuple=True)
    measure = prob[first] * prob[second] * (reward[first] - reward[second]).sigmoid()
    place = torch.stack([first, second], 1).flatten()
    rows = world.space.rows(prompt).select(place)
    count = len(first)
    chosen = torch.arange(2 * count) % 2 == 0
    return rows.with_(
        weight=measure.repeat_interleave(2),
        group=torch.arange(count).repeat_interleave(2) + prompt * count,
        exact=True,
        masks={"nll": rows.mask & chosen[:, None]},
        columns={
            "score": reward[place] if reads == "pairs" else chosen.double(),
            "position": (~chosen).long(),
            "sequence": place + prompt * len(prob),
        },
        pairs=Pairs(
            chosen=2 * torch.arange(count),
            rejected=2 * torch.arange(count) + 1,
            measure=measure,
            coef=torch.ones_like(measure),
            label=torch.ones_like(measure),
            offset=torch.zeros_like(measure),
        ),
    )


def _labels(world: World, prompt: int, beta: float) -> Rows:
    log_prob, reward = world.log_probs("ref")[prompt], world.reward[prompt]
    right = (reward - beta * (log_prob + reward / beta).logsumexp(0)).sigmoid()
    count = len(log_prob)
    rows = world.space.rows(prompt).select(torch.arange(count).repeat(2))
    good = torch.arange(2 * count) < count
    return rows.with_(
        weight=log_prob.exp().repeat(2) * torch.where(good, right.repeat(2), 1 - right.repeat(2)),
        group=torch.arange(2 * count) + prompt * 2 * count,
        exact=True,
        label=good.double(),
        masks={"nll": rows.mask & good[:, None]},
        columns={"score": good.double(), "position": torch.zeros(2 * count, dtype=torch.long)},
    )


def table_of(log_probs: Float[Tensor, "Q S"], space: SequenceSpace) -> Float[Tensor, "Q X V"]:
    """The logits of each prefix under which whole sequences have these probabilities; uniform where none passes."""
    ends = endings(space)
    mass = torch.full((len(log_probs), space.prefixes, space.vocab), LOWEST, dtype=log_probs.dtype)
    start = space.prefixes
    for length in reversed(range(space.horizon)):
        start -= space.vocab**length
        for x in range(start, start + space.vocab**length):
            for v in range(space.vocab):
                if int(ends[x, v]) >= 0:
                    mass[:, x, v] = log_probs[:, int(ends[x, v])]
                elif length + 1 < space.horizon:
                    child = start + space.vocab**length + (x - start) * space.vocab + v
                    mass[:, x, v] = mass[:, child].logsumexp(-1)
    return mass.clamp(min=LOWEST).log_softmax(-1)


def stationarity(method: Any, world: World, optimum: Float[Tensor, "Q S"]) -> float:
    """How much of the loss's gradient is left at the stated optimum, over what it is at the reference."""
    from keel.verify.population import expected_update

    there = expected_update(method, world.at(table_of(optimum, world.space)))
    start = expected_update(method, world.at(world.ref))
    norm = start.direction.norm()
    return float(there.direction.norm() / norm) if norm > 0 else float("inf")


def minimiser(method: Any, world: World) -> World:
    """The world with the policy that minimises the loss over all comparisons, found from the reference by L-BFGS."""
    from scipy.optimize import minimize

    from keel.verify.population import expected_update

    shape = world.ref.shape

    def loss(flat):
        found = expected_update(method, world.at(torch.as_tensor(flat).reshape(shape)))
        return found.loss, -found.direction.flatten().numpy()

    start = world.ref.flatten().numpy()
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return replace(world, policy=torch.as_tensor(found.x).reshape(shape), old=world.old)


def has_minimum(method: Any) -> bool:
    """Whether the loss is a potential of its gradient; with weights of pairs that are held constant it is not."""
    return all(getattr(term, "weight", None) is None for term in method.terms.values())


def learnt_scores(method: Any, world: World) -> Float[Tensor, "Q S"]:
    """The scores that minimise a reward model's loss over all comparisons, one number for each completion.

    The head of the method is taken to be able to say anything: its numbers are what is minimised over.
    """
    from scipy.optimize import minimize

    from keel.statistics.functionals import Value
    from keel.statistics.stats import Stats

    assert method.reads is not None
    rows = preference_rows(world, method.reads)
    (head,) = (f for f in method.live_needs() if isinstance(f, Value))
    place, states = rows.columns["sequence"], method.initial_states()

    def loss(flat):
        scores = torch.tensor(flat, requires_grad=True)
        value = method.loss(rows, Stats({head: scores[place]}), states)
        (gradient,) = torch.autograd.grad(value, scores)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(
        loss, torch.zeros(world.reward.numel()).double().numpy(), jac=True, method="L-BFGS-B", options=options
    )
    return torch.as_tensor(found.x).reshape(world.reward.shape)
