"""Ensembles of reward models: mean, worst case, and mean less the disagreement."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.registry import part
from keel.models.reward_model import TOKENS
from keel.parts.rewards.models import RewardModel
from keel.tasks.task import Text

Rule = Literal["mean", "wco", "uwo"]
RULES = get_args(Rule)


def aggregate(
    scores: Float[Tensor, "K B"], rule: Rule = "mean", coef: float = 0.5, unbiased: bool = False
) -> Float[Tensor, "B"]:
    """One number for each text from the scores of K reward models.

        mean    mean_k S_k
        wco     min_k S_k                          worst case
        uwo     mean_k S_k - coef * var_k S_k      uncertainty weighted

    Args:
        scores: standardised, or the model of the largest scale decides alone.
        rule: one of the three.
        coef: of the variance.
        unbiased: divide the variance by K - 1 instead of K; that of one model is 0 either way.

    Raises:
        ValueError: no models, or an unknown rule.

    Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", 2024. Their best-of-n divides by K,
    their PPO by K - 1.

    >>> S = torch.tensor([[1.0], [2.0], [6.0]])
    >>> [round(float(aggregate(S, rule)), 6) for rule in ("mean", "wco", "uwo")]
    [3.0, 1.0, 0.666667]
    """
    if not len(scores):
        raise ValueError("an ensemble needs at least one model")
    if rule == "wco":
        return scores.amin(0)
    if rule not in RULES:
        raise ValueError(f"rule '{rule}' is not one of {', '.join(RULES)}")
    if rule == "mean" or len(scores) == 1:
        return scores.mean(0)
    return scores.mean(0) - coef * scores.var(0, correction=int(unbiased))


@part("reward_ensemble", paper=25)
@dataclass(frozen=True)
class RewardEnsemble:
    """The aggregate of several reward models' scores, each standardised by its own frozen constants.

    Args:
        paths: of the models, as `RewardModel` takes them.
        rule: mean, wco (the least of them) or uwo (mean less `coef` times the variance).
        coef: of uwo; the paper has 0.5 for best-of-n and 0.1 for PPO.
        unbiased: the variance of uwo is divided by K - 1.
        standardise: each by the constants beside it; without it scores of different scales are mixed.
        max_tokens, device: see `RewardModel`.

    Raises:
        ValueError: no paths, a path twice, an unknown rule, or a negative coefficient.
        ConfigError: at the first call, see `RewardModel`.

    Source: "Reward Model Ensembles Help Mitigate Overoptimization", 2024.
    """

    paths: tuple[str, ...]
    rule: Rule = "mean"
    coef: float = 0.5
    unbiased: bool = False
    standardise: bool = True
    max_tokens: int = TOKENS
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("an ensemble needs at least one model")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError("a model is in the ensemble twice")
        if self.rule not in RULES:
            raise ValueError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, not {self.coef}")

    @cached_property
    def members(self) -> tuple[RewardModel, ...]:
        """The models, each loaded at its first call."""
        known: dict[str, Any] = {"max_tokens": self.max_tokens, "device": self.device}
        return tuple(RewardModel(path, self.standardise, **known) for path in self.paths)

    def prepare(self) -> "RewardEnsemble":
        """Itself, with the models loaded."""
        for member in self.members:
            member.prepare()
        return self

    def scores(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Float[Tensor, "K B"]:
        """The score of each model."""
        return torch.tensor([member(prompts, completions) for member in self.members])

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One number for each completion."""
        found = aggregate(self.scores(prompts, completions), self.rule, self.coef, self.unbiased)
        return [float(score) for score in found]
