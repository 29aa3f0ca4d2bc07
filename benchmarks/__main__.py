"""`make bench`: Keel and its peer on the same work, in turns; medians, ratios, and the page docs/benchmarks.md."""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging

from benchmarks import distillation, head, page, pairs, sampling, start, step
from benchmarks.measuring import Row, as_json

PARTS = ("start", "head", "distillation", "sampling", "step", "pairs")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """The lines that are asked for."""
    wanted, turns = arguments.what, {"repeats": arguments.repeats}
    model = {"shape": arguments.shape, "vocabulary": arguments.vocabulary}
    if wanted in ("all", "start"):
        yield from start.rows(**turns, threads=arguments.threads)
    if wanted in ("all", "head"):
        yield from head.rows(**turns, threads=arguments.threads)
    if wanted in ("all", "distillation"):
        yield from distillation.rows(**turns, threads=arguments.threads)
    if wanted in ("all", "sampling"):
        yield from sampling.rows(**model, **turns, batch=arguments.batch)
    if wanted in ("all", "step"):
        yield from step.rows(**model, **turns, threads=arguments.threads)
    if wanted in ("all", "pairs"):
        yield from pairs.rows(**model, **turns, threads=arguments.threads)


def line(row: Row) -> str:
    """One line of the terminal."""
    goal = "" if row.goal is None else f"(to reach {row.goal:g})"
    numbers = f"{row.ratio:7.2f} x {goal:16} {row.ours:>12,.1f} {row.theirs:>12,.1f} {row.unit:9}"
    return f"{numbers} {row.work} [{row.setting}] {row.accuracy}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *PARTS])
    parser.add_argument("--shape", choices=["1M", "10M"])
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=5, help="turns, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="trl|transformers|torch")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begun, found = time.monotonic(), []
    print(f"{'ratio':>9} {'':17} {'Keel':>13} {'peer':>12}")
    for row in rows(arguments):
        found.append(row)
        print(line(row), flush=True)
    if arguments.json:
        print(as_json(found))
    if arguments.write:
        page.write(found, arguments.threads, arguments.repeats, whole=arguments.what == "all")
        print(f"{page.PAGE} is written", file=sys.stderr)
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
