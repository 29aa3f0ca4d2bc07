"""The outcomes of a model: its completions of held-out prompts, merged where they are equal, and scored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.config import build
from keel.core.errors import ConfigError, RewardError
from keel.models.language import LanguageModel
from keel.parts.rewards.functions import RewardFunction
from keel.parts.rewards.score import score
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.targets.survey import Listed
from keel.tasks.task import Example, Task
from keel.train.encode import Encoder
from keel.train.session import Reporter, reward_functions
from keel.train.settings import TaskSettings
from keel.train.setup import named_rewards, open_model, open_task

MAX_ROWS = 1024  # completions sampled together


def sampled_outcomes(
    model: Any,
    task: str | Task | None,
    data: Any,
    reward: Any,
    tokenizer: Any,
    *,
    num_prompts: int,
    num_generations: int,
    count_completions: bool,
    seed: int,
    device: str | None,
    report: Reporter,
    settings: Mapping[str, Any],
) -> tuple[list[Listed], int]:
    """Outcomes of the first held-out prompts, and the number of prompts that could not be scored; see `keel.target`.

    Raises:
        UserError: a mistake in what was asked for.
        RewardError: no prompt could be scored.
    """
    if min(num_prompts, num_generations) < 1:
        raise ConfigError("must be at least 1", "num_prompts" if num_prompts < 1 else "num_generations")
    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    task_settings = TaskSettings(name=task if isinstance(task, str) else None)
    opened = task if task is not None and not isinstance(task, str) else open_task(task_settings, data, seed)
    named, given = named_rewards(reward)
    functions = reward_functions(TaskSettings(name=opened.name, rewards=named), opened, given)
    if not functions:
        raise ConfigError("there is nothing to score completions with", "reward", "Give a reward.")
    policy = open_model(model, opened, tokenizer, device, report)
    sampling = build(Sampling, {"max_completion_length": opened.max_completion_length, **settings}, "sampling")
    if sampling.temperature == 0:
        raise ConfigError("must be positive: greedy decoding is no distribution to tilt", "temperature")
    try:
        prompts, left_out = _draw(policy, opened, functions, sampling, num_prompts, num_generations, seed, report)
    finally:
        for function in functions.values():
            if (close := getattr(function, "close", None)) is not None:
                close()
    if count_completions:
        prompts = [replace(listed, modes=listed.names) for listed in prompts]
    return prompts, left_out


def _draw(
    policy: LanguageModel,
    task: Task,
    functions: Mapping[str, RewardFunction],
    sampling: Sampling,
    num_prompts: int,
    num_generations: int,
    seed: int,
    report: Reporter,
) -> tuple[list[Listed], int]:
    """Sample, score and merge the completions of the first held-out prompts."""
    examples = [task.held_out[i] for i in range(min(num_prompts, len(task.held_out)))]
    generator, encoder = choose_generator(policy, "auto"), Encoder(policy)
    size, prompts, said = max(1, MAX_ROWS // num_generations), [], ""
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        rows = generator.generate(
            [encoder.prompt(e.prompt) for e in some],
            num_generations,
            sampling,
            seed=counter_seed(seed, "target"),
            data_index=[e.index for e in some],
        ).to("cpu")
        ids = [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)]
        log_probs = (rows.logp["behaviour"].double() * rows.mask).sum(1)
        repeated = [e for e in some for _ in range(num_generations)]
        replies = [_reply(encoder.decode(tokens), e) for tokens, e in zip(ids, repeated, strict=True)]
        columns = {name: [e.columns.get(name) for e in repeated] for name in some[0].columns}
        scores = score(functions, [e.prompt for e in repeated], replies, ids, columns, rows.group)
        rewards = scores.values.double().nansum(1)
        unusable = scores.failed | scores.values.isnan().all(1)
        said = said or "; ".join(text for texts in scores.messages.values() for text in texts)
        for place, example in enumerate(some):
            at = slice(place * num_generations, (place + 1) * num_generations)
            if not bool(unusable[at].any()):
                prompt = encoder.show(example.prompt)
                prompts.append(_merge(task, example, prompt, ids[at], replies[at], log_probs[at], rewards[at]))
        report("progress", {"done": start + len(some), "total": len(examples)})
    if not prompts:
        raise RewardError("no completion could be scored", "reward", said or None)
    return prompts, len(examples) - len(prompts)


def _merge(
    task: Task, example: Example, prompt: str, ids: list[list[int]], replies: list, log_probs: Tensor, rewards: Tensor
) -> Listed:
    """Completions of equal text as one outcome; its mode is the task's answer, or the text where it has none.

    Its probability is the sum over the token sequences that were seen, each of which counts once.
    """
    outcomes: dict[str, int] = {}
    samples = torch.tensor([outcomes.setdefault(_text(reply), len(outcomes)) for reply in replies])
    distinct = {tuple(tokens): i for i, tokens in enumerate(ids)}
    log_ref = torch.full((len(outcomes),), -math.inf, dtype=torch.float64)
    for i in distinct.values():
        log_ref[samples[i]] = torch.logaddexp(log_ref[samples[i]], log_probs[i])
    log_ref = log_ref - log_ref.logsumexp(0).clamp(min=0)  # rounding may bring the sum above 1
    count = torch.bincount(samples).double()
    reward = torch.zeros_like(count).index_add(0, samples, rewards) / count
    first = {int(k): i for i, k in reversed(list(enumerate(samples.tolist())))}
    answers = [task.answer(replies[first[k]], example) for k in range(len(outcomes))]
    modes = tuple(text if answer is None else str(answer) for answer, text in zip(answers, outcomes, strict=True))
    return Listed(tuple(outcomes), log_ref, reward, modes, prompt, samples)


def _reply(text: str, example: Example) -> str | list[dict[str, str]]:
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]


def _text(reply: str | list[dict[str, str]]) -> str:
    return reply if isinstance(reply, str) else reply[0]["content"]
