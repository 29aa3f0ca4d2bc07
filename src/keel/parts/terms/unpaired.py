"""Losses of single completions that are labelled good or bad, each held against a point of reference.

    loss = sum_i w_i [ p_i l_1 link(z_i) + (1 - p_i) l_0 link(-z_i) ] / sum_i w_i,      z_i = beta S_i - delta

p_i is the label, l_1 and l_0 the weights of good and bad examples, and delta is never differentiated. Scores are those
of pairs (`keel.parts.terms.scores`), read without a partner.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.aggregate import weighted_mean
from keel.core.choice import row_ids
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.parts.terms.pairs import ReadsScore, Score, Side, check_beta
from keel.parts.terms.scores import LogRatio
from keel.statistics.stats import Stats

LabelLink = Literal["sigmoid", "log_sigmoid"]
Shift = Literal["mismatched", "running", "none"]
MEAN = "rewards/mean"  # metric that the running shift follows
MISMATCHED = "mismatched"  # column: whether a row is one of a prompt with another prompt's completion
Beside = tuple[Rows, Stats]


@part("unpaired_loss")
@dataclass(frozen=True)
class UnpairedLoss(ReadsScore):
    """coef * the mean over examples of p l_1 link(z) + (1 - p) l_0 link(-z), z = beta S - delta.

        sigmoid        link(z) = 1 - sigmoid(z), which saturates on both sides (KTO)
        log_sigmoid    link(z) = -log sigmoid(z), a classifier of good and bad (BCO)

        mismatched     delta = beta max(0, mean sg[S]) over prompts with completions of other prompts (KTO's z0)
        running        delta = the running mean of sg[beta S] over all examples, those of the batch included (BCO)
        none           delta = 0

    The mean counts examples, not classes: where good ones are few, `chosen_weight` makes up for it.

    The rows of `mismatched` stand beside the batch (`mismatched` makes them): the live policy's numbers, without
    gradient. Without any, which is so where a whole batch has one prompt, delta is 0: an estimate from matching pairs
    would be the mean reward and not a KL.

    `running` is an exponential average whose weights sum to 1 from the first batch on, so that it does not start at
    0. It is biased towards the batch that reads it, by 1 - decay (all of it in the first batch), and lags behind the
    policy by about 1 / (1 - decay) batches.

    Args:
        link: sigmoid or log_sigmoid.
        score: S; known up to no constant of the prompt, for nothing cancels here.
        beta: factor of the scores.
        shift: what delta is.
        decay: of the running mean.
        chosen_weight, rejected_weight: l_1 and l_0.
        coef: of the whole; 0 drops the term.

    Returns:
        A number; 0 without any example.

    Raises:
        MethodError: scores that are known only up to a constant of the prompt; or rows without labels.
        ValueError: beta of 0, a negative weight, decay outside [0, 1), or an unknown link or shift.

    Source: "KTO: Model Alignment as Prospect Theoretic Optimization", 2024; "Binary Classifier Optimization for Large
    Language Model Alignment", 2024. TRL's BCO has a shift that is a plain mean over the run, or none (1.16), and
    estimates the density of prompts, which is left out here.
    """

    link: LabelLink = "sigmoid"
    score: Score = LogRatio()
    beta: float = 0.1
    shift: Shift = "mismatched"
    decay: float = 0.9
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    coef: float = 1.0
    additive = False
    reads = "labels"

    def __post_init__(self) -> None:
        for name, known in (("link", LabelLink), ("shift", Shift)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} '{getattr(self, name)}' is not one of {', '.join(get_args(known))}")
        check_beta(self.beta)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")
        for name in ("chosen_weight", "rejected_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.score.difference_only:
            raise MethodError(
                "a label is of one completion, and these scores are known only up to a constant of the prompt",
                type(self.score).__name__,
                "Take the score of the reverse KL, or learn from pairs.",
            )

    @property
    def reads_mismatched(self) -> bool:
        """Whether rows of prompts with other prompts' completions should stand beside the batch."""
        return self.shift == "mismatched"

    def init(self) -> dict[str, float]:
        """The running mean of the rewards, times the weight that it has so far."""
        return {"total": 0.0, "weight": 0.0}

    def observe(self, rows: Rows, stats: Stats, metrics: Mapping[str, float], state: dict[str, float]) -> dict:
        """Takes in the mean reward of the batch, as its first update saw it."""
        mean = metrics.get(MEAN, math.nan)
        return self._following(state, mean) if self.shift == "running" and math.isfinite(mean) else dict(state)

    def rewards(self, rows: Rows, stats: Stats) -> Float[Tensor, "B"]:
        """beta S of each row."""
        return self.beta * self.score(Side(rows, stats, torch.arange(len(rows), device=rows.device)))

    def __call__(
        self, rows: Rows, stats: Stats, state: dict[str, float], beside: Beside | None = None
    ) -> Float[Tensor, ""]:
        label, weight = _labels(rows), _weight(rows)
        reward = self.rewards(rows, stats)
        z = reward - self.delta(reward.detach(), weight, state, beside)
        good, bad = label.to(z), 1 - label.to(z)
        loss = self.chosen_weight * good * self._linked(z) + self.rejected_weight * bad * self._linked(-z)
        return self.coef * weighted_mean(loss, weight.to(loss))

    @torch.no_grad()
    def delta(
        self, reward: Float[Tensor, "B"], weight: Float[Tensor, "B"], state: dict[str, float], beside: Beside | None
    ) -> Float[Tensor, ""]:
        """What every reward is held against."""
        if self.shift == "mismatched" and beside is not None:
            return self._kl(beside).clamp(min=0).to(reward)
        if self.shift == "running":
            after = self._following(state, float(weighted_mean(reward, weight.to(reward))))
            return reward.new_tensor(after["total"] / after["weight"])
        return reward.new_zeros(())

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats, beside: Beside | None = None) -> dict[str, Tensor]:
        """TRL's rewards/chosen, rewards/rejected and rewards/margins, and `kl`, what z0 is made of.

        rewards/accuracies is how often a good completion of the batch earns more than a bad one, of any prompts.
        """
        label, weight, reward = _labels(rows), _weight(rows), self.rewards(rows, stats)
        good, bad = weight.to(reward) * label.to(reward), weight.to(reward) * (1 - label.to(reward))
        chosen, rejected = weighted_mean(reward, good), weighted_mean(reward, bad)
        gap = reward[:, None] - reward[None, :]
        right = (gap > 0).to(reward) + 0.5 * (gap == 0).to(reward)
        out = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": weighted_mean(right, good[:, None] * bad[None, :]),
            MEAN: weighted_mean(reward, good + bad),
        }
        return out if beside is None else out | {"kl": self._kl(beside) / self.beta}

    def _linked(self, z: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return torch.sigmoid(-z) if self.link == "sigmoid" else softplus(-z)

    def _kl(self, beside: Beside) -> Float[Tensor, ""]:
        """The mean reward of mismatched rows that have a token."""
        rows, stats = beside
        reward = self.rewards(rows, stats).detach()
        meant = rows.columns.get(MISMATCHED, torch.ones_like(rows.main))  # others may stand beside the batch, too
        return weighted_mean(reward, (rows.weight * rows.mask.any(1) * meant).to(reward))

    def _following(self, state: Mapping[str, float], mean: float) -> dict[str, float]:
        keep = self.decay
        return {"total": keep * state["total"] + (1 - keep) * mean, "weight": keep * state["weight"] + 1 - keep}


def mismatched(rows: Rows, max_length: int | None = None) -> Rows:
    """Each prompt with the completion of the next row of another prompt, as rows of a regulariser.

    The order of the batch, which the seed decides, says which one is next; after the last row comes the first. A row
    for which the whole batch has no other prompt gets none.

    Args:
        max_length: tokens of prompt and completion together; a completion that is too long for its new prompt is cut.
    """
    prompts = torch.where(rows.prompt_mask, rows.prompt_ids, torch.full_like(rows.prompt_ids, -1))
    _, which = prompts.unique(dim=0, return_inverse=True)
    place = torch.arange(len(rows), device=rows.device)
    other = (which[:, None] != which[None, :]) & rows.main[None, :]
    distance = torch.where(other, (place[None, :] - place[:, None]) % max(1, len(rows)), len(rows) + 1)
    own = (rows.main & other.any(1)).nonzero().flatten()
    partner = distance[own].argmin(1) if len(own) else own
    mine, taken = rows.with_(pairs=None).select(own), rows.with_(pairs=None).select(partner)
    mask = taken.mask
    if max_length is not None:
        room = max_length - mine.prompt_mask.sum(1)
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < room[:, None])
    return taken.with_(
        prompt_ids=mine.prompt_ids,
        prompt_mask=mine.prompt_mask,
        inputs=mine.inputs,
        mask=mask,
        row=row_ids(0, 0, mine.row, taken.row),
        group=mine.group + int(rows.group.max() if len(rows) else 0) + 1,
        domain=mine.domain,
        data_index=mine.data_index,
        weight=mine.weight,
        stream=torch.full_like(mine.stream, int(Stream.REGULARISER)),
        columns={**taken.columns, MISMATCHED: torch.ones_like(mine.main)},
    )


def _labels(rows: Rows) -> Float[Tensor, "B"]:
    if rows.label is None:
        raise MethodError(
            "this loss reads labels, and the batch has none", None, "Give `prompt`, `completion` and `label`."
        )
    return rows.label


def _weight(rows: Rows) -> Float[Tensor, "B"]:
    return rows.weight * rows.main
