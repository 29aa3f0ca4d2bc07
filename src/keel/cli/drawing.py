"""Commands that draw: `keel sample`, `keel samplers`, `keel fit-value`; and what `keel eval --method` does."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from keel.cli.options import (
    BesideModel,
    BesidePrompt,
    Beta,
    Data,
    EngineName,
    Json,
    Model,
    ModelArgument,
    Reward,
    Seed,
    Server,
    Set,
    Step,
    Task,
    Top,
    ValueOf,
    pairs,
    texts,
)

commands = typer.Typer()


@commands.command()
def sample(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; with --method, held-out ones without any.")
    ] = None,
    model: Model = "tiny",
    num_generations: Annotated[int, typer.Option("-n", "--num-generations", min=1)] = 4,
    method: Annotated[str | None, typer.Option("--method", help="A sampler; `keel samplers` lists them.")] = None,
    num_particles: Annotated[int | None, typer.Option("--num-particles", min=1, help="Of the sampler.")] = None,
    beta: Beta = None,
    reward: Reward = None,
    value: ValueOf = None,
    beside: BesideModel = None,
    beside_prompt: BesidePrompt = None,
    step: Step = None,
    engine: EngineName = None,
    server: Server = None,
    top: Top = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Held-out prompts.")] = 4,
    task: Task = None,
    data: Data = None,
    set_: Set = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Print completions of prompts; with --method, weighted ones and what they cost."""
    from keel.cli.show import print_samples, quiet_or_bars
    from keel.core.errors import ConfigError
    from keel.train.samples import sample as draw

    report = quiet_or_bars(as_json)
    settings = pairs(set_)
    only = {"num_particles": num_particles, "beta": beta, "value": value, "reward": reward, "step": step, "data": data}
    only |= {"engine": engine, "server": server, "top": top}
    if method is None:
        given = [name for name, setting in only.items() if setting is not None]
        if given:
            raise ConfigError("is for samplers", f"--{given[0].replace('_', '-')}", "Give --method smc, for example.")
        if not prompt and task is None:
            raise ConfigError("there is no prompt", "keel sample", "Give one, or --method for held-out ones.")
        print_samples(
            draw(model, prompt or num_prompts, num_generations, seed=seed or 0, task=task, report=report, **settings),
            as_json,
        )
        return
    from keel.cli.show import print_accounts

    options = settings | {key: only[key] for key in ("num_particles", "beta") if only[key] is not None}
    found = draw(
        model,
        prompt or num_prompts,
        seed=seed or 0,
        task=task,
        data=data,
        method=method,
        reward=tuple(reward) if reward else None,
        value=value,
        beside=besides(beside, beside_prompt),
        step=newlines(step),
        engine=engine,
        server=server,
        top=top,
        report=report,
        **options,
    )
    print_accounts(found, as_json)


@commands.command()
def samplers(as_json: Json = False) -> None:
    """List the samplers: what each does, what its output is distributed as, what it needs."""
    from keel.cli.show import print_samplers

    print_samplers(as_json)


@commands.command("fit-value")
def fit_value(
    path: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Model = "tiny",
    task: Task = None,
    data: Data = None,
    reward: Reward = None,
    kind: Annotated[
        str, typer.Option("--kind", help="soft: log of the mean of exp(r / beta); mean: mean reward.")
    ] = "soft",
    beta: Beta = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=8, help="Training prompts to sample.")] = 4096,
    num_generations: Annotated[int, typer.Option("-n", "--num-generations", min=1)] = 8,
    head_only: Annotated[bool, typer.Option("--head-only", help="A head on the policy's own states.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn the value of unfinished texts from a model's own samples, for samplers' --value."""
    from keel.cli.show import print_facts, quiet_or_bars
    from keel.core.errors import ConfigError
    from keel.train.samples import fit_value as fit

    if kind not in ("soft", "mean"):
        raise ConfigError(f"must be soft or mean, not {kind!r}", "--kind")
    facts = fit(
        path,
        model,
        task,
        data,
        tuple(reward) if reward else None,
        kind=kind,  # type: ignore[arg-type]
        beta=0.1 if beta is None else beta,
        num_prompts=num_prompts,
        num_generations=num_generations,
        own_body=not head_only,
        seed=seed or 0,
        report=quiet_or_bars(as_json),
    )
    print_facts(facts, as_json)


def run_frontier(
    model: ModelArgument,
    methods: list[str],
    sizes: str,
    seeds: int,
    html: Path | None,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """`keel eval --method`: a table, and the plot if a file is named."""
    import sys

    from keel.cli.show import print_curves, quiet_or_bars
    from keel.core.errors import ConfigError
    from keel.train.samples import frontier

    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"must be numbers with commas, such as 1,4,16 (got {sizes!r})", "--num-particles")
    names = [name.strip() for item in methods for name in item.split(",")]
    found = frontier(model, names, tuple(map(int, parts)), seeds=seeds, report=quiet_or_bars(as_json), **options)
    print_curves(found, as_json)
    if html is not None:
        from keel.report.cost import write_cost

        write_cost(html, found, "keel " + shlex.join(sys.argv[1:]))
        if not as_json:
            print(f"the plot is in {html}")


def besides(models: list[str] | None, prompts: list[str] | None) -> dict[str, Any] | None:
    """Further models and prompts by name."""
    from keel.train.sampling import PROMPT, Beside

    by_name, texts_of = texts(models, "--beside"), texts(prompts, "--beside-prompt")
    if not by_name and not texts_of:
        return None
    names = dict.fromkeys([*by_name, *texts_of])
    return {name: Beside(by_name.get(name), texts_of.get(name, PROMPT)) for name in names}


def newlines(step: str | None) -> str | None:
    r"""A delimiter in which \n and \t are written out."""
    return None if step is None else step.replace("\\n", "\n").replace("\\t", "\t")
