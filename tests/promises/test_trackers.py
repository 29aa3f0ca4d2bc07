"""Trackers are given the configuration and every step, are closed however the run ends, and never end it."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from keel.core.errors import ConfigError

NAMES = ("wandb", "mlflow", "trackio")


class Recorder:
    """What the three packages offer of what Accelerate calls, with all calls written down."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def note(self, what, *values):
        self.calls.append((what, *values))
        if self.fail_at == what:
            raise ConnectionError("the server is gone")

    def module(self, name):
        run = SimpleNamespace(
            log=lambda values, step=None, **_: self.note("log", dict(values), step), finish=lambda: self.note("finish")
        )
        known = {
            "init": lambda **given: (self.note("init", given), run)[1],
            "config": SimpleNamespace(update=lambda values, **_: self.note("config", dict(values))),
        }
        mlflow = MagicMock()
        mlflow.search_experiments = lambda **_: []
        mlflow.start_run = lambda **given: self.note("init", given)
        mlflow.log_params = lambda values: self.note("config", dict(values))
        mlflow.log_metrics = lambda values, step=None, **_: self.note("log", dict(values), step)
        mlflow.end_run = lambda: self.note("finish")
        mlflow.utils.validation.MAX_PARAM_VAL_LENGTH = 6000
        mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 100
        return mlflow if name == "mlflow" else SimpleNamespace(**known)

    def of(self, what):
        return [call[1:] for call in self.calls if call[0] == what]


@pytest.fixture
def install(monkeypatch):
    """Put a recorder in the place of a package."""
    import accelerate.tracking as tracking
    from accelerate.utils import LoggerType

    def put(name, fail_at=None):
        recorder = Recorder(fail_at)
        monkeypatch.setitem(sys.modules, name, recorder.module(name))
        monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, LoggerType(name)])
        return recorder

    return put


def configuration(recorder):
    found = {}
    for (values,) in recorder.of("config"):
        found |= values
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_configuration_and_every_step_arrive(train, install, name):
    recorder = install(name)
    run = train(max_steps=3, **{"train.trackers": (name,)})
    assert len(recorder.of("init")) == 1
    told = configuration(recorder)
    assert (told["recipe.name"], told["train.learning_rate"], told["method.rollout.num_prompts"]) == ("grpo", 1e-2, 2)
    assert told["name"] == "run" and told["seed"] == 0
    logged = recorder.of("log")
    assert [step for _, step in logged] == [1, 2, 3]
    for values, step in logged:
        assert values["loss"] == dict(run.metrics["loss"])[step]
    assert recorder.calls[-1] == ("finish",) and len(recorder.of("finish")) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_fails_closes_its_trackers(train, install, name):
    recorder = install(name)

    def power_cut(event, facts):
        if event == "step" and facts["step"] == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(max_steps=3, report=power_cut, **{"train.trackers": (name,)})
    assert [step for _, step in recorder.of("log")] == [1, 2]
    assert recorder.calls[-1] == ("finish",)


@pytest.mark.parametrize("fail_at", ["log", "finish"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_does_not_end_the_run_and_is_named(train, install, name, fail_at):
    recorder = install(name, fail_at)
    said = []
    run = train(
        max_steps=3,
        report=lambda event, facts: said.append((event, facts)),
        **{"train.trackers": (name,)},
    )
    assert run.summary["status"] == "finished"
    told = [facts["text"] for event, facts in said if event == "warning"]
    assert len(told) == 1 and f"tracker '{name}' fails" in told[0] and "the server is gone" in told[0]
    assert len(recorder.of("log")) == (1 if fail_at == "log" else 3) and recorder.of("finish")


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_does_not_start_is_told_before_training(train, install, name):
    recorder = install(name, "init")
    with pytest.raises(ConfigError, match=r"train\.trackers: a tracker cannot be started: the server is gone"):
        train(**{"train.trackers": (name,)})
    assert not recorder.of("log")


def test_one_of_two_trackers_fails_and_the_other_goes_on(train, install):
    first, second = install("wandb", "log"), install("trackio")
    train(max_steps=3, **{"train.trackers": ("wandb", "trackio")})
    assert len(first.of("log")) == 1 and [step for _, step in second.of("log")] == [1, 2, 3]
    assert first.of("finish") and second.of("finish")


def test_a_tracker_that_is_not_installed_is_an_error_before_there_is_a_run(train, monkeypatch, tmp_path):
    """Accelerate would leave it out without a word."""
    import accelerate.tracking as tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"'wandb' is not installed.*keel-rl\[trackers\]"):
        train(**{"train.trackers": ("wandb",)})
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        train(**{"train.trackers": ("wandbb",)})
    assert not (tmp_path / "runs").exists()


def test_tensorboard_reads_back_what_was_written(train):
    """The real one: every step of every metric, and the configuration."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(max_steps=3, **{"train.trackers": ("tensorboard",)})
    (folder,) = {path.parent for path in run.path.glob("keel/events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss", "reward", "grad_norm", "entropy"):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in run.metrics[name]]
    (settings,) = run.path.rglob("hparams.yml")
    assert "train.learning_rate: 0.01" in settings.read_text()
