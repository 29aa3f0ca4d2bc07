"""Every group of the real size: what an estimator that works on G completions of a prompt does on average.

The population alone would certify a biased group estimator, because a mean over everything contains no small sample.
With S sequences, the order within a group being irrelevant, there are C(S + G - 1, G) groups, the multisets

    P(c) = G! / prod_s c_s!  *  prod_s pi(s)^c_s,        c_s copies of sequence s, sum_s c_s = G

165 for S = 4 and G = 8, 969 for G = 16. Beyond `LIMIT` groups are sampled, and the standard error says so.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.choice import generator
from keel.core.rows import Rows, cat
from keel.exact.space import TabularPolicy

LIMIT = 10_000


@dataclass(frozen=True, eq=False)
class GroupBatch:
    """Groups of one prompt as one batch: group i is rows i G .. (i + 1) G - 1, each of weight P(group i).

    Equal weights within a group count as plain samples, so every correction for the size of a sample applies; over the
    batch the weights are frequencies, so a mean over the batch is the expectation over groups. A ratio over the batch
    (the mean over tokens, say) is then the ratio of expectations, as in a step of very many groups.

    Args:
        rows: the batch, B = N G; `exact` is False, `logp["behaviour"]` is recorded.
        sequence: place of each row's completion in `space.sequences()`.
        counts: copies of each sequence in each group.
        probability: of each group; they sum to 1.
        sampled: drawn instead of enumerated: then each has probability 1 / N.
    """

    rows: Rows
    sequence: Int[Tensor, "B"]
    counts: Int[Tensor, "N S"]
    probability: Float[Tensor, "N"]
    sampled: bool

    @property
    def size(self) -> int:
        """Completions in a group, G."""
        return len(self.sequence) // len(self.counts)

    def with_reward(self, reward: Float[Tensor, "S"]) -> "GroupBatch":
        """The same groups, each completion with the reward of its sequence."""
        rows = self.rows.with_(reward=reward[self.sequence][:, None])
        return GroupBatch(rows, self.sequence, self.counts, self.probability, self.sampled)

    def one(self, group: int) -> Rows:
        """A single group as a batch of its own, its weights 1."""
        rows = self.rows.select(torch.arange(group * self.size, (group + 1) * self.size))
        return rows.with_(weight=torch.ones_like(rows.weight))


@dataclass(frozen=True, eq=False)
class Moments:
    """Expectation of a number that each group yields.

    Args:
        mean: E[x].
        variance: of x over groups, E[(x - mean)^2].
        standard_error: of the mean: 0 where every group was enumerated, sqrt(variance / N) where N were drawn.
    """

    mean: Float[Tensor, "*d"]
    variance: Float[Tensor, "*d"]
    standard_error: Float[Tensor, "*d"]


def number_of_groups(sequences: int, size: int) -> int:
    """C(S + G - 1, G).

    >>> number_of_groups(4, 8)
    165
    """
    return math.comb(sequences + size - 1, size)


def multisets(sequences: int, size: int) -> Int[Tensor, "N S"]:
    """The copies of each sequence in every group of `size`.

    >>> multisets(2, 2).tolist()
    [[2, 0], [1, 1], [0, 2]]
    """
    draws = torch.tensor(list(itertools.combinations_with_replacement(range(sequences), size)), dtype=torch.long)
    return _counts(draws, sequences)


def group_log_probs(counts: Int[Tensor, "N S"], log_p: Float[Tensor, "S"]) -> Float[Tensor, "N"]:
    """log P of each multiset under independent draws: log multinomial + sum_s c_s log pi(s), with 0 log 0 = 0."""
    counts = counts.to(log_p.dtype)
    ways = torch.lgamma(counts.sum(1) + 1) - torch.lgamma(counts + 1).sum(1)
    return ways + torch.where(counts > 0, counts * log_p, torch.zeros_like(counts)).sum(1)


def every_group(policy: TabularPolicy, size: int, prompt: int = 0, limit: int = LIMIT) -> GroupBatch:
    """Every group of `size` completions of a prompt, with its probability under the policy.

    Args:
        size: completions in a group, G.
        limit: the most groups that are enumerated.

    Raises:
        ValueError: size below 1, or more groups than the limit.
    """
    sequences = _checked(policy, size)
    number = number_of_groups(sequences, size)
    if number > limit:
        raise ValueError(f"{sequences} sequences have {number} groups of {size}, more than {limit}: draw some of them")
    counts = multisets(sequences, size)
    log_p = policy.log_prob(policy.space.rows(prompt)).detach()
    return _batch(policy, counts, group_log_probs(counts, log_p).exp(), prompt, sampled=False)


def sampled_groups(policy: TabularPolicy, size: int, count: int, seed: int, prompt: int = 0) -> GroupBatch:
    """`count` groups of independent completions, each of probability 1 / count.

    Raises:
        ValueError: size or count below 1.
    """
    sequences = _checked(policy, size)
    if count < 1:
        raise ValueError(f"at least one group must be drawn, not {count}")
    p = policy.log_prob(policy.space.rows(prompt)).detach().exp()
    draws = torch.multinomial(p, count * size, replacement=True, generator=generator("groups", seed, prompt))
    counts = _counts(draws.reshape(count, size), sequences)
    return _batch(policy, counts, p.new_full((count,), 1 / count), prompt, sampled=True)


def groups(policy: TabularPolicy, size: int, prompt: int = 0, count: int = LIMIT, seed: int = 0) -> GroupBatch:
    """Every group if there are at most `LIMIT`, else `count` drawn ones."""
    if number_of_groups(_checked(policy, size), size) <= LIMIT:
        return every_group(policy, size, prompt)
    return sampled_groups(policy, size, count, seed, prompt)


def joined(batches: list[GroupBatch]) -> Rows:
    """The groups of several prompts as one batch in which each prompt counts the same.

    Group ids of later batches are shifted, so that no two groups share one.
    """
    starts = [0, *itertools.accumulate(len(b.counts) for b in batches)]
    shifted = [b.rows.with_(group=b.rows.group + start) for b, start in zip(batches, starts, strict=False)]
    rows = cat([r.with_(weight=r.weight / b.size) for r, b in zip(shifted, batches, strict=True)])
    return rows.with_(row=torch.arange(len(rows)))


def moments(values: Float[Tensor, "N *d"], batch: GroupBatch) -> Moments:
    """Mean over groups, variance from group to group, and the standard error of the mean.

    A batch of M independent groups has variance `variance / M`.

    Args:
        values: what each group yields, a gradient say, in the order of the groups.
    """
    shape = (-1,) + (1,) * (values.dim() - 1)
    p = batch.probability.to(values.dtype).reshape(shape)
    mean = (p * values).sum(0)
    variance = (p * (values - mean).square()).sum(0)
    if not batch.sampled:
        return Moments(mean, variance, torch.zeros_like(mean))
    n = len(values)
    variance = variance * (n / (n - 1)) if n > 1 else torch.full_like(variance, math.nan)
    return Moments(mean, variance, (variance / n).sqrt())


def _checked(policy: TabularPolicy, size: int) -> int:
    if size < 1:
        raise ValueError(f"a group has at least one completion, not {size}")
    return len(policy.space.sequences()[0])


def _counts(draws: Int[Tensor, "N G"], sequences: int) -> Int[Tensor, "N S"]:
    return torch.zeros(len(draws), sequences, dtype=torch.long).scatter_add(1, draws, torch.ones_like(draws))


def _batch(
    policy: TabularPolicy, counts: Int[Tensor, "N S"], probability: Float[Tensor, "N"], prompt: int, sampled: bool
) -> GroupBatch:
    """Each sequence as often as it is in the group; the rows of a group stand together."""
    number, sequences = counts.shape
    size = int(counts[0].sum())
    sequence = torch.arange(sequences).repeat(number).repeat_interleave(counts.flatten())
    world = policy.space.rows(prompt)
    log_probs = policy.hidden(world).detach().log_softmax(-1).gather(-1, world.tokens[..., None])[..., 0]
    behaviour = torch.where(world.mask, log_probs, torch.zeros_like(log_probs))
    rows = world.with_(logp={"behaviour": behaviour}).select(sequence)
    rows = rows.with_(
        group=torch.arange(number).repeat_interleave(size),
        weight=probability.repeat_interleave(size),
        row=torch.arange(len(sequence)),
    )
    return GroupBatch(rows, sequence, counts, probability, sampled)
