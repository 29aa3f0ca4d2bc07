"""`keel compare`: recipes under equal conditions; `keel recommend`: which ones to try first."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keel.cli.options import Data, Json, Model, Reward, Runs, Set, Task, pairs

commands = typer.Typer()


@commands.command()
def compare(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes, or file.py:recipe; the first is the baseline."),
    ] = None,
    task: Task = None,
    model: Model = None,
    data: Data = None,
    reward: Reward = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each arm, with seeds 0, 1, ...")] = 3,
    budget: Annotated[
        str, typer.Option("--budget", help="Of each run's training: 200k-tokens, 5min, 100steps.")
    ] = "100steps",
    set_: Set = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="KEY=V,V", help="One arm for each value, of each recipe that has it."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option("--tune", metavar="beta[=V,V]", help="Choose each arm's strength by trials on other prompts."),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes at a time.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of each process; 1 without it.")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the comparison, and of its folder.")] = None,
    runs: Runs = Path("runs"),
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which runs there would be, which are there, and how long they take.")
    ] = False,
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a line for each run here, too.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page here, too.")] = None,
) -> None:
    """Train by several recipes under equal conditions, several seeds each, and say what can be told apart."""
    from keel.compare.arms import swept_values
    from keel.compare.asked import Asked
    from keel.compare.display import display
    from keel.compare.entry import preview, run
    from keel.compare.outcomes import Budget
    from keel.compare.plan import Conditions
    from keel.compare.tuning import Tuning

    tuning = None
    if tune is not None:
        key, sign, _ = tune.partition("=")
        tuning = Tuning(key, tuple(swept_values([tune], "--tune")[key.strip()] if sign else ()))
    asked = Asked(
        recipes=tuple(recipes or ()),
        conditions=Conditions(
            budget=Budget.parse(budget),
            task=task,
            model=model,
            data=data,
            rewards=tuple(reward or ()),
            settings=tuple(sorted(pairs(set_).items())),
        ),
        seeds=seeds,
        swept=swept_values(param or [], "--param"),
        tuning=tuning,
        name=name,
        runs=runs,
        workers=workers,
        threads=threads,
        ray=ray,
    )
    if dry_run:
        _print_preview(preview(asked, display()), as_json)
        return
    _print(run(asked, retry_failed=retry_failed, shown=display()), as_json, csv, html)


@commands.command()
def recommend(
    task: Task = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="What may be spent on one run: 200k-tokens, 5min, 100steps.")
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Name the recipes to try first on a task, with the evidence: comparisons here, and those that come with Keel."""
    from keel.cli.show import print_json
    from keel.compare.outcomes import Budget
    from keel.compare.recommend import recommend as found

    advice = found(task, None if budget is None else Budget.parse(budget), runs)
    print_json(advice.to_json()) if as_json else print(advice.text())


def _print_preview(found: dict[str, Any], as_json: bool) -> None:
    from keel.cli.show import print_json

    if as_json:
        print_json(found)
        return
    for cell in found["cells"]:
        print(f"{cell['state']:<9} {cell['arm']}, seed {cell['seed']:<5} {cell['run']}")


def _print(found: Any, as_json: bool, csv: Path | None, html: Path | None) -> None:
    """What came of it; with failed cells the exit status is 1."""
    from keel.compare.publish import print_json, print_table, publish_to

    publish_to(found, csv, html)
    if as_json:
        print_json(found)
    else:
        print_table(found)
    if found.comparison.failed:
        raise typer.Exit(1)
