"""From what was asked for to cells: the configuration of every arm and seed, and the key by which a cell is known."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import keel
from keel.compare.outcomes import Arm, Budget
from keel.core.errors import ConfigError, UserError
from keel.recipes.registry import recipe_named
from keel.tasks.data import DataTask
from keel.train.configuration import TINY, Configuration
from keel.train.session import Reporter, silent
from keel.train.setup import Setup, prepare_setup

NO_LIMIT = 1_000_000  # steps, where tokens or seconds end a cell
SAVES = 5  # checkpoints of a cell that is counted in steps; what a kill loses is done again
SAVE_STEPS = 20  # between two of one that is not
TRIALS_FROM = 1000  # seeds of the trials that choose a strength; those that are compared are below
# What changes no number of a cell; all else of its configuration is in its key.
WITHOUT_EFFECT = ("trackers", "log_completions", "save_steps", "save_total_limit")
_BUDGET_KEYS = ("max_steps", "max_train_tokens", "max_train_seconds")
_PATHS = ("path", "paths", "data", "held_out")  # keys under which the name of a file decides what is computed


@dataclass(frozen=True)
class Conditions:
    """What all arms of a comparison share.

    Args:
        budget: of every cell.
        task: its name; None with `data`, or for the usual one.
        model: `tiny`, a folder, or a hub name; None is `tiny`.
        data: path of one's own data, in place of a task.
        rewards: functions as `module:function`.
        settings: arguments and dotted paths, sorted.
    """

    budget: Budget
    task: str | None = None
    model: str | None = None
    data: str | None = None
    rewards: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "budget": str(self.budget),
            "task": self.task,
            "model": self.model,
            "data": self.data,
            "rewards": list(self.rewards),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm with one seed: an ordinary run, known by what decides its numbers.

    Args:
        arm: what is run.
        seed: with which seed.
        config: complete; its name is that of the run.
        key: digest of the configuration, of the files it reads, and of Keel's version.
        files: digest of those files.
    """

    arm: Arm
    seed: int
    config: Configuration
    key: str
    files: str = ""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.name

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.arm.name}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Plan:
    """What stands before the first cell runs.

    Args:
        arms: in the order in which they are shown; the first is the baseline.
        setups: of each arm by name, at seed 0.
        conditions: what they share.
        task, model: as they are stored.
        notes: what a reader of the results should know.
        digests: of the files that each arm reads, as they become known.
    """

    arms: tuple[Arm, ...]
    setups: Mapping[str, Setup]
    conditions: Conditions
    task: str
    model: str
    notes: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)

    def cells(self, seeds: Sequence[int]) -> list[Cell]:
        """All arms of the first seed, then of the second, so that what is finished can be compared."""
        return [self.cell(arm, seed) for seed in seeds for arm in self.arms]

    def cell(self, arm: Arm, seed: int) -> Cell:
        """One of them."""
        config = replace(self.setups[arm.name].config, seed=seed)
        if arm.name not in self.digests:
            self.digests[arm.name] = files_digest(self.setups[arm.name])
        key = key_of(config, self.digests[arm.name])
        name = f"cell-{_folder_name(arm.recipe)}-{seed}-{key}"
        return Cell(arm, seed, replace(config, name=name), key, self.digests[arm.name])


def plan(arms: Sequence[Arm], conditions: Conditions, skip: int = 0, report: Reporter = silent) -> Plan:
    """Resolve all arms under the same conditions.

    Args:
        arms: the first is the baseline.
        conditions: what they share.
        skip: held-out prompts that are passed over, because others are compared on them.
        report: called with (event, facts), while the built-in model is trained say.

    Raises:
        UserError: an arm cannot be resolved, two are the same, or they cannot be compared.
    """
    _check_kinds(arms, conditions.data)
    given = _shared(conditions, skip)
    setups = {arm.name: _setup(arm, conditions, given, report) for arm in arms}
    lengths = {name: _completion_length(setup) for name, setup in setups.items()}
    if len(set(lengths.values())) > 1 and "evaluate.max_completion_length" not in given:
        given["evaluate.max_completion_length"] = max(lengths.values())
        setups = {arm.name: _setup(arm, conditions, given, report) for arm in arms}
    _check_comparable(setups)
    _check_budget(setups, conditions.budget)
    _check_different(setups)
    first = next(iter(setups.values())).config
    task = first.task.name or str(first.task.data)
    return Plan(tuple(arms), setups, conditions, task, first.model.path, tuple(_notes(setups, conditions.budget)))


def key_of(config: Configuration, files: str = "") -> str:
    """Digest of what decides the numbers of a run.

    Args:
        config: complete; name, trackers and what is logged or saved have no part in it.
        files: digest of the files that it names.
    """
    data = config.to_dict()
    del data["name"]
    for key in WITHOUT_EFFECT:
        del data["train"][key]
    return digest([keel.__version__, files, data], 6)


def digest(data: Any, size: int = 8) -> str:
    """Of plain data, as hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


# -- settings that all cells have ------------------------------------------------------------------------------------


def _shared(conditions: Conditions, skip: int) -> dict[str, Any]:
    own = dict(conditions.settings)
    for key in own:
        if key.removeprefix("train.") in _BUDGET_KEYS:
            raise ConfigError("is what the budget says", f"--set {key}", "For example --budget 100steps.")
    if own.get("evaluate.after") is False:
        raise ConfigError("without it there is nothing to compare", "--set evaluate.after")
    budget = conditions.budget
    steps = int(budget.amount) if budget.unit == "steps" else NO_LIMIT
    if steps < 1 or (budget.unit == "steps" and steps != budget.amount):
        raise ConfigError(f"no whole number of steps: {budget.amount:g}", "--budget", "For example 100steps.")
    return {
        "task.split_seed": 0,
        "evaluate.draw_seed": 0,
        "train.save_steps": max(1, steps // SAVES) if budget.unit == "steps" else SAVE_STEPS,
        "train.save_total_limit": 1,
        **own,
        "evaluate.skip": own.get("evaluate.skip", 0) + skip,
        "train.max_steps": steps,
        **({"train.max_train_tokens": int(budget.amount)} if budget.unit == "tokens" else {}),
        **({"train.max_train_seconds": budget.amount} if budget.unit == "seconds" else {}),
    }


def _setup(arm: Arm, conditions: Conditions, given: Mapping[str, Any], report: Reporter) -> Setup:
    try:
        return prepare_setup(
            arm.recipe,
            conditions.model,
            None,
            conditions.task,
            conditions.data,
            conditions.rewards or None,
            seed=0,
            name="cell",
            config=None,
            settings={**given, **dict(arm.settings)},
            report=report,
        )
    except UserError as error:
        where = f"{arm.name}: {error.where}" if error.where else arm.name
        raise type(error)(error.what, where, error.fix) from error


def _completion_length(setup: Setup) -> int:
    rollout = setup.config.method.rollout
    return setup.task.max_completion_length if rollout is None else rollout.max_completion_length


# -- what cannot be compared -----------------------------------------------------------------------------------------

_LEARNS_FROM = {
    "online": "draws its own completions",
    "supervised": "learns from given completions",
    "pairs": "learns from comparisons",
    "distillation": "learns from a teacher",
    "reward": "trains a reward model",
    "sampling": "trains nothing",
}


def _check_kinds(arms: Sequence[Arm], data: str | None) -> None:
    """Before anything is loaded: every arm must leave a policy, and data of one's own must serve all."""
    kinds = {arm.name: kind for arm in arms if (kind := _kind(arm)) is not None}
    for name, kind in kinds.items():
        if kind in ("reward", "sampling"):
            raise ConfigError(f"it {_LEARNS_FROM[kind]}, so there is no policy to measure on held-out prompts", name)
        first = next(iter(kinds))
        if data is not None and kind != kinds[first]:
            what = f"{first} {_LEARNS_FROM[kinds[first]]} and {name} {_LEARNS_FROM[kind]}: they need different data"
            fix = "Compare those of one kind, or on a task that has data of each."
            raise ConfigError(what, "compare", fix)


def _kind(arm: Arm) -> str | None:
    """Where the rows of an arm come from; None where the recipe needs more to say it."""
    try:
        return recipe_named(arm.recipe)().kind
    except UserError:
        return None


def _check_comparable(setups: Mapping[str, Setup]) -> None:
    for name, setup in setups.items():
        config, task = setup.config, setup.task
        if len(task.held_out) <= config.evaluate.skip:
            fix = "Set task.held_out to a share or to a file of its own."
            raise ConfigError("no prompt is held out to compare on", config.task.name or str(config.task.data), fix)
        answers = len(task.train) and "answer" in task.train[0].columns
        if not (setup.rewards or config.task.rewards or task.rewards or config.method.rewards or answers):
            what = "there is no reward to compare by: the data have no column `answer`"
            raise ConfigError(what, name, "Give --reward module:function.")


def _check_budget(setups: Mapping[str, Setup], budget: Budget) -> None:
    """A step of so many completions takes at least as many tokens."""
    for name, setup in setups.items():
        if budget.unit == "tokens" and budget.amount < (least := completions_a_step(setup.config)):
            what = f"{name} draws or reads {least:,} completions in a step, which is more than {budget}"
            raise ConfigError(what, "--budget", "Give more, or lower rollout.num_prompts or train.batch_size.")


def completions_a_step(config: Configuration) -> int:
    """Completions that a step draws or reads, of prompts with one answer each where they are compared."""
    rollout = config.method.rollout
    return config.train.batch_size if rollout is None else rollout.num_prompts * rollout.num_generations


def _check_different(setups: Mapping[str, Setup]) -> None:
    known: dict[str, str] = {}
    for name, setup in setups.items():
        same = known.setdefault(digest([setup.config.recipe, setup.config.to_dict()["method"], _sections(setup)]), name)
        if same != name:
            raise ConfigError(f"'{name}' and '{same}' are the same", "compare", "Leave one of them out.")


def _sections(setup: Setup) -> dict[str, Any]:
    """The sections of a configuration."""
    data = setup.config.to_dict()
    return {key: data[key] for key in ("model", "task", "train", "evaluate")}


def _notes(setups: Mapping[str, Setup], budget: Budget) -> list[str]:
    found = []
    sizes = {name: completions_a_step(setup.config) for name, setup in setups.items()}
    if budget.unit == "steps" and len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        found.append(f"a step is not the same for all: completions in a step are {said}; a budget of tokens is")
    kinds = {name: setup.config.method.kind for name, setup in setups.items()}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{name} {_LEARNS_FROM[kind]}" for name, kind in kinds.items())
        found.append(f"they learn from different data, so that a difference may be that of the data: {said}")
    schedules = {setup.config.train.lr_scheduler for setup in setups.values()}
    if budget.unit == "seconds" and schedules != {"constant"}:
        found.append("the learning rate follows the seconds that are spent, so that no two runs are bit for bit alike")
    return found


# -- files that a configuration names --------------------------------------------------------------------------------


def files_digest(setup: Setup) -> str:
    """The digest of all files that decide the numbers of a run, by their contents."""
    data = setup.config.to_dict()
    places = {str(path): path for path in _named_files(data)}
    if isinstance(setup.source, str | Path) and Path(setup.source).exists():
        label = TINY if setup.config.model.path == TINY else str(setup.source)
        places[label] = Path(setup.source)
    if isinstance(setup.task, DataTask) and isinstance(setup.config.task.data, str):
        places[setup.config.task.data] = Path(setup.config.task.data)
    return digest({label: _contents(path) for label, path in places.items() if path.exists()})


def _named_files(data: Any, key: str = "") -> list[Path]:
    """Paths under the keys that hold paths, files of `file.py:NAME`, and modules beside the current directory."""
    if isinstance(data, Mapping):
        inner = [path for name, value in data.items() for path in _named_files(value, str(name))]
        return inner + ([Path(name) for name in data if Path(str(name)).exists()] if key == "data" else [])
    if isinstance(data, list | tuple):
        return [path for value in data for path in _named_files(value, key)]
    if not isinstance(data, str) or not data or len(data) > 1000:
        return []
    place, sign, _ = data.partition(":")
    if sign and place.endswith(".py"):
        return [Path(place)]
    if key in ("rewards", "hidden") and sign:
        return [Path(*place.split(".")).with_suffix(".py")]
    return [Path(data)] if key in _PATHS and Path(data).exists() else []


def _contents(path: Path) -> str:
    """Digest of a file, or of the files of a folder; of a run's folder those of its newest checkpoint."""
    if path.is_dir():
        saved = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
        folder = saved[-1] if saved else path
        return digest({file.name: _contents(file) for file in sorted(folder.iterdir()) if file.is_file()})
    facts = path.stat()
    return _file(str(path.resolve()), facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4096)
def _file(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _folder_name(recipe: str) -> str:
    """A recipe's name as part of a folder's.

    >>> _folder_name("mine/own.py:my_grpo")
    'my_grpo'
    """
    return recipe.rpartition(":")[2]
