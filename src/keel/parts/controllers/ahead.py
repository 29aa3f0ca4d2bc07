"""MetaRM: the gradient of a reward model's loss is taken where its rewards on unlabelled samples are further apart."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows


def spread(score: Float[Tensor, "B"], rows: Rows) -> Float[Tensor, ""]:
    """J = mean over prompts of (2 / k^2) sum_{i < j} sigmoid(|R_i - R_j|), k completions of each.

    The slope of |.| at 0 is taken to be 0, as torch does.

    Args:
        score: R of each row.
        rows: whose groups are the prompts.
    """
    groups = Groups.of(rows)
    values = []
    for number in rows.group.unique().tolist():
        own = score[rows.group == number]
        gaps = (own[:, None] - own[None, :]).abs().sigmoid()
        values.append(2 / len(own) ** 2 * gaps.triu(1).sum())
    weight = groups.weight.new_ones(len(values))
    return weighted_mean(torch.stack(values), weight.to(score))


@part("look_ahead", paper=199)
@dataclass(frozen=True)
class LookAhead:
    """Before each gradient the weights go up along J, and the step that follows starts from where they were.

        theta' = theta + rate * grad J(theta),    theta <- step(theta, grad L(theta'))        (first order)

    J is the spread of the scores of `num_generations` completions of each of a few prompts (see `spread`), which the
    model `source` draws: the policy that the reward model will be asked to judge.

    Args:
        rate: of the step ahead; 0 gives the loss's own gradient, and draws nothing.
        num_generations: k.
        num_prompts: of the batch's prompts, from the first on.
        source: name of the model that draws.
        head: whose score it is.
        max_completion_length: tokens at most; None takes the longest completion of the batch.

    Raises:
        ValueError: a negative rate, or fewer than two completions or one prompt.

    Source: "Secrets of RLHF in Large Language Models Part II: Reward Modeling", 2024, its section on MetaRM.
    """

    rate: float = 1e-3
    num_generations: int = 4
    num_prompts: int = 8
    source: str = "sampler"
    head: str = "reward"
    max_completion_length: int | None = None
    owns: tuple[str, ...] = ()
    needs = ()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, not {self.rate}")
        if self.num_generations < 2 or self.num_prompts < 1:
            what = "a spread needs num_generations of at least 2 and num_prompts of at least 1"
            raise ValueError(f"{what}, not {self.num_generations} and {self.num_prompts}")

    def init(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def update(self, metrics: Any, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """No value of the method is its own."""
        return {}, state
