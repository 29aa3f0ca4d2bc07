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

STYLE = {"holds": "green", "falls short": "yellow", "no objective": "dim"}


def run_losses(names: Sequence[str], objective: str | None, level: str, beta: float | None, as_json: bool) -> bool:
    """Verify loss functions and print what was found; whether all hold the stated objective."""
    reports = [verify_loss(name, objective=objective, level=level, beta=beta) for name in names]  # type: ignore[arg-type]
    if as_json:
        print_json([plain(report.to_dict()) for report in reports])
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
        print_json([plain(one.to_dict()) for one in found])
    else:
        Console().print(table(found, full))
        for one in found:
            for reason in one.reasons:
                print(f"{one.label}: {reason}")
            if one.follows:
                print(f"{one.label}: what it follows: {one.follows}")
            if one.exact_with:
                print(f"{one.label}: exact with {', '.join(f'{k}={v}' for k, v in one.exact_with.items())}")
    return all(one.status == HOLDS for one in found)


def plain(value: Any) -> Any:
    """Values for JSON, in which a number that was not measured is null."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def table(found: Sequence[Verification], full: bool) -> Table:
    """One line for each recipe."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("recipe", overflow="fold")
    for name in ("error", "cosine", "off-policy", "groups"):
        out.add_column(name, justify="right", no_wrap=True)
    if full:
        out.add_column("fixed point", justify="right", no_wrap=True)
    out.add_column("status", no_wrap=True)
    out.add_column("objective", overflow="fold")
    for one in found:
        cells = [escape(one.label), *numbers(one)]
        if full:
            cells.append(_share(one.fixed_point_tv))
        out.add_row(*cells, f"[{STYLE[one.status]}]{one.status}[/]", escape(one.objective))
    return out


def numbers(found: Verification) -> list[str]:
    """Gradient error, cosine, off-policy error, and the error in groups."""
    groups = f"{_share(found.groups[-1].relative_error)} (G={found.groups[-1].size})" if found.groups else ""
    cosine = "" if found.cosine is None else f"{found.cosine:.4f}"
    return [_share(found.gradient_relative_error), cosine, _share(found.off_policy_relative_error), groups]


def _share(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value < 1e-6 else f"{value:.3g}"
