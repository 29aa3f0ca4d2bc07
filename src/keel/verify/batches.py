"""What a loss function sees of a small world, and the exact expectation of its gradient there.

A loss is called once for every group of G sequences that the sampler may draw, and

    g = sum over groups of P(group) * grad loss(group),   grad with respect to the policy's logits

so nothing is sampled and nothing is estimated. Rows of a group are independent, so a group is a multiset, weighted by
its number of orders; a loss that depends on the order of its rows is called on every order.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.verify.world import World, random_world

NEAR, FAR = 0.1, 1.0
FIXED = SequenceSpace(vocab=2, horizon=2)
ENDED = SequenceSpace(vocab=2, horizon=3, eos=1)
SPACES = {"equal lengths": FIXED, "lengths 1 to 3": ENDED}
Baseline = Literal["exact", "group"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One group of sequences of one prompt, as a trainer would hand it to its loss.

    Beyond the end of a sequence the numbers are those of some other state, as they are in practice; only the mask
    says that they do not count.

    Args:
        tokens: [B, T], 0 after the end.
        mask: tokens that count, [B, T].
        logits: of the live policy, with gradient, [B, T, V].
        old_logits: of the policy that sampled.
        ref_logits: of the reference.
        reward: of each sequence, [B].
        advantage: of each sequence, [B].
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    logits: Float[Tensor, "B T V"]
    old_logits: Float[Tensor, "B T V"]
    ref_logits: Float[Tensor, "B T V"]
    reward: Float[Tensor, "B"]
    advantage: Float[Tensor, "B"]

    @property
    def log_prob(self) -> Float[Tensor, "B T"]:
        """Of the live policy, with gradient."""
        return _chosen(self.logits, self.tokens)

    @property
    def old_log_prob(self) -> Float[Tensor, "B T"]:
        """Of the policy that sampled."""
        return _chosen(self.old_logits, self.tokens)

    @property
    def ref_log_prob(self) -> Float[Tensor, "B T"]:
        """Of the reference."""
        return _chosen(self.ref_logits, self.tokens)

    @property
    def entropy(self) -> Float[Tensor, "B T"]:
        """Of the live policy before each token, with gradient."""
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def select(self, index: Int[Tensor, "n"]) -> "Batch":
        """The rows of that index, in that order."""
        return Batch(**{name: value[index] for name, value in vars(self).items()})

    def to(self, dtype: torch.dtype) -> "Batch":
        """With floating-point numbers of another precision."""
        return Batch(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(self).items()})


GroupLoss = Callable[[Batch], Tensor]
"""A scalar to be minimised, from one group."""


@dataclass(frozen=True)
class Situation:
    """One of the worlds that every loss meets.

    Args:
        lengths: name of the space, a key of `SPACES`.
        distance: "near" or "far", of the policy from the reference.
        seed: of the world.
        on_policy: the policy itself has sampled.
    """

    lengths: str
    distance: Literal["near", "far"]
    seed: int
    on_policy: bool

    def world(self) -> World:
        """Rewards are multiples of 1/64, so that single precision holds them exactly."""
        distance = NEAR if self.distance == "near" else FAR
        staleness = 0.0 if self.on_policy else 0.3
        world = random_world(SPACES[self.lengths], self.seed, distance=distance, staleness=staleness)
        return replace(world, reward=(world.reward * 64).round() / 64)


def situations(seeds: tuple[int, ...] = (0, 1), *, on_policy: bool | None = None) -> tuple[Situation, ...]:
    """Both spaces, near and far from the reference, on-policy and off-policy (or one of the two)."""
    policies = (True, False) if on_policy is None else (on_policy,)
    grid = itertools.product(policies, SPACES, ("near", "far"), seeds)
    return tuple(Situation(lengths, distance, seed, on) for on, lengths, distance, seed in grid)  # type: ignore[arg-type]


def everything(world: World, table: Float[Tensor, "1 X V"]) -> Batch:
    """Every sequence of a world of one prompt as one row; `table` are the live policy's logits."""
    rows = world.space.rows()
    old, ref = _logits(world, rows, world.old), _logits(world, rows, world.ref)
    reward = world.reward[0]
    expected = (world.log_probs("old")[0].exp() * reward).sum()
    return Batch(rows.tokens, rows.mask, _logits(world, rows, table), old, ref, reward, reward - expected)


def expected_gradient(
    loss: GroupLoss,
    world: World,
    group: int = 4,
    *,
    baseline: Baseline = "exact",
    ordered: bool = False,
) -> Float[Tensor, "X V"]:
    """The gradient of a loss in the policy's logits, averaged over all groups that the sampler may draw.

    Args:
        group: rows of a group.
        baseline: what is subtracted from the rewards: their expectation under the sampler, or the group's mean.
        ordered: call the loss on every order of a group, not only on one.

    Raises:
        RuntimeError: the loss does not depend on the policy.
    """
    table = world.policy.clone().requires_grad_()
    rows = everything(world, table)
    probability = world.log_probs("old")[0].exp()
    total = torch.zeros((), dtype=torch.float64)
    for index, weight in outcomes(probability, group, ordered=ordered):
        total = total + weight * loss(with_baseline(rows.select(index), baseline)).double()
    (found,) = torch.autograd.grad(total, table)
    return found[0]


def with_baseline(batch: Batch, baseline: Baseline) -> Batch:
    """The batch with its rewards centred on the group's mean, where that is asked for."""
    if baseline == "exact":
        return batch
    return replace(batch, advantage=batch.reward - batch.reward.mean())


def outcomes(
    probability: Float[Tensor, "S"], group: int, *, ordered: bool = False
) -> Iterator[tuple[Int[Tensor, "n"], float]]:
    """Every group with its probability: multisets, or every order."""
    p = probability.tolist()
    if ordered:
        for members in itertools.product(range(len(p)), repeat=group):
            yield torch.tensor(members), math.prod(p[i] for i in members)
        return
    for members in itertools.combinations_with_replacement(range(len(p)), group):
        repeats = math.prod(math.factorial(members.count(i)) for i in set(members))
        yield torch.tensor(members), math.factorial(group) / repeats * math.prod(p[i] for i in members)


def reached(space: SequenceSpace) -> Bool[Tensor, "X"]:
    """The prefixes before which a sequence has not ended: those at which a policy chooses."""
    rows = space.rows()
    found = torch.zeros(space.prefixes, dtype=torch.bool)
    found[space.prefix_index(rows.tokens)[rows.mask]] = True
    return found


def _logits(world: World, rows: Rows, table: Float[Tensor, "1 X V"]) -> Float[Tensor, "B T V"]:
    prefix = world.space.prefix_index(rows.tokens).clamp(max=world.space.prefixes - 1)
    return table[0, prefix]


def _chosen(logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
