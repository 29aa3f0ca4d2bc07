"""From a recipe, arguments and paths to a complete configuration, and back.

Later sources win: the recipe's defaults, its training preset, the task's preset (for the built-in model), a
configuration file, arguments, paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_origin

import yaml

from keel.core.config import from_config, is_part, to_config
from keel.core.errors import ConfigError, UserError, nearest
from keel.method import CHAINS, Method
from keel.models.sources import Pretrained
from keel.recipes.registry import Recipe, recipe_named
from keel.rollouts.rollout import named_sampler
from keel.sampling.catalogue import entry_of
from keel.tasks.task import Task
from keel.train.settings import EvaluateSettings, ModelSettings, Section, TaskSettings, TrainSettings, parse

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "task": TaskSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
}
_SLOTS = tuple(f.name for f in fields(Method))
KEYS = ("recipe", "method", *SECTIONS, "seed", "name")
TINY = "tiny"
SAMPLER, GENERATIONS = "rollout.sampler", "rollout.num_generations"
LARGEST_SEED = 2**63 - 1  # of an integer in SQLite
LONGEST_NAME = 255  # bytes of a folder's name


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run.

    Args:
        recipe: name of the recipe, or None for a method made by hand.
        arguments: of the recipe.
        method: the resolved composition.
        model, task, train, evaluate: the sections.
        seed: decides all randomness.
        name: of the run.
    """

    recipe: str | None
    arguments: Mapping[str, Any]
    method: Method
    model: ModelSettings
    task: TaskSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    seed: int
    name: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, complete: `from_dict` gives the same configuration."""
        return {
            "recipe": None if self.recipe is None else {"name": self.recipe, "arguments": to_config(self.arguments)},
            "method": to_config(self.method),
            **{name: getattr(self, name).model_dump(mode="json") for name in SECTIONS},
            "seed": self.seed,
            "name": self.name,
        }

    def to_yaml(self) -> str:
        """The configuration as it is stored with a run."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclass
class Request:
    """What a user asked for, before it is resolved.

    Args:
        recipe: a name, a method, or None where a file says it.
        values: `--set` keys and keyword settings: bare names and dotted paths.
        file: contents of a configuration file.
        model: `tiny`, folder or hub name; None leaves it to the file.
        seed, name: None leaves them to the file.
        teacher: folder or hub name of the method's model `teacher`, in place of its own.
    """

    recipe: str | Method | None = None
    values: Mapping[str, Any] | None = None
    file: Mapping[str, Any] | None = None
    model: str | None = None
    task: str | None = None
    data: str | Mapping[str, float] | None = None
    rewards: tuple[str, ...] = ()
    seed: int | None = None
    name: str | None = None
    teacher: str | None = None

    def __post_init__(self) -> None:
        for key, value in (self.values or {}).items():
            if not all(key.split(".")):
                raise ConfigError("is no key: a part of it is empty", repr(key), "Write name, or slot.name.field.")
            _check_depth(key, value)


def parse_value(text: str) -> Any:
    """What stands behind `--set KEY=`: YAML, or the text itself where it is none.

    >>> parse_value("1e-3"), parse_value("[a, 2]"), parse_value("2024-99-99")
    ('1e-3', ['a', 2], '2024-99-99')
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return text  # besides its own errors, YAML passes on those of the types that a tag names


def read_file(path: str | Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        ConfigError: it is not there, is no YAML mapping, or has unknown sections.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"is not valid YAML: {' '.join(str(error).split())}", str(path)) from error
    if not isinstance(data, dict):
        raise ConfigError("is no mapping of sections", str(path), f"Sections: {', '.join(KEYS)}.")
    for key in data:
        if key not in KEYS:
            raise ConfigError(
                f"unknown section '{key}'.{nearest(str(key), KEYS)}", str(path), f"Sections: {', '.join(KEYS)}."
            )
    return data


def settings_of_task(request: Request) -> TaskSettings:
    """The task section alone, needed before the task's own preset is known."""
    return parse(TaskSettings, _section_values(request, "task"), "task")


def resolve(request: Request, task: Task | None = None) -> Configuration:
    """The complete configuration.

    Args:
        request: what was asked for.
        task: the loaded task, for its preset and its length of completions.

    Raises:
        ConfigError: an unknown recipe, argument, key or path, or a value that does not fit.
    """
    file = dict(request.file or {})
    known, arguments = _recipe_of(request, file)
    bare, paths = _sorted_values(request, known)
    model = parse(ModelSettings, _section_values(request, "model"), "model")
    preset = _preset(known, task, model)
    if isinstance(request.recipe, Method) or file.get("method") is not None:
        if bare:
            raise ConfigError(
                "the composition is given in full, so recipe arguments do not apply",
                next(iter(bare)),
                "Use a path into the method, such as terms.kl.coef, or leave the method section out.",
            )
        method = request.recipe if isinstance(request.recipe, Method) else from_config(file["method"], "method")
        if not isinstance(method, Method):
            raise ConfigError("is no composition", "method", "Write it as `keel methods show NAME` prints it.")
        preset = {key: value for key, value in preset.items() if key.split(".")[0] in SECTIONS}
    else:
        assert known is not None
        fitting = {k: v for k, v in preset.items() if "." not in k and k in known.arguments}
        arguments = {**fitting, **arguments, **bare}
        method = known(**arguments)
        method = _with_preset(method, preset, arguments, known, task)
    if request.teacher is not None:
        method = _with_teacher(method, request.teacher)
    if known is not None and GENERATIONS in paths and "num_generations" in known.arguments:
        known(**{**arguments, "num_generations": from_config(paths[GENERATIONS], GENERATIONS)})  # what it says of them
    for path, value in _with_sampler(paths, method).items():
        method = method.set(path, from_config(value, path))
    _check_chains(method)
    values = {name: dict(_section_values(request, name)) for name in SECTIONS}
    for key, value in preset.items():
        section, _, name = key.partition(".")
        if section in SECTIONS and name:
            values[section].setdefault(name, value)
    parsed = {name: parse(SECTIONS[name], values[name], name) for name in SECTIONS}
    if task is not None:  # before it is known, its own number of prompts is not
        _check_updates(method, parsed["train"])
    recipe = known.name if known is not None else None
    seed = request.seed if request.seed is not None else file.get("seed", 0)
    name = request.name or file.get("name") or recipe or "run"
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"must be a non-negative whole number (got {seed!r})", "seed")
    if seed > LARGEST_SEED:
        raise ConfigError(f"must be at most {LARGEST_SEED}, which the store of runs holds (got {seed})", "seed")
    _check_name(str(name))
    return Configuration(recipe, arguments, method, seed=seed, name=str(name), **parsed)


def from_dict(data: Mapping[str, Any]) -> Configuration:
    """The inverse of `Configuration.to_dict`."""
    recipe = data.get("recipe") or {}
    parsed = {name: parse(SECTIONS[name], data.get(name) or {}, name) for name in SECTIONS}
    method = from_config(data["method"], "method")
    return Configuration(
        recipe.get("name"), recipe.get("arguments") or {}, method, seed=data["seed"], name=data["name"], **parsed
    )


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted keys at which two plain configurations differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found: list[str] = []
        for key in [*one, *(k for k in other if k not in one)]:
            here = f"{where}.{key}" if where else str(key)
            found += differences(one.get(key, "absent"), other.get(key, "absent"), here)
        return found
    return [] if one == other else [f"{where}: {one!r} -> {other!r}"]


def _recipe_of(request: Request, file: Mapping[str, Any]) -> tuple[Recipe | None, dict[str, Any]]:
    if isinstance(request.recipe, Method):
        return None, {}
    given = file.get("recipe") or {}
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or set(given) - {"name", "arguments"}:
        raise ConfigError(
            "must have a name and arguments", "recipe", "For example {name: grpo, arguments: {beta: 0.04}}."
        )
    name = request.recipe or given.get("name")
    if name is None:
        if file.get("method") is None:
            raise ConfigError("no recipe is named", None, "Give one, such as grpo; `keel methods` lists them.")
        return None, {}
    if request.recipe and given.get("name") not in (None, request.recipe):
        raise ConfigError(f"the file is for recipe '{given['name']}', not '{request.recipe}'", "recipe")
    return recipe_named(str(name)), dict(given.get("arguments") or {})


def _sorted_values(request: Request, known: Recipe | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bare names for the recipe, and paths into the method; those of sections are read by `_section_values`."""
    bare: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    arguments = known.arguments if known is not None else {}
    for key, value in (request.values or {}).items():
        head, _, rest = key.partition(".")
        if rest:
            if head not in SECTIONS:
                paths[key] = value
        elif key in arguments:
            bare[key] = value
        elif key == "rollout" and (isinstance(value, str) or is_part(value)):  # short for its sampler
            paths[SAMPLER] = value
        elif key in (*SECTIONS, *_SLOTS):
            raise ConfigError("is a whole section or slot", key, f"Name what to set in it, such as {key}.NAME=VALUE.")
        elif key in ("seed", "name"):
            raise ConfigError("is no setting", key, f"Give it as --{key}.")
        elif key not in TrainSettings.model_fields:
            choices = [*arguments, *TrainSettings.model_fields, *_SLOTS]
            raise ConfigError(
                f"nothing is called '{key}'.{nearest(key, choices)}",
                key,
                f"Arguments of the recipe: {', '.join(arguments) or 'none'}.",
            )
    return bare, paths


def _with_sampler(paths: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Paths in an order that does not matter: a whole stands before its settings, and a sampler that is named takes up
    its own at once, for some are required.
    """
    settings = {path: value for path, value in paths.items() if path.startswith(f"{SAMPLER}.")}
    rest = {path: value for path, value in paths.items() if path not in settings}
    given, rollout = rest.get(SAMPLER), method.rollout
    if rollout is None and (given or settings):
        raise ConfigError("this recipe draws no completions, so it has no sampler", "rollout")
    if settings and given is None and rollout is not None and rollout.sampler is None:
        raise ConfigError(
            "there is no sampler to set",
            next(iter(settings)),
            "Name one, such as rollout=smc; `keel samplers` lists them.",
        )
    if isinstance(given, str):
        options = {path.removeprefix(f"{SAMPLER}."): from_config(value, path) for path, value in settings.items()}
        given, settings = named_sampler(given, options), {}
    found = given if given is not None else rollout and rollout.sampler
    if f"{SAMPLER}.num_particles" in paths and is_part(found) and entry_of(found).group == "particles":
        raise ConfigError(
            "the particles are the rows of a group", f"{SAMPLER}.num_particles", "Set num_generations of the rollout."
        )
    first = {} if SAMPLER not in rest else {SAMPLER: given}
    return {**first, **{path: rest[path] for path in rest if path != SAMPLER}, **settings}


def _with_teacher(method: Method, teacher: str) -> Method:
    """The method with another teacher."""
    if "teacher" not in method.models:
        raise ConfigError("this method has no model of that name", "teacher", "`keel methods show NAME` lists models.")
    return method.replacing(models={**method.models, "teacher": Pretrained(teacher)})


def _section_values(request: Request, name: str) -> dict[str, Any]:
    """What the file, the flags and the paths say of one section."""
    given = dict(request.file or {}).get(name) or {}
    if not isinstance(given, Mapping):
        raise ConfigError("must be a mapping", name)
    values = dict(given)
    if name == "model" and request.model is not None:
        values["path"] = request.model
    if name == "task":
        if request.task is not None:
            values.update(name=request.task, data=None)
        if request.data is not None:
            values.update(data=request.data if isinstance(request.data, str) else dict(request.data), name=None)
        if request.rewards:
            values["rewards"] = request.rewards
    for key, value in (request.values or {}).items():
        section, _, rest = key.partition(".")
        if section == name and rest:
            inner, _, option = rest.partition(".")
            if option:  # task.options.held_out
                values[inner] = {**_options(values.get(inner), name, inner, key), option: value}
            else:
                values[rest] = value
        elif name == "train" and not rest and key in TrainSettings.model_fields and not _is_argument(request, key):
            values[key] = value
    return values


def _options(given: Any, section: str, inner: str, key: str) -> Mapping[str, Any]:
    """The entries of a setting that is a mapping."""
    field = SECTIONS[section].model_fields.get(inner)
    if field is not None and get_origin(field.annotation) is not dict:
        raise ConfigError(f"'{section}.{inner}' has no settings of its own", key)
    if not isinstance(given or {}, Mapping):
        raise ConfigError(f"'{section}.{inner}' is no mapping (got {given!r})", key)
    return given or {}


def _is_argument(request: Request, key: str) -> bool:
    name = request.recipe if isinstance(request.recipe, str) else ((request.file or {}).get("recipe") or {})
    name = name.get("name") if isinstance(name, Mapping) else name
    return isinstance(name, str) and key in recipe_named(name).arguments


def _preset(known: Recipe | None, task: Task | None, model: ModelSettings) -> dict[str, Any]:
    """The recipe's training preset, and the task's for the built-in model."""
    preset = dict(known.preset) if known is not None else {}
    if task is not None and model.path == TINY:
        own, heads = (preset.get(f"train.{name}learning_rate") for name in ("", "critic_"))
        preset.update(task.preset)
        if own and heads and "train.learning_rate" in task.preset:  # the heads keep their distance from the policy
            preset["train.critic_learning_rate"] = heads * (task.preset["train.learning_rate"] / own)
        preset.update(_COMPARING.get(_kind(known), {}))
    return preset


# What suits the built-in model where completions are compared: a task's own settings are those of its rollouts.
_COMPARING: dict[str | None, dict[str, Any]] = {
    "pairs": {"train.learning_rate": 1e-5},
    "reward": {"train.learning_rate": 1e-3},
}


def _kind(known: Recipe | None) -> str | None:
    try:
        return None if known is None else known().kind
    except UserError:  # one that cannot do without an argument
        return None


def _with_preset(
    method: Method, preset: Mapping[str, Any], arguments: Mapping[str, Any], known: Recipe, task: Task | None
) -> Method:
    """The task's settings of the rollout, where the user or the recipe's own default does not decide."""
    if method.rollout is None:
        return method
    changes = {}
    for key, value in preset.items():
        slot, _, name = key.partition(".")
        if slot == "rollout" and name not in arguments and not (name == "num_generations" and _decides_groups(known)):
            changes[name] = value
    if task is not None and "max_completion_length" not in arguments and "max_completion_length" not in changes:
        changes["max_completion_length"] = task.max_completion_length
    if changes.get("max_completion_length") and "max_completion_length" in known.arguments:
        length = changes.pop("max_completion_length")
        method = known(**{**arguments, "max_completion_length": length})
    assert method.rollout is not None
    return method.replacing(rollout=replace(method.rollout, **changes)) if changes else method


def _check_chains(method: Method) -> None:
    """What stands in the slots are parts; anything else would break in the middle of a run."""
    for slot in CHAINS:
        for name, item in getattr(method, slot).items():
            if not isinstance(name, str) or not (is_part(item) or (slot == "rewards" and isinstance(item, str))):
                raise ConfigError(f"must be a part (got {item!r})", f"{slot}.{name}", "For example {part: NAME, ...}.")


def _check_updates(method: Method, train: TrainSettings) -> None:
    """An optimiser step takes whole groups, at least one."""
    draws = method.rollout is not None and method.kind in ("online", "distillation")
    groups = method.rollout.num_prompts if draws and method.rollout is not None else train.batch_size
    if train.num_minibatches > groups:
        setting, what = ("rollout.num_prompts", "groups") if draws else ("train.batch_size", "groups or rows")
        raise ConfigError(
            f"{train.num_minibatches} optimiser steps are more than the {groups} {what} of a batch",
            "train.num_minibatches",
            f"Lower it, or raise {setting}.",
        )


def _check_name(name: str) -> None:
    """A run's name is a folder in that of the runs, beside their store."""
    if name in ("", ".", "..") or not name.isprintable() or "/" in name or "\\" in name:
        raise ConfigError(f"cannot be a folder's name (got {name!r:.60})", "name", "Use letters, digits, - and _.")
    longest = len(name.encode())
    if longest > LONGEST_NAME:
        what = f"has {longest} bytes, and a folder's name at most {LONGEST_NAME} (got '{name[:20]}...')"
        raise ConfigError(what, "name", "Give a shorter one.")


def _check_depth(key: str, value: Any, depth: int = 20) -> None:
    if depth == 0:
        raise ConfigError("is nested too deeply", key)
    if isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_depth(key, item, depth - 1)


def _decides_groups(known: Recipe) -> bool:
    """Recipes without groups keep one completion a prompt whatever the task suggests."""
    parameter = known.arguments.get("num_generations")
    return parameter is not None and parameter.default == 1
