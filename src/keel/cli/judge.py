"""`keel judge`: preferences out of prompts with completions."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from keel.cli.options import Json, Seed

commands = typer.Typer()


class How(StrEnum):
    """How a language model judges."""

    pairwise = "pairwise"
    scores = "scores"
    digit = "digit"


class Ties(StrEnum):
    """Where ties go."""

    apart = "apart"
    half = "half"


@commands.command()
def judge(
    data: Annotated[str, typer.Argument(help="JSONL or Parquet: prompt, and completions, or chosen and rejected.")],
    path: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    reward: Annotated[
        str | None,
        typer.Option("--reward", metavar="MODULE:FUNCTION", help="Scores completions; or a reward model's folder."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="A language model here: a folder or hub name.")] = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="A language model at an OpenAI-compatible address.")
    ] = None,
    served: Annotated[str | None, typer.Option("--served", help="Its name there; the first one without it.")] = None,
    how: Annotated[
        How, typer.Option("--how", help="Compare each two in both orders, write scores, or read a digit.")
    ] = How.pairwise,
    template: Annotated[
        Path | None, typer.Option("--template", help="A file with the question to a language model, and its places.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Judgements of an item for scores.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of the judge's answers.")] = 0.0,
    max_completion_length: Annotated[int, typer.Option("--max-completion-length", min=1)] = 512,
    ties: Annotated[
        Ties, typer.Option("--ties", help="Put ties with the undecided, or write them: probability 0.5, equal scores.")
    ] = Ties.apart,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Label single completions: good from this score on.")
    ] = None,
    least_gap: Annotated[float, typer.Option("--least-gap", min=0, help="Scores up to so far apart are tied.")] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Items that are written together.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for a call of --reward.")] = 60.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a file that is there, and ask again where the judge failed.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Judge completions, and write preferences for `keel train dpo --data`.

    Items become pairs; where any has more than two completions, all become lists with scores. What the data say of an
    earlier judgement is not carried over.

    Ties and what cannot be read go to PATH.undecided.jsonl, and are counted. Where the judge has not scored a single
    item the command fails.
    """
    from keel.cli.show import print_facts, quiet_or_bars
    from keel.core.errors import ConfigError, RewardError
    from keel.train.judging import judge as label

    question = None
    if template is not None:
        try:
            question = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", str(template), "Give a text file.") from error
    report = quiet_or_bars(as_json)
    facts = label(
        data,
        path,
        reward,
        model=model,
        server=server,
        served=served,
        how=how.value,  # type: ignore[arg-type]
        template=question,
        num_samples=num_samples,
        temperature=temperature,
        max_completion_length=max_completion_length,
        ties=ties.value,  # type: ignore[arg-type]
        threshold=threshold,
        least_gap=least_gap,
        seed=seed or 0,
        batch_size=batch_size,
        timeout=timeout,
        resume=resume,
        report=report,
    )
    report("done", {})
    print_facts(facts, as_json)
    if facts["items"] and facts["failed"] + facts["unparsable"] == facts["items"]:
        fix = f"The reasons are above, and in {path}.undecided.jsonl. Once the judge works, go on with --resume."
        raise RewardError(f"the judge has scored none of the {facts['items']:.0f} items", str(path), fix)
