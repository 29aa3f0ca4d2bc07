"""What `keel verify` prints."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keel.cli.show import print_json
from keel.cli.verify_loss import print_loss
from keel.verify.entry import verify
from keel.verify.losses import verify_loss
from keel.verify.recipes import HOLDS, Verification

WIDE = 110  # columns
STYLE = {"holds": "green", "falls short": "yellow", "no objective": "dim"}


def run_losses(names: Sequence[str], objective: str | None, level: str, beta: float | None, as_json: bool) -> bool:
    """Verify loss functions and print what was found; whether all hold the stated objective."""
    reports = [verify_loss(name, objective=objective, level=level, beta=beta) for name in names]  # type: ignore[arg-type]
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            print_loss(report)
    return all(report.status == HOLDS for report in reports)


def run_verify(names: Sequence[str], everything: bool, full: bool, arguments: Mapping[str, Any], as_json: bool) -> bool:
    """Verify recipes and print what was found; whether all that claim an objective hold it."""
    console = Console(stderr=True)
    told = None if as_json or not sys.stderr.isatty() else lambda found: console.print(f"  {found.label}", style="dim")
    found = verify(None if everything else list(names), full=full, arguments=arguments, told=told)
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        out = Console()
        out.print(table(found, full, wide=out.width >= WIDE))
        for one in found:
            for reason in one.reasons:
                print(f"{one.label}: {reason}")
            if one.follows:
                print(f"{one.label}: what it follows: {one.follows}")
            if one.exact_with:
                print(f"{one.label}: exact with {', '.join(f'{k}={v}' for k, v in one.exact_with.items())}")
    return all(one.status == HOLDS for one in found)


def table(found: Sequence[Verification], full: bool, wide: bool) -> Table:
    """One row for each recipe, whose name is folded before a number is cut; the objective only where there is room."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("recipe", overflow="fold")
    out.add_column("status", no_wrap=True)
    for name in ("error", "off-policy", "groups (G)", *(["fixed"] if full else [])):
        out.add_column(name, justify="right", no_wrap=True)
    if wide:
        out.add_column("objective", overflow="fold")
    for one in found:
        groups = f"{_share(one.groups[-1].relative_error)} ({one.groups[-1].size})" if one.groups else ""
        cells = [_share(one.gradient_relative_error), _share(one.off_policy_relative_error), groups]
        cells += [_share(one.fixed_point_tv)] if full else []
        cells += [escape(one.objective)] if wide else []
        out.add_row(escape(one.label), f"[{STYLE[one.status]}]{one.status}[/]", *cells)
    return out


def _share(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value < 1e-6 else f"{value:.3g}"
