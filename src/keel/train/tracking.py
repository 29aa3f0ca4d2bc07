"""Metrics for TensorBoard, W&B, MLflow and the other trackers that Accelerate knows."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from keel.core.errors import ConfigError, nearest
from keel.train.session import Session

WHERE = "train.trackers"
INSTALL = "Install it: pip install 'keel-rl[trackers]'."


@contextlib.contextmanager
def tracked(session: Session) -> Iterator[None]:
    """Give the trackers of the configuration every setting and every step, and close them however the run ends.

    A tracker that fails while the run goes on is left out with a warning: it is not worth a run.

    Raises:
        ConfigError: one cannot be started.
    """
    names = list(session.config.train.trackers)
    if not names or session.path is None:
        yield
        return
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=names, project_dir=str(session.path), cpu=True)
        accelerator.init_trackers("keel", config=flat(session.config.to_dict()))
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"a tracker cannot be started: {what}", WHERE, INSTALL) from error
    for tracker in accelerator.trackers:
        session.trackers.append(_forgiving(session, tracker))
    try:
        yield
    finally:
        session.trackers.clear()
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                _warn(session, tracker, error)


def flat(settings: Any, where: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings under dotted keys, as trackers take them; lists are JSON.

    >>> flat({"train": {"max_steps": 3, "trackers": ["a"]}, "name": None})
    {'train.max_steps': 3, 'train.trackers': '["a"]', 'name': 'null'}
    """
    if isinstance(settings, Mapping):
        out: dict[str, bool | int | float | str] = {}
        for key, value in settings.items():
            out |= flat(value, f"{where}.{key}" if where else str(key))
        return out
    plain = isinstance(settings, (bool, int, float, str))
    return {where: settings if plain else json.dumps(settings, default=str)}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate would leave out without a word.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = dict.fromkeys([*map(str, LoggerType.list()), *LOGGER_TYPE_TO_CLASS])
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no tracker '{name}'.{nearest(name, known)}", WHERE, f"Known: {', '.join(known)}."
            )
        if name in LoggerType.list() and name not in (*installed, "all"):
            raise ConfigError(f"the tracker '{name}' is not installed", WHERE, INSTALL)


def _forgiving(session: Session, tracker: Any) -> Callable[[Mapping[str, float], int], None]:
    failed = False

    def log(metrics: Mapping[str, float], step: int) -> None:
        nonlocal failed
        if failed:
            return
        try:
            tracker.log(dict(metrics), step=step)
        except Exception as error:
            failed = True
            _warn(session, tracker, error)

    return log


def _warn(session: Session, tracker: Any, error: Exception) -> None:
    said = " ".join(str(error).split())[:200]
    name = getattr(tracker, "name", type(tracker).__name__)
    session.report("warning", {"text": f"tracker '{name}' fails and is left out: {type(error).__name__}: {said}"})
