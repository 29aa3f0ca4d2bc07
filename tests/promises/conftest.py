"""Runs that can be attacked: in this process, or in one of their own that may be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.promises.runs import start, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Folder of an untrained model of some thousand parameters."""
    return write_model(tmp_path_factory.mktemp("promises") / "model")


@pytest.fixture
def train(model, tmp_path):
    """`keel.train` on the small model, in this process."""
    return lambda recipe="grpo", **settings: start(
        settings.pop("model", model), tmp_path / "runs", recipe, settings.pop("report", None), **settings
    )


@dataclass
class Process:
    """A run in a process of its own."""

    zygote: "Zygote"
    pid: int
    log: Path
    status: int | None = None

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        if self.status is None:
            self.status = self.zygote.ask({"wait": self.pid})
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; until it was waited for, its number belongs to nobody else."""
        if self.status is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it has written to standard error so far."""
        return self.log.read_text()

    def until(self, words: str, seconds: float = 60.0) -> None:
        """Wait until it has said something."""
        end = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < end, f"it did not say {words!r} but: {self.said}"
            time.sleep(0.01)


class Zygote:
    """The process that forks runs; see `zygote.py`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def ask(self, order: dict[str, Any]) -> int:
        """Send an order; its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="session")
def zygote():
    """One for all tests."""
    found = Zygote()
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait(timeout=30)


@pytest.fixture
def launch(zygote, model, tmp_path):
    """Start a run in a process of its own; it is killed at the end of the test at the latest."""
    started: list[Process] = []

    def begin(runs: Path | None = None, attack: dict[str, Any] | None = None, **settings: Any) -> Process:
        log = tmp_path / f"said-{len(started)}"
        log.touch()
        order = {"model": model, "runs": str(runs or tmp_path / "runs"), "log": str(log), "settings": settings}
        process = Process(zygote, zygote.ask({**order, **(attack or {})}), log)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
