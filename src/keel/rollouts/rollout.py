"""The rollout slot: how many completions of which prompts, and how they are drawn."""

from dataclasses import dataclass

from keel.core.registry import part
from keel.rollouts.sampling import Sampling


@part("rollout")
@dataclass(frozen=True)
class Rollout:
    """Independent samples, a group for each prompt.

    Args:
        num_prompts: prompts a batch.
        num_generations: completions a prompt, the group size G.
        temperature, top_k, top_p, min_p: of the sampler; statistics use the temperature, not the filters.
        max_completion_length: tokens at most, EOS included.
        max_prompt_length: tokens at most, cut from the left and counted; None keeps all.
        stop_strings: texts that end a completion.
        greedy_baseline: adds a greedy completion to each group, for ReMax; it never enters the loss.

    Raises:
        ValueError: a setting out of its range.
    """

    num_prompts: int = 16
    num_generations: int = 8
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_completion_length: int = 256
    max_prompt_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    greedy_baseline: bool = False

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive in training, not {self.temperature}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """The settings that the generator reads."""
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.max_completion_length, self.stop_strings
        )
