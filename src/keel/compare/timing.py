"""How long a comparison will take: what cells of the same kind took on this machine, or what a probe of them takes."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keel.compare.outcomes import Budget
from keel.compare.plan import WITHOUT_EFFECT, Cell, digest
from keel.compare.workers import Launch, Order, Room
from keel.core.errors import ConfigError
from keel.train.checkpoint import write_text

REPORT = 4.0  # seconds for the statistics and the pages at the end
FILE = "times.json"


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a cell.

    Args:
        startup: from the launch of the process to its first measurement or step.
        before, after: the measurements on held-out prompts, the second with all that follows it.
        step: one step, checkpoints included.
        tokens: of one step.
        share: of the wall time of a step that counts as training.
    """

    startup: float
    before: float
    after: float
    step: float
    tokens: float
    share: float = 1.0

    @staticmethod
    def of(found: Mapping[str, float]) -> "Times":
        """From what a cell or a probe reports of itself."""
        steps = max(1.0, found["steps"])
        return Times(
            startup=found["startup"],
            before=found["before"],
            after=found["after"],
            step=found["train"] / steps,
            tokens=found["tokens"] / steps,
            share=min(1.0, found["seconds"] / found["train"]) if found["train"] > 0 else 1.0,
        )

    def steps(self, budget: Budget) -> float:
        """Steps that a budget allows; the last one may go beyond it."""
        if budget.unit == "steps":
            return budget.amount
        each = self.tokens if budget.unit == "tokens" else self.step * self.share
        return max(1.0, budget.amount / each + 0.5) if each > 0 else 1.0

    def cell(self, budget: Budget, done: float = 0.0) -> float:
        """Seconds of a cell of which a share is done already."""
        rest = self.step * self.steps(budget) * (1.0 - done)
        return self.startup + (self.before if not done else 0.0) + rest + self.after


def kind_of(cell: Cell, room: Room) -> str:
    """Digest of what decides how long the parts of a cell take: all but seed, name, budget, and what is kept."""
    data = cell.config.to_dict()
    for key in ("name", "seed"):
        del data[key]
    for key in ("max_steps", "max_train_tokens", "max_train_seconds", *WITHOUT_EFFECT):
        del data["train"][key]
    return digest([data, platform.node(), room.workers, room.threads, room.gpus])


def known_times(runs: Path) -> dict[str, Times]:
    """By kind, as earlier comparisons measured them."""
    try:
        data = json.loads((runs / "comparisons" / FILE).read_text(encoding="utf-8"))
        return {kind: Times(**found) for kind, found in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(runs: Path, found: Mapping[str, Times]) -> None:
    """Add to what is known; another comparison that writes at the same moment costs a probe at most."""
    if not found:
        return
    (runs / "comparisons").mkdir(parents=True, exist_ok=True)
    data = {kind: asdict(times) for kind, times in {**known_times(runs), **found}.items()}
    write_text(runs / "comparisons" / FILE, json.dumps(data, indent=1))


def times_of(
    cells: Sequence[Cell], runs: Path, folder: Path, room: Room, launch: Launch, stopping: Callable[[], bool]
) -> dict[str, Times]:
    """The times of the kinds of all cells, from what is known or from probes, which are run side by side as cells are.

    Slots that would be empty probe the first kind again, so that a probe is as slow as a cell will be.
    A kind whose probe fails is not in the result: its cells will say why.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(kind_of(cell, room), cell)
    known = known_times(runs)
    found = {kind: known[kind] for kind in first if kind in known}
    unknown = [(kind, cell) for kind, cell in first.items() if kind not in known]
    busy = min(room.workers, len(cells))
    for begin in range(0, len(unknown), busy):
        some = unknown[begin : begin + busy]
        beside = [(None, cell) for _, cell in (unknown * busy)[: busy - len(some)]]
        fresh = _probed([*some, *beside], runs, folder, room, launch, stopping)
        remember(runs, fresh)
        found |= fresh
    return found


def _probed(
    some: Sequence[tuple[str | None, Cell]],
    runs: Path,
    folder: Path,
    room: Room,
    launch: Launch,
    stopping: Callable[[], bool],
) -> dict[str, Times]:
    orders = []
    for place, (kind, cell) in enumerate(some):
        own = folder if kind is not None else folder / f"beside-{place}"
        orders.append((kind, Order(cell, runs, own, room.threads, probe=True)))
    workers = [launch(order, slot) for slot, (_, order) in enumerate(orders)]
    try:
        wanted = [i for i, (kind, _) in enumerate(orders) if kind is not None]
        while any(workers[i].poll() is None for i in wanted) and not stopping():
            time.sleep(0.05)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    found = {}
    for i in wanted:
        kind, order = orders[i]
        assert kind is not None
        if workers[i].poll() == 0 and (times := order.result().get("times")):
            found[kind] = Times.of(times)
    return found


def check_budget(cells: Sequence[Cell], times: Mapping[str, Times], budget: Budget, room: Room) -> None:
    """Refuse a budget that is smaller than a step.

    Raises:
        ConfigError: it is.
    """
    for cell in cells:
        found = times.get(kind_of(cell, room))
        if found is None or budget.unit == "steps":
            continue
        each = found.tokens if budget.unit == "tokens" else found.step * found.share
        if each > budget.amount:
            said = f"{each:,.0f} tokens" if budget.unit == "tokens" else f"{each:.1f} s"
            raise ConfigError(f"a step of {cell.arm.name} takes {said}, more than {budget}", "--budget", "Give more.")


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of the cells ends, each begun by the first worker that is free, in their order.

    >>> makespan([3.0, 1.0, 1.0, 2.0], 2)
    4.0
    """
    free = [0.0] * max(1, workers)
    for each in seconds:
        place = free.index(min(free))
        free[place] += each
    return max(free)


def in_words(seconds: float) -> str:
    """About how long.

    >>> in_words(42), in_words(100), in_words(840), in_words(9000)
    ('about 40 s', 'about 1.5 min', 'about 14 min', 'about 2.5 h')
    """
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 600:
        return f"about {round(seconds / 30) / 2:g} min"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {round(seconds / 1800) / 2:g} h"
