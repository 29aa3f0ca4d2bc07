"""What `keel verify my_loss.py:loss` prints."""

from keel.verify.losses import LossReport, Row


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
    colour = "green" if report.status == "holds" else "red"
    return f"[{colour}]{report.status}[/{colour}] (gradient off by {_share(report.gradient_relative_error)} at most)"


def _table(rows: tuple[Row, ...]):  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("sequences", "reference", "sampled by", "seed"):
        table.add_column(column)
    for column in ("gradient error", "cosine", "scale"):
        table.add_column(column, justify="right")
    for row in rows:
        sampler = "the policy" if row.on_policy else "an older one"
        numbers = (_share(row.gradient_relative_error), f"{row.cosine:.4f}", f"{row.scale:.4g}")
        table.add_row(row.lengths, row.distance, sampler, str(row.seed), *numbers)
    return table


def _share(error: float | None) -> str:
    """An error in percent, rounding noise as 0."""
    if error is None:
        return "-"
    return "0" if error < 1e-6 else f"{100 * error:.2g}%"
