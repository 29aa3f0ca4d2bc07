"""Small runs for attacks: an untrained model of a few thousand parameters, four prompts, a reward that seldom ties."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

ALPHABET = "0123456789 >=+-*/()"
DATA = [{"prompt": f"{n} {n + 1} 3>{2 * n + 4}=", "answer": str(n)} for n in range(1, 9)]
SETTINGS: dict[str, Any] = {
    "data": DATA,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "num_generations": 2,
    "rollout.max_completion_length": 4,
    "task.held_out": 0.0,
    "rollout.num_prompts": 2,
    "evaluate.before": False,
    "evaluate.after": False,
    "train.log_completions": 0,
    "train.max_rounds": 1,
}


def length(completions, **_):
    """A reward that seldom ties."""
    return [float(sum(map(ord, c)) % 7) for c in completions]


def write_model(folder: Path) -> str:
    """The untrained model, saved."""
    from keel.models.load import save
    from keel.models.tiny import TinyConfig, build_tiny

    save(build_tiny(ALPHABET, TinyConfig(dim=16, layers=1, heads=2, feed_forward=32, context=48)), folder)
    return str(folder)


def start(model: Any, runs: Path, recipe: Any = "grpo", report: Callable | None = None, **settings: Any):
    """`keel.train` on the small model."""
    import keel

    given = {**SETTINGS, "reward": length, "name": "run", **settings}
    if recipe in ("sft", "dpo"):
        for key in ("num_generations", "rollout.max_completion_length", "rollout.num_prompts", "reward"):
            given.pop(key)
    given = {key: value for key, value in given.items() if value is not ...}
    return keel.train(recipe, model=model, runs=runs, report=report or (lambda *_: None), **given)
