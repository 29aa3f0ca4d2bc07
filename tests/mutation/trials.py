"""Trials of planted faults: tests are collected once, and each fault meets them in a child process of its own.

A child replaces the code of the functions that live in memory, so that every import, wrapper and table that holds them
has the fault. First the tests run without a fault, to learn which lines each of them runs, how long it takes, and
whether it passes; a fault then meets only passing tests that run its lines, the nearest and quickest ones first.
"""

import gc
import io
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from tests.mutation.mutants import Mutant

ROOMS = {  # folder of the source -> folders of the tests that are nearest to it
    "core": ("tests/core/",),
    "divergences": ("tests/divergences/", "tests/parts/test_penalties"),
    "targets": ("tests/targets/",),
    "parts/rewards": ("tests/parts/", "tests/recipes/test_selection", "tests/recipes/test_anchored"),
    "parts": ("tests/parts/",),
}


@dataclass
class Known:
    """What a test did without a fault."""

    passed: bool
    seconds: float
    lines: frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Args:
        fault: the fault.
        status: caught, survived, not run (no test runs its lines), or not planted (its code is not in memory).
        test: the test that failed.
        how: the exception with which it failed; "timeout" for a child that had to be stopped.
        seconds: of the child.
        tests: how many tests it met at most.
    """

    fault: Mutant
    status: str
    test: str = ""
    how: str = ""
    seconds: float = 0.0
    tests: int = 0


@dataclass(frozen=True)
class Failure:
    """What a child raised: its type, and all of it."""

    kind: str
    said: str


@dataclass
class Child:
    """A process at work."""

    pid: int
    pipe: int
    started: float
    limit: float
    task: Any
    heard: io.BytesIO = field(default_factory=io.BytesIO)


def in_children(tasks: Iterator[tuple[Any, Callable[[], Any]]], workers: int, limit: float) -> Iterator[tuple]:
    """(task, result, seconds) of functions that run in forked children and give what JSON has.

    The result of one that raised is a Failure, that of one stopped for time None.
    """
    running: dict[int, Child] = {}
    with selectors.DefaultSelector() as pipes:
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < workers:
                following = next(tasks, None)
                if following is None:
                    exhausted = True
                    break
                child = _fork(*following, limit)
                running[child.pipe] = child
                pipes.register(child.pipe, selectors.EVENT_READ)
            for key, _ in pipes.select(timeout=0.5):
                child = running[key.fd]
                data = os.read(child.pipe, 1 << 16)
                child.heard.write(data)
                if not data:
                    yield _finish(child, pipes, running)
            for child in list(running.values()):
                if time.monotonic() - child.started > child.limit:
                    os.kill(child.pid, signal.SIGKILL)
                    child.heard = io.BytesIO()
                    yield _finish(child, pipes, running)


def _fork(task: Any, work: Callable[[], Any], limit: float) -> Child:
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading, time.monotonic(), limit, task)
    os.close(reading)
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    home = tempfile.mkdtemp(prefix="keel-mutation-")
    os.environ["KEEL_CACHE"] = home
    try:
        found = json.dumps({"result": work()})
    except BaseException as error:  # the parent shows it
        found = json.dumps({"failed": [type(error).__name__, repr(error)]})
    shutil.rmtree(home, ignore_errors=True)
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(found.encode())
    os._exit(0)


def _finish(child: Child, pipes: selectors.BaseSelector, running: dict[int, Child]) -> tuple[Any, Any, float]:
    pipes.unregister(child.pipe)
    os.close(child.pipe)
    os.waitpid(child.pid, 0)
    del running[child.pipe]
    said = json.loads(child.heard.getvalue() or '{"result": null}')
    found = Failure(*said["failed"]) if "failed" in said else said["result"]
    return child.task, found, time.monotonic() - child.started


# -- planting --------------------------------------------------------------------------------------------------------


def plant(fault: Mutant, source: str, path: Path) -> bool:
    """Replaces the code of the living functions; False where none of them has the code of the source."""
    module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path))
    loader = module.__spec__.loader  # type: ignore[union-attr]
    sound, faulty = (loader.source_to_code(text.encode(), str(path)) for text in (source, fault.planted(source)))
    living: dict[CodeType, list[FunctionType]] = defaultdict(list)
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == str(path):
            living[function.__code__].append(function)
    planted = False
    for before, after in _different(sound, faulty):
        for function in living[before]:
            try:
                function.__code__ = after
                planted = True
            except ValueError:  # a closure that lost a variable; the function that makes it has the fault
                pass
    return planted


def _different(sound: CodeType, faulty: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Pairs of functions that are not the same, from the outside in."""
    befores, afters = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (sound, faulty))
    if len(befores) != len(afters):
        return
    for before, after in zip(befores, afters, strict=True):
        if before != after:
            yield before, after
            yield from _different(before, after)


# -- the plugin ------------------------------------------------------------------------------------------------------


class Trials:
    """A plugin of pytest that puts its own loop in place of the run.

    Args:
        faults: in the order in which they are tried.
        sources: text of each file, by its path.
        root: of the project.
        workers: children at a time.
        budget: seconds of tests, as measured without a fault, that a fault meets beyond those nearest to it.
        told: called with each verdict.
    """

    def __init__(
        self,
        faults: list[Mutant],
        sources: dict[str, str],
        root: Path,
        workers: int = 2,
        budget: float = 10.0,
        limit: float = 120.0,
        told: Callable[[Verdict], None] = lambda verdict: None,
    ) -> None:
        self.faults, self.sources, self.root = faults, sources, root
        self.workers, self.budget, self.limit, self.told = workers, budget, limit, told
        self.known: dict[str, Known] = {}
        self.verdicts: list[Verdict] = []
        self.kills: dict[str, Counter] = defaultdict(Counter)
        self.failed: list[tuple[str, str]] = []
        self.took = (0.0, 0.0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """First without faults, then with each of them."""
        items = {item.nodeid: item for item in session.items}
        began = time.monotonic()
        self._learn(list(items.values()))
        middle = time.monotonic()
        for task, found, seconds in in_children(self._tasks(items), self.workers, self.limit):
            self._note(*task, found, seconds)
        self.took = (middle - began, time.monotonic() - middle)
        return True

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        """Notes failures and what failed."""
        outcome = yield
        if outcome.get_result().failed:  # type: ignore[attr-defined]
            self.failed.append((item.nodeid, call.excinfo.typename if call.excinfo else "failed"))

    # -- without a fault -----------------------------------------------------------------------------------------

    def _learn(self, items: list[pytest.Item]) -> None:
        """Runs all tests once, in a few parts for each worker."""
        files = {str(self.root / path): path for path in self.sources}
        size = -(-len(items) // (8 * self.workers)) or 1
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        tasks = ((None, lambda part=part: self._watch(part, files)) for part in parts)
        for _, found, _ in in_children(iter(tasks), self.workers, 1800.0):
            if isinstance(found, Failure) or found is None:
                raise RuntimeError(f"the tests could not run without a fault: {found!r}")
            for name, (passed, seconds, lines) in found.items():
                self.known[name] = Known(passed, seconds, frozenset(map(tuple, lines)))

    def _watch(self, items: list[pytest.Item], files: dict[str, str]) -> dict[str, list]:
        """Of each test whether it passed, its seconds, and the lines that it ran."""
        found = {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            lines: set[tuple[str, int]] = set()

            def local(frame: Any, event: str, _: Any, lines: set = lines) -> Any:
                if event == "line":
                    lines.add((files[frame.f_code.co_filename], frame.f_lineno))
                return local

            def start(frame: Any, event: str, _: Any, local: Any = local, lines: set = lines) -> Any:
                path = files.get(frame.f_code.co_filename)
                if path is None:
                    return None
                lines.add((path, frame.f_lineno))
                return local

            began = time.monotonic()
            sys.settrace(start)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            passed = not any(name == item.nodeid for name, _ in self.failed)
            found[item.nodeid] = [passed, time.monotonic() - began, sorted(lines)]
        return found

    # -- with one ------------------------------------------------------------------------------------------------

    def _tasks(self, items: dict[str, pytest.Item]) -> Iterator[tuple[Any, Callable[[], Any]]]:
        for fault in self.faults:
            chosen = self._chosen(fault)
            if not chosen:
                self._tell(Verdict(fault, "not run"))
                continue
            meeting = [items[name] for name in chosen]
            yield (fault, len(chosen)), lambda fault=fault, meeting=meeting: self._try(fault, meeting)

    def _chosen(self, fault: Mutant) -> list[str]:
        """Passing tests that run the lines of a fault: the nearest, then others of every kind within the budget."""
        lines = {(fault.path, line) for line in range(fault.line, fault.last + 1)}
        running = {name: known for name, known in self.known.items() if known.passed and known.lines & lines}
        proven = self.kills[f"{fault.path}:{fault.scope}"]
        near = nearest_tests(fault.path)
        order = sorted(running, key=lambda name: (-proven[name], not name.startswith(near), running[name].seconds))
        chosen = [name for name in order if proven[name] or name.startswith(near)]
        kinds: dict[str, list[str]] = defaultdict(list)
        for name in order[len(chosen) :]:
            kinds[name.split("[")[0]].append(name)
        left, others = self.budget, []
        for turn in range(max(map(len, kinds.values()), default=0)):
            for names in kinds.values():
                if turn < len(names) and (left := left - running[names[turn]].seconds) > 0:
                    others.append(names[turn])
        return chosen + others

    def _try(self, fault: Mutant, items: list[pytest.Item]) -> tuple[str, str, str]:
        if not plant(fault, self.sources[fault.path], self.root / fault.path):
            return "not planted", "", ""
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return "caught", *self.failed[0]
        return "survived", "", ""

    def _note(self, fault: Mutant, count: int, found: Any, seconds: float) -> None:
        if found is None:
            found = ("caught", "", "timeout") if seconds > self.limit else ("caught", "", "crash")
        if isinstance(found, Failure):
            found = ("caught", "", found.kind)
        status, test, how = found
        if test:
            self.kills[f"{fault.path}:{fault.scope}"][test] += 1
        self._tell(Verdict(fault, status, test, how, round(seconds, 2), count))

    def _tell(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self.told(verdict)


def nearest_tests(path: str) -> tuple[str, ...]:
    """Beginnings of the names of the tests that are nearest to a file of the source; its doctests are among them."""
    inner = path.removeprefix("src/keel/")
    room = next((tests for folder, tests in ROOMS.items() if inner.startswith(folder + "/")), ("tests/",))
    return (*room, path)
