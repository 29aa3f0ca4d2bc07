"""Completions beside the batch: other groups for some of its prompts, drawn at another temperature."""

from dataclasses import dataclass

from keel.core.registry import part


@part("extra_completions", paper=50)
@dataclass(frozen=True)
class ExtraCompletions:
    """A further group of completions for a share of the prompts, at a temperature of its own.

    They stand in the stream CANDIDATE, in groups of their own: in no statistic and no loss until a part takes them in.
    `logp["behaviour"]` is under the distribution that drew them, and `columns["temperature"]` says of each row at which
    temperature that was; everything that is measured of a model stays at the rollout's temperature.

    Args:
        share: of the prompts, the first of the batch, in (0, 1].
        temperature: of these completions.

    Raises:
        ValueError: a share outside (0, 1], or a temperature that is not positive.

    Source: "Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", 2025; a
    version of the authors' code draws them for all prompts.
    """

    share: float = 0.25
    temperature: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], not {self.share}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive in training, not {self.temperature}")

    def count(self, prompts: int) -> int:
        """Of so many prompts, how many get further completions.

        >>> [ExtraCompletions().count(n) for n in (1, 2, 4, 16)]
        [0, 1, 1, 4]
        """
        return int(self.share * prompts + 0.5)
