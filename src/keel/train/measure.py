"""Measuring a policy on held-out prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.policy import PolicyModel
from keel.core.rows import Rows
from keel.evaluate.collect import collect
from keel.evaluate.evaluation import Evaluation, Samples, assess
from keel.evaluate.support import Classes, compare_support
from keel.models.language import LanguageModel
from keel.parts.rewards.named import of_models
from keel.parts.rewards.score import score
from keel.rollouts.choose import choose_generator
from keel.rollouts.episodes import Limits, Played, play
from keel.rollouts.sampling import Generator, Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, Functional
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example, RewardFunction, Task
from keel.train.encode import Encoder
from keel.train.settings import EvaluateSettings

MAX_ROWS = 2048  # completions sampled together


def measure_policy(
    policy: LanguageModel,
    task: Task,
    rewards: Mapping[str, RewardFunction],
    settings: EvaluateSettings,
    *,
    seed: int,
    **known: Any,
) -> Evaluation:
    """avg@k, pass@k, maj@k, entropy, KL to the reference and lengths on the first held-out prompts.

    The arguments are those of `draw`.
    """
    return assessed(draw(policy, task, rewards, settings, seed=seed, **known), settings, seed)


def assessed(samples: Samples, settings: EvaluateSettings, seed: int) -> Evaluation:
    """The metrics of samples."""
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= settings.num_generations]
    return assess(samples, ks, seed=seed, threshold=settings.threshold)


def measure_against(
    policy: LanguageModel,
    base: LanguageModel,
    task: Task,
    rewards: Mapping[str, RewardFunction],
    settings: EvaluateSettings,
    *,
    classes: Classes = "answer",
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    **known: Any,
) -> Evaluation:
    """What `measure_policy` measures, and the support of the policy against that of its base.

    The base is sampled twice, with other randomness than the policy, so that chance can be told from change.

    Args:
        policy: the model to measure.
        base: the model that it is held against, also for the KL.
        task, rewards, settings, known: as in `draw`.
        classes: what counts as one answer: "answer", its canonical form, or "completion", each text by itself.
        seed: of the completions.
        progress: called with (prompts done, all prompts) over the three passes.
    """

    def told(part: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(part * total + done, 3 * total)

    samples = draw(policy, task, rewards, settings, seed=seed, reference=base, progress=told(0), **known)
    evaluation = assessed(samples, settings, seed)
    if samples.answers is None or not any(answer is not None for row in samples.answers for answer in row):
        return evaluation
    once, again = (
        draw(base, task, rewards, settings, seed=counter_seed(seed, "base", i), progress=told(i), **known)
        for i in (1, 2)
    )
    found = compare_support(samples, once, again, seed, settings.threshold, classes, _truncated(settings))
    return replace(evaluation, support=found)


def _truncated(settings: EvaluateSettings) -> list[str]:
    """What the sampler takes from the support by its own filters."""
    found = []
    if settings.temperature != 1:
        found.append(f"sampled at temperature {settings.temperature:g}: support is defined at 1")
    if settings.top_p is not None and settings.top_p < 1:
        found.append(f"sampled with top_p={settings.top_p:g}, which removes rare answers by construction")
    return found


def draw(
    policy: LanguageModel,
    task: Task,
    rewards: Mapping[str, RewardFunction],
    settings: EvaluateSettings,
    *,
    encoder: Encoder,
    max_completion_length: int,
    seed: int,
    reference: PolicyModel | None = None,
    generator: str = "auto",
    max_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
    hidden: Mapping[str, RewardFunction] | None = None,
    limits: Limits | None = None,
) -> Samples:
    """Scored completions of the first held-out prompts, with their entropy, and their KL to a reference.

    Args:
        policy: the model to sample.
        task: its held-out examples and answers.
        rewards: functions that score completions.
        settings: number of prompts and completions, sampling, threshold.
        encoder: prompts to tokens.
        max_completion_length: tokens at most.
        seed: of the completions; the same one before and after gives common random numbers.
        reference: for the KL, per token over the whole vocabulary; None leaves it out.
        generator: local, transformers or auto.
        max_tokens: tokens of a micro-batch of the statistics.
        progress: called with (prompts done, all prompts).
        hidden: functions that are measured and are no part of the reward.
        limits: of episodes, on a task of several turns; None takes the task's.
    """
    places = range(settings.skip, min(settings.skip + settings.num_prompts, len(task.held_out)))
    examples: Sequence[Example] = [task.held_out[i] for i in places]
    sampling = Sampling(settings.temperature, None, settings.top_p, None, max_completion_length)
    n = settings.num_generations
    models: dict[str, PolicyModel] = {"policy": policy} | ({} if reference is None else {"ref": reference})
    engine = Engine(models, max_tokens=max_tokens)

    functions = {**rewards, **(hidden or {})}
    verdict = getattr(task, "verdict", None) or ("gold" if "gold" in (hidden or {}) and of_models(rewards) else None)

    def statistics(rows: Rows) -> dict[str, Tensor]:
        needs: list[Functional] = [Entropy()] if reference is None else [Entropy(), Divergence("kl_policy_ref")]
        stats = engine.measure(needs, rows.to(policy.device))
        return {"entropy": stats[Entropy()]} | ({} if reference is None else {"kl": stats[Divergence("kl_policy_ref")]})

    drawing, episodes = choose_generator(policy, generator), None
    if isinstance(task, InteractiveTask):
        known = (sampling, limits or Limits.of(task, policy.context_length), encoder)
        episodes = partial(_episodes, drawing, task, n, known, seed)
    return collect(
        drawing,
        examples,
        lambda prompts, completions, ids, columns, group: score(functions, prompts, completions, ids, columns, group),
        num_generations=n,
        sampling=sampling,
        seed=seed,
        encode=encoder.prompt,
        decode=encoder.decode,
        answer=task.answer,
        statistics=statistics,
        verdict=verdict if verdict in functions else None,
        hidden=tuple(hidden or ()),
        episodes=episodes,
        max_rows=MAX_ROWS,
        progress=progress,
    )


def _episodes(drawing: Generator, task: Any, count: int, known: tuple, seed: int, some: list[Example]) -> Played:
    return play(drawing, task, some, count, *known, seed=seed, data_index=[example.index for example in some])
