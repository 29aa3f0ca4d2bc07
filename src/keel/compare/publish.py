"""What is made of a comparison's outcomes: its statistics, its table, its page, a line for each cell."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.compare.analysis import Analysis, analyse
from keel.compare.export import to_json, write_csv, write_json, write_summary
from keel.compare.outcomes import Comparison

if TYPE_CHECKING:
    from keel.compare.work import Compared


def publish(folder: Path, comparison: Comparison, command: str, compositions: Mapping[str, Any]) -> Analysis:
    """Write the page, the numbers, and a line for each cell into the comparison's folder.

    Args:
        folder: gets `report.html`, `results.json`, `results.csv` (a line for each cell) and `summary.csv`.
        comparison: with its outcomes.
        command: that makes it again.
        compositions: the configuration of each arm, by its name.
    """
    from keel.compare.report import write_report

    analysis = analyse(comparison)
    write_json(folder / "results.json", comparison, analysis)
    write_csv(folder / "results.csv", comparison)
    write_summary(folder / "summary.csv", analysis)
    write_report(folder / "report.html", comparison, analysis, command, compositions)
    return analysis


def publish_to(found: "Compared", csv: Path | None, html: Path | None) -> None:
    """The lines of the cells and the page where else they are wanted."""
    if csv is not None:
        write_csv(csv, found.comparison)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_bytes(found.report.read_bytes())


def print_json(found: "Compared") -> None:
    """All of it, for programs."""
    facts = {"report": str(found.report), "announced": found.announced, "took": found.took, "told": list(found.notes)}
    print(json.dumps({**to_json(found.comparison, found.analysis), **facts}, allow_nan=False, indent=1))


def print_table(found: "Compared") -> None:
    """The table and what it says, for people."""
    from rich.console import Console

    from keel.compare.table import terminal

    console = Console()
    console.print(terminal(found.comparison, found.analysis))
    console.print(f"report  {found.report}", highlight=False, soft_wrap=True)
