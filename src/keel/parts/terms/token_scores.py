"""Scores that look at single tokens: sequential KL, phrases in which two completions differ, and token rewards.

    S       = sum_t w_t (log pi - log ref)_t + alpha sum_t v_t KL(ref || pi)_t
    penalty = coef * sum_i m_i u_i (F_w + F_l)_i / sum_i m_i

`keel.parts.terms.token_weights` has the learned weights and those that are read off activations.
"""

import difflib
import functools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import PairWeight, ReadsScore, Score, Side, pairs_of, part_heads, part_needs, sides
from keel.parts.terms.scores import Feature, TokenWeight
from keel.statistics.functionals import Divergence, Functional, LogProb
from keel.statistics.stats import Stats

Sides = Literal["both", "chosen", "rejected"]


@part("sequential_kl", paper=[36, 37, 147])
@dataclass(frozen=True)
class SequentialKL:
    """alpha * sum_t w_t KL(ref || pi) at position t, over the whole vocabulary and the tokens of a completion, in nats.

    Positions are those of the completion itself, and the expectation is the reference's. Added to a score it turns the
    margin m into m - alpha (K_l - K_w), as the KL of the rejected side enters with a minus.

    Args:
        alpha: factor; 0 measures nothing.
        against: name of the reference.
        detached: hold the policy constant, sg[K].
        weight: w, of each token; None is 1.

    Raises:
        ValueError: the policy as its own reference.

    Source: "Token-level Direct Preference Optimization", 2024; the sum and its direction as in the authors' code.
    """

    alpha: float = 1.0
    against: str = "ref"
    detached: bool = False
    weight: TokenWeight | None = None
    difference_only = False

    def __post_init__(self) -> None:
        _ = self._kl

    @property
    def _kl(self) -> Divergence:
        return Divergence("kl_ref_policy", self.against)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The divergence, and what the weight reads."""
        return tuple(dict.fromkeys((self._kl, *part_needs(self.weight)))) if self.alpha else ()

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the weight."""
        return part_heads(self.weight) if self.alpha else ()

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        if not self.alpha:
            return side.rows.weight.new_zeros(len(side))
        values = side.tokens(self._kl)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.weight is not None:
            values = values * torch.where(side.mask, self.weight(side), torch.zeros_like(values))
        found = self.alpha * values.sum(1)
        return found.detach() if self.detached else found


@part("differing_tokens", paper=147)
@dataclass(frozen=True)
class DifferingTokens:
    """1 on tokens that the other completion of the pair does not have at the place where the two are aligned, else 0.

    Data may mark phrases themselves: where the rows have a mask of that name, it is taken.

    Args:
        mask: name of the mask that data may bring along.

    Raises:
        MethodError: rows without partners, and without that mask.

    Source: "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization", 2025,
    which marks the phrases when it perturbs an answer; the alignment stands in where nobody has marked them.
    """

    mask: str = "phrases"

    def __call__(self, side: Side) -> Float[Tensor, "N T"]:
        if self.mask in side.rows.masks:
            return side.rows.masks[self.mask][side.index].to(side.rows.weight)
        if side.partner is None:
            raise MethodError("this compares both completions of a pair, and these rows have no partner")
        return differing_tokens(side.rows, side.index, side.partner).to(side.rows.weight)


def differing_tokens(rows: Rows, index: Int[Tensor, "N"], partner: Int[Tensor, "N"]) -> Bool[Tensor, "N T"]:
    """Tokens of the completions `index` that are not matched in those of `partner`, in the longest common blocks."""
    tokens, mask = rows.tokens.cpu().numpy(), rows.mask.cpu().numpy()
    out = torch.zeros(len(index), mask.shape[1], dtype=torch.bool)
    for i, (own, other) in enumerate(zip(index.tolist(), partner.tolist(), strict=True)):
        first, second = (tokens[b][mask[b]].tobytes() for b in (own, other))
        out[i, torch.from_numpy(mask[own])] = torch.tensor(_unmatched(first, second), dtype=torch.bool)
    return out.to(rows.device)


@functools.lru_cache(maxsize=4096)  # the loss and its metrics ask for the same pairs again
def _unmatched(first: bytes, second: bytes) -> tuple[bool, ...]:
    own, other = (np.frombuffer(sequence, dtype=np.int64).tolist() for sequence in (first, second))
    alone = [True] * len(own)
    for block in difflib.SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks():
        alone[block.a : block.a + block.size] = [False] * block.size
    return tuple(alone)


@part("token_reward_likelihood", paper=170)
@dataclass(frozen=True)
class TokenRewardLikelihood:
    """-beta * sum_t r_t log pi(y_t), r_t = sigmoid(log p(y_t | better) - log p(y_t | worse)) - 1/2.

    r_t, in [-1/2, 1/2], is what a frozen model says of each token behind two opposite prompts; both sides of a pair
    take the same formula, and the sign comes from r alone.

    Args:
        beta: factor.
        better, worse: names of the models behind the two prompts.

    Source: "T-REG: Preference Optimization with Token-Level Reward Regularization", 2025; the sum over tokens is a
    reading, as a mean would only rescale it by lengths.
    """

    beta: float = 0.1
    better: str = "better"
    worse: str = "worse"
    difference_only = False

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy, and the frozen model behind each prompt."""
        return (LogProb(), LogProb(of=(self.better,)), LogProb(of=(self.worse,)))

    def rewards(self, side: Side) -> Float[Tensor, "N T"]:
        """r, 0 off the completion."""
        better, worse = (side.tokens(LogProb(of=(name,))) for name in (self.better, self.worse))
        odds = (better - worse).to(torch.promote_types(better.dtype, torch.float32))
        return (odds.sigmoid() - 0.5).detach()

    def __call__(self, side: Side) -> Float[Tensor, "N"]:
        return -self.beta * (self.rewards(side) * side.tokens(LogProb())).sum(1)

    def metrics(self, side: Side) -> dict[str, Float[Tensor, ""]]:
        """token_reward/mean and token_reward/correlation, that of r with the policy's log-ratio to the reference."""
        found, ref = {}, LogProb(of=("ref",))
        reward = self.rewards(side)[side.mask]
        found["token_reward/mean"] = ratio(reward.sum(), float(len(reward)))
        if ref in side.stats:
            gain = (side.tokens(LogProb()) - side.tokens(ref))[side.mask].to(reward)
            first, second = reward - reward.mean(), gain - gain.mean()
            norm = first.square().sum().sqrt() * second.square().sum().sqrt()
            found["token_reward/correlation"] = ratio((first * second).sum(), norm)
        return found


@part("misorder_weight", paper=170)
@dataclass(frozen=True)
class MisorderWeight(ReadsScore):
    """sg[sigmoid(offset - beta (S_w - S_l))], the factor of a pair in the gradient of a log-sigmoid loss.

    Args:
        score: S, as in that loss.
        beta: of that loss.
        offset: of that loss.

    Source: "T-REG: Preference Optimization with Token-Level Reward Regularization", 2025.
    """

    score: Score
    beta: float = 0.1
    offset: float = 0.0

    def __call__(self, chosen: Side, rejected: Side) -> Float[Tensor, "N"]:
        return (self.offset - self.beta * (self.score(chosen) - self.score(rejected))).sigmoid().detach()


@part("pair_penalty")
@dataclass(frozen=True)
class PairPenalty:
    """coef * sum_i m_i u_i F_i / sum_i m_i over the pairs of a batch, F of one side or the sum of both.

    m_i is the measure of a pair and u_i = sg(weight).

    Args:
        feature: F, of each completion.
        coef: of the whole; 0 drops the term.
        sides: chosen, rejected or both.
        weight: u, a factor of each pair; None is 1.

    Returns:
        A number; 0 without any pair.

    Raises:
        ValueError: an unknown side.
    """

    feature: Feature
    coef: float = 1.0
    sides: Sides = "both"
    weight: PairWeight | None = None
    additive = False
    reads = "pairs"

    def __post_init__(self) -> None:
        if self.sides not in get_args(Sides):
            raise ValueError(f"sides '{self.sides}' is not one of {', '.join(get_args(Sides))}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """Those of the feature and of the weight."""
        return part_needs(self.feature, self.weight)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """Those of the feature and of the weight."""
        return part_heads(self.feature, self.weight)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        pairs = pairs_of(rows)
        chosen, rejected = sides(rows, stats, pairs)
        used = {"both": (chosen, rejected), "chosen": (chosen,), "rejected": (rejected,)}[self.sides]
        value = torch.stack([self.feature(side) for side in used]).sum(0)
        if self.weight is not None:
            value = value * self.weight(chosen, rejected).detach()
        measure = pairs.measure.to(value)
        return self.coef * ratio((measure * value).sum(), measure.sum())

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """What the feature says of each side, under `NAME/chosen` and `NAME/rejected`."""
        if not hasattr(self.feature, "metrics") or any(need not in stats for need in part_needs(self.feature)):
            return {}
        named = zip(("chosen", "rejected"), sides(rows, stats, pairs_of(rows)), strict=True)
        return {f"{name}/{which}": value for which, side in named for name, value in self.feature.metrics(side).items()}
