"""Likelihood on what was right, a policy gradient on what was wrong, and the token reward model that weighs both."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.discriminative import prompt_weight
from keel.statistics.functionals import Functional, LogProb, Value
from keel.statistics.stats import Stats


@part("outcome_loss", paper=177)
@dataclass(frozen=True)
class OutcomeLoss:
    """Minus the likelihood of right completions and the policy gradient of wrong ones, each over its own tokens.

        positive (1 / n+) sum_P A sum_t w+_t (-log pi_t)  -  negative (1 / n-) sum_Q A sum_t w-_t rho_t
        w+ = clip((p - margin) / (1 - margin), 0, 1),   w- = clip((1 - p - margin) / (1 - margin), 0, 1)
        p_t = sigmoid(mean of q_u over u <= t)

    With `share`, in place of the margin, that share of a completion's tokens counts: those with the largest p (for w-,
    1 - p), rescaled so that the largest counts 1 and the smallest of them 0; all of them 1 where they agree.

    A is the advantage, rho = pi / sg(pi), n+ and n- count the tokens of P and Q, q is the head's number at each token
    as it was when the batch was prepared. Of each prompt with right and wrong completions one of either is learnt,
    picked by the hashes of the rows; all of them, in equal shares, with `expected` and on enumerated rows.

    Args:
        positive, negative: coefficients.
        margin: probability by which a token must be sure to count.
        share: of the tokens of a completion that count, in (0, 1]; None takes the margin. The authors name 0.25.
        threshold: return from which on a completion is right.
        expected: learn all completions of a prompt, in equal shares.
        head: the token reward model's name; "" weighs all tokens alike.

    Raises:
        ValueError: a negative coefficient, margin outside [0, 1), or share outside (0, 1].

    Source: "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", 2025; a share of less than one
    token is none in the release, here it is one.
    """

    positive: float = 1.0
    negative: float = 0.5
    margin: float = 0.5
    share: float | None = None
    threshold: float = 0.5
    expected: bool = False
    head: str = ""
    additive = False

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must be in [0, 1), not {self.margin}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], not {self.share}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy, and the token rewards before the update."""
        return (LogProb(), Value(self.head, of=("old",))) if self.head else (LogProb(),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The token reward model."""
        return (self.head,) if self.head else ()

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        if rows.advantage is None:
            raise ValueError("the outcome loss needs an advantage: the method's chain `advantage` is empty")
        value = returns(rows)
        good, scored = value >= self.threshold, ~value.isnan()
        live = torch.where(rows.mask, stats[LogProb()], torch.zeros_like(stats[LogProb()]))
        credit = rows.advantage.to(live)
        above, below = self.token_weights(rows, stats)
        right = self._per_token(rows, scored & good, scored & ~good, credit * above * -live)
        wrong = self._per_token(rows, scored & ~good, scored & good, credit * below * (live - live.detach()).exp())
        return self.positive * right - self.negative * wrong

    def token_weights(self, rows: Rows, stats: Stats) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """w+ and w-, without gradient; 1 where no head is read."""
        if not self.head:
            return (torch.ones_like(stats[LogProb()].detach()),) * 2
        sure = torch.sigmoid(running_mean(stats[Value(self.head, of=("old",))].detach(), rows.mask))
        if self.share is not None:
            return top_share(sure, rows.mask, self.share), top_share(1 - sure, rows.mask, self.share)
        room = 1 - self.margin
        return ((sure - self.margin) / room).clamp(0, 1), ((1 - sure - self.margin) / room).clamp(0, 1)

    def _per_token(
        self, rows: Rows, chosen: Bool[Tensor, "B"], others: Bool[Tensor, "B"], values: Float[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Sum over the learnt rows of a sign, over the number of their tokens."""
        weight = self.learnt(rows, chosen, others).to(values.dtype)
        per_row = torch.where(rows.mask, values, torch.zeros_like(values)).sum(1)
        return ratio((weight * per_row).sum(), (weight * rows.lengths).sum())

    def learnt(self, rows: Rows, chosen: Bool[Tensor, "B"], others: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
        """How much each row counts: a prompt's weight on one of its chosen rows, or in shares on all of them."""
        mine, theirs = Groups.of(rows, chosen), Groups.of(rows, others)
        mixed = (mine.sum(mine.weight) > 0) & (theirs.sum(theirs.weight) > 0)
        if self.expected or rows.exact:
            share = ratio(mine.weight, mine.broadcast(mine.sum(mine.weight)))
        else:
            last = rows.row.new_full((mine.count,), torch.iinfo(torch.long).max)
            first = last.scatter_reduce(0, mine.index, torch.where(mine.weight > 0, rows.row, last[0]), "amin")
            share = ((mine.weight > 0) & (rows.row == first[mine.index])).to(mine.weight.dtype)
        whole = Groups.of(rows, chosen | others)
        return share * whole.broadcast(prompt_weight(whole) * mixed)


def running_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Mean over the chosen tokens of a row up to each position."""
    total = torch.where(mask, values, torch.zeros_like(values)).cumsum(1)
    return ratio(total, mask.cumsum(1).to(values.dtype))


def top_share(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float) -> Float[Tensor, "B T"]:
    """The largest numbers of each row, floor(share n) of its n tokens and at least one, from 0 to 1; 0 elsewhere.

    >>> top_share(torch.tensor([[0.9, 0.2, 0.6, 0.5]]), torch.ones(1, 4, dtype=torch.bool), 0.75)
    tensor([[1.0000, 0.0000, 0.2500, 0.0000]])
    """
    number = (share * mask.sum(1) + 1e-6).floor().long().clamp(min=1)
    order = torch.where(mask, values, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    chosen = mask & (place < number[:, None])
    low = torch.where(chosen, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(chosen, values, -torch.inf).amax(1, keepdim=True)
    scaled = torch.where(high > low, (values - low) / torch.where(high > low, high - low, torch.ones_like(high)), 1.0)
    return torch.where(chosen, scaled, torch.zeros_like(values))


@part("token_reward_loss", paper=177)
@dataclass(frozen=True)
class TokenRewardLoss:
    """Cross-entropy of sigmoid(mean_t q_t) with whether the completion is right, mean over completions.

    Args:
        coef: of the loss.
        threshold: return from which on a completion is right.
        head: the token reward model's name; the policy's own states learn nothing from it.

    Raises:
        ValueError: a negative coef.

    Source: "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", 2025.
    """

    coef: float = 1.0
    threshold: float = 0.5
    head: str = "token_reward"
    additive = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The live token rewards, the policy held constant."""
        return (Value(self.head, stop=("policy",)),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The token reward model."""
        return (self.head,)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        value = returns(rows)
        each = stats[self.needs[0]]
        total = torch.where(rows.mask, each, torch.zeros_like(each)).sum(1)
        logit = ratio(total, rows.lengths.to(each.dtype))
        right = (value >= self.threshold).to(logit.dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, right, reduction="none")
        return self.coef * weighted_mean(loss, rows.weight.to(loss.dtype) * (rows.main & ~value.isnan()))
