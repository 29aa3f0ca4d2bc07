"""Completions for distillation: who writes them, and how many are given instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.choice import counter_seed, uniforms
from keel.core.drawing import draw
from keel.core.policy import Head
from keel.core.registry import part
from keel.core.rows import Rows
from keel.models.adapters import AdapterView
from keel.models.language import LanguageModel
from keel.rollouts.caches import Workspace
from keel.rollouts.decoding import Chooser, Prompts, Stepper, decode
from keel.rollouts.local import LocalGenerator, evaluating
from keel.rollouts.sampling import Sampling


@part("given_completions")
@dataclass(frozen=True)
class GivenCompletions:
    """Completions of the data, or the task's own solutions, in place of drawn ones.

    Args:
        share: of them, in [0, 1].
        per: "batch" takes whole batches from the data with probability `share`, as GKD does; "row" that share of the
            prompts of every batch, rounded.

    Raises:
        ValueError: a share outside [0, 1], or another unit.

    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), 2024.
    """

    share: float = 0.5
    per: Literal["batch", "row"] = "batch"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], not {self.share}")
        if self.per not in ("batch", "row"):
            raise ValueError(f"per must be batch or row, not '{self.per}'")

    def count(self, prompts: int, seed: int, step: int) -> int:
        """Of so many prompts, how many have given completions in this step.

        >>> [GivenCompletions(0.25, "row").count(8, 0, step) for step in range(3)]
        [2, 2, 2]
        """
        if self.per == "row":
            return int(self.share * prompts + 0.5)
        chance = float(uniforms(torch.tensor([counter_seed(seed, "given", step)]), 0))
        return prompts if chance < self.share else 0


@part("written_by")
@dataclass(frozen=True)
class WrittenBy:
    """Who draws: at each token alpha * model + (1 - alpha) * policy, each at the temperature of the rollout.

    Filters act on the mixture. The log-probability of what was drawn stands in `logp["mixture"]`.

    Args:
        model: name of the model among the method's.
        alpha: its share; 1 is that model alone.

    Raises:
        ValueError: alpha outside (0, 1].

    Source: "MiniLLM: Knowledge Distillation of Large Language Models", 2024 (alpha = 0.2).
    """

    model: str = "teacher"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {self.alpha}: without a share the policy writes alone")


def mixture_log_probs(
    policy: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], alpha: float, temperature: float = 1.0
) -> Float[Tensor, "n V"]:
    """log(alpha softmax(teacher / T) + (1 - alpha) softmax(policy / T)) of logits.

    >>> both = torch.tensor([[0., 0.]]), torch.tensor([[3., 0.]]).log()
    >>> mixture_log_probs(*both, 0.5).exp().tolist()
    [[0.75, 0.25]]
    """
    own, other = ((z / temperature).log_softmax(-1) for z in (policy, teacher))
    log_share = torch.tensor([1 - alpha, alpha], dtype=own.dtype, device=own.device).log()
    return torch.logaddexp(own + log_share[0], other.to(own) + log_share[1])


def geometric_log_probs(
    policy: Float[Tensor, "n V"], other: Float[Tensor, "n V"], share: float, temperature: float = 1.0
) -> Float[Tensor, "n V"]:
    """share log softmax(other / T) + (1 - share) log softmax(policy / T), normalised, of logits.

    >>> both = torch.tensor([[0., 0.]]), torch.tensor([[9., 1.]]).log()
    >>> geometric_log_probs(*both, 0.5).exp().round(decimals=4).tolist()
    [[0.75, 0.25]]
    """
    return (((1 - share) * policy + share * other.to(policy)) / temperature).log_softmax(-1)


def generate_mixture(
    policy: LocalGenerator,
    teacher: LocalGenerator,
    alpha: float,
    prompts: Sequence[Sequence[int]],
    num_generations: int,
    sampling: Sampling,
    *,
    seed: int,
    step: int = 0,
    data_index: Sequence[int] | None = None,
    geometric: bool = False,
    view: AdapterView | None = None,
) -> Rows:
    """Completions of a mixture of two models, which read each other's tokens; see `Generator` and `WrittenBy`.

    Args:
        geometric: mix log-probabilities at each token, as `CompletionsOf` does, in place of probabilities.
        view: as which the teacher is seen, where it is the policy with another adapter or with none.

    Raises:
        UserError: prompts that do not fit the context or the vocabulary of either.
    """
    room = sampling.max_completion_length
    known = {"seed": seed, "step": step, "data_index": data_index}
    asked = Prompts.of(policy.model, prompts, num_generations, room, **known)  # type: ignore[arg-type]
    Prompts.of(teacher.model, prompts, num_generations, room, **known)  # type: ignore[arg-type]  # that they fit
    length = asked.ids.shape[1] + room
    with evaluating(policy.model), evaluating(teacher.model):
        other = teacher.stepper(length, Workspace()) if view is None else _Seen.of(teacher, view, length)
        stepper = _Both(policy.stepper(length, Workspace()), other)
        heads = policy.model.head, teacher.model.head if view is None else view.head
        chooser = _Mixing((policy.model, teacher.model), heads, alpha, sampling, asked.row, geometric)
        rows = asked.rows(decode(stepper, policy.model, asked, sampling, chooser=chooser), policy.model.pad_id)
    return rows.with_(logp={"mixture": rows.logp["behaviour"]})


class _Both:
    """Two steppers in step; their states stand side by side."""

    def __init__(self, first: Stepper, second: Stepper):
        self.first, self.second = first, second

    def prefill(self, ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"], room: int) -> Float[Tensor, "N D"]:
        return _beside(self.first.prefill(ids, mask, room), self.second.prefill(ids, mask, room))

    def expand(self, index: Int[Tensor, "n"]) -> None:
        self.first.expand(index)
        self.second.expand(index)

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        return _beside(self.first.step(tokens), self.second.step(tokens))

    def keep(self, index: Int[Tensor, "m"]) -> None:
        self.first.keep(index)
        self.second.keep(index)

    def fork(self, index: Int[Tensor, "m"]) -> Self:
        return type(self)(self.first.fork(index), self.second.fork(index))


class _Seen:
    """A stepper of a model whose adapters are, while it runs, those of a view."""

    def __init__(self, stepper: Stepper, view: AdapterView):
        self.stepper, self.view = stepper, view

    @classmethod
    def of(cls, generator: LocalGenerator, view: AdapterView, length: int) -> Self:
        with view.active():
            return cls(generator.stepper(length, Workspace()), view)

    def prefill(self, ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"], room: int) -> Float[Tensor, "N D"]:
        with self.view.active():
            return self.stepper.prefill(ids, mask, room)

    def expand(self, index: Int[Tensor, "n"]) -> None:
        self.stepper.expand(index)

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        with self.view.active():
            return self.stepper.step(tokens)

    def keep(self, index: Int[Tensor, "m"]) -> None:
        self.stepper.keep(index)

    def fork(self, index: Int[Tensor, "m"]) -> Self:
        return type(self)(self.stepper.fork(index), self.view)


class _Mixing(Chooser):
    """Draws from the mixture of both models' distributions."""

    def __init__(
        self,
        models: tuple[LanguageModel, LanguageModel],
        heads: tuple[Head, Head],
        alpha: float,
        sampling: Sampling,
        row: Int[Tensor, "B"],
        geometric: bool,
    ):
        super().__init__(heads[0], sampling, row, sampling.max_completion_length)
        self.models, self.heads, self.alpha, self.width = models, heads, alpha, models[0].config.hidden_size
        self.mixed = geometric_log_probs if geometric else mixture_log_probs

    def __call__(
        self, states: Float[Tensor, "n D"], alive: Int[Tensor, "n"], position: int
    ) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        parts = states[:, : self.width], states[:, self.width :]
        ready = (model.for_head(part) for model, part in zip(self.models, parts, strict=True))
        own, other = (head.logits(part) for head, part in zip(self.heads, ready, strict=True))
        logits = self.mixed(own, other, self.alpha, self.sampling.temperature)
        probs = (logits if self.filter is None else self.filter(logits)).softmax(-1)
        there = self.row.device
        token = draw(probs.to(there), self._uniform(position)[alive.to(there)]).to(probs.device)
        return token, probs.gather(-1, token[:, None])[:, 0].log()


def _beside(first: Float[Tensor, "n D"], second: Float[Tensor, "n E"]) -> Float[Tensor, "n DE"]:
    return torch.cat([first.float(), second.float().to(first.device)], -1)
