"""`make methods`: every method on the same bases, prompts and steps, for docs/methods.md.

A cell (recipe, task, seed, settings) is run if its result is missing or of other code than there is now.
"""

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import fingerprint, halving, methods_page, packaged, plan, results, work
from benchmarks.cells import BASE, Cell, checksum_of
from benchmarks.evidence import Evidence
from keel.core.errors import KeelError, nearest


def gathered(folder: Path) -> tuple[Evidence, Evidence]:
    """What is stored of the cells of the plan: runs that count, and trials of coefficients."""
    stored = results.everything(folder)
    others = {path.name: results.everything(path) for path in results.elsewhere(folder).glob("*")}

    def planned(cell: Cell) -> bool:
        return cell.settings == plan.settings(cell.task)

    return (
        Evidence.of(stored, lambda cell: planned(cell) and cell.seed != halving.TUNING_SEED, others),
        Evidence.of(stored, lambda cell: planned(cell) and cell.seed == halving.TUNING_SEED, others),
    )


def both_rounds(folder: Path) -> tuple[list[Cell], list[Cell]]:
    """The cells of the first round, and of the second as far as the first is done: it says who is in it."""
    first = plan.in_order(list(plan.first_round()))
    if any(results.stored(cell, folder) is None for cell in first if cell.task == plan.MAIN):
        return first, []
    return first, plan.in_order(list(halving.second_round(*gathered(folder), plan.compared())))


def baselines(cells: Sequence[Cell], folder: Path) -> list[tuple[str, Path, list[Cell]]]:
    """By base that is not the usual one: where the baselines of the cells that began with it are, and these."""
    found: dict[str, list[Cell]] = {}
    for evidence in gathered(folder):
        usual = {task: evidence.usual(task) for task in plan.tasks()}
        for cell in cells:
            base = evidence.base(halving.arm_of(cell), cell.seed)
            if base and base != usual[cell.task]:
                found.setdefault(base, []).extend(plan.baselines(cell))
    return [(base, results.elsewhere(folder) / base, plan.in_order(some)) for base, some in found.items()]


def wanted(cells: Sequence[Cell], arguments: argparse.Namespace) -> list[Cell]:
    """Those that are asked for."""
    return [
        cell
        for cell in cells
        if (not arguments.what or cell.recipe in arguments.what)
        and (not arguments.seed or cell.seed in arguments.seed)
        and (not arguments.task or cell.task in arguments.task)
    ]


def say(text: str) -> None:
    """A line of the terminal."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Vouch, run, tell, write: what is asked for."""
    folder, begun = arguments.results, time.monotonic()

    def left() -> float | None:
        return None if arguments.budget is None else arguments.budget - (time.monotonic() - begun) / 60

    first, second = (wanted(cells, arguments) for cells in both_rounds(folder))
    if arguments.vouch:
        say(f"vouched: {dict(work.vouch(plan.in_order([*first, *second]), say, folder, before=arguments.before))}")
        for _, place, cells in baselines([*first, *second], folder):
            said = dict(work.vouch(cells, say, place, before=arguments.before))
            say(f"vouched for baselines in {place.name}: {said}")
    if not arguments.list:
        say(f"first round: {dict(work.work(first, say, left(), folder))}")
        for _ in range(2):  # trials, then what they have chosen
            second = wanted(both_rounds(folder)[1], arguments)
            say(f"second round: {dict(work.work(second, say, left(), folder))}")
        for base, place, cells in baselines([*first, *second], folder):
            here = [cell for cell in cells if checksum_of(cell.task) == base]
            say(f"baselines in {place.name}: {dict(work.work(here, say, left(), place))}")
    print("\n".join(work.summary(plan.in_order([*first, *second]), folder)))
    for _, place, cells in baselines([*first, *second], folder):
        print("\n".join([f"baselines in {place.name}:", *work.summary(cells, place)]))
    if arguments.write:
        write(folder)


def write(folder: Path) -> None:
    """The page, from what is stored."""
    evidence, trial = gathered(folder)
    names = plan.compared()
    left = {name: why for name in plan.recipes() if (why := plan.left_out(name)) is not None}
    again = halving.again(evidence, trial, names)
    methods_page.write(evidence, names, halving.said(evidence, trial, names), left, again)
    packaged.write(evidence, names)
    print(f"{methods_page.PAGE}, {methods_page.PICTURE} and {packaged.FILE} are written", file=sys.stderr)


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("what", nargs="*", help="recipes, or base; all without any")
    parser.add_argument("--task", action="append", help="only these")
    parser.add_argument("--seed", action="append", type=int, help="only these")
    parser.add_argument("--list", action="store_true", help="what is missing, stale and fresh; nothing is run")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no cell after that")
    parser.add_argument("--vouch", action="store_true", help="first run a few stale cells again, to keep the others")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="vouch on another processor; see work.vouch")
    parser.add_argument("--write", action="store_true", help="write docs/methods.md and evidence.json at the end")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="transformers|torch")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    known = (BASE, *plan.compared())  # imports all recipes
    for name, allowed in [(n, known) for n in arguments.what] + [(t, plan.tasks()) for t in arguments.task or ()]:
        if name not in allowed:
            parser.error(f"there is no '{name}'.{nearest(name, allowed)}")
    fingerprint.remember(list(sys.modules))
    try:
        run(arguments)
    except KeelError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; finished cells are kept")


if __name__ == "__main__":
    main()
