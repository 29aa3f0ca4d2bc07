"""One DPO step on pairs of a file, against TRL's `DPOTrainer`."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measuring import Row
from benchmarks.models import build
from benchmarks.trainers import Way, clocked

PAIRS, PROMPT, LENGTH, BETA = 32, 12, 64, 0.1
MODELS = (("1M", 64), ("1M", 32768))


def comparisons(vocabulary: int) -> list[dict[str, str]]:
    """Pairs of completions of 63 words, which an end token makes 64, for prompts of twelve."""
    chance = torch.Generator().manual_seed(0)
    lengths = {"prompt": PROMPT, "chosen": LENGTH - 1, "rejected": LENGTH - 1}
    words = {key: torch.randint(3, vocabulary, (PAIRS, n), generator=chance).tolist() for key, n in lengths.items()}
    # the space before a completion keeps its first word from joining the last one of the prompt
    start = {"prompt": "", "chosen": " ", "rejected": " "}
    joined = {key: [start[key] + " ".join(f"w{i}" for i in row) for row in rows] for key, rows in words.items()}
    return [{key: joined[key][i] for key in joined} for i in range(PAIRS)]


def keel_way(shape: str, vocabulary: int, **settings: Any) -> Way:
    """Seconds of the step of one turn."""
    from keel.train.online import run
    from keel.train.session import build_session
    from keel.train.setup import prepare_setup

    model = build(shape, vocabulary)
    asked = {
        "beta": BETA,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "train.batch_size": PAIRS,
        "task.held_out": 0.0,
        **settings,
    }
    model.autocast = torch.bfloat16 if asked.pop("model.autocast", None) else None
    data = comparisons(vocabulary)
    setup = prepare_setup("dpo", model, None, None, data, None, seed=0, name=None, config=None, settings=asked)

    def way() -> list[float]:
        session = build_session(setup.config, setup.task, model, preferences=setup.preferences)
        run(session)
        return [metrics["step_time"] for metrics in session.metrics]

    return way


def trl_way(shape: str, vocabulary: int, **settings: Any) -> Way:
    """The same of TRL; it has its tokens before the step begins."""
    from trl import DPOConfig, DPOTrainer

    asked = {"per_device_train_batch_size": PAIRS, "beta": BETA, **settings}
    return clocked(DPOTrainer, DPOConfig, shape, vocabulary, comparisons(vocabulary), asked)


FP32 = {"bf16": False, "gradient_checkpointing": False}
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (keel_way, {}),
    "model.autocast=bfloat16": (keel_way, {"model.autocast": "bfloat16"}),
    "train.precompute_reference=true": (keel_way, {"train.precompute_reference": True}),
    "TRL at its defaults": (trl_way, {}),
    "TRL in fp32": (trl_way, FP32),
    "TRL in fp32, reference precomputed": (trl_way, {**FP32, "precompute_ref_log_probs": True}),
}
COMPARED = (  # ours, theirs, ratio to reach
    ("default", "TRL in fp32", 1.8),
    ("default", "TRL at its defaults", 1.5),
    ("model.autocast=bfloat16", "TRL at its defaults", 1.5),
    ("train.precompute_reference=true", "TRL in fp32, reference precomputed", 1.8),
    ("train.precompute_reference=true", "default", 1.2),
)
ACCURACY = {"default": "fp32", "model.autocast=bfloat16": "bf16 products, as TRL's default"}


def rows(shape: str | None = None, vocabulary: int | None = None, repeats: int = 5, threads: int = 2) -> Iterator[Row]:
    """Time of a step against TRL's, and of one whose reference is precomputed against one whose is not."""
    for name, size in MODELS:
        if shape in (None, name) and vocabulary in (None, size):
            yield from measure(name, size, repeats)


def measure(shape: str, vocabulary: int, repeats: int) -> Iterator[Row]:
    """One model."""
    command = f"python -m benchmarks pairs --shape {shape} --vocabulary {vocabulary}"
    work = f"DPO step, {PAIRS} pairs, {LENGTH} tokens, {shape} parameters, vocabulary {vocabulary}"
    ways = {name: make(shape, vocabulary, **settings) for name, (make, settings) in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            found = way()
            seconds[name] += found if turn else []
    spent = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    for ours, peer, goal in COMPARED:
        title = f"{work}: time, against {peer if peer.startswith('TRL') else 'a reference that runs in every step'}"
        accuracy = ACCURACY.get(ours, "fp32")
        yield Row(title, ours, spent[ours], spent[peer], "ms", spent[peer] / spent[ours], goal, accuracy, command)
