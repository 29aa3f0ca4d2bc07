"""Settings of TRL as settings of Keel."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keel.core.errors import ConfigError

# Values that change nothing here, or that only say how TRL itself runs, logs and uploads.
_IRRELEVANT = frozenset(
    [
        "output_dir",
        "do_train",
        "do_eval",
        "do_predict",
        "logging_dir",
        "logging_strategy",
        "logging_first_step",
        "logging_steps",
        "logging_nan_inf_filter",
        "save_strategy",
        "disable_tqdm",
        "report_to",
        "run_name",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "remove_unused_columns",
        "label_names",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "ddp_timeout",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "skip_memory_metrics",
        "include_num_input_tokens_seen",
        "shuffle_dataset",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_multimodal",
        "log_completions_hub_repo",
        "use_cpu",
        "no_cuda",
        "seed",
        "data_seed",
        "full_determinism",
        "project",
        "trackio_space_id",
        "per_device_eval_batch_size",
        "num_generations_eval",
        "dataset_num_proc",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "gradient_checkpointing_kwargs",
        "cache_implementation",
        "ds3_gather_for_generation",
        "pad_to_multiple_of",
        "restore_callback_states_from_checkpoint",
        "overwrite_output_dir",
        "ignore_data_skip",
        "resume_from_checkpoint",
        "activation_checkpointing",
        "include_for_metrics",
        "accelerator_config",
        "debug",
    ]
)
_TRAINING = {
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
}
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_LOSSES = {  # loss_type -> recipe and arguments
    "grpo": ("grpo", {"aggregation": "sequence_mean_token_mean"}),
    "dapo": ("grpo", {"aggregation": "token_mean"}),
    "bnpo": ("grpo", {"aggregation": "token_mean"}),
    "dr_grpo": ("dr_grpo", {}),
    "cispo": ("cispo", {}),
    "sapo": ("sapo", {}),
    "vespo": ("vespo", {}),
    "luspo": ("luspo", {}),
}
_SHAPES = {  # settings of a loss by name: TRL's and Keel's
    "sapo": {"sapo_temperature_pos": "tau", "sapo_temperature_neg": "tau_negative"},
    "vespo": {
        "vespo_k_pos": "k",
        "vespo_lambda_pos": "lam",
        "vespo_k_neg": "k_negative",
        "vespo_lambda_neg": "lam_negative",
    },
}


@dataclass(frozen=True)
class Translation:
    """A TRL configuration in Keel's words.

    `keel.train(t.recipe, model=..., data=..., reward=..., seed=t.seed, **t.settings)` runs it.

    Args:
        recipe: name of the recipe.
        settings: recipe arguments and dotted paths.
        seed: of the run.
        without_counterpart: settings that differ from TRL's defaults and that Keel has no place for, with the reason.
    """

    recipe: str
    settings: dict[str, Any]
    seed: int
    without_counterpart: dict[str, str] = field(default_factory=dict)


def from_trl(config: Any) -> Translation:
    """Translate a TRL `GRPOConfig`, `RLOOConfig`, `SFTConfig` or `DPOConfig`.

    Args:
        config: the object. A mapping of settings counts as a GRPOConfig's, TRL's own defaults filled in.

    Returns:
        The translation; what could not be translated is named in `without_counterpart`, never dropped in silence.

    Raises:
        ConfigError: it is none of these.
    """
    kind, values, defaults = _read(config)
    given = dict(values)
    out: dict[str, Any] = {}
    lost: dict[str, str] = {}
    reader = _Reader(given, lost)
    recipe = {"grpo": _grpo, "rloo": _rloo, "sft": _sft, "dpo": _dpo}[kind](reader, out)
    _training(reader, out, kind)
    seed = int(reader.take("seed", 42))
    for name, value in given.items():
        if name in reader.read or name in _IRRELEVANT or name.startswith("_"):
            continue
        if name in defaults and value == defaults[name]:
            continue
        lost.setdefault(name, "Keel has no such setting")
    return Translation(recipe, out, seed, lost)


class _Reader:
    """Takes settings and remembers which were looked at."""

    def __init__(self, values: Mapping[str, Any], lost: dict[str, str]):
        self.values, self.lost, self.read = values, lost, set[str]()

    def take(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name, default)
        return default if value is None else value

    def lose(self, name: str, reason: str) -> None:
        self.lost[name] = reason


def _read(config: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    if isinstance(config, Mapping):
        return "grpo", dict(config), {}
    name = type(config).__name__
    kinds = {"GRPOConfig": "grpo", "RLOOConfig": "rloo", "SFTConfig": "sft", "DPOConfig": "dpo"}
    kind = next((kinds[c.__name__] for c in type(config).__mro__ if c.__name__ in kinds), None)
    if kind is None or not dataclasses.is_dataclass(config):
        raise ConfigError(f"a {name} cannot be translated", "from_trl", f"Give one of {', '.join(kinds)}.")
    fields = {f.name: f for f in dataclasses.fields(config)}
    defaults = {n: f.default for n, f in fields.items() if f.default is not dataclasses.MISSING}
    return kind, {n: getattr(config, n) for n in fields}, defaults


def _rollout(reader: _Reader, out: dict[str, Any], group: int) -> int:
    """Rollout settings; returns the optimiser steps of one pass over a batch."""
    accumulation = int(reader.take("gradient_accumulation_steps", 1))
    per_device = int(reader.take("per_device_train_batch_size", 8))
    steps = reader.take("steps_per_generation")
    batch = reader.take("generation_batch_size")
    steps = int(steps if steps is not None else batch // per_device if batch is not None else accumulation)
    rows = int(batch if batch is not None else per_device * steps)
    out["rollout.num_prompts"] = max(1, rows // group)
    out["rollout.num_generations"] = group
    out["rollout.temperature"] = float(reader.take("temperature", 1.0))
    top_p, top_k, min_p = reader.take("top_p", 1.0), reader.take("top_k", 0), reader.take("min_p")
    out |= {"rollout.top_p": top_p} if top_p < 1 else {}
    out |= {"rollout.top_k": top_k} if top_k else {}
    out |= {"rollout.min_p": min_p} if min_p else {}
    minibatches = max(1, steps // accumulation)
    if minibatches > out["rollout.num_prompts"]:
        what = f"{minibatches} updates of {out['rollout.num_prompts']} groups: Keel keeps a group whole"
        reader.lose("steps_per_generation", f"{what}; rollout.num_prompts can be raised")
        minibatches = out["rollout.num_prompts"]
    if minibatches > 1:
        out["train.num_minibatches"] = minibatches
    iterations = int(reader.take("num_iterations", 1))
    if iterations > 1:
        out["train.num_iterations"] = iterations
    return minibatches * iterations


def _grpo(reader: _Reader, out: dict[str, Any]) -> str:
    loss = str(reader.take("loss_type", "dapo"))
    recipe, arguments = _LOSSES.get(loss, ("grpo", {}))
    if loss not in _LOSSES:
        reader.lose("loss_type", f"'{loss}' is not among Keel's recipes; grpo stands in for it")
    if loss == "bnpo":
        reader.lose("loss_type", "bnpo divides by the tokens of each micro-batch; Keel by those of the whole step")
    out |= arguments
    beta = float(reader.take("beta", 0.0))
    corrected = bool(reader.take("use_bias_correction_kl", True))
    if beta:
        out |= {"beta": beta, "kl": "k3_ratio" if corrected else "k3"}
    out["max_completion_length"] = int(reader.take("max_completion_length", 512))
    out["scale_rewards"] = _scaling(reader.take("scale_rewards", "group"))
    epsilon, high = reader.take("epsilon", 0.2), reader.take("epsilon_high")
    level = reader.take("importance_sampling_level", "token")
    delta = reader.take("delta")
    if delta is not None and recipe == "grpo":
        recipe, out["delta"] = "grpo_two_sided", float(delta)
    elif delta is not None:
        reader.lose("delta", f"no two-sided clip in {recipe}")
    for theirs, ours in _SHAPES.get(recipe, {}).items():
        if (value := reader.take(theirs)) is not None:
            out[ours] = float(value)
    if recipe == "cispo":
        out["high"] = float(high if high is not None else epsilon)
    elif recipe not in _SHAPES:  # those clip nothing
        out["epsilon"] = float(epsilon)
        out |= {} if high is None else {"epsilon_high": float(high)}
        if level == "sequence":
            out["surrogate.level"] = "sequence"
    out |= {"entropy_coef": float(c)} if (c := reader.take("entropy_coef", 0.0)) else {}
    if reader.take("use_vllm", False) and reader.take("vllm_importance_sampling_correction", True):
        mode = reader.take("vllm_importance_sampling_mode", "sequence_mask")
        cap = float(reader.take("vllm_importance_sampling_clip_max", 3.0))
        out["importance_cap"] = cap
        if mode != "token_truncate":
            reader.lose(
                "vllm_importance_sampling_mode", f"'{mode}' is not there; weights are truncated per token at {cap:g}"
            )
    for name, reason in {
        "sync_ref_model": "no moving reference in this recipe; models={'ref': EMA(...)} makes one",
        "mask_truncated_completions": "no mask of truncated completions",
        "top_entropy_quantile": "no entropy mask",
        "off_policy_mask_threshold": "no off-policy mask",
        "reward_weights": "give transforms={'sum': WeightedSum(weights)}",
        "use_adaptive_entropy": "no adaptive entropy coefficient",
    }.items():
        if reader.take(name) not in (None, False, 1.0):
            reader.lose(name, reason)
    _rollout(reader, out, int(reader.take("num_generations", 8)))
    return recipe


def _rloo(reader: _Reader, out: dict[str, Any]) -> str:
    out |= {"beta": float(reader.take("beta", 0.05)), "epsilon": float(reader.take("epsilon", 0.2))}
    out["rollout.max_completion_length"] = int(reader.take("max_completion_length", 512))
    if reader.take("normalize_advantages", False):
        reader.lose("normalize_advantages", "no normalisation in rloo; advantage={'whiten': Whiten()} adds it")
    _rollout(reader, out, int(reader.take("num_generations", 2)))
    return "rloo"


def _sft(reader: _Reader, out: dict[str, Any]) -> str:
    accumulation = int(reader.take("gradient_accumulation_steps", 1))
    out["train.batch_size"] = int(reader.take("per_device_train_batch_size", 8)) * accumulation
    if (length := reader.take("max_length")) is not None:
        out["train.max_length"] = int(length)
    if reader.take("packing", False):
        reader.lose("packing", "rows are bucketed by length, not packed")
    return "sft"


def _dpo(reader: _Reader, out: dict[str, Any]) -> str:
    _sft(reader, out)
    for name in (
        "beta",
        "loss_type",
        "label_smoothing",
        "f_divergence_type",
        "loss_weights",
        "ld_alpha",
        "use_weighting",
        "precompute_ref_log_probs",
    ):
        reader.take(name)
        reader.lose(name, "this version has no pair losses")
    return "sft"


def _training(reader: _Reader, out: dict[str, Any], kind: str) -> None:
    rates = {"grpo": 1e-6, "rloo": 1e-6, "sft": 2e-5, "dpo": 1e-6}
    for theirs, ours in _TRAINING.items():
        value = reader.take(theirs, rates[kind] if theirs == "learning_rate" else None)
        if value is not None:
            out[f"train.{ours}"] = float(value)
    schedule = str(
        getattr(reader.take("lr_scheduler_type", "linear"), "value", reader.take("lr_scheduler_type", "linear"))
    )
    if schedule in _SCHEDULES:
        out["train.lr_scheduler"] = _SCHEDULES[schedule]
    else:
        reader.lose("lr_scheduler_type", f"no schedule '{schedule}'; one of constant, linear, cosine")
    updates = out.get("train.num_minibatches", 1) * out.get("train.num_iterations", 1)
    steps = int(reader.take("max_steps", -1))
    if steps > 0:
        out["train.max_steps"] = max(1, steps // updates)
    elif kind in ("grpo", "rloo", "sft", "dpo"):
        reader.lose("num_train_epochs", "Keel counts batches: give train.max_steps")
        reader.take("num_train_epochs")
    warmup = float(reader.take("warmup_steps", 0) or 0)
    if warmup >= 1:
        out["train.warmup_steps"] = int(warmup)
    elif warmup > 0 and steps > 0:
        out["train.warmup_steps"] = int(warmup * steps)
    if (save := reader.take("save_steps")) is not None and float(save) >= 1:
        out["train.save_steps"] = max(1, int(save) // updates)
    if (limit := reader.take("save_total_limit")) is not None:
        out["train.save_total_limit"] = int(limit)
    if reader.take("gradient_checkpointing", False):
        out["model.gradient_checkpointing"] = True
    if reader.take("bf16", False):
        out["model.autocast"] = "bfloat16"
    elif reader.take("fp16", False):
        out["model.autocast"] = "float16"
    if not reader.take("disable_dropout", kind == "dpo"):
        out["train.dropout"] = True


def _scaling(value: Any) -> str:
    return {True: "group", False: "none"}[value] if isinstance(value, bool) else str(value)
