"""Running what is missing or stale, alone or beside other processes, within a budget; and vouching for stale cells."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import BASE, Cell, checksum_of, machine, run_cell
from benchmarks.results import FOLDER, FRESH, MISSING, STALE, Code, Result, claimed, code_of, state_of, stored, write
from keel.core.errors import KeelError

SECONDS = 25.0  # of a cell of which nothing is known
VOUCHERS = 1  # stale cells that are run again for each change; those of the engine are met by many
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
    before: Path | None = None,
) -> Counter:
    """Run a few of the stale cells again; where their numbers are the same, others of the same changes are fresh.

    Where a cell began with another base than this machine's, as it was run on another processor, the code that it is
    of runs here, too: `before` is a checkout of it.

    A change is a digest that went from one value to another. A cell is vouched for if each of its changes was met by
    `count` cells that were run again with the same numbers, or by all there are, and one of these was on its task.
    A change with which the numbers differed vouches for nothing. Several processes at once share the work.

    Raises:
        KeelError: the base is another, and there is no such checkout.
    """
    done: Counter = Counter()
    for change in _stale_by_change(cells, folder):
        with claimed(f"{change}", folder) as mine:
            if mine and (stale := _stale_by_change(cells, folder).get(change)):  # again: others were at it
                done += _vouch_for(stale, change, cells, told, folder, count, run, before)
    return done


def _stale_by_change(cells: Sequence[Cell], folder: Path) -> dict[Change, list[Result]]:
    groups: dict[Change, list[Result]] = {}
    for cell in cells:
        found = stored(cell, folder)
        if found is not None and (code := code_of(cell)) != found.code and not found.error:
            groups.setdefault(change_of(found.code, code), []).append(found)
    return groups


def _vouch_for(
    stale: Sequence[Result],
    change: Change,
    cells: Sequence[Cell],
    told: Told,
    folder: Path,
    count: int,
    run: Callable[[Cell], Mapping[str, Any]],
    before: Path | None,
) -> Counter:
    """Run what is lacking for one set of changes; then the others of it are fresh."""
    done: Counter = Counter()
    met, spoilt = witnesses(cells, folder)
    changed = [list(entry) for entry in change]
    for one in spread(stale, count):
        if spoilt & set(change) or not _lacks(one.cell.task, change, met, count):
            continue
        wanted = numbers_here(one, before)
        again = run(one.cell)
        same = again["numbers"] == wanted
        rarest = min(len(met.get(entry, ())) for entry in change)  # what hardly another has is what made the difference
        differs = [list(entry) for entry in change if len(met.get(entry, ())) == rarest]
        known = {"by": [one.cell.label], "changed": changed} if same else {"by": [], "changed": differs}
        fresh = replace(one, code=code_of(one.cell), vouched=known)
        if not same or wanted is one.numbers:
            numbers, times, base = again["numbers"], again["times"], one.base and checksum_of(one.cell.task)
            fresh = replace(fresh, numbers=numbers, times=times, machine=again["machine"], base=base)
        write(fresh, folder)
        done["run"] += 1
        told(f"{one.cell.label}: {'the same numbers' if same else 'OTHER numbers'}")
        met, spoilt = witnesses(cells, folder)
    for one in stale:
        if stored(one.cell, folder).code == code_of(one.cell):  # type: ignore[union-attr]
            continue
        if spoilt & set(change):
            done["stale"] += 1
            continue
        names = sorted({label for entry in change for label, _ in met[entry][:count]})
        write(replace(one, code=code_of(one.cell), vouched={"by": names, "changed": changed}), folder)
        done["vouched"] += 1
    return done


def numbers_here(one: Result, before: Path | None) -> Mapping[str, Any]:
    """The numbers that a result's own code has on this machine: those stored, or of a run in a checkout of that code.

    Raises:
        KeelError: its base is not that of this machine and there is no checkout, or it is of other code.
    """
    if not one.base or one.base == checksum_of(one.cell.task):
        return one.numbers
    if before is None:
        raise KeelError(
            f"{one.cell.label} began with another base than this machine's, as another processor rounds otherwise",
            fix="Compare both codes here: --before FOLDER, a checkout in which the stored results are fresh.",
        )
    before = before.resolve()  # it is run in there
    program = (
        "import json, sys, torch; torch.set_num_threads(1); from benchmarks import cells, results; "
        "cell = cells.Cell.from_json(json.load(sys.stdin)); "
        "print(json.dumps([results.code_of(cell), cells.run_cell(cell)['numbers']]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(before), str(before / "src")])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(one.cell.to_json()),
        cwd=before,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise KeelError(f"{one.cell.label} cannot be run in {before}: {done.stderr[-1000:]}")
    code, numbers = json.loads(done.stdout.splitlines()[-1])
    if code != one.code:
        raise KeelError(f"the code in {before} is not that of the result of {one.cell.label}")
    return numbers


def witnesses(cells: Sequence[Cell], folder: Path) -> tuple[dict[tuple[str, ...], list[tuple[str, str]]], set]:
    """Who was run again with which changes and had the same numbers, by label and task; and what made them differ.

    The base is no witness: it trains nothing.
    """
    met: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    spoilt = set()
    for cell in cells:
        found = stored(cell, folder)
        if found is None or found.vouched is None:
            continue
        for entry in map(tuple, found.vouched["changed"]):
            if not found.vouched["by"]:
                spoilt.add(entry)
            elif found.vouched["by"] == [cell.label] and cell.recipe != BASE:
                met.setdefault(entry, []).append((cell.label, cell.task))
    return met, spoilt


def _lacks(task: str, change: Change, met: Mapping[tuple[str, ...], list[tuple[str, str]]], count: int) -> bool:
    everywhere = all(len(met.get(entry, ())) >= count for entry in change)
    return not everywhere or all(task not in {on for _, on in met[entry]} for entry in change)


def spread(stale: Sequence[Result], count: int) -> list[Result]:
    """The cells, the first of them spread over the list, then one of each task, then the others."""
    stale = sorted(stale, key=lambda one: one.cell.recipe == BASE)  # which can vouch for nothing
    step = max(1, len(stale) // max(count, 1))
    first = list(stale[::step][:count])
    for task in dict.fromkeys(one.cell.task for one in stale):
        if task not in {one.cell.task for one in first}:
            first.append(next(one for one in stale if one.cell.task == task))
    return [*first, *(one for one in stale if one not in first)]


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
