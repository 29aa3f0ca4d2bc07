"""A reward model as a reward, by its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from keel.core.errors import ConfigError
from keel.core.registry import part
from keel.models.reward_model import TOKENS, TextScorer, constants_of, load_reward_model
from keel.tasks.task import Text


@part("reward_model")
@dataclass(frozen=True)
class RewardModel:
    """The score of a frozen reward model, in this process; it is loaded at the first call.

    Args:
        path: a run's folder (of a reward recipe, such as `bradley_terry`), a folder with a sequence classifier in the
            format of transformers with num_labels = 1, or a hub name.
        standardise: subtract the mean and divide by the deviation of the scores on samples of the policy that its
            training began with, which `keel.json` beside the model states.
        max_tokens: of one forward pass, padding included.
        device: None takes the best there is.

    Raises:
        ConfigError: at the first call: no such folder, a model of another kind, or no constants to standardise with.
        ValueError: max_tokens below 1.
    """

    path: str
    standardise: bool = False
    max_tokens: int = TOKENS
    device: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")

    @cached_property
    def scorer(self) -> TextScorer:
        """The model, loaded once."""
        return load_reward_model(self.path, self.device, self.max_tokens)

    def prepare(self) -> "RewardModel":
        """Itself, with the model loaded, so that a mistake shows before training begins."""
        assert self.scorer
        if self.standardise:
            self._constants()
        return self

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One score for each completion."""
        scores = self.scorer.scores(list(zip(prompts, completions, strict=True)))
        if self.standardise:
            mean, std = self._constants()
            scores = (scores - mean) / std
        return [float(score) for score in scores]

    def _constants(self) -> tuple[float, float]:
        found = constants_of(self.scorer.facts)
        if found is None:
            raise ConfigError(
                "its folder does not state the mean and the deviation of its scores",
                self.path,
                "Write them with keel.models.reward_model.write_constants, or set standardise=false.",
            )
        return found
