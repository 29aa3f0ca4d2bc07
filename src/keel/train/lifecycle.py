"""A run from its first line to its last: its folder, its lock, its checkpoints, its measurements, how it ends."""

import contextlib
import errno
import fcntl
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from keel.core.choice import counter_seed
from keel.core.errors import CheckpointError, KeelError, RunError, nearest
from keel.core.plain import finite
from keel.core.policy import PolicyModel
from keel.evaluate.evaluation import Evaluation
from keel.models.language import LanguageModel
from keel.models.load import checksum
from keel.parts.rewards.worker import RewardTimeout
from keel.report.run import write_report
from keel.store.store import Store
from keel.train.beginning import check_data, check_initial
from keel.train.checkpoint import (
    checkpoints,
    damage,
    newest_sound,
    remove_unfinished,
    restore,
    save_checkpoint,
    write_text,
)
from keel.train.configuration import Configuration, differences, read_file
from keel.train.episodes import evaluation_limits
from keel.train.held_out import beside, measure_preferences
from keel.train.limits import is_over
from keel.train.measure import measure_policy
from keel.train.online import run
from keel.train.reward_model import check_reward_model, measure_reward_model, write_reward_model
from keel.train.session import Reporter, Session, build_session, reward_functions, silent
from keel.train.setup import IN_MEMORY, Setup, check_reward_count, check_rewards, load_model
from keel.train.strengths import measure_strengths
from keel.train.tracking import check_trackers, tracked
from keel.train.watch import Watch


class RunBusy(RunError):
    """Another process is working on the run."""


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


@contextlib.contextmanager
def _disk_full_explained() -> Iterator[None]:
    """A full disk, whatever was being written, becomes an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"cannot be written ({error.strerror})",
            str(error.filename or "a file of the run"),
            "Make room on the disk (or raise its quota), then continue with --resume.",
        ) from error


@_disk_full_explained()
def execute(setup: Setup, runs: Path, *, resume: bool = False, report: Reporter = silent) -> Run:
    """Run a setup to its end, in a folder of its own."""
    config = setup.config
    path = runs / config.name
    finished = _finished(path) if resume else None
    if finished is not None:
        _check_same(config, path)
        check_data(path, setup)
        report("note", {"text": f"{path} is finished"})
        return _reopened(path, runs, config, finished)
    check_trackers(config.train.trackers)
    check_rewards(setup)
    fresh = _made(path, resume)
    with _only_one(path), Store(runs / "keel.sqlite") as store:
        try:
            session = _open(setup, path, store, resume, report)
        except BaseException:
            if fresh and not checkpoints(path):
                shutil.rmtree(path, ignore_errors=True)
            raise
        with _stop_on_signal(session):
            try:
                return _carry_out(setup, session, report)
            except KeyboardInterrupt:  # in the middle of an update, perhaps: nothing of that may be saved
                _end(session, "stopped", save=False)
                raise Stopped("stopped at once; continue with --resume", str(path)) from None
            except RewardTimeout:
                session.give_up_step()
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


_NO_FOLDER = {
    errno.ENOTDIR: ("a part of this path is a file, and runs are folders", "Give a folder as --runs."),
    errno.EACCES: ("a run's folder cannot be made here: permission denied", "Give a folder of your own as --runs."),
    errno.EROFS: ("a run's folder cannot be made here: nothing can be written", "Give another folder as --runs."),
    errno.ENAMETOOLONG: ("this path is too long", "Give a shorter --name or --runs."),
}


def _made(path: Path, resume: bool) -> bool:
    """Make the folder of a run; whether it was not there."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise RunError("is a file, and a run is a folder", str(path), "Choose another --name.") from None
        if not resume:
            raise RunError(
                "there is a run of that name", str(path), "Continue it with --resume, or choose another --name."
            ) from None
        return False
    except OSError as error:
        usual = f"a run's folder cannot be made here: {error.strerror}", "Give another folder as --runs."
        what, fix = _NO_FOLDER.get(error.errno or 0, usual)
        raise RunError(what, str(path), fix) from None
    return True


def _open(setup: Setup, path: Path, store: Store, resume: bool, report: Reporter) -> Session:
    """A session at the beginning, or at the newest sound checkpoint."""
    config = setup.config
    checkpoint = None
    if resume:
        if (path / "config.yaml").exists():
            _check_same(config, path)
            check_data(path, setup)
        remove_unfinished(path)
        checkpoint, complaints = newest_sound(path)
        if checkpoint is None and complaints:
            raise CheckpointError(
                "none of its checkpoints is sound: " + "; ".join(complaints),
                str(path),
                "Nothing was changed. Put back a copy of a checkpoint, or start a run of another --name.",
            )
        for complaint in complaints:
            report("warning", {"text": complaint})
        if checkpoint is None:
            others = [place.name for place in path.parent.iterdir() if (place / "config.yaml").is_file()]
            text = f"{path} has no checkpoint: starting from the beginning.{nearest(path.name, others)}"
            report("note", {"text": text})
        else:
            report("note", {"text": f"continuing from {checkpoint}"})
    start = load_model(config.model, setup.source, setup.tokenizer, config.seed)
    initial = start
    policy = start
    if checkpoint is not None:
        policy = load_model(config.model, checkpoint, None, config.seed, adapted=config.model.lora_rank > 0)
    if checkpoint is None or not (path / "config.yaml").exists():
        write_text(path / "config.yaml", config.to_yaml())
    check_initial(path, initial, setup, fresh=checkpoint is None)
    session = build_session(
        config, setup.task, policy, setup.rewards, initial if checkpoint is not None else None, setup.preferences
    )
    if config.method.kind == "online":
        check_reward_count(config.method, session.rewards)
    if config.method.kind == "reward":
        check_reward_model(config.method, policy)
    session.path, session.store, session.report = path, store, report
    for name, item in config.method.controllers.items():
        if getattr(item, "seeded", False):  # one that draws
            session.controller_states[name] = item.init(config.seed)
    session.run_id = _run_id(store, config, resume)
    if checkpoint is not None:
        restore(session, checkpoint)
    else:
        measure_strengths(session)
    store.rewind(session.run_id, session.position.step)
    session.watch = Watch(config.to_dict(), store.metrics(session.run_id))
    return session


def _carry_out(setup: Setup, session: Session, report: Reporter) -> Run:
    config, store, run_id, path = session.config, session.store, session.run_id, session.path
    assert store is not None and run_id is not None and path is not None
    report("start", {"config": config, "session": session})
    for note in session.preferences.notes if session.preferences is not None else ():
        report("warning", {"text": note})
    measured = {e.phase: Evaluation.from_json(e.evaluation) for e in store.evaluations(run_id)}
    wanted = config.evaluate if session.rewards or config.method.kind != "online" else None
    fresh = session.position.step == 0 and "before" not in measured
    if wanted is not None and wanted.before and fresh and (found := _measure(session, setup, "before", report)):
        measured["before"] = found
    session.measure = lambda phase: _measure(session, setup, phase, report)
    with tracked(session):
        report(
            "phase",
            {"name": "train", "steps": config.train.max_steps, "start": session.position.step, "text": config.name},
        )
        run(session)
    if not is_over(session):
        raise Stopped(f"stopped at step {session.position.step}; continue with --resume", str(path))
    save_checkpoint(session)
    if config.method.kind == "reward":
        write_reward_model(session, lambda: _initial_reference(setup, session))
    if wanted is not None and wanted.after and (found := _measure(session, setup, "after", report)) is not None:
        measured["after"] = found
    return _finish(session, measured, report)


def _measure(session: Session, setup: Setup, phase: str, report: Reporter) -> Evaluation | None:
    """An evaluation on held-out prompts, stored; None where there is nothing to measure with."""
    config = session.config
    if config.method.kind == "reward":
        return _measure_comparisons(session, phase, report)
    rewards = session.rewards or reward_functions(config.task, session.task, setup.rewards)
    held_out = len(session.task.held_out) - config.evaluate.skip
    sampled, compared = bool(rewards and held_out > 0), session.preferences is not None
    if not sampled and not compared:
        return None
    rollout = config.method.rollout
    length = config.evaluate.max_completion_length or (
        rollout.max_completion_length if rollout is not None else session.task.max_completion_length
    )
    count = min(config.evaluate.num_prompts, held_out)
    report("phase", {"name": phase, "steps": count, "text": f"measuring {phase} training"})
    session.begun = None  # the step before this is done

    def progress(done: int, total: int) -> None:
        if session.stopping():
            raise Stopped(f"stopped while measuring {phase} training; continue with --resume", str(session.path))
        report("progress", {"done": done, "total": total})

    reference: PolicyModel | None = session.sources.get("ref")
    if reference is None and phase != "before" and setup.source is not session.policy.module:
        reference = _initial_reference(setup, session)
    origin = session.policy if phase == "before" else reference
    evaluation = (
        measure_policy(
            session.policy,
            session.task,
            rewards,
            config.evaluate,
            encoder=session.encoder,
            max_completion_length=length,
            seed=counter_seed(config.seed if (drawn := config.evaluate.draw_seed) is None else drawn, "evaluate"),
            reference=origin,
            generator=config.train.generator,
            max_tokens=session.engine.max_tokens,
            progress=progress,
            hidden=session.hidden,
            limits=evaluation_limits(session.task, rollout, session.policy.context_length, length),
        )
        if sampled
        else None
    )
    evaluation = beside(evaluation, measure_preferences(session, origin, progress) if compared else None)
    if evaluation is None:
        return None
    assert session.store is not None and session.run_id is not None
    session.store.log_evaluation(session.run_id, session.position.step, phase, evaluation.to_json())
    report("evaluation", {"phase": phase, "evaluation": evaluation})
    return evaluation


def _measure_comparisons(session: Session, phase: str, report: Reporter) -> Evaluation | None:
    """A reward model on the held-out comparisons, stored; None without any."""
    assert session.preferences is not None and session.store is not None and session.run_id is not None
    count = min(session.config.evaluate.num_prompts, len(session.preferences.held_out))
    report("phase", {"name": phase, "steps": count, "text": f"measuring {phase} training"})
    found = measure_reward_model(session, lambda done, total: report("progress", {"done": done, "total": total}))
    if found is not None:
        session.store.log_evaluation(session.run_id, session.position.step, phase, found.to_json())
        report("evaluation", {"phase": phase, "evaluation": found})
    return found


def _initial_reference(setup: Setup, session: Session) -> LanguageModel | None:
    """The model before training, for the KL of the last evaluation; one given in memory was trained in place."""
    if not isinstance(setup.source, (str, Path)):
        return None
    model = load_model(session.config.model, setup.source, None, session.config.seed, adapted=None)
    model.module.requires_grad_(False)
    return model


def _finish(session: Session, measured: dict[str, Evaluation], report: Reporter) -> Run:
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
        **({"notes": list(session.preferences.notes)} if session.preferences is not None else {}),
        **{phase: evaluation.to_json()["metrics"] for phase, evaluation in measured.items()},
    }
    store.finish(run_id, "finished", summary)
    metrics = store.metrics(run_id)
    write_report(path)
    write_text(path / "summary.json", json.dumps(finite(summary), indent=1))
    report("done", {"summary": summary, "evaluations": measured, "path": path, "metrics": metrics})
    return Run(path, session.policy.module, session.policy.tokenizer, metrics, summary, measured, config)


def _finished(path: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if its last checkpoint is damaged, so that its last steps are done again."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("status") != "finished":
        return None
    return summary if damage(path / str(summary.get("checkpoint"))) is None else None


def _check_same(config: Configuration, path: Path) -> None:
    """Refuse to resume under another configuration; the differing keys are named."""
    found = differences(read_file(path / "config.yaml"), yaml.safe_load(config.to_yaml()))
    if found:
        raise RunError(
            "the configuration has changed: " + "; ".join(found[:8]),
            str(path),
            "Resume with the same settings, or start a run of another name.",
        )


def _reopened(path: Path, runs: Path, config: Configuration, summary: dict[str, Any]) -> Run:
    model = load_model(
        config.model, path / summary["checkpoint"], None, config.seed, adapted=config.model.lora_rank > 0
    )
    with Store(runs / "keel.sqlite", readonly=True) as store:
        stored = store.run(config.name)
        measured = {e.phase: Evaluation.from_json(e.evaluation) for e in store.evaluations(stored.id)}
        metrics = store.metrics(stored.id)
    return Run(path, model.module, model.tokenizer, metrics, summary, measured, config)


def _run_id(store: Store, config: Configuration, resume: bool) -> int:
    if resume:
        with contextlib.suppress(RunError):
            return store.run(config.name).id
    data = config.task.data or IN_MEMORY
    task = config.task.name or (data if isinstance(data, str) else " + ".join(data))
    return store.create_run(
        config.name, config.to_dict(), config.recipe or "custom", task, config.model.path, config.seed
    )


def _end(session: Session, status: str, save: bool) -> None:
    """What can still be written when a run ends early."""
    assert session.store is not None and session.run_id is not None
    try:
        if save:
            save_checkpoint(session)
    finally:
        with contextlib.suppress(KeelError):
            session.store.finish(session.run_id, status, {"steps": session.position.step})


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Refuse a second process on the same run."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunBusy(
                "another process is working on this run", str(path), "Wait for it, or choose another --name."
            ) from None
        yield


@contextlib.contextmanager
def _stop_on_signal(session: Session) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the loop after the step in progress; a second Ctrl-C ends it at once.

    Told a second time by SIGTERM the run still writes its checkpoint first.
    """
    told = threading.Event()

    def interrupt(*_: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()
        session.report("warning", {"text": "stopping after this step; interrupt again to stop at once"})

    session.stopping = told.is_set
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {signal.SIGTERM: lambda *_: told.set(), signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
