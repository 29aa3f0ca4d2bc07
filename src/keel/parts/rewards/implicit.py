"""Process rewards out of an outcome reward model: the log-ratio of a model trained on outcomes to its reference.

    r(y) = beta sum_t (log prm - log ref)_t,      Q_t = beta sum_{i <= t} (log prm - log ref)_i

r is learnt from labels of whole completions. Q_t is then the soft value of what is written,

    Q_t = beta log E_{y > t ~ ref}[ e^(r / beta) ],

so that its differences reward steps that nobody has labelled.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Level = Literal["token", "step"]
Reading = Literal["accumulative", "single"]
Aggregate = Literal["min", "sum", "last"]


def partial_rewards(
    log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], beta: float = 0.05
) -> Float[Tensor, "B T"]:
    """Q_t = beta sum_{i <= t} (log prm - log ref)_i; off the mask it stays where it was, so that the last is r.

    >>> partial_rewards(torch.tensor([[1.0, 9.0, -3.0]]), torch.tensor([[True, False, True]]), 0.5)
    tensor([[ 0.5000,  0.5000, -1.0000]])

    Args:
        log_ratio: log prm - log ref of each token, in nats.
        mask: tokens of the completion.
        beta: coefficient of the log-ratio.
    """
    return beta * torch.where(mask, log_ratio, torch.zeros_like(log_ratio)).cumsum(1)


def step_of_token(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], separators: Sequence[int]
) -> Int[Tensor, "B T"]:
    """The step of each token, from 0; a separator belongs to the step that it ends.

    >>> step_of_token(torch.tensor([[5, 9, 6, 9, 7]]), torch.ones(1, 5, dtype=torch.bool), (9,))
    tensor([[0, 0, 1, 1, 2]])
    """
    known = torch.tensor(list(separators), dtype=tokens.dtype, device=tokens.device)
    ends = (mask & torch.isin(tokens, known)).long()
    return ends.cumsum(1) - ends


def step_rewards(
    token: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], step: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """What the tokens of each step earn together, and which steps there are.

    Args:
        token: reward of each token.
        mask: tokens of the completion.
        step: of each token, from 0.

    Returns:
        Q at the end of a step less Q at the end of the one before it, 0 for a step that a row does not have; and the
        steps that it has.
    """
    count = int(step[mask].max()) + 1 if bool(mask.any()) else 1
    place = torch.where(mask, step, torch.zeros_like(step))
    earned = token.new_zeros(len(token), count).scatter_add(1, place, torch.where(mask, token, 0.0 * token))
    there = token.new_zeros(len(token), count).scatter_add(1, place, mask.to(token.dtype)) > 0
    return earned, there


def step_score(
    steps: Float[Tensor, "B S"],
    there: Bool[Tensor, "B S"],
    reading: Reading = "single",
    aggregate: Aggregate = "min",
) -> Float[Tensor, "B"]:
    """One number for a completion, of its steps; steps that it does not have are left out, and one without any has 0.

    >>> steps = torch.tensor([[0.2, -0.3, 0.4]])
    >>> there = torch.ones(1, 3, dtype=torch.bool)
    >>> [round(float(step_score(steps, there, reading)), 6) for reading in ("accumulative", "single")]
    [-0.1, -0.3]

    Args:
        steps: of each step, its own reward.
        there: the steps that each completion has.
        reading: `single` takes each step's own reward, `accumulative` Q at its end.
        aggregate: the smallest, the sum, or that of the last step.

    Raises:
        ValueError: another reading or aggregate.
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading '{reading}' is not one of {', '.join(get_args(Reading))}")
    if aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate '{aggregate}' is not one of {', '.join(get_args(Aggregate))}")
    own = torch.where(there, steps, torch.zeros_like(steps))
    values = own.cumsum(1) if reading == "accumulative" else own
    if aggregate == "sum":
        return torch.where(there, values, torch.zeros_like(values)).sum(1)
    some = there.any(1)
    if aggregate == "min":
        found = torch.where(there, values, torch.inf).amin(1)
    else:
        number = torch.arange(there.shape[1], device=there.device).expand_as(there)
        last = torch.where(there, number, -1).amax(1).clamp(min=0)
        found = values.gather(1, last[:, None])[:, 0]
    return torch.where(some, found, torch.zeros_like(found))


def weighted_vote(
    answers: Sequence[Hashable | None], scores: Sequence[float] | Float[Tensor, "n"]
) -> tuple[Hashable | None, Mapping[Hashable, float]]:
    """The answer with the largest sum of sigmoid(score) over the completions that give it, and all sums.

    None is no answer and gets no vote; of equal sums the answer that came first wins.

    >>> weighted_vote(["4", "5", "4", None], [0.0, 1.0, 0.0, 9.0])[0]
    '4'

    Args:
        answers: of each completion of one prompt.
        scores: of each completion.

    Raises:
        ValueError: as many scores as there are no answers.
    """
    if len(answers) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(answers)} answers")
    weight = torch.sigmoid(torch.as_tensor(scores, dtype=torch.float64)).tolist()
    votes: dict[Hashable, float] = {}
    for answer, share in zip(answers, weight, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + share
    return max(votes, key=lambda answer: votes[answer], default=None), votes


@dataclass(frozen=True)
class _Implicit:
    """What reads the log-ratio of an outcome reward model to its reference."""

    prm: str = "prm"
    ref: str = "ref"
    beta: float = 0.05
    separators: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}: the reward would not know the model")
        if self.prm == self.ref:
            raise ValueError(f"prm and ref are both '{self.ref}', and their log-ratio is 0 everywhere")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reward model and its reference."""
        return (LogProb(of=(self.prm,)), LogProb(of=(self.ref,)))

    def tokens(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        """beta (log prm - log ref) of each token, 0 off the completion."""
        gap = stats[LogProb(of=(self.prm,))] - stats[LogProb(of=(self.ref,))]
        return self.beta * torch.where(rows.mask, gap, torch.zeros_like(gap))

    def step(self, rows: Rows) -> Int[Tensor, "B T"]:
        """The step of each token: by the separators, by `rows.segment` without any, else one for all."""
        if self.separators:
            return step_of_token(rows.tokens, rows.mask, self.separators)
        return torch.zeros_like(rows.tokens) if rows.segment is None else rows.segment


@part("implicit_process_reward", paper=69)
@dataclass(frozen=True)
class ImplicitProcessReward(_Implicit):
    """beta (log prm - log ref) added to the reward of every token, or of every step at its last token.

    Args:
        prm: name of the reward model, trained on outcomes by `implicit_prm`.
        ref: name of its reference: the model that it started from, which need not be the policy's reference.
        beta: of its training, or another unit of the reward.
        separators: ids of the tokens that end a step; none takes `rows.segment`.
        level: token or step.

    Raises:
        ValueError: beta not positive, another level, or the same name twice.

    Source: "Free Process Rewards without Process Labels", 2024; as a reward of online methods "Process Reinforcement
    through Implicit Rewards", 2025.
    """

    level: Level = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in get_args(Level):
            raise ValueError(f"level '{self.level}' is not one of {', '.join(get_args(Level))}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        own = self.tokens(rows, stats)
        if self.level == "step":
            step = self.step(rows)
            earned, _ = step_rewards(own, rows.mask, step)
            place = torch.where(rows.mask, step, torch.zeros_like(step))
            number = torch.arange(step.shape[1], device=step.device).expand_as(step)
            last = torch.full_like(earned, -1, dtype=torch.long)
            last = last.scatter_reduce(1, place, torch.where(rows.mask, number, -1), "amax")
            closes = rows.mask & (last.gather(1, place) == number)
            own = torch.where(closes, earned.gather(1, place), torch.zeros_like(own))
        return rows.with_(token_reward=own if rows.token_reward is None else rows.token_reward + own)


@part("implicit_score", paper=69)
@dataclass(frozen=True)
class ImplicitScore(_Implicit):
    """The score of a completion under an implicit reward model as its reward, for best-of-n.

    Args:
        prm, ref, beta, separators: as in `ImplicitProcessReward`.
        reading: each step's own reward, or Q at its end.
        aggregate: the smallest, the sum, or that of the last step; `accumulative` and `last` give r.

    Raises:
        ValueError: beta not positive, another reading or aggregate, or the same name twice.

    Source: "Free Process Rewards without Process Labels", 2024.
    """

    reading: Reading = "single"
    aggregate: Aggregate = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        step_score(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), self.reading, self.aggregate)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        steps, there = step_rewards(self.tokens(rows, stats), rows.mask, self.step(rows))
        return rows.with_(reward=step_score(steps, there, self.reading, self.aggregate)[:, None])
