"""`keel cold-start`: data for supervised training before reinforcement learning."""

from pathlib import Path
from typing import Annotated

import typer

from keel.cli.options import Json, Reward, Seed

commands = typer.Typer()


@commands.command("cold-start")
def cold_start(
    data: Annotated[str, typer.Argument(help="Traces: JSONL, Parquet, or a saved data set; several rows a prompt.")],
    path: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Counts tokens, and is sampled where the data have no pass rates.")
    ] = None,
    reward: Reward = None,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Traces of a prompt at most.")] = 1,
    easy_length: Annotated[float | None, typer.Option("--easy-length", min=0, help="For a pass rate of 1.")] = None,
    hard_length: Annotated[float | None, typer.Option("--hard-length", min=0, help="For a pass rate of 0.")] = None,
    num_generations: Annotated[int, typer.Option("-n", "--num-generations", min=1, help="Samples a prompt.")] = 8,
    max_completion_length: Annotated[int, typer.Option("--max-completion-length", min=1)] = 256,
    threshold: Annotated[float, typer.Option("--threshold", help="A sample is right if its reward is above.")] = 0.5,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose traces that are as long as their prompts are hard, for `keel train sft --data`."""
    from keel.cli.show import print_facts, quiet_or_bars
    from keel.train.cold_start import cold_start as choose

    facts = choose(
        data,
        path,
        model,
        tuple(reward) if reward else None,
        per_prompt=per_prompt,
        easy_length=easy_length,
        hard_length=hard_length,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        threshold=threshold,
        seed=seed or 0,
        report=quiet_or_bars(as_json),
    )
    print_facts(facts, as_json)
