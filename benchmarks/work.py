"""Running what is missing or stale, alone or beside other processes, within a budget; and vouching for stale cells."""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, checksum_of, machine, run_cell
from benchmarks.results import FOLDER, FRESH, MISSING, STALE, Code, Result, claimed, code_of, state_of, stored, write
from keel.core.errors import KeelError

SECONDS = 25.0  # of a cell of which nothing is known
VOUCHERS = 3  # stale cells that are run again for each change
Told = Callable[[str], None]


def states(cells: Iterable[Cell], folder: Path = FOLDER) -> tuple[dict[Cell, str], dict[Cell, str]]:
    """The state of each cell, and why those that cannot be run cannot."""
    found: dict[Cell, str] = {}
    broken: dict[Cell, str] = {}
    for cell in cells:
        try:
            code_of(cell)  # says what is wrong with a cell that was never run
            found[cell] = state_of(cell, folder)
        except KeelError as error:
            broken[cell] = str(error)
    return found, broken


def expected_seconds(cells: Sequence[Cell], folder: Path = FOLDER) -> float:
    """What they will take, from what they or their like took."""
    known: dict[str, list[float]] = {}
    unknown = []
    total = 0.0
    for cell in cells:
        before = stored(cell, folder)
        if before is not None and before.times:
            total += before.times["seconds"]
            known.setdefault(cell.task, []).append(before.times["seconds"])
        else:
            unknown.append(cell.task)
    return total + sum(sum(t) / len(t) if (t := known.get(task)) else SECONDS for task in unknown)


def do(cell: Cell, folder: Path = FOLDER) -> Result:
    """Run a cell and write what came of it, a failure, too."""
    code = code_of(cell)
    begun = time.monotonic()
    try:
        found = run_cell(cell)
        result = Result(cell, code, found["numbers"], found["times"], found["machine"], checksum_of(cell.task))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "keel" in f.filename]
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].name})" if frames else ""
        said = f"{type(error).__name__}: {error}{where}"[:600]
        times = {"seconds": round(time.monotonic() - begun, 3)}
        result = Result(cell, code, {}, times, machine(), checksum_of(cell.task), error=said)
    write(result, folder)
    return result


def work(cells: Sequence[Cell], told: Told, minutes: float | None = None, folder: Path = FOLDER) -> Counter:
    """Run the cells that are missing or stale, in their order; those that another process is at are left to it."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    done: Counter = Counter()
    for place, cell in enumerate(cells):
        if end is not None and time.monotonic() > end:
            told(f"the budget is used up; {len(cells) - place} cells are left to look at")
            break
        try:
            if state_of(cell, folder) == FRESH:
                done["fresh"] += 1
                continue
            with claimed(cell, folder) as mine:
                if not mine:
                    done["elsewhere"] += 1
                    continue
                if state_of(cell, folder) == FRESH:  # finished elsewhere meanwhile
                    done["fresh"] += 1
                    continue
                result = do(cell, folder)
        except KeelError as error:
            done["impossible"] += 1
            told(f"{cell.label}: cannot be run: {error}")
            continue
        done["failed" if result.error else "run"] += 1
        told(f"{cell.label}: {said_of(result)}")
    return done


def said_of(result: Result) -> str:
    """A finished cell in a line."""
    if result.error:
        return f"FAILED after {result.times['seconds']:.0f} s: {result.error}"
    means = ", ".join(f"{k} {v:.3f}" for k, v in result.numbers["means"].items() if k in ("pass@1", "pass@16", "kl"))
    return f"{means} in {result.times['seconds']:.1f} s"


# -- vouching --------------------------------------------------------------------------------------------------------

Change = tuple[tuple[str, str, str], ...]


def change_of(old: Code, new: Code) -> Change:
    """What differs: (component, before, after)."""
    return tuple((k, old.get(k, ""), new.get(k, "")) for k in sorted({*old, *new}) if old.get(k) != new.get(k))


def vouch(
    cells: Sequence[Cell],
    told: Told,
    folder: Path = FOLDER,
    count: int = VOUCHERS,
    run: Callable[[Cell], Mapping[str, Any]] = run_cell,
) -> Counter:
    """Run a few of the stale cells again; where all their numbers are the same, the others of that change are fresh.

    Cells are stale by the same change if the same digests went from the same value to the same value. Of every task
    that is among them at least one is run.
    """
    groups: dict[Change, list[Result]] = {}
    for cell in cells:
        found = stored(cell, folder)
        if found is not None and (code := code_of(cell)) != found.code and not found.error:
            groups.setdefault(change_of(found.code, code), []).append(found)
    done: Counter = Counter()
    for change, stale in groups.items():
        chosen = vouchers(stale, count)
        same = []
        for one in chosen:
            again = run(one.cell)
            code = code_of(one.cell)
            fresh = replace(
                one, code=code, numbers=again["numbers"], times=again["times"], machine=again["machine"], vouched=None
            )
            write(fresh, folder)
            same.append(again["numbers"] == one.numbers)
            done["run"] += 1
            told(f"{one.cell.label}: {'the same numbers' if same[-1] else 'OTHER numbers'}")
            if not same[-1]:
                break
        if not all(same):
            done["stale"] += len(stale) - len(same)
            continue
        names = [one.cell.label for one in chosen]
        for one in stale:
            if one not in chosen:
                by = {"by": names, "changed": [list(entry) for entry in change]}
                write(replace(one, code=code_of(one.cell), vouched=by), folder)
                done["vouched"] += 1
    return done


def vouchers(stale: Sequence[Result], count: int) -> list[Result]:
    """A few of the cells, spread over the list, at least one of each task."""
    step = max(1, len(stale) // max(count, 1))
    chosen = list(stale[::step][:count])
    for task in dict.fromkeys(one.cell.task for one in stale):
        if task not in {one.cell.task for one in chosen}:
            chosen.append(next(one for one in stale if one.cell.task == task))
    return chosen


def summary(cells: Sequence[Cell], folder: Path = FOLDER) -> list[str]:
    """How many are missing, stale and fresh, how long the rest will take, and what failed."""
    found, broken = states(cells, folder)
    counts = Counter(found.values())
    todo = [cell for cell, state in found.items() if state != FRESH]
    lines = [
        f"{len(cells)} cells: " + ", ".join(f"{counts[state]} {state}" for state in (MISSING, STALE, FRESH)),
        f"{expected_seconds(todo, folder) / 60:.0f} minutes for what is missing or stale",
    ]
    failed = [found for cell in cells if cell not in broken and (found := stored(cell, folder)) and found.error]
    lines += [f"failed: {one.cell.label}: {one.error}" for one in failed]
    lines += [f"cannot be run: {cell.label}: {why}" for cell, why in broken.items()]
    return lines
