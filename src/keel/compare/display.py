"""What a person sees while cells run: bars on a terminal, lines elsewhere, all on standard error."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from keel.compare.plan import Cell
from keel.compare.running import Display
from keel.compare.timing import in_words

EVERY = 60.0  # seconds between two lines of progress, where there is no terminal


def display() -> Display:
    """Bars where standard error is a terminal."""
    return Bars() if sys.stderr.isatty() else Lines()


class Silent:
    """Says nothing."""

    def progress(self, running: Mapping[str, float], done: int, total: int, left: float | None) -> None:
        """Nothing."""

    def ended(self, cell: Cell, entry: Mapping[str, Any], done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines(Silent):
    """A line for each cell that ends, and now and then one on what runs."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def progress(self, running: Mapping[str, float], done: int, total: int, left: float | None) -> None:
        """Once a minute."""
        if running and time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            each = ", ".join(f"{label} {share:.0%}" for label, share in running.items())
            self.note(f"{done} of {total} cells done; {each}{_left(left)}")

    def ended(self, cell: Cell, entry: Mapping[str, Any], done: int, total: int) -> None:
        """How a cell ended."""
        self.note(f"[{done}/{total}] {cell.label}: {how(entry)}")

    def note(self, text: str) -> None:
        """A line."""
        print(text, file=sys.stderr, flush=True)


class Bars(Silent):
    """One bar for all cells, and one for each that runs.

    Args:
        force: draw them even where standard error is no terminal.
    """

    def __init__(self, force: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self.console = Console(stderr=True, force_terminal=True if force else None)
        self.bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=34)),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, min_width=9)),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.all: Any = None
        self.each: dict[str, Any] = {}

    def progress(self, running: Mapping[str, float], done: int, total: int, left: float | None) -> None:
        """Draw where everything stands."""
        if self.all is None:
            self.bars.start()
            self.all = self.bars.add_task("cells", total=1.0, said="")
        share = (done + sum(running.values())) / max(1, total)
        self.bars.update(self.all, completed=share, said=f"{done} of {total}{_left(left)}")
        for label in [label for label in self.each if label not in running]:
            self.bars.remove_task(self.each.pop(label))
        for label, part in running.items():
            if label not in self.each:
                self.each[label] = self.bars.add_task(label, total=1.0, said="")
            self.bars.update(self.each[label], completed=part, said=f"{part:.0%}" if part else "starting")

    def ended(self, cell: Cell, entry: Mapping[str, Any], done: int, total: int) -> None:
        """How a cell ended."""
        self.note(f"[{done}/{total}] {cell.label}: {how(entry)}")

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bars.stop()


def how(entry: Mapping[str, Any]) -> str:
    """How a cell ended, in words.

    >>> how({"error": "it diverged", "log": "x.log"})
    'FAILED: it diverged (x.log)'
    """
    if entry.get("error"):
        return f"FAILED: {entry['error']} ({entry.get('log', 'no log')})"
    return f"finished in {entry['wall']:.0f} s" if math.isfinite(entry.get("wall", math.nan)) else "finished"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {in_words(seconds)} left"
