"""Reward functions under a time limit: in a process of their own, or in a thread."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from keel.core.errors import ConfigError, DataError, RewardError, describe
from keel.parts.rewards.functions import (
    GIVEN,
    Parameters,
    RewardFunction,
    call_reward,
    load_reward,
    parameters,
)

_START = 120.0  # seconds for the imports of a worker process
_BOOT = (
    "import json, sys; reward, sys.path[:] = json.loads(sys.argv[1]); "
    "from keel.parts.rewards.serve import serve; serve(reward)"
)


class RewardTimeout(RewardError):
    """A reward function took longer than its time limit.

    `fatal` says that the function still runs in a thread, which cannot be stopped: the run has to end (after a
    checkpoint).
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None, fatal: bool = False):
        super().__init__(what, where, fix)
        self.fatal = fatal


class RewardWorkerDied(RewardError):
    """The worker process ended while its function ran; another one is started for the next call."""


def isolate(reward: str | Callable[..., Any], timeout: float = 60.0) -> RewardWorker | RewardThread:
    """A reward function under a time limit: `module:function` in a worker process, a callable in a thread.

    Args:
        reward: see `load_reward`.
        timeout: seconds for one call, which scores a whole batch.
    """
    if isinstance(reward, RewardWorker | RewardThread):
        return reward
    return RewardWorker(reward, timeout) if isinstance(reward, str) else RewardThread(reward, timeout)


class RewardWorker:
    """A reward function in a worker process, which is killed after the time limit and started again.

    The process is a fresh interpreter with the import path of this one. It is given batches as lines of JSON, only
    what the function's signature accepts. What the function prints appears on standard error.

    Args:
        reward: `module:function` or `file.py:function`, found from the current directory.
        timeout: seconds for one call.

    Raises:
        ConfigError: the function is not found, or its module cannot be imported.
    """

    def __init__(self, reward: str, timeout: float = 60.0):
        self.reward, self.timeout = reward, timeout
        self.parameters = Parameters(None, frozenset())
        self._directory = os.getcwd()
        self._lock = threading.Lock()
        self._worker: _Process | None = None
        self._start()

    def __call__(
        self, /, prompts: Any = (), completions: Any = (), completion_ids: Any = (), **columns: Any
    ) -> list[float | None]:
        """Score a batch in the worker.

        Raises:
            RewardTimeout: after `timeout` seconds; not fatal.
            RewardWorkerDied: the process ended.
            RewardError: the function raised, or returned something that is no list of numbers.
            DataError: a column cannot be written as JSON.
        """
        given = dict(zip(GIVEN, (prompts, completions, completion_ids), strict=True))
        accepted = self.parameters.accepted
        request: dict[str, Any] = {
            key: value if accepted is None or key in accepted or key == "completions" else []
            for key, value in given.items()
        }
        request["columns"] = {key: value for key, value in columns.items() if accepted is None or key in accepted}
        line = _as_json(request)
        with self._lock:
            worker = self._worker or self._start()
            reply = worker.ask(line, self.timeout)
            if reply is None:
                self._worker = None
                raise self._lost(worker)
        if "error" in reply:
            raise RewardError(reply["error"], where=self.reward)
        return reply["values"]

    def close(self) -> None:
        """End the worker process; a later call starts another one."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> _Process:
        worker = _Process(self.reward, self._directory)
        reply = worker.read(_START)
        if reply is None:
            raise self._lost(worker)
        if "refused" in reply:
            worker.close()
            raise ConfigError(*reply["refused"])
        accepted = reply["accepted"]
        self.parameters = Parameters(None if accepted is None else frozenset(accepted), frozenset(reply["required"]))
        self._worker = worker
        weakref.finalize(self, worker.close)
        return worker

    def _lost(self, worker: _Process) -> RewardError:
        if worker.timed_out:
            fix = "Raise the reward's time limit if it is not stuck."
            return RewardTimeout(f"no result after {worker.timed_out:g} s.", where=self.reward, fix=fix)
        status = worker.status()
        ended = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        said = " ".join("".join(worker.said).split())
        return RewardWorkerDied(f"the worker process {ended}." + (f" It said: {said}" if said else ""), self.reward)


class _Process:
    """The process behind a `RewardWorker`, its pipes, and what it said last."""

    def __init__(self, reward: str, directory: str):
        self.timed_out = 0.0
        self.said: collections.deque[str] = collections.deque(maxlen=10)
        self._process = subprocess.Popen(
            # -P: without the current directory on the path no file there can pass for a standard module
            [sys.executable, "-P", "-c", _BOOT, json.dumps([reward, [os.path.abspath(path) for path in sys.path]])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            start_new_session=True,  # a group of its own, so that what the function starts is killed with it
        )
        self._pump = threading.Thread(target=_pass_on, args=(self._process.stderr, self.said), daemon=True)
        self._pump.start()

    def ask(self, line: bytes, timeout: float) -> dict[str, Any] | None:
        """The reply to a request; None if the process was killed after `timeout` seconds, or ended."""
        return self._within(timeout, line)

    def read(self, timeout: float) -> dict[str, Any] | None:
        """The next line, or None as for `ask`."""
        return self._within(timeout, b"")

    def _within(self, timeout: float, line: bytes) -> dict[str, Any] | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(timeout, self._expire, [timeout])
        timer.daemon = True
        timer.start()
        try:
            if line:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except OSError:
            reply = b""
        except BaseException:  # an interrupt leaves a reply in the pipe that nobody asked for
            self.kill()
            raise
        finally:
            timer.cancel()
            timer.join()  # if it has gone off, it has said so before anybody looks
        if reply.endswith(b"\n") and not self.timed_out:
            return json.loads(reply)
        self.kill()
        return None

    def _expire(self, timeout: float) -> None:
        self.timed_out = timeout
        self.kill()

    def status(self) -> int:
        """The exit status, once the process has ended and what it said has been read."""
        status = self._process.wait()
        self._pump.join(timeout=1.0)
        return status

    def kill(self) -> None:
        """Kill the process and everything it started."""
        if self._process.returncode is not None:
            return  # its number may belong to another process by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self) -> None:
        """Kill the process and release its pipes."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _pass_on(stderr: Any, said: collections.deque[str]) -> None:
    for line in stderr:
        text = line.decode(errors="replace")
        said.append(text)
        with contextlib.suppress(OSError, ValueError):  # nobody may be listening, but the pipe must not fill
            sys.stderr.write(text)


def _as_json(request: dict[str, Any]) -> bytes:
    try:
        return json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError):
        for key, values in request["columns"].items():
            for row, value in enumerate(values):
                try:
                    json.dumps(value)
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f"cannot be sent to the worker process: {error} (row {row} of the batch).",
                        where=f"column {key}",
                        fix="Pass the reward as a Python callable, which runs in a thread, or leave the column out.",
                    ) from error
        raise


class RewardThread:
    """A Python callable in a thread under a time limit.

    A thread cannot be killed: after the time limit the error is fatal, and every later call raises it again. Signals
        do not work in a thread; a function that needs them is given as `module:function`.

    Args:
        function: the reward function.
        timeout: seconds for one call.
    """

    def __init__(self, function: Callable[..., Any], timeout: float = 60.0):
        self.function, self.timeout = load_reward(function), timeout
        self.parameters = parameters(self.function)
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._stuck: RewardTimeout | None = None
        threading.Thread(target=_work, args=(self._calls, self.function), daemon=True).start()

    def __call__(
        self, /, prompts: Any = (), completions: Any = (), completion_ids: Any = (), **columns: Any
    ) -> list[float | None]:
        """Score a batch in the thread.

        Raises:
            RewardTimeout: after `timeout` seconds; fatal.
            Exception: whatever the function raises.
        """
        if self._stuck is not None:
            raise self._stuck
        call = _Call((prompts, completions, completion_ids, columns))
        self._calls.put(call)
        if not call.done.wait(self.timeout):
            self._stuck = RewardTimeout(
                f"no result after {self.timeout:g} s, and a thread cannot be stopped.",
                where=f"reward {getattr(self.function, '__qualname__', type(self.function).__name__)}",
                fix="Give it as module:function, which runs in a process that can be killed, or raise its time limit.",
                fatal=True,
            )
            raise self._stuck
        if call.error is None:
            return call.values
        if "signal" in str(call.error) and "thread" in str(call.error):
            fix = "Signals do not work in a thread; give the reward as module:function, which runs in a process."
            raise RewardError(describe(call.error) + ".", fix=fix) from call.error
        raise call.error

    def close(self) -> None:
        """Let the thread end."""
        self._calls.put(_Call(None))


class _Call:
    """A batch on its way through the thread, and what came of it."""

    def __init__(self, arguments: tuple[Sequence[Any], Sequence[Any], Sequence[Any], dict[str, Any]] | None):
        self.arguments = arguments
        self.done = threading.Event()
        self.values: list[float | None] = []
        self.error: BaseException | None = None


def _work(calls: queue.SimpleQueue[_Call], function: RewardFunction) -> None:
    while (call := calls.get()).arguments is not None:
        try:
            call.values = call_reward(function, *call.arguments)
        except SystemExit as error:
            call.error = RewardError(f"called sys.exit({error.code!r}).")
        except BaseException as error:
            call.error = error
        call.done.set()
