"""`make bench`: Keel and its peer on the same work, in turns; medians, ratios, and the page docs/benchmarks.md."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import head, sampling, start, step
from benchmarks.measuring import Row


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """The lines that are asked for."""
    wanted = arguments.what
    model = {"shape": arguments.shape, "vocabulary": arguments.vocabulary}
    if wanted in ("all", "sampling"):
        yield from sampling.rows(**model, batch=arguments.batch, repeats=arguments.repeats)
    if wanted in ("all", "step"):
        yield from step.rows(**model, repeats=arguments.repeats, threads=arguments.threads)
    if wanted in ("all", "head"):
        yield from head.rows(repeats=arguments.repeats, threads=arguments.threads)
    if wanted in ("all", "start"):
        yield from start.rows(repeats=arguments.repeats, threads=arguments.threads)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "sampling", "step", "head", "start"])
    parser.add_argument("--shape", choices=["1M", "10M"])
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for row in rows(arguments):
        goal = "" if row.goal is None else f"  (goal {row.goal:g})"
        print(
            f"{row.ratio:6.2f} x{goal:12} {row.ours:>12,.1f} {row.theirs:>12,.1f} {row.unit:9} {row.work} [{row.setting}] {row.accuracy}",
            flush=True,
        )


if __name__ == "__main__":
    main()
