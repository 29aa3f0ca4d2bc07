"""Completions beside the policy's own: other models answer the same prompts, as opponents or for comparison."""

from dataclasses import dataclass

from keel.core.registry import part

AUTHOR = "author"  # column: 0 for the rows of the rollout, i + 1 for those of its i-th `CompletionsOf`


@part("completions_of")
@dataclass(frozen=True)
class CompletionsOf:
    """Further completions of each prompt, by another model or by a mixture of it with the policy.

    At each token log q = share log model + (1 - share) log policy + const, each at the temperature of the rollout. The
    rows stand in their prompt's group, in the stream CANDIDATE: they are scored and may be compared with, and are in no
    statistic and no loss until a part takes them in.

    Args:
        model: name of the model among the method's.
        count: completions of a prompt.
        share: of the model; 1 is that model alone.
        every: 0 draws them for each batch; otherwise only for every second stretch of so many batches, beginning with
            the second one.

    Raises:
        ValueError: a share outside (0, 1], no completions, or a negative `every`.

    Source: "Nash Learning from Human Feedback", 2023, whose opponent is such a mixture (Nash-MD-PG).
    """

    model: str = "ref"
    count: int = 4
    share: float = 1.0
    every: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], not {self.share}: without one the policy writes alone")
        if self.count < 1 or self.every < 0:
            raise ValueError(f"count must be at least 1 and every not negative, not {self.count} and {self.every}")

    def due(self, step: int) -> bool:
        """Whether they are drawn for a batch, counted from 0.

        >>> [CompletionsOf(every=2).due(step) for step in range(6)]
        [False, False, True, True, False, False]
        """
        return not self.every or step // self.every % 2 == 1
