"""`keel`: every command calls a function of the package; nothing heavy is imported before it is needed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from keel.cli import cold, compare, explain, judge, papers, ui
from keel.cli.drawing import besides, commands, newlines, run_frontier
from keel.cli.options import (
    LARGEST_SEED,
    BesideModel,
    BesidePrompt,
    Beta,
    Classes,
    Data,
    DataSets,
    EngineName,
    Json,
    Model,
    ModelArgument,
    Reward,
    Runs,
    Seed,
    Server,
    Set,
    Step,
    Task,
    Teacher,
    Top,
    ValueOf,
    data_sets,
    pairs,
    with_steps,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Divergence-regularised policy optimisation: train, evaluate, sample, compose.",
)
methods_app = typer.Typer(invoke_without_command=True, help="List the recipes, or show the composition of one.")
app.add_typer(methods_app, name="methods")
app.add_typer(papers.papers_app, name="papers")
app.add_typer(commands)
app.add_typer(explain.commands)
app.add_typer(cold.commands)
app.add_typer(judge.commands)
app.add_typer(compare.commands)
app.add_typer(ui.commands)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; `keel methods` lists them.")] = None,
    model: Model = None,
    task: Task = None,
    data: DataSets = None,
    reward: Reward = None,
    set_: Set = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file, such as a run's config.yaml.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that name.")] = False,
    seed: Seed = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Batches.")] = None,
    teacher: Teacher = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show composition, memory, time and a first batch; train nothing.")
    ] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a model by a recipe."""
    from keel.cli.show import print_composition, print_dry_run, print_run, quiet_or_bars
    from keel.train.lifecycle import execute
    from keel.train.setup import check_rewards, prepare_setup

    settings = with_steps(pairs(set_), max_steps)
    report = quiet_or_bars(as_json)
    setup = prepare_setup(
        recipe,
        model,
        None,
        task,
        data_sets(data),
        tuple(reward) if reward else None,
        seed=seed,
        name=name,
        config=config,
        settings=settings,
        teacher=teacher,
        report=report,
    )
    if dry_run:
        check_rewards(setup)
        print_dry_run(setup, as_json)
        return
    if not as_json:
        print_composition(setup.config)
    run = execute(setup, runs, resume=resume, report=report)
    print_run(run, as_json)


@app.command("eval")
def evaluate(
    model: ModelArgument = "tiny",
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Another model, for the KL, and for the answers kept and lost.")
    ] = None,
    support: Annotated[
        Classes, typer.Option("--support", help="What counts as one of the correct answers kept, gained and lost.")
    ] = Classes.answer,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Samplers (`keel samplers`), for accuracy against tokens instead."),
    ] = None,
    num_particles: Annotated[
        str, typer.Option("--num-particles", metavar="N,N,...", help="Budgets of each sampler.")
    ] = "1,4,16",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each sampler.")] = 1,
    beta: Beta = None,
    value: ValueOf = None,
    beside: BesideModel = None,
    beside_prompt: BesidePrompt = None,
    step: Step = None,
    engine: EngineName = None,
    server: Server = None,
    top: Top = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the plot of samplers as a page.")] = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure a model on held-out prompts: pass@k, avg@k, maj@k, entropy, KL, support, with intervals.

    With --method, measure samplers on it: accuracy of their output against tokens.
    """
    from keel.cli.show import print_evaluation, quiet_or_bars
    from keel.train.entry import evaluate as run_evaluation

    if method:
        options = {
            "task": task,
            "data": data,
            "reward": tuple(reward) if reward else None,
            "value": value,
            "beside": besides(beside, beside_prompt),
            "step": newlines(step),
            "engine": engine,
            "server": server,
            "top": top,
            "seed": seed or 0,
            **({} if beta is None else {"beta": beta}),
            **{key.removeprefix("evaluate."): setting for key, setting in pairs(set_).items()},
        }
        run_frontier(model, method, num_particles, seeds, html, options, as_json)
        return
    settings = {key.removeprefix("evaluate."): value for key, value in pairs(set_).items()}
    classes: Any = None if support is Classes.none else support.value
    report = quiet_or_bars(as_json)
    report("phase", {"name": "eval", "steps": None, "text": f"measuring {model}"})
    found = run_evaluation(
        model,
        task,
        data,
        tuple(reward) if reward else None,
        seed=seed or 0,
        reference=reference,
        support=classes,
        report=report,
        **settings,
    )
    report("done", {})
    print_evaluation(found, as_json)


@app.command()
def serve(
    model: ModelArgument = "tiny",
    host: Annotated[str, typer.Option("--host", help="Where to listen; a loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen where other machines can reach it; there are no keys.")
    ] = False,
    task: Task = None,
) -> None:
    """Serve a model through OpenAI's API on this machine, until Ctrl-C."""
    from keel.cli.show import quiet_or_bars
    from keel.serve.app import check_host, run_server
    from keel.train.settings import TaskSettings
    from keel.train.setup import open_model, open_task

    check_host(host, allow_remote)
    report = quiet_or_bars(False)
    policy = open_model(model, open_task(TaskSettings(name=task), None, 0), None, None, report)
    report("done", {})
    run_server(
        policy,
        model,
        host,
        port,
        allow_remote=allow_remote,
        ready=lambda url: print(f"serving {model} at {url}; Ctrl-C ends it", flush=True),
    )


@app.command()
def verify(
    recipe: Annotated[list[str] | None, typer.Argument(help="Recipes, file.py:recipe, or file.py:loss.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every recipe.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Add fixed points, variance, larger groups, precision.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 unless everything holds.")] = False,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="What a loss is meant for: a divergence to the reference, or reward."),
    ] = None,
    level: Annotated[str, typer.Option("--level", help="Of that divergence: sequence or state.")] = "sequence",
    beta: Annotated[float | None, typer.Option("--beta", help="Its coefficient; also handed to the loss.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Hold methods to their stated objectives on worlds where the exact answer is known."""
    from keel.cli.verify import run_losses, run_verify
    from keel.core.errors import ConfigError
    from keel.recipes.registry import is_recipe

    if not recipe and not everything:
        raise ConfigError("name a recipe, or give --all", "verify", "For example: keel verify grpo rloo.")
    if recipe and everything:
        raise ConfigError("give names or --all, not both", "verify")
    if level not in ("sequence", "state"):
        raise ConfigError(f"must be sequence or state, not '{level}'", "--level")
    losses = [name for name in recipe or [] if not is_recipe(name)]
    if losses and len(losses) < len(recipe or []):
        raise ConfigError("recipes and loss functions are verified apart", ", ".join(losses))
    if not losses and (objective or beta is not None):
        flag = "--objective" if objective else "--beta"
        raise ConfigError("is for loss functions; a recipe claims its own objective", flag, "Use --set beta=... there.")
    if losses:
        holds = run_losses(losses, objective, level, beta, as_json)
    else:
        holds = run_verify(recipe or [], everything, full, pairs(set_), as_json)
    if strict and not holds:
        raise typer.Exit(1)


@app.command()
def target(
    outcomes: Annotated[
        Path | None, typer.Argument(help="JSON, JSONL or CSV: ref, reward, and optionally name, mode, prompt.")
    ] = None,
    ref: Annotated[list[str] | None, typer.Option("--ref", metavar="P,P,...", help="Reference probabilities.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", metavar="R,R,...", help="Rewards; of a model: MODULE:FUNCTION.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="Names of the outcomes, with commas.")] = None,
    mode: Annotated[list[str] | None, typer.Option("--mode", help="What each outcome counts as, with commas.")] = None,
    beta: Annotated[list[str] | None, typer.Option("--beta", help="Numbers, or a sweep such as 0.01:1:5.")] = None,
    divergence: Annotated[
        list[str] | None, typer.Option("--divergence", help="kl_policy_ref, kl_ref_policy, js, alpha:0.5, ...")
    ] = None,
    per_curvature: Annotated[
        bool, typer.Option("--per-curvature", help="Divide beta by f''(1): equal strength near the reference.")
    ] = False,
    kl_budget: Annotated[list[str] | None, typer.Option("--kl-budget", help="The most reward for so much KL.")] = None,
    best_of: Annotated[list[str] | None, typer.Option("--best-of", help="The best of so many draws.")] = None,
    moment: Annotated[
        list[str] | None, typer.Option("--moment", metavar="NAME=MEAN", help="A mean of reward, good, or a mode.")
    ] = None,
    good_from: Annotated[
        float | None, typer.Option("--good-from", help="Lowest reward of a good outcome; the highest one by default.")
    ] = None,
    keep: Annotated[
        float, typer.Option("--keep", min=0, max=1, help="Share from which an answer counts as surviving.")
    ] = 0.01,
    model: Model = None,
    task: Task = None,
    data: Data = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 8,
    num_generations: Annotated[int, typer.Option("-n", "--num-generations", min=1)] = 64,
    count_completions: Annotated[
        bool, typer.Option("--count-completions", help="Count different completions, not different answers.")
    ] = False,
    set_: Set = None,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the masses drawn.")] = None,
    as_json: Json = False,
) -> None:
    """Say which distribution settings ask for, from numbers or from a model's samples."""
    from keel.cli.target import run_target

    options = {
        "outcomes": outcomes,
        "ref": ref,
        "reward": reward,
        "names": name,
        "modes": mode,
        "beta": beta,
        "divergence": divergence or "kl_policy_ref",
        "per_curvature": per_curvature,
        "kl_budget": kl_budget,
        "best_of": best_of,
        "moments": moment,
        "good_from": good_from,
        "keep": keep,
        "model": model,
        "task": task,
        "data": data,
        "num_prompts": num_prompts,
        "num_generations": num_generations,
        "count_completions": count_completions,
        "seed": seed or 0,
        **pairs(set_),
    }
    run_target(options, as_json, html)


@methods_app.callback()
def methods(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is None:
        from keel.cli.show import print_methods

        print_methods(as_json)


@methods_app.command("show")
def methods_show(
    recipe: Annotated[str, typer.Argument(help="A recipe.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print the composition of a recipe, slot by slot, as a configuration that runs."""
    from keel.cli.show import print_method

    print_method(recipe, pairs(set_), as_json)


@app.command("runs")
def list_runs(runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List the runs of a folder."""
    from keel.cli.show import print_runs

    print_runs(runs, as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Name of a run, or its folder.")],
    path: Annotated[Path, typer.Argument(help="Where to write the model.")],
    runs: Runs = Path("runs"),
) -> None:
    """Write the final model of a run, adapters merged, in the transformers format."""
    from keel.train.entry import export as write

    folder = Path(run) if Path(run).is_dir() else runs / run
    print(write(folder, path))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and can do."""
    from keel.cli.doctor import examine, print_findings

    findings = examine()
    print(json.dumps(findings, indent=1)) if as_json else print_findings(findings)


@app.command()
def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED)] = 0,
    runs: Runs = Path("runs"),
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Batches of each run.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Add supervised training of the same duration.")] = False,
    as_json: Json = False,
) -> None:
    """Train GRPO on countdown, without and with a KL to the reference, and show what each keeps and loses."""
    from keel.cli.demo import run_demo

    run_demo(runs, seed, max_steps, control, as_json)


def main() -> None:
    """The entry point: a user's mistake exits with 2, a fault with 1, both without a traceback."""
    from keel.core.errors import KeelError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks must not end a command
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeelError as error:
        print(f"keel: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
