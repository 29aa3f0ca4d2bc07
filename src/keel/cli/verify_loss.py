"""What `keel verify my_loss.py:loss` prints."""

from typing import TYPE_CHECKING

from keel.verify.losses import LossReport, Row

if TYPE_CHECKING:
    from rich.table import Table


def print_loss(report: LossReport, as_json: bool = False) -> None:
    """A verdict, what the loss follows, and a row for each world."""
    if as_json:
        from keel.cli.show import print_json

        print_json(report.to_dict())
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{report.name}[/bold]  {_verdict(report)}", soft_wrap=True)
    if report.objective is not None:
        console.print(f"  meant       {report.objective}", markup=False, soft_wrap=True)
    console.print(f"  follows     {report.follows}", markup=False, soft_wrap=True)
    console.print(f"  off-policy  {report.follows_off_policy}", markup=False, soft_wrap=True)
    if report.field_asymmetry > 1e-6:
        text = f"  no function has this gradient: its Jacobian is asymmetric by {report.field_asymmetry:.2g}"
        console.print(text, markup=False, soft_wrap=True)
    for finding in report.findings:
        console.print(f"  - {finding}", markup=False, soft_wrap=True)
    if report.objective is not None:
        console.print(_table(report.rows))


def _verdict(report: LossReport) -> str:
    if report.status == "no objective":
        return "no objective was stated"
    if report.status == "holds":
        return "[green]holds[/green] on every world where the policy samples"
    return f"[red]falls short[/red] (gradient off by up to {_share(report.gradient_relative_error)})"


def _table(rows: tuple[Row, ...]) -> "Table":
    """One line for each kind of world, the worst of its seeds."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("sequences", "reference", "sampled by"):
        table.add_column(column)
    for column in ("gradient error", "cosine"):
        table.add_column(column, justify="right")
    kinds = dict.fromkeys((row.lengths, row.distance, row.on_policy) for row in rows)
    for lengths, distance, on_policy in kinds:
        here = [row for row in rows if (row.lengths, row.distance, row.on_policy) == (lengths, distance, on_policy)]
        error = max(row.gradient_relative_error or 0.0 for row in here)
        cosine = min(row.cosine or 0.0 for row in here)
        sampler = "the policy" if on_policy else "an older one"
        table.add_row(lengths, distance, sampler, _share(error), f"{cosine:.4f}")
    return table


def _share(error: float | None) -> str:
    """An error in percent, rounding noise as 0."""
    if error is None:
        return "-"
    if error < 1e-6:
        return "0"
    return f"{100 * error:.0f}%" if error >= 0.1 else f"{100 * error:.2g}%"
