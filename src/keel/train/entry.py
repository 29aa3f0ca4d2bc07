"""`keel.train`, `keel.evaluate`, `keel.sample`: what the commands call."""

import contextlib
import fcntl
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, KeelError, RunError
from keel.evaluate.evaluation import Evaluation
from keel.method import Method
from keel.models.adapters import LoRA
from keel.models.language import LanguageModel
from keel.models.load import checksum, load, merged, save
from keel.parts.rewards.worker import RewardTimeout
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.store.store import Store
from keel.tasks.data import DataTask, load_data
from keel.tasks.load import load_task
from keel.tasks.task import Task, Text
from keel.train.base import ensure_base
from keel.train.checkpoint import newest_sound, restore, save_checkpoint
from keel.train.configuration import (
    TINY,
    Configuration,
    Request,
    differences,
    read_file,
    resolve,
    settings_of_task,
)
from keel.train.encode import Encoder
from keel.train.measure import measure_policy
from keel.train.online import run
from keel.train.session import Reporter, Session, build_session, reward_functions, silent
from keel.train.settings import EvaluateSettings, ModelSettings, TaskSettings, parse

IN_MEMORY = "in memory"
DEFAULT_TASK = "countdown"


class Stopped(KeelError):
    """The run was told to stop; its checkpoint is written."""

    exit_code = 143


@dataclass
class Run:
    """A finished run.

    Args:
        path: its folder.
        model: the trained transformers model (with adapters, where there are some).
        tokenizer: its tokenizer.
        metrics: curves by name, (step, value).
        summary: what `summary.json` holds.
        evaluations: measured before and after.
        config: the complete configuration.
    """

    path: Path
    model: Any
    tokenizer: Any
    metrics: dict[str, list[tuple[int, float]]]
    summary: dict[str, Any]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    config: Configuration | None = None


@dataclass
class Setup:
    """What stands before a run begins: configuration, task, and where the model is."""

    config: Configuration
    task: Task
    source: Any  # a folder or hub name, or a model in memory
    tokenizer: Any = None
    rewards: Mapping[str, Any] | None = None


def train(
    recipe: str | Method,
    model: Any = None,
    tokenizer: Any = None,
    task: str | Task | None = None,
    data: Any = None,
    reward: Callable | str | Mapping[str, Any] | Sequence[Any] | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: bool = False,
    runs: str | Path = "runs",
    config: str | Path | Mapping[str, Any] | None = None,
    report: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Train a model by a recipe or a method, and measure it before and after.

    Args:
        recipe: a name (`keel methods` lists them), or a `Method`.
        model: `tiny` (the default), a folder, a hub name, or a transformers model, which is trained in place.
        tokenizer: of a model in memory.
        task: a built-in task, a reasoning-gym data set, or an object with the attributes of `keel.tasks.task.Task`.
        data: in place of a task: a path, a list of dictionaries, or a `datasets.Dataset`, with a column `prompt` (text or
            messages) or `messages`; other columns reach the reward function.
        reward: `def reward(prompts, completions, completion_ids, **columns) -> list[float | None]`, as a callable, as
            `module:function` (then in a process of its own), several in a list or by name.
        seed: decides all randomness; 0 if neither it nor the configuration says otherwise.
        name: of the run, and of its folder in `runs`; the recipe's by default.
        resume: continue the run of that name from its last checkpoint.
        runs: folder of all runs.
        config: a configuration file, or its contents.
        report: called with (event, facts) while the run goes on; by default a progress bar where there is a terminal.
        **settings: arguments of the recipe (`beta=0.04`), training settings (`max_steps=200`), and dotted paths
            (`**{"rollout.num_prompts": 8}`).

    Returns:
        The run: `run.model`, `run.tokenizer`, `run.metrics`, `run.summary`, `run.path`.

    Raises:
        UserError: a mistake in what was asked for, named with what would be right.
        TrainingError: training could not go on.
    """
    from keel.train.progress import default_reporter

    report = default_reporter() if report is None else report
    setup = prepare_setup(
        recipe, model, tokenizer, task, data, reward, seed=seed, name=name, config=config, settings=settings, report=report
    )
    return execute(setup, Path(runs), resume=resume, report=report)


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
    report: Reporter = silent,
) -> Setup:
    """Resolve everything that can be resolved before the model is loaded."""
    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    file = read_file(config) if isinstance(config, (str, Path)) else config
    named, given = _named_rewards(reward)
    request = Request(
        recipe=recipe,
        values=settings,
        file=file,
        model=None if model is None else str(model) if isinstance(model, (str, Path)) else IN_MEMORY,
        task=task if isinstance(task, str) or task is None else task.name,
        data=None if data is None else str(data) if isinstance(data, (str, Path)) else IN_MEMORY,
        rewards=named,
        seed=seed,
        name=name,
    )
    chosen = settings_of_task(request)
    loaded = task if task is not None and not isinstance(task, str) else open_task(chosen, data, seed or 0)
    resolved = resolve(request, loaded)
    if resolved.task.name is None and resolved.task.data is None:
        resolved = _with_default_task(resolved)
    source: Any = model if resolved.model.path == IN_MEMORY else resolved.model.path
    if resolved.model.path == TINY:
        source = ensure_base(_base_task(loaded), report=report)
    return Setup(resolved, loaded, source, tokenizer, given)


def open_task(settings: TaskSettings, data: Any, seed: int) -> Task:
    """The task of a configuration; countdown where none is named."""
    if data is not None or settings.data is not None:
        given = data if data is not None else settings.data
        if given == IN_MEMORY:
            raise RunError("its data were given in memory", "data", "Give the same data again.")
        return load_data(given, settings.held_out, seed)
    return load_task(settings.name or DEFAULT_TASK, **settings.options)


def execute(setup: Setup, runs: Path, *, resume: bool = False, report: Reporter = silent) -> Run:
    """Run a setup to its end, in a folder of its own."""
    config = setup.config
    path = runs / config.name
    finished = _finished(path) if resume else None
    if path.exists() and not resume:
        raise RunError("there is a run of that name", str(path), "Continue it with --resume, or choose another --name.")
    if finished is not None:
        _check_same(config, path)
        report("note", {"text": f"{path} is finished"})
        return _reopened(path, runs, config, finished, setup)
    fresh = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with _only_one(path), Store(runs / "keel.sqlite") as store:
        try:
            session = _open(setup, path, store, resume, report)
        except BaseException:
            if fresh:
                shutil.rmtree(path, ignore_errors=True)
            raise
        try:
            return _carry_out(setup, session, report)
        except KeyboardInterrupt:
            _end(session, "stopped", save=True)
            raise Stopped("stopped; continue with --resume", str(path)) from None
        except RewardTimeout:
            _end(session, "failed", save=True)
            raise
        except Stopped:
            _end(session, "stopped", save=True)
            raise
        except Exception:
            _end(session, "failed", save=False)
            raise
        finally:
            session.close()


def _open(setup: Setup, path: Path, store: Store, resume: bool, report: Reporter) -> Session:
    """A session at the beginning, or at the newest sound checkpoint."""
    config = setup.config
    checkpoint = None
    if resume:
        if (path / "config.yaml").exists():
            _check_same(config, path)
        checkpoint, complaints = newest_sound(path)
        for complaint in complaints:
            report("warning", {"text": complaint})
        if checkpoint is None:
            report("note", {"text": f"{path} has no checkpoint: starting from the beginning"})
        else:
            report("note", {"text": f"continuing from {checkpoint}"})
    start = load_model(config.model, setup.source, setup.tokenizer, config.seed)
    initial = start
    policy = start
    if checkpoint is not None:
        policy = load_model(config.model, checkpoint, None, config.seed, adapted=config.model.lora_rank > 0)
    if checkpoint is None or not (path / "config.yaml").exists():
        (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    _check_initial(path, initial, setup, fresh=checkpoint is None)
    session = build_session(config, setup.task, policy, setup.rewards, initial if checkpoint is not None else None)
    session.path, session.store, session.report = path, store, report
    session.run_id = _run_id(store, config, resume)
    if checkpoint is not None:
        restore(session, checkpoint)
    store.rewind(session.run_id, session.position.step)
    return session


def _carry_out(setup: Setup, session: Session, report: Reporter) -> Run:
    config, store, run_id, path = session.config, session.store, session.run_id, session.path
    assert store is not None and run_id is not None and path is not None
    report("start", {"config": config, "session": session})
    measured = {e.phase: Evaluation.from_json(e.evaluation) for e in store.evaluations(run_id)}
    wanted = config.evaluate if session.rewards or config.method.kind == "supervised" else None
    if wanted is not None and wanted.before and "before" not in measured and session.position.step == 0:
        if (found := _measure(session, setup, "before", report)) is not None:
            measured["before"] = found
    session.measure = lambda phase: _measure(session, setup, phase, report)
    with _stop_on_signal(session), _tracked(session):
        report("phase", {"name": "train", "steps": config.train.max_steps, "start": session.position.step, "text": config.name})
        run(session)
    if session.position.step < config.train.max_steps:
        raise Stopped(f"stopped at step {session.position.step}; continue with --resume", str(path))
    save_checkpoint(session)
    if wanted is not None and wanted.after and (found := _measure(session, setup, "after", report)) is not None:
        measured["after"] = found
    return _finish(session, measured, report)


def _measure(session: Session, setup: Setup, phase: str, report: Reporter) -> Evaluation | None:
    """An evaluation on held-out prompts, stored; None where there is nothing to measure with."""
    config = session.config
    rewards = session.rewards or reward_functions(config, session.task, setup.rewards)
    if not rewards or not len(session.task.held_out):
        return None
    rollout = config.method.rollout
    length = config.evaluate.max_completion_length or (
        rollout.max_completion_length if rollout is not None else session.task.max_completion_length
    )
    count = min(config.evaluate.num_prompts, len(session.task.held_out))
    report("phase", {"name": phase, "steps": count, "text": f"measuring {phase} training"})
    reference = session.sources["ref"] if "ref" in session.sources else None
    if reference is None and phase != "before" and setup.source is not session.policy.module:
        reference = _initial_reference(setup, session)
    evaluation = measure_policy(
        session.policy,
        session.task,
        rewards,
        config.evaluate,
        encoder=session.encoder,
        max_completion_length=length,
        seed=counter_seed(config.seed, "evaluate"),
        reference=session.policy if phase == "before" else reference,
        generator=config.train.generator,
        max_tokens=config.train.max_tokens,
        progress=lambda done, total: report("progress", {"done": done, "total": total}),
    )
    assert session.store is not None and session.run_id is not None
    session.store.log_evaluation(session.run_id, session.position.step, phase, evaluation.to_json())
    report("evaluation", {"phase": phase, "evaluation": evaluation})
    return evaluation


def _initial_reference(setup: Setup, session: Session) -> LanguageModel | None:
    """The model before training, for the KL of the last evaluation; one given in memory was trained in place."""
    if not isinstance(setup.source, (str, Path)):
        return None
    model = load_model(session.config.model, setup.source, None, session.config.seed, adapted=None)
    model.module.requires_grad_(False)
    return model


def _finish(session: Session, measured: dict[str, Evaluation], report: Reporter) -> Run:
    from keel.report.run import write_report

    config, store, run_id, path = session.config, session.store, session.run_id, session.path
    assert store is not None and run_id is not None and path is not None
    last = session.metrics[-1] if session.metrics else {}
    summary = {
        "name": config.name,
        "recipe": config.recipe,
        "status": "finished",
        "steps": session.position.step,
        "seconds": round(session.position.seconds, 3),
        "num_tokens": session.position.tokens,
        "checkpoint": str((path / f"checkpoint-{session.position.step}").name),
        "checksum": checksum(session.policy.module),
        "last": last,
        **{phase: evaluation.to_json()["metrics"] for phase, evaluation in measured.items()},
    }
    store.finish(run_id, "finished", summary)
    metrics = store.metrics(run_id)
    write_report(path)
    (path / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report("done", {"summary": summary, "evaluations": measured, "path": path, "metrics": metrics})
    return Run(path, session.policy.module, session.policy.tokenizer, metrics, summary, measured, config)


def load_model(
    settings: ModelSettings, source: Any, tokenizer: Any, seed: int, adapted: bool | None = False
) -> LanguageModel:
    """The policy as the settings say; `adapted` means that `source` holds the adapter already, None wants no adapter."""
    lora = None
    if settings.lora_rank and adapted is False:
        options = {"target_modules": settings.lora_target_modules} if settings.lora_target_modules else {}
        lora = LoRA(rank=settings.lora_rank, alpha=settings.lora_alpha or 2.0 * settings.lora_rank,
                    dropout=settings.lora_dropout, **options)  # fmt: skip
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


def evaluate(
    model: Any,
    task: str | Task | None = None,
    data: Any = None,
    reward: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    reference: Any = None,
    device: str | None = None,
    report: Reporter = silent,
    **settings: Any,
) -> Evaluation:
    """Measure a model on held-out prompts: avg@k, pass@k, maj@k, entropy, lengths, and KL to a reference if given.

    Args:
        model: `tiny`, a folder (a run's too), a hub name, or a model in memory.
        task, data, reward: as in `keel.train`.
        tokenizer: of a model in memory.
        seed: of the completions.
        reference: another model, for the KL.
        device: None takes the best there is.
        report: called with (event, facts).
        **settings: of the section `evaluate`, such as `num_prompts=64`.

    Raises:
        UserError: a mistake in what was asked for.
    """
    chosen = parse(EvaluateSettings, settings, "evaluate")
    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    task_settings = TaskSettings(name=task if isinstance(task, str) else None)
    opened = task if task is not None and not isinstance(task, str) else open_task(task_settings, data, seed)
    named, given = _named_rewards(reward)
    config_task = TaskSettings(name=opened.name, rewards=named)
    functions = reward_functions(_only_task(config_task), opened, given)
    if not functions:
        raise ConfigError("there is nothing to score completions with", "reward", "Give reward=, or an `answer` column.")
    policy = open_model(model, opened, tokenizer, device, report)
    other = None if reference is None else open_model(reference, opened, None, device, report)
    try:
        return measure_policy(
            policy,
            opened,
            functions,
            chosen,
            encoder=Encoder(policy),
            max_completion_length=chosen.max_completion_length or opened.max_completion_length,
            seed=counter_seed(seed, "evaluate"),
            reference=other,
            progress=lambda done, total: report("progress", {"done": done, "total": total}),
        )
    finally:
        for function in functions.values():
            if (close := getattr(function, "close", None)) is not None:
                close()


@dataclass(frozen=True)
class Sample:
    """One completion.

    Args:
        prompt, text: as they are read.
        tokens: the completion's tokens, end token included.
        log_prob: of the completion under the distribution that was sampled, in nats.
        stop: why it ended: eos, stop_string or length.
    """

    prompt: Text
    text: str
    tokens: tuple[int, ...]
    log_prob: float
    stop: str


def sample(
    model: Any,
    prompts: Sequence[Text] | Text,
    num_generations: int = 1,
    tokenizer: Any = None,
    seed: int = 0,
    task: str | Task | None = None,
    device: str | None = None,
    report: Reporter = silent,
    **settings: Any,
) -> list[Sample]:
    """Completions of prompts.

    Args:
        model: as in `keel.evaluate`.
        prompts: texts, or lists of messages.
        num_generations: completions of each prompt.
        tokenizer: of a model in memory.
        seed: of the completions.
        task: the task of the built-in model.
        device: None takes the best there is.
        report: called with (event, facts).
        **settings: of `Sampling`: temperature, top_k, top_p, min_p, max_completion_length, stop_strings.

    Raises:
        UserError: a mistake in what was asked for.
    """
    from keel.core.config import build
    from keel.core.rows import Stop

    listed: list[Text] = [prompts] if isinstance(prompts, str) else list(prompts)
    opened = task if task is not None and not isinstance(task, str) else open_task(TaskSettings(name=task), None, seed)
    if task is not None or model == TINY:
        settings = {"max_completion_length": opened.max_completion_length, **settings}
    sampling = build(Sampling, settings, "sampling")
    policy = open_model(model, opened, tokenizer, device, report)
    encoder = Encoder(policy)
    rows = choose_generator(policy, "auto").generate(
        [encoder.prompt(prompt) for prompt in listed], num_generations, sampling, seed=seed
    )
    out = []
    for i in range(len(rows)):
        tokens = rows.tokens[i][rows.mask[i]].tolist()
        log_prob = float(rows.logp["behaviour"][i][rows.mask[i]].sum())
        stop = Stop(int(rows.stop[i])).name.lower()
        out.append(Sample(listed[int(rows.group[i])], encoder.decode(tokens), tuple(tokens), log_prob, stop))
    return out


def open_model(model: Any, task: Task, tokenizer: Any, device: str | None, report: Reporter = silent) -> LanguageModel:
    """A model by `tiny`, folder, run folder or hub name, or in memory."""
    if isinstance(model, LanguageModel):
        return model
    if model is None or model == TINY:
        model = ensure_base(_base_task(task), report=report)
    if isinstance(model, (str, Path)):
        model = run_checkpoint(Path(model)) or model
    return load(model, tokenizer, device=device)


def run_checkpoint(path: Path) -> Path | None:
    """The newest sound checkpoint of a run's folder; None if `path` is none."""
    if not (path / "config.yaml").is_file():
        return None
    checkpoint, _ = newest_sound(path)
    if checkpoint is None:
        raise RunError("this run has no checkpoint", str(path))
    return checkpoint


def export(run_path: str | Path, target: str | Path) -> Path:
    """Write the final model of a run, adapters merged, so that transformers loads it.

    Raises:
        RunError: no such run, no checkpoint, or the target exists.
    """
    path, target = Path(run_path), Path(target)
    if not path.is_dir():
        raise RunError("there is no such run", str(path), "`keel runs` lists them.")
    if target.exists():
        raise RunError("exists already", str(target), "Choose another folder.")
    model = load(run_checkpoint(path) or path, device="cpu")
    plain = LanguageModel(merged(model), model.tokenizer)
    save(plain, target)
    return target


def _base_task(task: Task) -> Task:
    """On what the built-in model was trained: the task itself, or countdown for one's own data."""
    return load_task(DEFAULT_TASK) if isinstance(task, DataTask) else task


def _named_rewards(reward: Any) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """What goes into the configuration as text, and the functions by name."""
    if reward is None:
        return (), None
    if isinstance(reward, Mapping):
        functions = dict(reward)
    else:
        listed = list(reward) if isinstance(reward, (list, tuple)) else [reward]
        functions = {_reward_name(item): item for item in listed}
        if len(functions) != len(listed):
            raise ConfigError("two reward functions have the same name", "reward", "Give them by name, as a dictionary.")
    texts = tuple(item if isinstance(item, str) else f"{IN_MEMORY}:{name}" for name, item in functions.items())
    return texts, functions


def _reward_name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward.rsplit(":", 1)[-1]
    return getattr(reward, "__name__", type(reward).__name__)


def _with_default_task(config: Configuration) -> Configuration:
    from dataclasses import replace

    return replace(config, task=config.task.model_copy(update={"name": DEFAULT_TASK}))


def _only_task(task: TaskSettings) -> Any:
    """Just enough of a configuration to find reward functions."""

    @dataclass
    class Holder:
        task: TaskSettings

    return Holder(task)


def _finished(path: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "finished" else None


def _check_same(config: Configuration, path: Path) -> None:
    """Refuse to resume under another configuration; the differing keys are named."""
    before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    now = yaml.safe_load(config.to_yaml())
    found = differences(before, now)
    if found:
        raise RunError("the configuration has changed: " + "; ".join(found[:8]), str(path),
                       "Resume with the same settings, or start a run of another name.")  # fmt: skip


def _check_initial(path: Path, initial: LanguageModel, setup: Setup, fresh: bool) -> None:
    """The reference of a resumed run must be the model that it began with."""
    file = path / "initial.json"
    found = checksum(initial.module)
    if fresh:
        file.write_text(json.dumps({"path": str(setup.source) if isinstance(setup.source, (str, Path)) else IN_MEMORY,
                                    "checksum": found}, indent=1), encoding="utf-8")  # fmt: skip
        return
    before = json.loads(file.read_text(encoding="utf-8"))["checksum"]
    if before != found:
        raise RunError("the initial model is not the one that this run began with", str(path),
                       "Give the same --model, unchanged.")  # fmt: skip


def _reopened(path: Path, runs: Path, config: Configuration, summary: dict[str, Any], setup: Setup) -> Run:
    checkpoint, _ = newest_sound(path)
    if checkpoint is None:
        raise RunError("the run is finished, but its checkpoint is gone", str(path))
    model = load_model(config.model, checkpoint, None, config.seed, adapted=config.model.lora_rank > 0)
    with Store(runs / "keel.sqlite", readonly=True) as store:
        stored = store.run(config.name)
        measured = {e.phase: Evaluation.from_json(e.evaluation) for e in store.evaluations(stored.id)}
        metrics = store.metrics(stored.id)
    return Run(path, model.module, model.tokenizer, metrics, summary, measured, config)


def _run_id(store: Store, config: Configuration, resume: bool) -> int:
    if resume:
        with contextlib.suppress(RunError):
            return store.run(config.name).id
    task = config.task.name or config.task.data or IN_MEMORY
    return store.create_run(config.name, config.to_dict(), config.recipe or "custom", task, config.model.path, config.seed)


def _end(session: Session, status: str, save: bool) -> None:
    """What can still be written when a run ends early."""
    assert session.store is not None and session.run_id is not None
    if save:
        save_checkpoint(session)
    with contextlib.suppress(KeelError):
        session.store.finish(session.run_id, status, {"steps": session.position.step})


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Refuse a second process on the same run."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError("another process is working on this run", str(path), "Wait for it, or choose another --name.") from None
        yield


@contextlib.contextmanager
def _tracked(session: Session) -> Iterator[None]:
    """Metrics go to the trackers of the configuration, through Accelerate."""
    names = list(session.config.train.trackers)
    if not names or session.path is None:
        yield
        return
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=names, project_dir=str(session.path), cpu=True)
        accelerator.init_trackers("keel", config={"recipe": str(session.config.recipe), "seed": session.config.seed})
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error), "train.trackers", "Install it: pip install 'keel-rl[trackers]'.") from error
    session.trackers.append(lambda metrics, step: accelerator.log(dict(metrics), step=step))
    try:
        yield
    finally:
        session.trackers.clear()
        accelerator.end_training()


@contextlib.contextmanager
def _stop_on_signal(session: Session) -> Iterator[None]:
    """SIGTERM ends the loop after the step in progress; the checkpoint is written then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = threading.Event()
    session.stopping = told.is_set
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
