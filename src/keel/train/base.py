"""The built-in model, trained by Keel on a task's own solutions, and cached."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from keel.core.errors import ConfigError
from keel.models.load import save
from keel.models.tiny import TinyConfig, build_tiny
from keel.recipes.registry import recipe_named
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Task
from keel.train.configuration import Configuration
from keel.train.online import run
from keel.train.session import Reporter, build_session, silent
from keel.train.settings import EvaluateSettings, ModelSettings, TaskSettings, TrainSettings

VERSION = 1  # raise it when the training of the base changes


@dataclass(frozen=True)
class BaseRecipe:
    """How the built-in model is made; its hash names the folder in the cache.

    Args:
        shape: of the model.
        steps, batch_size, learning_rate, warmup_steps: of the supervised training, cosine to a tenth.
        seed: of the weights and of the order of the data; it is the base's own, whatever the seed of a run.
    """

    shape: TinyConfig = TinyConfig()
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    seed: int = 0


def cache_directory() -> Path:
    """`$KEEL_CACHE`, or `~/.cache/keel`."""
    return Path(os.environ.get("KEEL_CACHE") or Path.home() / ".cache" / "keel").expanduser()


def ensure_base(task: Task, how: BaseRecipe | None = None, report: Reporter = silent) -> Path:
    """The folder of the built-in model for a task, trained first if it is not in the cache.

    Raises:
        ConfigError: the task states no alphabet, so that the built-in model cannot read it.
    """
    how = how or base_recipe(task)
    if not task.characters:
        raise ConfigError(
            f"the built-in model does not know the alphabet of task '{task.name}'",
            "model",
            "Give --model with a folder or a hub name.",
        )
    facts = {
        "version": VERSION,
        "task": task.name,
        "characters": task.characters,
        "data": _held_out(task),
        **asdict(how),
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    final = cache_directory() / f"tiny-{task.name}-{digest}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.parent / f".{final.name}.lock"):
        if final.is_dir():
            return final
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            save(train_base(task, how, report), temporary)
            (temporary / "base.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            os.rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def base_recipe(task: Task) -> BaseRecipe:
    """The usual one, or the settings that the task itself has under `base_recipe`."""
    own = dict(getattr(task, "base_recipe", None) or {})
    return BaseRecipe(**{**own, "shape": TinyConfig(**own.get("shape", {}))})


def _held_out(task: Task) -> str:
    """Digest of what is held out, so that no cached base has learnt it; of episodes also of what they look like."""
    known: list = [example.prompt for example in task.held_out]
    if isinstance(task, InteractiveTask):
        known += [[e.columns, task.demonstration(e, 0)] for e in task.held_out]
    prompts = json.dumps(known)
    return hashlib.blake2b(prompts.encode(), digest_size=8).hexdigest()


def train_base(task: Task, how: BaseRecipe, report: Reporter = silent):
    """The built-in model after supervised training on the task's solutions."""
    assert task.characters is not None
    policy = build_tiny(task.characters, how.shape, how.seed)
    train = TrainSettings(
        max_steps=how.steps,
        batch_size=how.batch_size,
        learning_rate=how.learning_rate,
        warmup_steps=how.warmup_steps,
        lr_scheduler="cosine",
        lr_final=0.1,
        log_completions=0,
    )
    config = Configuration(
        recipe="sft",
        arguments={},
        method=recipe_named("sft")(),
        model=ModelSettings(),
        task=TaskSettings(name=task.name),
        train=train,
        evaluate=EvaluateSettings(before=False, after=False),
        seed=how.seed,
        name="base",
    )
    session = build_session(config, task, policy)
    session.report = report
    report("phase", {"name": "base", "steps": how.steps, "text": f"training the built-in model on {task.name}"})
    run(session)
    return policy


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
