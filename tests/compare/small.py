"""Comparisons that take a second: a model of some thousand parameters, cells in forked processes, or in none at all."""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.compare.asked import Asked
from keel.compare.cell import carry_out, probe, run_cell
from keel.compare.display import Silent
from keel.compare.entry import run
from keel.compare.outcomes import Budget
from keel.compare.plan import Conditions
from keel.compare.workers import Order
from keel.store.store import Store

TASK = f"{Path(__file__).with_name('lengths.py')}:Lengths"
SETTINGS = {
    "rollout.num_prompts": 2,
    "rollout.num_generations": 4,
    "evaluate.num_prompts": 8,
    "evaluate.num_generations": 2,
    "train.log_completions": 1,
}


def asked(model: str, runs: Path, *recipes: str, budget: str = "2steps", settings: Any = None, **more: Any) -> Asked:
    """A comparison of the small model."""
    shared = tuple(sorted({**SETTINGS, **(settings or {})}.items()))
    conditions = Conditions(Budget.parse(budget), task=more.pop("task", TASK), model=model, settings=shared)
    return Asked(recipes, conditions, **{"seeds": 2, "runs": runs, "workers": 2, **more})


class Told(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def ended(self, cell: Any, entry: Any, done: int, total: int) -> None:
        self.said.append(f"{done}/{total} {cell.label} {'failed' if entry.get('error') else 'finished'}")


class Forked:
    """A cell in a fork of this process, which has imported everything already."""

    def __init__(self, order: Order):
        order.write()
        self.order, self.status = order, None
        self.pid = os.fork()
        if self.pid == 0:
            self._work()

    def _work(self) -> None:
        status = 99
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            log = os.open(self.order.path("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
            spec = json.loads(self.order.path("json").read_text())
            status = carry_out(spec, probe if self.order.probe else run_cell)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def stop(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.005)


@dataclass
class Forks:
    """Launches forks, and counts the cells that were begun; probes take no time."""

    begun: list[str] = field(default_factory=list)
    workers: dict[str, Forked] = field(default_factory=dict)

    def __call__(self, order: Order, slot: int) -> Any:
        if order.probe:
            return Pretended(order, {})
        self.begun.append(order.cell.label)
        self.workers[order.cell.label] = Forked(order)
        return self.workers[order.cell.label]


TIMES = {"startup": 1.0, "before": 2.0, "train": 20.0, "after": 3.0, "steps": 2, "tokens": 100, "seconds": 20.0}


class Pretended:
    """A cell that is not run: it ends as it is told to, and if that is well, the store has a run of it.

    Args:
        order: what to pretend.
        ends: exit statuses by label, one for each time; what is missing is 0. None is for ever.
    """

    def __init__(self, order: Order, ends: dict[str, list[int | None]], score: Any = None):
        order.write()
        self.order = order
        label = order.cell.label
        self.status = ends[label].pop(0) if ends.get(label) and not order.probe else 0
        if order.probe:
            order.path("out").write_text(json.dumps({"times": TIMES}))
        elif self.status == 0:
            enter(order, score)
        elif self.status is not None and 0 < self.status < 70:
            order.path("out").write_text(json.dumps({"error": f"{label} went wrong"}))

    def poll(self) -> int | None:
        return self.status

    def stop(self) -> None:
        self.status = 143 if self.status is None else self.status

    def kill(self) -> None:
        self.status = -9 if self.status is None else self.status


@dataclass
class Pretending:
    """Launches pretended cells, and counts them."""

    ends: dict[str, list[int | None]] = field(default_factory=dict)
    score: Any = None
    begun: list[str] = field(default_factory=list)
    skips: set[int] = field(default_factory=set)

    def __call__(self, order: Order, slot: int) -> Pretended:
        if not order.probe:
            self.begun.append(order.cell.label)
            self.skips.add(order.cell.config.evaluate.skip)
        return Pretended(order, self.ends, self.score)


def enter(order: Order, score: Any = None) -> None:
    """A finished run in the store."""
    config = order.cell.config
    count = config.evaluate.num_prompts
    value = 0.5 if score is None else score(order.cell)
    with Store(order.runs / "keel.sqlite") as store:
        known = [r.id for r in store.runs(name=config.name)]
        number = known[0] if known else store.create_run(config.name, config.to_dict(), "r", "t", "m", config.seed)
        store.log_metrics(number, 1, {"reward": 0.1, "num_tokens": 50.0, "step_time": 2.0})
        store.log_metrics(number, 2, {"reward": 0.2, "num_tokens": 100.0, "step_time": 3.0})
        for phase, shift in (("before", -0.1), ("after", 0.0)):
            column = [value + shift] * count
            store.log_evaluation(number, 2, phase, {"values": {"pass@1": column, "kl": [None] * count}})
        store.finish(number, "finished", {"steps": 2, "num_tokens": 100, "seconds": 5.0})


def compared(wanted: Asked, launch: Any = None, **more: Any) -> Any:
    """Run it; what was said is in `said` of the display."""
    shown = Told()
    found = run(wanted, shown=shown, launch=Forks() if launch is None else launch, **more)
    return found, shown.said
