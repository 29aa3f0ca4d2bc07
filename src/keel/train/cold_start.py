"""Data for a cold start: traces as long as their prompts are hard, to be learnt by `sft`."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.models.language import LanguageModel
from keel.tasks.data import DataTask, identity, load_data
from keel.tasks.task import Example
from keel.tasks.traces import PASS_RATE, choose_traces
from keel.train.encode import Encoder
from keel.train.measure import draw
from keel.train.session import Reporter, reward_functions, silent
from keel.train.settings import EvaluateSettings, TaskSettings
from keel.train.setup import named_rewards, open_model


def cold_start(
    data: Any,
    path: str | Path,
    model: Any = None,
    reward: Any = None,
    *,
    per_prompt: int = 1,
    easy_length: float | None = None,
    hard_length: float | None = None,
    num_generations: int = 8,
    max_completion_length: int = 256,
    threshold: float = 0.5,
    tokenizer: Any = None,
    seed: int = 0,
    device: str | None = None,
    report: Reporter = silent,
) -> dict[str, float]:
    """Choose traces by `keel.tasks.traces.choose_traces` and write them as JSON lines, for `keel train sft --data`.

    Lengths are in tokens of the model, or in characters without one.

    Args:
        data: traces, as `keel.train` takes data: `prompt` and `completion`, several rows for a prompt, and columns
            `pass_rate` (of the prompt) or `correct` (of the trace).
        path: the file to write.
        model: `tiny`, a folder or a hub name; where the data have no pass rates it is sampled to measure them.
        reward: as in `keel.train`; for measuring.
        per_prompt, easy_length, hard_length: as in `choose_traces`.
        num_generations: samples a prompt.
        max_completion_length: tokens of a sample at most.
        threshold: a sample is right if its reward is above this.
        tokenizer: of a model in memory.
        seed: of the samples.
        device: None takes the best there is.
        report: called with (event, facts).

    Returns:
        What there was: prompts, prompts left_out, traces chosen, easy_length, hard_length, mean pass_rate.

    Raises:
        UserError: a mistake in the data or in what was asked for; the file exists.
    """
    target = Path(path)
    if target.exists():
        raise ConfigError("exists already", str(target), "Choose another file.")
    task = load_data(data, held_out=0.0)
    policy = None if model is None else open_model(model, task, tokenizer, device, report)
    rates = None
    if policy is not None and any(example.columns.get(PASS_RATE) is None for example in task.train):
        chosen = EvaluateSettings(num_generations=num_generations, threshold=threshold, num_prompts=len(task.train))
        rates = _measured(task, policy, reward, chosen, max_completion_length, seed, report)
    known: dict[str, Any] = {"easy_length": easy_length, "hard_length": hard_length}
    if policy is not None:
        encoder = Encoder(policy)
        known["length"] = lambda text: len(encoder.completion(text))
    try:
        found = choose_traces(task.train, rates, per_prompt=per_prompt, **known)
    except ValueError as error:
        raise ConfigError(str(error), "cold_start") from error
    lines = [json.dumps(_row(example), ensure_ascii=False) + "\n" for example in found.examples]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    return {
        "prompts": found.prompts,
        "left_out": found.left_out,
        "traces": len(found.examples),
        "easy_length": found.easy_length,
        "hard_length": found.hard_length,
        "pass_rate": float(np.mean([e.columns[PASS_RATE] for e in found.examples])) if found.examples else float("nan"),
    }


def _measured(
    task: DataTask,
    policy: LanguageModel,
    reward: Any,
    settings: EvaluateSettings,
    max_completion_length: int,
    seed: int,
    report: Reporter,
) -> dict[Hashable, float]:
    """The share of right samples of each prompt."""
    names, given = named_rewards(reward)
    functions = reward_functions(TaskSettings(name=task.name, rewards=names), task, given)
    if not functions:
        fix = "Give reward=, a column `answer`, or the data a column `pass_rate`."
        raise ConfigError("there is nothing to score samples with", "reward", fix)
    prompts: Sequence[Example] = list({identity(example): example for example in reversed(task.train)}.values())
    try:
        samples = draw(
            policy,
            DataTask(task.name, (), prompts),
            functions,
            settings,
            encoder=Encoder(policy),
            max_completion_length=max_completion_length,
            seed=counter_seed(seed, "cold_start"),
            progress=lambda done, total: report("progress", {"done": done, "total": total}),
        )
    finally:
        for function in functions.values():
            if (close := getattr(function, "close", None)) is not None:
                close()
    if bool(np.isnan(samples.reward).all(1).any()):
        raise DataError("the reward function failed on every sample of a prompt", task.name)
    share = np.nanmean(np.where(np.isnan(samples.reward), np.nan, samples.reward > settings.threshold), axis=1)
    return {identity(example): float(rate) for example, rate in zip(prompts, share, strict=True)}


def _row(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "completion": example.completion, **example.columns}
