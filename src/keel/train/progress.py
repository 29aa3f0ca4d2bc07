"""What a person sees while a run goes on: bars with the time left, now and then two completions, warnings in words."""

import sys
from collections.abc import Mapping
from typing import Any

from keel.train.session import Reporter

SHOWN = ("reward", "entropy", "kl")  # of an online run; a supervised one shows its loss


def default_reporter() -> Reporter:
    """Bars on a terminal; elsewhere only warnings and notes, on standard error."""
    return ProgressReporter() if sys.stderr.isatty() else plain_reporter


def plain_reporter(event: str, facts: Mapping[str, Any]) -> None:
    """Warnings, notes and findings, one line each."""
    if event in ("warning", "note", "finding"):
        print(f"{event}: {facts['text']}", file=sys.stderr, flush=True)


class ProgressReporter:
    """Rich progress bars on standard error.

    Args:
        completions: print the sampled completions.
        width: of the console; None takes the terminal's.
        force: draw bars even where standard error is no terminal.
    """

    def __init__(self, completions: bool = True, width: int | None = None, force: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.completions = completions
        self.console = Console(stderr=True, width=width, force_terminal=True if force else None)
        whole = Column(no_wrap=True, min_width=7)
        self.bars = Progress(
            TextColumn("{task.description:<26.26}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
        )
        self.task: Any = None

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        handle = getattr(self, f"on_{event}", None)
        if handle is not None:
            handle(facts)

    def on_phase(self, facts: Mapping[str, Any]) -> None:
        """A new bar."""
        self.bars.start()
        self._finish_bar()
        self.task = self.bars.add_task(facts["text"], total=facts["steps"], completed=facts.get("start", 0), said="")

    def on_step(self, facts: Mapping[str, Any]) -> None:
        """One batch further."""
        metrics = facts["metrics"]
        shown = SHOWN if "reward" in metrics else ("loss",)
        said = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)
        self.bars.update(self.task, completed=facts["step"], said=said)
        for prompt, completion in facts["completions"] if self.completions else []:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.console.print(
                f"  step {facts['step']}: {_short(text)} -> {_short(completion)}",
                markup=False,
                highlight=False,
                style="dim",
            )

    def on_progress(self, facts: Mapping[str, Any]) -> None:
        """Part of a phase that counts something other than steps."""
        if self.task is not None:
            self.bars.update(self.task, completed=facts["done"], total=facts["total"])

    def on_warning(self, facts: Mapping[str, Any]) -> None:
        """Something to know about."""
        self.console.print(f"warning: {facts['text']}", markup=False, highlight=False, style="yellow")

    def on_finding(self, facts: Mapping[str, Any]) -> None:
        """What the numbers say has begun."""
        style = "red" if facts["finding"].level == "problem" else "yellow"
        self.console.print(facts["text"], markup=False, highlight=False, style=style)

    def on_note(self, facts: Mapping[str, Any]) -> None:
        """Something said once."""
        self.console.print(facts["text"], markup=False, highlight=False)

    def on_evaluation(self, facts: Mapping[str, Any]) -> None:
        """The bar of a measurement shows its result."""
        metrics = facts["evaluation"].metrics
        said = "  ".join(f"{name} {metrics[name].value:.3f}" for name in ("pass@1", "pass@16") if name in metrics)
        if self.task is not None:
            self.bars.update(self.task, said=said)

    def on_done(self, facts: Mapping[str, Any]) -> None:
        """No bar any more."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._finish_bar()
        self.bars.stop()

    def _finish_bar(self) -> None:
        if self.task is not None:
            self.bars.stop_task(self.task)
            self.task = None


def _short(text: str, limit: int = 100) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= limit else one_line[: limit - 1] + "…"
