"""The sections of a configuration, apart from the method."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keel.core.config import problem
from keel.core.errors import ConfigError, nearest


class Section(BaseModel):
    """A section: unknown keys are errors, values are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model, and how it is held in memory.

    Args:
        path: `tiny`, a folder, or a hub name.
        dtype: of the weights.
        autocast: dtype of mixed precision, or None.
        device: None takes the best there is.
        gradient_checkpointing: trade time for memory.
        lora_rank: rank of a LoRA adapter; 0 trains all weights.
        lora_alpha, lora_dropout, lora_target_modules: its other settings; None leaves them to peft's choice.
        trust_remote_code: run Python code that comes with the model.
    """

    path: str = "tiny"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    autocast: Literal["bfloat16", "float16"] | None = None
    device: str | None = None
    gradient_checkpointing: bool = False
    lora_rank: int = Field(0, ge=0)
    lora_alpha: float | None = None
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: tuple[str, ...] | None = None
    trust_remote_code: bool = False


class TaskSettings(Section):
    """Where prompts and rewards come from.

    Args:
        name: a built-in task, a reasoning-gym data set, `verifiers:ID`, or one's own as `file.py:NAME`; None with
            `data`.
        options: of the task; of data `repeats` and `repeats_by`, how often a prompt comes by its pass rate; of
            preferences `pairs`, which pairs of a list are compared: extremes or all.
        data: path of a JSONL or Parquet file or a saved data set; of preferences several, with their weights.
        held_out: share of the data that is held out, or a path of its own.
        rewards: functions as `module:function`; they replace the task's own.
        hidden: functions as `module:function` that are measured and recorded like rewards and enter no loss; they
            replace the task's own.
        reward_timeout: seconds for one call.
        system_prompt: put before every prompt, for models with a chat template.
        split_seed: decides which of the data are held out; None takes the run's seed.
    """

    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    data: str | dict[str, float] | None = None
    held_out: float | str = 0.05
    rewards: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    reward_timeout: float = Field(60.0, gt=0)
    system_prompt: str | None = None
    split_seed: int | None = Field(None, ge=0)


class TrainSettings(Section):
    """The optimiser and the loop.

    Args:
        max_steps: batches at most.
        max_train_tokens: end with the step that brings the completion tokens drawn or read to this; None is no limit.
        max_train_seconds: end with the step that brings the time spent on training to this; None is no limit.
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        critic_learning_rate: of the heads; None takes the policy's.
        critic_warmup_steps: first batches, of which the heads alone learn; a method without heads has none.
        lr_scheduler: constant, linear or cosine, after `warmup_steps` of linear warm-up; its end is that of the limit
            which is nearest, in steps, tokens or seconds.
        lr_final: share of the learning rate at the end of a schedule.
        max_grad_norm: gradients are scaled down to this norm; None is off.
        num_minibatches: optimiser steps in one pass over a batch, each of whole groups.
        num_iterations: passes over a batch.
        batch_size: rows a step, for data from files.
        max_tokens: tokens of a micro-batch, padding included; None takes 16384, and on a CPU, where small ones are
            faster, 2048, unless the method has a part that would have to go forward twice.
        max_length: tokens of prompt and completion at most, for data from files; None is the model's context.
        precompute_reference: of comparisons, measure what models that do not move say of them once, before the first
            step, in place of once in every step.
        chunk_megabytes: memory for one copy of the logits; None takes what is fast: 8 on a CPU, 64 on an accelerator.
        dropout: train with the model's dropout.
        dynamic_sampling: replace tied groups by new prompts.
        max_rounds: rollouts at most for one batch.
        save_steps: steps between checkpoints; 0 saves only at the end.
        save_total_limit: checkpoints to keep.
        eval_steps: steps between evaluations on held-out prompts; 0 is none.
        log_completions: steps between two printed completions; 0 is none.
        generator: local, transformers, or auto.
        trackers: names that Accelerate's `log_with` knows, `tensorboard` say.
    """

    max_steps: int = Field(100, ge=1)
    max_train_tokens: int | None = Field(None, ge=1)
    max_train_seconds: float | None = Field(None, gt=0)
    learning_rate: float = Field(1e-6, ge=0, le=1e6)
    critic_learning_rate: float | None = Field(None, ge=0, le=1e6)
    critic_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_final: float = Field(0.0, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    num_minibatches: int = Field(1, ge=1)
    num_iterations: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    precompute_reference: bool = False
    chunk_megabytes: float | None = Field(None, gt=0)
    dropout: bool = False
    dynamic_sampling: bool = False
    max_rounds: int = Field(3, ge=1)
    save_steps: int = Field(100, ge=0)
    save_total_limit: int = Field(2, ge=1)
    eval_steps: int = Field(0, ge=0)
    log_completions: int = Field(25, ge=0)
    generator: Literal["auto", "local", "transformers"] = "auto"
    trackers: tuple[str, ...] = ()


class EvaluateSettings(Section):
    """Measuring on held-out prompts.

    Args:
        num_prompts: prompts at most.
        skip: held-out prompts that are passed over at the beginning.
        draw_seed: decides the completions that are drawn; None takes the run's seed.
        num_generations: completions a prompt.
        temperature, top_p: of the sampler.
        max_completion_length: tokens at most; None takes the rollout's.
        threshold: a completion is correct if its reward is above this.
        before, after: measure at the start and at the end of a run.
    """

    num_prompts: int = Field(256, ge=1)
    skip: int = Field(0, ge=0)
    draw_seed: int | None = Field(None, ge=0)
    num_generations: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = None
    max_completion_length: int | None = Field(None, ge=1)
    threshold: float = 0.5
    before: bool = True
    after: bool = True


MICRO_BATCH, MICRO_BATCH_CPU = 16384, 2048  # tokens; on a CPU what a layer writes should stay near the cache


def micro_batch_tokens(settings: TrainSettings, additive: bool, on_cpu: bool) -> int:
    """Tokens of a micro-batch: those asked for, or what is fast.

    >>> micro_batch_tokens(TrainSettings(), additive=True, on_cpu=True)
    2048
    """
    return settings.max_tokens or (MICRO_BATCH_CPU if on_cpu and additive else MICRO_BATCH)


def parse(section: type[Section], values: Mapping[str, Any], where: str) -> Any:
    """A section from plain values.

    Raises:
        ConfigError: an unknown key, with the nearest spelling, or a value that does not fit.
    """
    known = list(section.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key.{nearest(key, known)}", f"{where}.{key}", f"Allowed: {', '.join(known)}.")
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{problem(first)} (got {first.get('input')!r})", f"{where}.{key}") from None
