"""docs/benchmarks.md: the tables are measured, the prose between them stays."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.measuring import ROOT, Row

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PREFIX = "python -m benchmarks "
HEADER = "| same work, same weights | setting | Keel | peer | ratio | to reach | accuracy | command |"
ON_GPU = (
    "sampling against `generate`",
    "GRPO step against TRL",
    "log-probability + entropy + KL of the vocabulary against materialised logits",
)


def write(rows: Sequence[Row], threads: int, repeats: int, page: Path = PAGE, whole: bool = True) -> None:
    """Put the tables between the markers of the page.

    Args:
        whole: these are all rows; otherwise those of the page that are not among them stay.

    Raises:
        ValueError: the page has no markers, or rows of it that would stay were measured otherwise.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no line {BEGIN!r} or no line {END!r}")
    (before, rest), after = text.split(BEGIN), text.split(END)[1]
    about = conditions(threads, repeats)
    if not whole and about not in rest:
        raise ValueError(f"the rows of {page.name} were not measured under these conditions, so measure all:\n{about}")
    known = {} if whole else _lines(rest.split(END)[0])
    shown = [*(known | {(row.work, row.setting): line(row) for row in rows}).values()]
    page.write_text(f"{before}{BEGIN}\n\n{about}\n\n{tables(shown)}\n{END}{after}")


def _lines(text: str) -> dict[tuple[str, str], str]:
    """The rows of a page's first table, by work and setting."""
    table = text.split(HEADER)[1].strip().split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in found.strip("|").split("|")] for found in table]
    return {(own[0], own[1].strip("`")): found for own, found in zip(cells, table, strict=True)}


def conditions(threads: int, repeats: int) -> str:
    """The machine, and how it was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    lines = [
        f"Measured on {processor()}, {os.cpu_count()} cores, {threads} threads;",
        f"Python {platform.python_version()}, {versions}.",
        f"Medians of {repeats} turns, in which Keel and the peer took part one after the other.",
        f"Each command follows `{PREFIX.strip()}`.",
    ]
    return "\n".join(lines)


def tables(shown: Sequence[str]) -> str:
    """Of the lines of all rows, and of what was not measured."""
    lines = [HEADER, "|---|---|--:|--:|--:|--:|---|---|", *shown]
    lines += ["", "| on a GPU | |", "|---|---|", *(f"| {work} | not measured |" for work in ON_GPU), ""]
    return "\n".join(lines)


def line(row: Row) -> str:
    """Of the table."""
    goal = "" if row.goal is None else f"{row.goal:g}"
    ratio = f"**{row.ratio:.2f}**" if row.goal is not None and row.ratio >= row.goal else f"{row.ratio:.2f}"
    unit = row.unit.replace("tokens/s", "/s")
    shown = [f"{number:,.{0 if number >= 100 else 1}f} {unit}" for number in (row.ours, row.theirs)]
    setting = row.setting if row.setting == "default" else f"`{row.setting}`"
    command = f"`{row.command.removeprefix(PREFIX)}`"
    numbers = (text.replace(" ", "\u00a0") for text in shown)
    return f"| {' | '.join([row.work, setting, *numbers, ratio, goal, row.accuracy, command])} |"


def processor() -> str:
    """Its name, and which wide instructions it has."""
    known: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    flags = known.get("flags", "").split()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    name = known.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {known.get('cpu family', '?')}, {', '.join(wide) or 'no AVX2'})"
