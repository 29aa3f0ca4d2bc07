"""Running the cells that are missing: side by side, each once, from checkpoints, whatever happens in between."""

import contextlib
import fcntl
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from keel.compare.cell import BUSY
from keel.compare.outcomes import Budget
from keel.compare.plan import Cell
from keel.compare.record import finished_run, place
from keel.compare.timing import Times, kind_of, makespan, remember
from keel.compare.workers import Launch, Order, Room, Worker, failure
from keel.core.errors import KeelError
from keel.store.store import Store
from keel.train.checkpoint import checkpoints
from keel.train.lifecycle import Stopped

DEATHS = 2  # times that a cell whose process was killed goes on from its checkpoint, before it counts as failed
POLL = 0.1  # seconds between two looks at the workers
LOOK = 1.0  # seconds between two looks at the store
STOPPED = (143, -signal.SIGTERM, -signal.SIGINT)  # exit statuses of a worker that was told to stop


class Display(Protocol):
    """What a person sees of the cells."""

    def progress(self, running: Mapping[str, float], done: int, total: int, left: float | None) -> None:
        """Called now and then: the share done of each cell that runs, and seconds left."""
        ...

    def ended(self, cell: Cell, entry: Mapping[str, Any], done: int, total: int) -> None:
        """A cell is finished, or has failed."""
        ...

    def note(self, text: str) -> None:
        """Something to know."""
        ...


@dataclass
class Running:
    """A cell that is being run.

    Args:
        order: what the worker was told.
        worker: who does it.
        slot: which place it has.
        began: by the monotonic clock.
        done: share of it that was done before.
    """

    order: Order
    worker: Worker
    slot: int
    began: float
    done: float = 0.0


@dataclass
class Cells:
    """Runs cells until all are finished or have failed.

    Args:
        runs: folder of all runs.
        folder: that of the comparison, for orders and logs.
        budget: of each cell.
        room: how many at a time.
        launch: starts a worker.
        display: what is seen.
        stopping: whether to stop.
        times: of the kinds of cells, where they are known.
        entries: of the cells by "arm/seed", changed in place; `save` is called after every change.
    """

    runs: Path
    folder: Path
    budget: Budget
    room: Room
    launch: Launch
    display: Display
    stopping: "Stopping"
    times: Mapping[str, Times]
    entries: dict[str, dict[str, Any]]
    save: Any = lambda: None
    _deaths: dict[str, int] = field(default_factory=dict)
    _running: dict[str, Running] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell], retry_failed: bool = False) -> None:
        """Run what is missing.

        Args:
            cells: in the order in which they are begun.
            retry_failed: those that failed before, too.

        Raises:
            Stopped: it was told to; all workers have ended, their checkpoints are written.
        """
        total, waiting = len(cells), self._missing(cells, retry_failed)
        looked = 0.0
        try:
            while waiting or self._running:
                if self.stopping.told:
                    self._stop()
                self._begin(waiting)
                for cell in [cell for cell in cells if cell.name in self._running]:
                    self._look_at(cell, waiting, total)
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    done = total - len(waiting) - len(self._running)
                    self.display.progress(self._shares(), done, total, self._left(waiting))
                if waiting or self._running:
                    self.stopping.wait(POLL)
        finally:
            for one in self._running.values():
                one.worker.kill()

    def state(self, cell: Cell) -> str:
        """finished, failed, begun (with a checkpoint), running (elsewhere), or new."""
        with self._store() as store:
            if finished_run(store, cell.name) is not None:
                return "finished"
        if self.entries.get(place(cell.arm.name, cell.seed), {}).get("error"):
            return "failed"
        if locked_elsewhere(self.runs / cell.name):
            return "running"
        return "begun" if checkpoints(self.runs / cell.name) else "new"

    def seconds(self, cells: Sequence[Cell]) -> float | None:
        """How long the cells will take together; None where a time is not known."""
        known = [self.times.get(kind_of(cell, self.room)) for cell in cells]
        if any(times is None for times in known):
            return None
        each = [t.cell(self.budget, self._done(c)) for t, c in zip(known, cells, strict=True) if t is not None]
        return makespan(each, self.room.workers)

    # The loop's steps

    def _missing(self, cells: Sequence[Cell], retry_failed: bool) -> list[Cell]:
        waiting = []
        for cell in cells:
            entry = self.entries.setdefault(place(cell.arm.name, cell.seed), {})
            if entry.get("run") != cell.name or (retry_failed and "error" in entry):
                entry.clear()
            entry.update(run=cell.name, key=cell.key)
            state = self.state(cell)
            if state == "finished":
                entry.pop("error", None)
            elif state != "failed":
                waiting.append(cell)
        self.save()
        return waiting

    def _begin(self, waiting: list[Cell]) -> None:
        """Give free slots to cells that nobody else is at."""
        for cell in list(waiting):
            free = set(range(self.room.workers)) - {one.slot for one in self._running.values()}
            if not free:
                return
            if locked_elsewhere(self.runs / cell.name):
                continue
            waiting.remove(cell)
            if self._is_finished(cell):  # by somebody else, meanwhile
                continue
            order, slot = Order(cell, self.runs, self.folder, self.room.threads), min(free)
            done = self._done(cell)
            self._running[cell.name] = Running(order, self.launch(order, slot), slot, time.monotonic(), done)

    def _look_at(self, cell: Cell, waiting: list[Cell], total: int) -> None:
        one = self._running[cell.name]
        status = one.worker.poll()
        if status is None:
            return
        del self._running[cell.name]
        entry = self.entries[place(cell.arm.name, cell.seed)]
        if status == BUSY or (status in STOPPED and self.stopping.told):
            waiting.append(cell)
            return
        if status == 0 and self._is_finished(cell):
            entry.pop("error", None)
            entry["wall"] = round(time.monotonic() - one.began, 3)
            if times := one.order.result().get("times"):
                remember(self.runs, {kind_of(cell, self.room): Times.of(times)})
        elif status < 0 or status in STOPPED:
            self._deaths[cell.name] = self._deaths.get(cell.name, 0) + 1
            if self._deaths[cell.name] <= DEATHS:
                self.display.note(f"{cell.label}: {failure(status, one.order.result())}; it is started again")
                waiting.insert(0, cell)
                return
            entry.update(error=failure(status, one.order.result()), log=str(one.order.path("log")))
        else:
            entry.update(error=failure(status, one.order.result()), log=str(one.order.path("log")))
        self.save()
        self.display.ended(cell, entry, total - len(waiting) - len(self._running), total)

    def _stop(self) -> None:
        """Tell all workers, wait for their checkpoints, and end; told again, kill them.

        Raises:
            Stopped: always.
        """
        for one in self._running.values():
            one.worker.stop()
        if self._running:
            self.display.note("stopping after the steps in progress; interrupt again to stop at once")
        while any(one.worker.poll() is None for one in self._running.values()) and not self.stopping.told_twice:
            time.sleep(POLL)
        for one in self._running.values():
            if one.worker.poll() is None:
                one.worker.kill()
        self._running.clear()
        raise Stopped("stopped; the same command goes on where it was", str(self.folder))

    # What the store says

    @contextlib.contextmanager
    def _store(self) -> Iterator[Store | None]:
        file = self.runs / "keel.sqlite"
        if not file.is_file():
            yield None
            return
        with Store(file, readonly=True) as store:
            yield store

    def _is_finished(self, cell: Cell) -> bool:
        with self._store() as store:
            return finished_run(store, cell.name) is not None

    def _done(self, cell: Cell) -> float:
        """The share of a cell that its last checkpoint has."""
        saved = checkpoints(self.runs / cell.name)
        if not saved:
            return 0.0
        step, times = int(saved[-1].name.split("-")[-1]), self.times.get(kind_of(cell, self.room))
        if self.budget.unit != "steps" and times is None:
            return 0.0
        steps = self.budget.amount if times is None else times.steps(self.budget)
        return min(0.99, step / max(1.0, steps))

    def _shares(self) -> dict[str, float]:
        """How far each running cell is, by its label."""
        found = {}
        with self._store() as store:
            for one in self._running.values():
                cell = one.order.cell
                found[cell.label] = self._share(cell, store)
        return found

    def _share(self, cell: Cell, store: Store | None) -> float:
        if store is None:
            return 0.0
        try:
            run = next((r for r in store.runs(name=cell.name) if r.name == cell.name), None)
            if run is None:
                return 0.0
            if self.budget.unit == "steps":
                return min(1.0, run.step / self.budget.amount)
            name = "num_tokens" if self.budget.unit == "tokens" else "step_time"
            values = [value for _, value in store.metrics(run.id, [name]).get(name, [])]
            spent = sum(values) if name == "step_time" else max(values, default=0.0)
            return min(1.0, spent / self.budget.amount)
        except KeelError:  # a page in the middle of being written
            return 0.0

    def _left(self, waiting: Sequence[Cell]) -> float | None:
        """Seconds left, by the times known beforehand."""
        ahead, now = [], time.monotonic()
        for cell in [one.order.cell for one in self._running.values()] + list(waiting):
            times = self.times.get(kind_of(cell, self.room))
            if times is None:
                return None
            one = self._running.get(cell.name)
            spent = 0.0 if one is None else now - one.began
            ahead.append(max(1.0, times.cell(self.budget, self._done(cell) if one is None else one.done) - spent))
        return makespan(ahead, self.room.workers)


def locked_elsewhere(path: Path) -> bool:
    """Whether a process is working on the run in this folder."""
    try:
        with (path / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


class Stopping:
    """Whether to stop: told by Ctrl-C or SIGTERM while it is entered, or by `tell`."""

    def __init__(self) -> None:
        self._count, self._event = 0, threading.Event()

    @property
    def told(self) -> bool:
        """Once at least."""
        return self._count > 0

    @property
    def told_twice(self) -> bool:
        """So that nothing is waited for any more."""
        return self._count > 1

    def tell(self, *_: Any) -> None:
        """Stop."""
        self._count += 1
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not on when told."""
        self._event.wait(seconds)

    def __enter__(self) -> "Stopping":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.tell) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
