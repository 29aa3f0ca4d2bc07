"""One GRPO step, from prompts to updated weights, against TRL's `GRPOTrainer`."""

import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measuring import PeakMemory, Row, in_process
from benchmarks.models import build
from benchmarks.trainers import Way, clocked

PROMPTS, GROUP, PROMPT, LENGTH, BETA = 16, 8, 12, 32, 0.04
MODELS = (("1M", 64), ("1M", 32768))


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How often the commonest letter of random words occurs: cheap, and different within a group."""
    return [text.count("1") / 10 for text in completions]


def questions(vocabulary: int) -> list[dict[str, str]]:
    """Prompts of twelve words."""
    chance = torch.Generator().manual_seed(0)
    words = torch.randint(3, vocabulary, (256, PROMPT), generator=chance).tolist()
    return [{"prompt": " ".join(f"w{i}" for i in row)} for row in words]


def keel_way(shape: str, vocabulary: int, **settings: Any) -> Way:
    """Seconds of the step of one turn."""
    from keel.train.online import run
    from keel.train.session import build_session
    from keel.train.setup import prepare_setup

    model = build(shape, vocabulary)
    model.eos_ids = ()
    asked = {
        "beta": BETA,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "rollout.num_prompts": PROMPTS,
        "rollout.num_generations": GROUP,
        "rollout.max_completion_length": LENGTH,
        **settings,
    }
    model.autocast = torch.bfloat16 if asked.pop("model.autocast", None) else None
    setup = prepare_setup(
        "grpo", model, None, None, questions(vocabulary), reward, seed=0, name=None, config=None, settings=asked
    )

    def way() -> list[float]:
        session = build_session(setup.config, setup.task, model, setup.rewards)
        run(session)
        return [metrics["step_time"] for metrics in session.metrics]

    return way


def trl_way(shape: str, vocabulary: int, **settings: Any) -> Way:
    """The same of TRL."""
    from trl import GRPOConfig, GRPOTrainer

    asked = {
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": LENGTH,
        "generation_kwargs": {"min_new_tokens": LENGTH},
        "beta": BETA,
        "log_completions": False,
        **settings,
    }
    return clocked(GRPOTrainer, GRPOConfig, shape, vocabulary, questions(vocabulary), asked, reward_funcs=reward)


WAYS: dict[str, tuple[Callable[..., Way], dict[str, Any]]] = {
    "default": (keel_way, {}),
    "model.autocast=bfloat16": (keel_way, {"model.autocast": "bfloat16"}),
    "train.max_tokens=1024": (keel_way, {"train.max_tokens": 1024}),
    "TRL at its defaults": (trl_way, {}),
    "TRL in fp32": (trl_way, {"bf16": False, "gradient_checkpointing": False}),
}
ACCURACY = {"default": "fp32", "model.autocast=bfloat16": "bf16 products, as TRL's default"}


def rows(shape: str | None = None, vocabulary: int | None = None, repeats: int = 5, threads: int = 2) -> Iterator[Row]:
    """Time against TRL at its defaults and in fp32; memory against its defaults."""
    for name, size in MODELS:
        if shape in (None, name) and vocabulary in (None, size):
            yield from measure(name, size, repeats, threads)


def measure(shape: str, vocabulary: int, repeats: int, threads: int) -> Iterator[Row]:
    """One model."""
    command = f"python -m benchmarks step --shape {shape} --vocabulary {vocabulary}"
    work = f"GRPO step, {PROMPTS} x {GROUP}, {LENGTH} tokens, beta {BETA}, {shape} parameters, vocabulary {vocabulary}"
    timed = [name for name in WAYS if name != "train.max_tokens=1024"]
    ways = {name: WAYS[name][0](shape, vocabulary, **WAYS[name][1]) for name in timed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            found = way()
            seconds[name] += found if turn else []
    spent = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    for ours, peer, goal in (
        ("default", "TRL at its defaults", 2.0),
        ("model.autocast=bfloat16", "TRL at its defaults", 2.0),
        ("default", "TRL in fp32", 1.8),
    ):
        title = f"{work}: time, against {peer}"
        ratio = spent[peer] / spent[ours]
        yield Row(title, ours, spent[ours], spent[peer], "ms", ratio, goal, ACCURACY[ours], command)
    code = "from benchmarks.step import memory; memory({!r}, {!r}, {})"
    asked = ("default", "train.max_tokens=1024", "TRL at its defaults")
    mega = {name: in_process(code.format(name, shape, vocabulary), threads)["extra"] / 2**20 for name in asked}
    theirs = mega[asked[-1]]
    for ours in asked[:2]:
        title = f"{work}: peak memory of the step, against TRL at its defaults"
        yield Row(title, ours, mega[ours], theirs, "MiB", theirs / mega[ours], 1.0, "fp32", command)


def memory(name: str, shape: str, vocabulary: int) -> None:
    """Peak of a turn, beyond the trainer that stands ready."""
    make, settings = WAYS[name]
    way = make(shape, vocabulary, **settings)
    with PeakMemory() as peak:
        way()
    print(json.dumps({"extra": peak.extra}))
