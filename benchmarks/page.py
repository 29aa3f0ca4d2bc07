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
ON_GPU = (
    "sampling against `generate`",
    "GRPO step against TRL",
    "log-probability + entropy + KL of the vocabulary against materialised logits",
)


def write(rows: Sequence[Row], threads: int, repeats: int, page: Path = PAGE) -> None:
    """Put the tables between the markers of the page.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no line {BEGIN!r} or no line {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{measured(rows, threads, repeats)}\n{END}{after}")


def measured(rows: Sequence[Row], threads: int, repeats: int) -> str:
    """The machine, and the tables."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    lines = [
        f"Measured on {processor()}, {os.cpu_count()} cores, {threads} threads;",
        f"Python {platform.python_version()}, {versions}.",
        f"Medians of {repeats} turns, in which Keel and the peer took part one after the other.",
        f"Each command follows `{PREFIX.strip()}`.",
        "",
        "| same work, same weights | setting | Keel | peer | ratio | to reach | accuracy | command |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:g}"
        ratio = f"**{row.ratio:.2f}**" if row.goal is not None and row.ratio >= row.goal else f"{row.ratio:.2f}"
        unit = row.unit.replace("tokens/s", "/s")
        shown = [f"{number:,.{0 if number >= 100 else 1}f} {unit}" for number in (row.ours, row.theirs)]
        setting = row.setting if row.setting == "default" else f"`{row.setting}`"
        command = f"`{row.command.removeprefix(PREFIX)}`"
        cells = [
            row.work,
            setting,
            *(text.replace(" ", "\u00a0") for text in shown),
            ratio,
            goal,
            row.accuracy,
            command,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| on a GPU | |", "|---|---|", *(f"| {work} | not measured |" for work in ON_GPU), ""]
    return "\n".join(lines)


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
