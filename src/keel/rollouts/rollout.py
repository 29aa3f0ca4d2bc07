"""The rollout slot: how many completions of which prompts, and how they are drawn."""

from dataclasses import dataclass, replace
from typing import Any

import keel.rollouts.samplers  # noqa: F401 (they join the catalogue)
from keel.core.errors import ConfigError
from keel.core.registry import part
from keel.rollouts.adaptive import AdaptiveTemperature
from keel.rollouts.beside import CompletionsOf
from keel.rollouts.extra import ExtraCompletions
from keel.rollouts.sampling import Sampling
from keel.rollouts.taught import GivenCompletions, WrittenBy
from keel.sampling.catalogue import entry_named, entry_of, sampler
from keel.sampling.values import MonteCarlo

LEARNT = {  # what a sampler may need that no rollout has
    "restart": "needs a learnt prediction of whether to start again",
    "joint": "needs a learnt prediction of reward and length",
    "models": "needs a further model or prompt beside the policy",
}


@part("rollout")
@dataclass(frozen=True)
class Rollout:
    """A group of completions for each prompt: independent samples of the policy, or what a sampler makes of it.

    With a sampler the rows of a group are either the weighted particles of one run (SMC and its kin; row weights N W_i,
    1 on average), whose number is num_generations, or the picks of as many runs (best of N, rejection, searches), each
    with the sampler's own num_particles. `keel.sampling.catalogue` says which.

    Such rows are no samples of the policy. What a recipe takes a mean over is then taken under the sampler's law: a
    policy gradient becomes E_tilt[A grad log pi], which raises what is better than the tilt's mean and is not the
    gradient of E_pi[r]; group means, deviations and the metric `reward` are the tilt's. The sampler is told the sum of
    the reward functions, before any transform of the rewards but the weights of a `WeightedSum`. Without a value an
    unfinished text counts as one of reward 0: where rewards are positive, those that end first take over the others'
    places, and at a small beta a group soon holds one text.

    Args:
        num_prompts: prompts a batch.
        num_generations: completions a prompt, the group size G.
        temperature, top_k, top_p, min_p: of the sampler; statistics use the temperature, not the filters.
        max_completion_length: tokens at most, EOS included.
        max_prompt_length: tokens at most, cut from the left and counted; None keeps all.
        stop_strings: texts that end a completion.
        greedy_baseline: adds a greedy completion to each group, for ReMax; it never enters the loss.
        sampler: a part of `keel.sampling`, or its name in the catalogue; None draws independent samples.
        value: what a sampler takes for the value of unfinished texts: "monte_carlo:M", or None for 0.
        max_turns, max_turn_length: on a task of several turns, turns and tokens of a turn at most; None is the task's.
        extra: further completions of some prompts at another temperature, beside the batch; None draws none.
        adaptive: a temperature for each token by its entropy; None draws all at one.
        given: completions of the data in place of some, for distillation; None draws all.
        written: who draws: a teacher or a mixture with it, for distillation; a model alone, for methods that compare
            its completions; None is the policy.
        beside: completions of each prompt by other models, beside those of the rollout.

    Raises:
        ValueError: a setting out of its range, or a sampler that cannot serve here.
        ConfigError: there is no sampler of that name.
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
    sampler: Any = None
    value: str | None = None
    extra: ExtraCompletions | None = None
    adaptive: AdaptiveTemperature | None = None
    given: GivenCompletions | None = None
    written: WrittenBy | None = None
    beside: tuple[CompletionsOf, ...] = ()
    max_turns: int | None = None
    max_turn_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive in training, not {self.temperature}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}")
        for name in ("max_turns", "max_turn_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        _ = self.sampling
        if isinstance(self.sampler, str):
            object.__setattr__(self, "sampler", named_sampler(self.sampler, {}))
        self._check_sampler()
        if self.grouped and self.sampler.num_particles != self.num_generations:
            object.__setattr__(self, "sampler", replace(self.sampler, num_particles=self.num_generations))

    @property
    def sampling(self) -> Sampling:
        """The settings that the generator reads."""
        settings = (self.temperature, self.top_k, self.top_p, self.min_p, self.max_completion_length)
        return Sampling(*settings, self.stop_strings, self.adaptive)

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the models beside the policy that draw."""
        own = () if self.written is None else (self.written.model,)
        return tuple(dict.fromkeys([*own, *(item.model for item in self.beside)]))

    @property
    def grouped(self) -> bool:
        """Whether the rows of a group are the particles of one run."""
        return self.sampler is not None and entry_of(self.sampler).group == "particles"

    @property
    def value_of(self) -> MonteCarlo | None:
        """The value of unfinished texts; in the sampler's own beta, where it has one."""
        if self.value is None:
            return None
        kind, _, count = self.value.partition(":")
        if kind != "monte_carlo" or not count.isdigit():
            raise ValueError(f"value must be monte_carlo:M with M completions, not '{self.value}'")
        return MonteCarlo(int(count), getattr(self.sampler, "beta", None))

    def _check_sampler(self) -> None:
        value = self.value_of
        if self.given is not None and self.written is not None and self.written.alpha < 1:
            raise ValueError("given completions have no log-probabilities of the mixture: take them or the mixture")
        if self.written is not None and (self.sampler or self.extra or self.greedy_baseline or self.adaptive):
            raise ValueError("what another model writes are plain samples: leave out sampler, extra, adaptive, greedy")
        if self.beside and (self.sampler or self.extra or self.greedy_baseline or self.adaptive or self.given):
            what = "plain samples stand beside plain samples of the policy"
            raise ValueError(f"{what}: leave out sampler, extra, adaptive, greedy and given, or beside")
        if self.sampler is None:
            if value is not None:
                raise ValueError("value is what a sampler goes by, and there is no sampler")
            return
        try:
            entry = entry_of(self.sampler)
        except ConfigError as error:
            raise ConfigError(error.what, "rollout.sampler", error.fix) from None
        if entry.needs in LEARNT:
            raise ValueError(_refusal(type(self.sampler).__name__, entry.needs))
        if self.extra is not None:
            raise ValueError("extra completions are independent samples of the policy: take them or a sampler")
        if self.greedy_baseline:
            raise ValueError("a greedy baseline is that of independent samples of the policy: take it or a sampler")
        if getattr(self.sampler, "draw", True) is False and self.num_generations > 1:
            what = "draws nothing by chance, so that all completions of a group would be the same"
            raise ValueError(f"{type(self.sampler).__name__} {what}: set rollout.sampler.draw=true")


def named_sampler(name: str, options: dict[str, Any]) -> Any:
    """A sampler for a rollout, by its name in the catalogue, with options by their (dotted) names.

    >>> named_sampler("smc", {"beta": 0.5}).beta
    0.5

    Raises:
        ConfigError: an unknown name or option, or a sampler that needs what a rollout does not have.
    """
    try:
        needs = entry_named(name).needs
    except ConfigError as error:
        raise ConfigError(error.what, "rollout.sampler", error.fix) from None
    if needs in LEARNT:
        raise ConfigError(_refusal(name, needs), "rollout.sampler", "`keel sample --method` and `keel eval` serve it.")
    return sampler(name, options)


def _refusal(name: str, needs: str) -> str:
    return f"{name} {LEARNT[needs]}, so it cannot draw the rows of training"
