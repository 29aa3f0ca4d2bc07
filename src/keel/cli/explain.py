"""`keel explain`: the completions of a run, token by token."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keel.cli.options import Json, Runs

commands = typer.Typer()
LISTED = 40  # completions in a list


@commands.command()
def explain(
    run: Annotated[str, typer.Argument(help="Name of a run, or its folder.")],
    rollout: Annotated[
        int | None, typer.Option("--rollout", metavar="ID", help="One completion; without it, list them.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by", metavar="NAME", help="entropy, advantage, kl, ratio, gradient, or a weight, mask or term by name."
        ),
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="Only completions of this step.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page: of the one completion, or of the last step's.")
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show what each token of a completion got: entropy, advantage, KL, weights, masks, terms, gradient."""
    from keel.cli.show import print_json
    from keel.core.errors import ConfigError
    from keel.report.tokens import pick, quantities
    from keel.report.tokens_page import write_tokens

    if by and rollout is None and html is None:
        raise ConfigError("colours one completion", "--by", "Name it: --rollout ID. Or write a page: --html FILE.")
    stored, found, earlier = find(run, runs, rollout, step, last_step_only=html is not None)
    if html is not None:
        typer.echo(write_tokens(stored, found, html, by), err=as_json)
    if rollout is None:
        if as_json:
            print_json([_facts(one) for one in found])
        elif html is None:
            _print_list(found, earlier)
        return
    [one] = found
    if as_json:
        print_json(_facts(one) | _numbers(one, pick(quantities(one), by) if by else quantities(one)))
    elif html is None:
        _print_tokens(one, by)


def find(
    run: str, runs: Path, rollout: int | None, step: int | None, last_step_only: bool = False
) -> tuple[Any, list[Any], int]:
    """The run, the completions asked for, and how many earlier ones are left out.

    Raises:
        UserError: there is no such run, step or completion, or none is stored.
    """
    from keel.core.errors import RunError, UserError
    from keel.store.store import Store

    folder = Path(run) if Path(run).is_dir() else runs / run
    file = folder.resolve().parent / "keel.sqlite"
    if not file.is_file():
        raise UserError(f"there is no run named '{run}', and no store of runs", str(file), "Name its folder: --runs.")
    with Store(file, readonly=True) as store:
        stored = store.run(folder.resolve().name)
        counts = store.rollout_counts(stored.id)
        if not counts:
            fix = "Methods with a reward or with comparisons store some every train.log_completions steps; 0: none."
            raise RunError("there are no completions stored", stored.name, fix)
        if step is not None and step not in counts:
            raise RunError(f"no completions are stored of step {step}", stored.name, f"Steps: {_steps(list(counts))}.")
        if rollout is not None:
            one = store.rollout(stored.id, rollout)
            if step is not None and one.step != step:
                raise RunError(f"rollout {rollout} is of step {one.step}, not {step}", stored.name)
            return stored, [one], 0
        if last_step_only and step is None:
            step = max(counts)
        total = sum(counts.values()) if step is None else counts[step]
        skipped = 0 if step is not None else max(0, total - LISTED)
        return stored, store.rollouts(stored.id, step, limit=total, offset=skipped, numbers=last_step_only), skipped


def _print_list(found: list[Any], earlier: int) -> None:
    from keel.report.tokens_terminal import listing

    print(listing(found))
    if earlier:
        print(f"{earlier} earlier ones: --step N lists those of a step")


def _print_tokens(rollout: Any, by: list[str] | None) -> None:
    """Coloured text where there are colours, else a table of the same numbers."""
    from rich.console import Console

    from keel.report.tokens import pick, quantities
    from keel.report.tokens_terminal import coloured, heading, number_table, ranges

    known = quantities(rollout)
    shown = pick(known, by)
    console = Console(highlight=False)
    print(heading(rollout) + "\n")
    if console.is_terminal and console.color_system is not None and not console.no_color:
        for quantity in shown:
            console.print(coloured(rollout, quantity, console.width), markup=False, soft_wrap=True)
    else:
        print(ranges(shown) + "\n")
        print(number_table(rollout, shown, console.width if console.is_terminal else None) + "\n")
    rest = [q.name for q in known if q not in shown]
    if rest:
        print(f"also stored: {', '.join(rest)} (--by NAME)")


def _facts(rollout: Any) -> dict[str, Any]:
    from keel.core.plain import finite

    names = ("id", "step", "group", "data_index", "reward", "rewards", "length", "stop", "prompt", "completion")
    return finite({name: getattr(rollout, name) for name in names})


def _numbers(rollout: Any, shown: list[Any]) -> dict[str, Any]:
    from keel.core.plain import finite
    from keel.report.tokens import chosen

    return {
        "tokens": list(rollout.tokens),
        "chosen": chosen(rollout).tolist(),
        "numbers": {q.name: finite(q.values.tolist()) for q in shown},
        "about": {q.name: {"says": q.says, "unit": q.unit, "neutral": q.centre, "range": q.range} for q in shown},
    }


def _steps(steps: list[int]) -> str:
    """
    >>> _steps([1, 2, 3, 4, 5, 6, 7, 8, 9])
    '1, 2, 3, ..., 8, 9'
    """
    words = [str(step) for step in steps]
    return ", ".join(words if len(words) <= 8 else [*words[:3], "...", *words[-2:]])
