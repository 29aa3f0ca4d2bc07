"""Advantages that pay for the divergence that is still to come."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import returns
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage
from keel.parts.advantages.stream import discounted_sum
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("future_kl", paper=1)
@dataclass(frozen=True)
class FutureKL:
    """A_t - beta S_e(t),   S_t = sum over u >= t of (log old - log ref)_u.

    e(t) is the end of the segment of token t, every `step_length` chosen tokens and at the last one. With a step of 1
    and A = R this is the policy gradient of E[R] - beta KL(policy || ref) of whole sequences. It stands behind the
    division by a group's deviation, which would divide beta, too. Longer segments pay for less: the tokens of a segment
    before its end are free.

    Args:
        beta: coefficient of the KL, 1 / eta of the paper.
        step_length: chosen tokens of a segment; 1 is the paper's second version, 256 the first one's.
        against: name of the reference model.

    Raises:
        ValueError: a negative beta, or step_length below 1.

    Source: "PRL: Process Reward Learning Improves LLMs' Reasoning Ability and Broadens the Reasoning Boundary", 2026.
    The release fills a segment from the next value that is not 0, which skips ends at which S is 0.
    """

    beta: float = 0.005
    step_length: int = 1
    against: str = "ref"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.step_length < 1:
            raise ValueError(f"step_length must be at least 1, not {self.step_length}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        credit = advantage(rows)
        gap = (stats[LogProb(of=("old",))] - stats[LogProb(of=(self.against,))]).to(credit.dtype)
        to_come = at_segment_ends(discounted_sum(gap, rows.mask, 1.0), rows.mask, self.step_length)
        scored = ~returns(rows).isnan()
        return rows.with_(advantage=torch.where(scored[:, None] & rows.mask, credit - self.beta * to_come, credit))


def at_segment_ends(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], length: int) -> Float[Tensor, "B T"]:
    """At each chosen token the value at the end of its segment; 0 off the mask."""
    width = values.shape[1]
    number = mask.long().cumsum(1)
    ends = mask & ((number % length == 0) | (number == mask.sum(1, keepdim=True)))
    places = torch.arange(width, device=values.device).expand_as(mask)
    place = torch.where(ends, places, width).flip(1).cummin(1).values.flip(1)
    padded = torch.cat([values, values.new_zeros(len(values), 1)], 1)
    return padded.gather(1, place) * mask


@part("future_kl_to_token", paper=1)
@dataclass(frozen=True)
class FutureKLToToken:
    """As `FutureKL`, with segments that end at listed tokens, a line break say, and at the last one.

    Args:
        beta: coefficient of the KL.
        ends: ids of the tokens; () makes each row one segment.
        against: name of the reference model.

    Raises:
        ValueError: a negative beta.

    Source: as `FutureKL`; one of the segmentations that its paper tries.
    """

    beta: float = 0.005
    ends: tuple[int, ...] = ()
    against: str = "ref"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference."""
        return FutureKL(self.beta, against=self.against).needs

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        credit = advantage(rows)
        gap = (stats[LogProb(of=("old",))] - stats[LogProb(of=(self.against,))]).to(credit.dtype)
        to_come = at_tokens(discounted_sum(gap, rows.mask, 1.0), rows, self.ends)
        scored = ~returns(rows).isnan()
        return rows.with_(advantage=torch.where(scored[:, None] & rows.mask, credit - self.beta * to_come, credit))


def at_tokens(values: Float[Tensor, "B T"], rows: Rows, ends: tuple[int, ...]) -> Float[Tensor, "B T"]:
    """At each chosen token the value at the next listed one, itself included, or at the last one; 0 off the mask."""
    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    last = torch.where(rows.mask, places, 0).amax(1, keepdim=True) if values.shape[1] else places
    listed = rows.mask & (torch.isin(rows.tokens, rows.tokens.new_tensor(ends)) | (places == last))
    place = torch.where(listed, places, last).flip(1).cummin(1).values.flip(1)
    return values.gather(1, place) * rows.mask
