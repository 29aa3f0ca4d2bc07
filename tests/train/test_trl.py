"""TRL's settings in Keel's words: numbers worked out by hand, and nothing dropped in silence."""

import dataclasses
import enum

import pytest

import keel
from keel.core.errors import ConfigError


class Schedule(enum.Enum):
    """As transformers has it: an enum with a string value."""

    LINEAR = "linear"
    POLYNOMIAL = "polynomial"


@dataclasses.dataclass
class GRPOConfig:
    """The fields of TRL's class that the tests vary, with its defaults."""

    output_dir: str = "out"
    learning_rate: float = 1e-6
    lr_scheduler_type: Schedule = Schedule.LINEAR
    warmup_steps: float = 0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_generations: int = 8
    num_iterations: int = 1
    max_steps: int = -1
    num_train_epochs: float = 3.0
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    importance_sampling_level: str = "token"
    use_vllm: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    disable_dropout: bool = False
    seed: int = 42
    repetition_penalty: float = 1.0
    logging_steps: int = 10


@dataclasses.dataclass
class DPOConfig:
    """The same for preference optimisation."""

    beta: float = 0.1
    loss_type: list = dataclasses.field(default_factory=lambda: ["sigmoid"])
    learning_rate: float = 1e-6


def test_defaults():
    found = keel.from_trl(GRPOConfig(max_steps=100))
    assert found.recipe == "grpo" and found.seed == 42 and found.without_counterpart == {}
    assert found.settings["aggregation"] == "token_mean"
    assert found.settings["rollout.num_prompts"] == 1 and found.settings["rollout.num_generations"] == 8
    assert found.settings["train.max_steps"] == 100 and found.settings["train.dropout"] is True
    assert "beta" not in found.settings


def test_batches_count_generations():
    config = GRPOConfig(
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_generations=4,
        num_iterations=3,
        max_steps=240,
    )
    settings = keel.from_trl(config).settings
    assert settings["rollout.num_prompts"] == 16 * 8 // 4
    assert settings["train.num_minibatches"] == 8 // 2 and settings["train.num_iterations"] == 3
    assert settings["train.max_steps"] == 240 // (4 * 3)


@pytest.mark.parametrize(
    ("given", "recipe", "expected"),
    [
        ({"beta": 0.04}, "grpo", {"beta": 0.04, "kl": "k3_ratio"}),
        ({"beta": 0.04, "use_bias_correction_kl": False}, "grpo", {"kl": "k3"}),
        ({"loss_type": "grpo"}, "grpo", {"aggregation": "sequence_mean_token_mean"}),
        (
            {"loss_type": "dr_grpo", "scale_rewards": "none"},
            "dr_grpo",
            {"scale_rewards": "none", "max_completion_length": 512},
        ),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo", {"high": 5.0}),
        (
            {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
            "grpo",
            {"surrogate.level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        ),
        (
            {"bf16": True, "gradient_checkpointing": True, "disable_dropout": True},
            "grpo",
            {"model.autocast": "bfloat16", "model.gradient_checkpointing": True},
        ),
        ({"warmup_steps": 0.1, "max_steps": 50}, "grpo", {"train.warmup_steps": 5}),
        ({"delta": 2.0, "epsilon_high": 0.28}, "grpo_two_sided", {"delta": 2.0, "epsilon_high": 0.28}),
        ({"loss_type": "sapo", "sapo_temperature_neg": 1.1}, "sapo", {"tau_negative": 1.1, "epsilon": None}),
        ({"loss_type": "vespo", "vespo_k_pos": 1.5}, "vespo", {"k": 1.5}),
        ({"loss_type": "luspo"}, "luspo", {"epsilon": 0.2}),
    ],
)
def test_settings(given, recipe, expected):
    found = keel.from_trl(GRPOConfig(**given))
    assert found.recipe == recipe
    assert {key: found.settings.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        ({"delta": 2.0, "loss_type": "cispo"}, "delta"),
        ({"loss_type": "mipo"}, "loss_type"),
        ({"lr_scheduler_type": Schedule.POLYNOMIAL}, "lr_scheduler_type"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"use_vllm": True}, "vllm_importance_sampling_mode"),
        ({"max_steps": -1}, "num_train_epochs"),
    ],
)
def test_what_has_no_counterpart_is_named(given, lost):
    found = keel.from_trl(GRPOConfig(**{"max_steps": 10, **given}))
    assert lost in found.without_counterpart and len(found.without_counterpart[lost]) > 10


def test_pair_losses_are_named_as_missing():
    found = keel.from_trl(DPOConfig())
    assert {"beta", "loss_type"} <= set(found.without_counterpart)


def test_other_objects_are_refused():
    with pytest.raises(ConfigError, match="GRPOConfig"):
        keel.from_trl(object())


def test_a_translation_runs(train):
    found = keel.from_trl(
        GRPOConfig(
            max_steps=4,
            per_device_train_batch_size=4,
            num_generations=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            beta=0.1,
            learning_rate=1e-3,
            max_completion_length=11,
        )
    )
    run = train(
        found.recipe,
        name="translated",
        seed=found.seed,
        **{
            **found.settings,
            "max_steps": found.settings["train.max_steps"],
            "learning_rate": found.settings["train.learning_rate"],
        },
    )
    assert run.summary["steps"] == 2 and run.metrics["num_rows"][0][1] == 16
