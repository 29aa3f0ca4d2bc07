"""`keel`: every command calls a function of the package; nothing heavy is imported before it is needed."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Divergence-regularised policy optimisation: train, evaluate, sample, compose.",
)
methods_app = typer.Typer(invoke_without_command=True, help="List the recipes, or show the composition of one.")
app.add_typer(methods_app, name="methods")

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A recipe argument (beta=0.04), or a path (train.learning_rate=1e-5, terms.kl.coef=0.1).",
    ),
]
Model = Annotated[str | None, typer.Option("--model", help="tiny, a folder, a run's folder, or a hub name.")]
Task = Annotated[str | None, typer.Option("--task", help="countdown, or the name of a reasoning-gym data set.")]
Data = Annotated[str | None, typer.Option("--data", help="JSONL, Parquet, or a saved data set, in place of a task.")]
Reward = Annotated[
    list[str] | None,
    typer.Option("--reward", metavar="MODULE:FUNCTION", help="Scores completions; may be given several times."),
]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Decides all randomness.")]


class Classes(StrEnum):
    """What counts as one answer: its canonical form, each completion by itself, or nothing is compared."""

    answer = "answer"
    completion = "completion"
    none = "none"


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; `keel methods` lists them.")] = None,
    model: Model = None,
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    set_: Set = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file, such as a run's config.yaml.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that name.")] = False,
    seed: Seed = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Batches.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show composition, memory, time and a first batch; train nothing.")
    ] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a model by a recipe."""
    from keel.cli.show import print_composition, print_dry_run, print_run, quiet_or_bars
    from keel.train.lifecycle import execute
    from keel.train.setup import prepare_setup

    settings = pairs(set_) | ({} if max_steps is None else {"train.max_steps": max_steps})
    report = quiet_or_bars(as_json)
    setup = prepare_setup(
        recipe,
        model,
        None,
        task,
        data,
        tuple(reward) if reward else None,
        seed=seed,
        name=name,
        config=config,
        settings=settings,
        report=report,
    )
    if dry_run:
        print_dry_run(setup, as_json)
        return
    if not as_json:
        print_composition(setup.config)
    run = execute(setup, runs, resume=resume, report=report)
    print_run(run, as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="tiny, a folder, a run's folder, or a hub name.")] = "tiny",
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Another model, for the KL, and for the answers kept and lost.")
    ] = None,
    support: Annotated[
        Classes, typer.Option("--support", help="What counts as one of the correct answers kept, gained and lost.")
    ] = Classes.answer,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure a model on held-out prompts: pass@k, avg@k, maj@k, entropy, KL, support, with intervals."""
    from keel.cli.show import print_evaluation, quiet_or_bars
    from keel.train.entry import evaluate as run_evaluation

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
def sample(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Model = "tiny",
    num_generations: Annotated[int, typer.Option("-n", "--num-generations", min=1)] = 4,
    task: Task = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Print completions of prompts."""
    from keel.cli.show import print_samples, quiet_or_bars
    from keel.train.entry import sample as draw

    found = draw(
        model, prompt, num_generations, seed=seed or 0, task=task, report=quiet_or_bars(as_json), **pairs(set_)
    )
    print_samples(found, as_json)


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
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    runs: Runs = Path("runs"),
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Batches of each run.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Add supervised training of the same duration.")] = False,
    as_json: Json = False,
) -> None:
    """Train GRPO on countdown, without and with a KL to the reference, and show what each keeps and loses."""
    from keel.cli.demo import run_demo

    run_demo(runs, seed, max_steps, control, as_json)


def pairs(values: list[str] | None) -> dict[str, Any]:
    """`--set` options as keys and YAML values.

    Raises:
        ConfigError: one without `=`, or one twice.
    """
    from keel.core.errors import ConfigError
    from keel.train.configuration import parse_value

    out: dict[str, Any] = {}
    for item in values or []:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign or not key:
            raise ConfigError("must be KEY=VALUE", f"--set {item}", "For example --set beta=0.04.")
        if key in out:
            raise ConfigError("is given twice", f"--set {key}")
        out[key] = parse_value(text)
    return out


def main() -> None:
    """The entry point: a user's mistake exits with 2, a fault with 1, both without a traceback."""
    from keel.core.errors import KeelError

    try:
        app()
    except KeelError as error:
        print(f"keel: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
