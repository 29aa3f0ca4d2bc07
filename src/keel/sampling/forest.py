"""The forest behind weighted particles: who continued whom, what was written once, and which branches died.

A node is what one particle added in one round. Particles that resampling dropped end in leaves with the status PRUNED;
the survivors are the first P N leaves, in their order. Every token that a sampler drew, and kept in its trace, is in
the forest once: M is what its meter calls generated.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix
from keel.core.errors import UserError
from keel.core.forest import PRUNED, Forest, Kind, depths, unrolled
from keel.core.rows import Rows
from keel.sampling.particles import Particles, Step


def forest_of(particles: Particles, merge: bool = True) -> Forest:
    """The forest of a sampler's particles; without a trace, each is a root of its own.

    Survivors have log_w = log(N W), the dead -inf and no reward (NaN). `logp` is log p_0 also where tokens were
    proposed by another kernel, because the weights make up for that. `branch_log_q` keeps what a node's first round was
    proposed with: where it added several tokens, the later ones enter as if the policy had proposed them.

    Args:
        particles: of any sampler over tokens.
        merge: make one node of a stretch without branchings; otherwise it stays one for each round.

    Raises:
        UserError: the states are not over tokens, or the trace does not lead to the particles.
    """
    states = particles.states
    if not isinstance(states, Prefix):
        raise UserError("only completions of tokens make a forest", "forest_of", "Sample from a chain over tokens.")
    forest = _grown(particles, states) if particles.trace else _planted(particles, states)
    return forest.merged() if merge else forest


def rows_of(
    particles: Particles, prompt_ids: Int[Tensor, "P W"], prompt_mask: Bool[Tensor, "P W"], pad_id: int
) -> Rows:
    """The survivors as rows in their order, a group for each prompt, with weight N W: 1 on average.

    A weighted mean over a group is the sampler's estimate of the expectation under the tilt. Rows of weight 0 stay, so
    that groups keep their size; no mean counts them. Particles that never finished are left out. See `Forest.rows` for
    the columns; log_w is log(N W).

    Args:
        particles: of any sampler over tokens.
        prompt_ids, prompt_mask: of each prompt, left-padded.
        pad_id: token after the end.

    Raises:
        UserError: the states are not over tokens, or the trace does not lead to the particles.
    """
    forest = forest_of(particles, merge=False)
    return forest.keep(forest.status != PRUNED).merged().rows(prompt_ids, prompt_mask, pad_id)


def _planted(particles: Particles, states: Prefix) -> Forest:
    zeros = torch.zeros_like(states.length)
    row, column = unrolled(zeros, states.length)
    end = states.length.cumsum(0)
    logp = states.logp[row, column]
    return Forest(
        parent=zeros - 1,
        start=end - states.length,
        end=end,
        depth=zeros,
        prompt=states.prompt,
        kind=zeros + int(Kind.SAMPLED),
        branch_log_q=torch.where(states.length > 0, states.logp[:, 0], 0.0),
        tokens=states.tokens[row, column],
        logp=logp,
        trainable=torch.ones_like(logp, dtype=torch.bool),
        leaf_node=torch.arange(len(states), device=zeros.device),
        status=states.stop,
        log_w=_log_weight(particles),
        reward=particles.reward.flatten(),
    )


def _grown(particles: Particles, states: Prefix) -> Forest:
    last = particles.trace[-1].states
    if not torch.equal(last.length, states.length) or not torch.equal(last.tokens, states.tokens):
        raise UserError("the trace does not end in the particles that it came with", "forest_of", "Keep every round.")
    tip = torch.full_like(states.length, -1)  # the node at which each particle stands
    rounds: list[Rounds] = []
    count = 0
    for step in particles.trace:
        tip = tip[_flat(step.ancestors)]
        grown = step.states.length > step.start.flatten()
        rounds.append(_added(step, grown, tip))
        tip[grown] = count + torch.arange(int(grown.sum()), device=tip.device)
        count += int(grown.sum())
    nodes = Rounds(*(torch.cat(columns) for columns in zip(*rounds, strict=True)))
    return _ended(particles, states, nodes, tip)


class Rounds(NamedTuple):
    """What particles added, one node for each particle and round.

    Args:
        parent, size, prompt, log_q: of each node, shape [N].
        tokens, logp: of all nodes, one after another, shape [M].
    """

    parent: Int[Tensor, "N"]
    size: Int[Tensor, "N"]
    prompt: Int[Tensor, "N"]
    log_q: Float[Tensor, "N"]
    tokens: Int[Tensor, "M"]
    logp: Float[Tensor, "M"]


def _added(step: Step, grown: Bool[Tensor, "B"], tip: Int[Tensor, "B"]) -> Rounds:
    """The nodes of one round."""
    which = grown.nonzero(as_tuple=True)[0]
    states, start = step.states, step.start.flatten()[which]
    owner, column = unrolled(start, states.length[which])
    logp = states.logp[which[owner], column]
    later = torch.where(column > start[owner], logp, 0.0)
    log_q = step.log_q.flatten()[which].to(logp)
    log_q = log_q - torch.zeros_like(log_q).index_add(0, owner, later)  # the others as the policy proposes them
    tokens = states.tokens[which[owner], column]
    return Rounds(tip[which], states.length[which] - start, states.prompt[which], log_q, tokens, logp)


def _ended(particles: Particles, states: Prefix, nodes: Rounds, tip: Int[Tensor, "B"]) -> Forest:
    """The forest of these nodes: survivors end at their tips, and where nobody went on, a branch is dead."""
    count = len(nodes.parent)
    ends = torch.bincount(tip[tip >= 0], minlength=count)
    alike = (
        ((tip < 0) | (ends[tip] > 1)).nonzero(as_tuple=True)[0] if count else torch.arange(len(tip), device=tip.device)
    )
    leaf = tip.index_copy(0, alike, count + torch.arange(len(alike), device=tip.device))  # copies add nothing
    inner = torch.bincount(nodes.parent[nodes.parent >= 0], minlength=count) > 0
    dead = (~inner & (ends == 0)).nonzero(as_tuple=True)[0]
    none = torch.zeros_like(alike)
    parent = torch.cat([nodes.parent, tip[alike]])
    size = torch.cat([nodes.size, none])
    end = size.cumsum(0)
    return Forest(
        parent=parent,
        start=end - size,
        end=end,
        depth=depths(parent),
        prompt=torch.cat([nodes.prompt, states.prompt[alike]]),
        kind=torch.full_like(parent, int(Kind.SAMPLED)),
        branch_log_q=torch.cat([nodes.log_q, none.to(nodes.log_q)]),
        tokens=nodes.tokens,
        logp=nodes.logp,
        trainable=torch.ones_like(nodes.tokens, dtype=torch.bool),
        leaf_node=torch.cat([leaf, dead]),
        status=torch.cat([states.stop, torch.full_like(dead, PRUNED)]),
        log_w=torch.cat([_log_weight(particles), particles.log_w.new_full(dead.shape, -torch.inf)]),
        reward=torch.cat([particles.reward.flatten(), particles.reward.new_full(dead.shape, torch.nan)]),
    )


def _log_weight(particles: Particles) -> Float[Tensor, "B"]:
    """log(N W)."""
    return particles.log_w.flatten() + math.log(particles.count)


def _flat(ancestors: Int[Tensor, "P N"]) -> Int[Tensor, "B"]:
    """From places within a prompt to places among all particles."""
    prompts, count = ancestors.shape
    return (ancestors + torch.arange(prompts, device=ancestors.device)[:, None] * count).flatten()
