"""From what was asked for to what can run: configuration, task, rewards, and where the model is."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from keel.core.errors import ConfigError, RunError
from keel.method import Method
from keel.models.adapters import LoRA
from keel.models.language import LanguageModel
from keel.models.load import load
from keel.models.sources import Pretrained
from keel.parts.rewards.components import KeepComponents
from keel.parts.rewards.named import reward_name
from keel.parts.rewards.stored_teacher import StoredTeacher, stored
from keel.parts.rewards.transforms import WeightedSum
from keel.tasks.data import DataTask, load_data
from keel.tasks.load import load_task
from keel.tasks.mixture import sources_of
from keel.tasks.preference_data import load_preferences, prompts_of
from keel.tasks.preferences import Kind, Preferences
from keel.tasks.repeats import with_options
from keel.tasks.task import Task, completion_text
from keel.train.base import ensure_base
from keel.train.checkpoint import newest_sound
from keel.train.comparisons import built_in_preferences
from keel.train.configuration import TINY, Configuration, Request, read_file, resolve, settings_of_task
from keel.train.gaps import with_gaps_checked
from keel.train.session import Reporter, reward_functions, silent
from keel.train.settings import ModelSettings, TaskSettings

IN_MEMORY = "in memory"
DEFAULT_TASK = "countdown"


@dataclass
class Setup:
    """What stands before a run begins: configuration, task, and where the model is."""

    config: Configuration
    task: Task
    source: Any  # a folder or hub name, or a model in memory
    tokenizer: Any = None
    rewards: Mapping[str, Any] | None = None
    preferences: Preferences | None = None  # for methods that learn from comparisons


def prepare_setup(
    recipe: str | Method | None,
    model: Any,
    tokenizer: Any,
    task: str | Task | None,
    data: Any,
    reward: Any,
    *,
    seed: int | None,
    name: str | None,
    config: str | Path | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    teacher: str | Path | None = None,
    report: Reporter = silent,
) -> Setup:
    """Resolve everything that can be resolved before the model is loaded."""
    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    check_model(model)
    if isinstance(model, LanguageModel):
        model, tokenizer = model.module, tokenizer or model.tokenizer
    file = read_file(config) if isinstance(config, (str, Path)) else config
    named, given = named_rewards(reward)
    request = Request(
        recipe=recipe,
        values=settings,
        file=file,
        model=None if model is None else str(model) if isinstance(model, (str, Path)) else IN_MEMORY,
        task=task if isinstance(task, str) or task is None else task.name,
        data=None if data is None else _named_data(data),
        rewards=named,
        seed=seed,
        name=name,
        teacher=None if teacher is None else str(teacher),
    )
    chosen = settings_of_task(request)
    first = resolve(request)
    reads = first.method.reads
    preferences = None
    split = first.seed if chosen.split_seed is None else chosen.split_seed
    if reads is not None and (data is not None or chosen.data is not None):
        preferences = open_preferences(chosen, data, reads, split)
        loaded: Task = prompts_of(preferences)
    else:
        loaded = task if task is not None and not isinstance(task, str) else open_task(chosen, data, split)
        _check_fits(first.method, loaded, named)
    resolved = resolve(request, loaded)
    if resolved.task.name is None and resolved.task.data is None:
        resolved = _with_default_task(resolved)
    resolved = _with_further_models(_with_checkpoint(resolved), loaded, report)
    source: Any = model if resolved.model.path == IN_MEMORY else resolved.model.path
    if resolved.model.path == TINY:
        source = ensure_base(_base_task(loaded), report=report)
        _tell_unread(loaded, report)
    if reads is not None and preferences is None:
        preferences = built_in_preferences(loaded, reads, report=report)
    if preferences is not None:
        preferences = with_gaps_checked(resolved.method, preferences)
    return Setup(resolved, loaded, source, tokenizer, given, preferences)


def open_preferences(settings: TaskSettings, data: Any, reads: Kind, seed: int) -> Preferences:
    """The comparisons of one's own data."""
    return load_preferences(_given_data(settings, data), reads, settings.held_out, seed, settings.options)


def open_task(settings: TaskSettings, data: Any, seed: int) -> Task:
    """The task of a configuration; countdown where none is named."""
    if data is not None or settings.data is not None:
        given = _given_data(settings, data)
        if sources_of(given) is not None:
            raise ConfigError("several data sets are mixed for methods that compare completions, such as dpo", "data")
        return with_options(load_data(given, settings.held_out, seed), settings.options)
    if settings.held_out != TaskSettings.model_fields["held_out"].default:
        fix = "A built-in one that has a choice takes it as task.options.held_out."
        raise ConfigError("is for data of one's own: a task has its own held-out prompts", "task.held_out", fix)
    return load_task(settings.name or DEFAULT_TASK, **settings.options)


def _given_data(settings: TaskSettings, data: Any) -> Any:
    """What was handed over, or what the configuration names."""
    given = data if data is not None else settings.data
    if isinstance(given, str) and given == IN_MEMORY:
        raise RunError("its data were given in memory", "data", "Give the same data again.")
    return given


def check_model(model: Any) -> None:
    """Refuse what names no model and is none.

    Raises:
        ConfigError: it is neither text, nor a path, nor a model in memory.
    """
    held = isinstance(model, LanguageModel) or (isinstance(model, nn.Module) and hasattr(model, "config"))
    if model is None or isinstance(model, (str, Path)) or held:
        return
    fix = "Give tiny, a folder, a run's folder, a hub name, or a transformers model with its tokenizer."
    raise ConfigError(f"{model!r:.60} is no model but of type {type(model).__name__}", "model", fix)


def check_rewards(setup: Setup) -> None:
    """Refuse rewards that are not there, where training asks for none and an evaluation would find out at its end.

    Raises:
        ConfigError: no such module, function, folder or model.
    """
    settings = setup.config.task
    if setup.config.method.kind == "online" or not (setup.rewards or settings.rewards):
        return  # of an online method the session has them
    for function in reward_functions(settings, setup.task, setup.rewards).values():
        if (close := getattr(function, "close", None)) is not None:
            close()


def check_reward_count(method: Method, rewards: Mapping[str, Any]) -> None:
    """Refuse one number for each reward function where there are more functions, or fewer.

    Raises:
        ConfigError: weights of their sum, or thresholds, of another number.
    """
    kept = any(isinstance(item, KeepComponents) for item in method.transforms.values())
    which = f"{len(rewards)} reward function{'s' * (len(rewards) != 1)} ({', '.join(rewards)})"
    fix = "Give one for each function, in their order"
    for name, item in method.transforms.items():
        if isinstance(item, WeightedSum) and item.weights is not None and len(item.weights) != len(rewards):
            raise ConfigError(f"{len(item.weights)} weights for {which}", f"transforms.{name}.weights", f"{fix}.")
    for name, item in method.controllers.items():
        thresholds = getattr(item, "thresholds", None)
        if thresholds is not None and len(thresholds) != (len(rewards) if kept else 1):
            what, where = f"{len(thresholds)} thresholds for {which}", f"controllers.{name}.thresholds"
            raise ConfigError(what, where, f"{fix}, or a single one for their sum.")


def load_model(
    settings: ModelSettings, source: Any, tokenizer: Any, seed: int, adapted: bool | None = False
) -> LanguageModel:
    """The policy as the settings say; `adapted`: `source` holds the adapter already, or, if None, none is wanted."""
    lora = None
    if settings.lora_rank and adapted is False:
        options = {"target_modules": settings.lora_target_modules} if settings.lora_target_modules else {}
        lora = LoRA(
            rank=settings.lora_rank,
            alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
            dropout=settings.lora_dropout,
            **options,
        )
    return load(
        source,
        tokenizer,
        dtype=settings.dtype,
        autocast=settings.autocast,
        device=settings.device,
        lora=lora,
        gradient_checkpointing=settings.gradient_checkpointing,
        trust_remote_code=settings.trust_remote_code,
        seed=seed,
    )


def open_model(model: Any, task: Task, tokenizer: Any, device: str | None, report: Reporter = silent) -> LanguageModel:
    """A model by `tiny`, folder, run folder or hub name, or in memory."""
    if isinstance(model, LanguageModel):
        return model
    return load(model_source(model, task, report), tokenizer, device=device)


def model_source(model: Any, task: Task, report: Reporter = silent) -> Any:
    """Where the files of a model are: a folder or hub name of a name, of a run its newest checkpoint."""
    check_model(model)
    if isinstance(model, LanguageModel):
        return model
    if model is None or (isinstance(model, str) and model == TINY):
        model = ensure_base(_base_task(task), report=report)
    if isinstance(model, (str, Path)):
        model = run_checkpoint(Path(model)) or model
    return model


def run_checkpoint(path: Path) -> Path | None:
    """The newest sound checkpoint of a run's folder, with a warning if newer ones are damaged; None if `path` is none.

    Raises:
        RunError: the run has none, or all are damaged.
        ConfigError: there can be no such path.
    """
    try:
        if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
            return None  # a folder with a model's own configuration is that model
    except OSError as error:  # it is too long
        raise ConfigError(f"'{str(path)[:20]}...' cannot be a path ({error.strerror})", "model") from None
    checkpoint, complaints = newest_sound(path)
    if checkpoint is None:
        raise RunError("; ".join(complaints) or "this run has no checkpoint", str(path))
    if complaints:
        warnings.warn(f"{path}: {'; '.join(complaints)}; {checkpoint.name} is taken", stacklevel=2)
    return checkpoint


def _with_checkpoint(config: Configuration) -> Configuration:
    """Of a policy that begins as a run, its newest checkpoint by name: what is stored says which one that was."""
    named = config.model.path
    found = None if named in (TINY, IN_MEMORY) else run_checkpoint(Path(named))
    if found is not None and any(found.rglob("adapter_config.json")):
        what = "trained an adapter, without which the reference would be the model before it"
        raise ConfigError(what, named, f"Write its model first: keel export {named} PATH, then --model PATH.")
    return config if found is None else replace(config, model=config.model.model_copy(update={"path": str(found)}))


def _with_further_models(config: Configuration, task: Task, report: Reporter) -> Configuration:
    """Of further models that are runs, their newest checkpoints; what is stored of a teacher must be there.

    Raises:
        ConfigError: one has no name.
        DataError: a file of a teacher's numbers is not there, or is none.
    """
    for item in config.method.transforms.values():
        if isinstance(item, StoredTeacher):
            stored(item.path)
    models = dict(config.method.models)
    for name, source in models.items():
        if not isinstance(source, Pretrained):
            continue
        if not source.path:
            fix = f"Give --teacher, or --set models.{name}.path: a folder, a run's folder, or a hub name."
            raise ConfigError("no model is named", f"models.{name}.path", fix)
        models[name] = replace(source, path=str(model_source(source.path, task, report)))
    return config if models == config.method.models else replace(config, method=config.method.replacing(models=models))


def _with_default_task(config: Configuration) -> Configuration:
    return replace(config, task=config.task.model_copy(update={"name": DEFAULT_TASK}))


def _base_task(task: Task) -> Task:
    """On what the built-in model was trained: the task itself, the one it names, or countdown for one's own data."""
    if isinstance(task, DataTask):
        return load_task(DEFAULT_TASK)
    return task.base_task() if hasattr(task, "base_task") else task


def _tell_unread(task: Task, report: Reporter) -> None:
    """Of one's own data, the characters that are none of the built-in model's."""
    if not isinstance(task, DataTask):
        return
    known = set(_base_task(task).characters or "")
    texts = [
        e.prompt if isinstance(e.prompt, str) else "".join(map(completion_text, ([m] for m in e.prompt)))
        for e in task.train
    ]
    strange = [found for text in texts if (found := set(text) - known)]
    if strange:
        some = ", ".join(map(repr, sorted(set.union(*strange))[:5]))
        what = (
            f"{len(strange)} of {len(texts)} prompts have characters that the built-in model does not know ({some} ...)"
        )
        report("warning", {"text": f"{what} and reads as one and the same: give --model with a folder or a hub name"})


def _named_data(data: Any) -> str | dict[str, float]:
    """What the configuration says of data: a path, several with their weights, or that they are in memory."""
    return str(data) if isinstance(data, (str, Path)) else sources_of(data) or IN_MEMORY


def _check_fits(method: Method, task: Task, rewards: tuple[str, ...]) -> None:
    """Say what learns from comparisons where another method is given some.

    Raises:
        ConfigError: a supervised method, or an online one that has no reward, on pairs, labels or lists.
    """
    if not isinstance(task, DataTask) or not len(task.train):
        return
    columns = task.train[0].columns
    pairs, lists = {"chosen", "rejected"} <= set(columns), "completions" in columns
    if not pairs and not lists:
        return
    what = "pairs (`chosen`, `rejected`)" if pairs else "lists (`completions`)"
    fits = "Train dpo, or another method of pairs (`keel methods`)"
    if method.kind == "supervised" and task.train[0].completion is None:
        fix = f"{fits}; to learn from the chosen ones alone, name that column `completion`."
        raise ConfigError(f"these are {what}, and this method learns from one completion", "data", fix)
    if method.kind == "online" and not rewards and not method.rewards and "answer" not in columns:
        given = "or give --reward to score what this method draws"
        raise ConfigError(f"these are {what}, and this method draws its own completions", "data", f"{fits}, {given}.")


def named_rewards(reward: Any) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """What goes into the configuration as text, and the functions by name."""
    if reward is None:
        return (), None
    if isinstance(reward, Mapping):
        functions = dict(reward)
    else:
        listed = list(reward) if isinstance(reward, (list, tuple)) else [reward]
        functions = {_reward_name(item): item for item in listed}
        if len(functions) != len(listed):
            raise ConfigError(
                "two reward functions have the same name", "reward", "Give them by name, as a dictionary."
            )
    texts = tuple(item if isinstance(item, str) else f"{IN_MEMORY}:{name}" for name, item in functions.items())
    return texts, functions


def _reward_name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward_name(reward)
    return getattr(reward, "__name__", type(reward).__name__)
