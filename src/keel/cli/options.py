"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A recipe argument (beta=0.04), or a path (train.learning_rate=1e-5, terms.kl.coef=0.1).",
    ),
]
Model = Annotated[str | None, typer.Option("--model", help="tiny, a folder, a run's folder, or a hub name.")]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", help="What a distillation learns from: tiny, a folder, a run's folder, or a hub name."),
]
ModelArgument = Annotated[str, typer.Argument(help="tiny, a folder, a run's folder, or a hub name.")]
Task = Annotated[
    str | None,
    typer.Option("--task", help="countdown, a data set of reasoning-gym, verifiers:ID, or one's own as file.py:NAME."),
]
Data = Annotated[str | None, typer.Option("--data", help="JSONL, Parquet, or a saved data set, in place of a task.")]
DataSets = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH[=WEIGHT]",
        help="JSONL, Parquet, or a saved data set, in place of a task; of preferences several, drawn by their weights.",
    ),
]
Reward = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="Scores completions; or the folder of a reward model, or an ensemble (mean, wco, uwo) as wco:DIR,DIR. May "
        "be given several times.",
    ),
]
Runs = Annotated[Path, typer.Option("--runs", file_okay=False, help="The folder of all runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LARGEST_SEED = 2**63 - 1  # what the store of runs holds
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Decides all randomness.")]
Beta = Annotated[float | None, typer.Option("--beta", help="Of the tilt, for samplers that have one; 0.1 without it.")]
ValueOf = Annotated[
    str | None,
    typer.Option(
        "--value",
        help="Of unfinished texts: fit, fit:mean, a folder of `keel fit-value`, monte_carlo:M, MODULE:FUNCTION, or "
        "odds:MODULE:FUNCTION for a process reward model.",
    ),
]
BesideModel = Annotated[
    list[str] | None,
    typer.Option("--beside", metavar="NAME=MODEL", help="A further model, for fusion, contrast and guidance."),
]
BesidePrompt = Annotated[
    list[str] | None,
    typer.Option(
        "--beside-prompt",
        metavar="NAME=TEXT",
        help="What a further model is given, {prompt} for the prompt; without --beside NAME the policy itself.",
    ),
]
Step = Annotated[
    str | None, typer.Option("--step", help="Text that ends a step, such as '\\n\\n'; samplers go by token without it.")
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Samplers draw from the model at this address (http://127.0.0.1:8000); --model gives its tokenizer.",
    ),
]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="local; server (--server, or OPENAI_BASE_URL); vllm, with --step.")
]
Top = Annotated[
    int | None,
    typer.Option("--top", min=1, help="Likeliest next tokens that a server is asked for, and that samplers see."),
]


class Classes(StrEnum):
    """What counts as one answer: its canonical form, each completion by itself, or nothing is compared."""

    answer = "answer"
    completion = "completion"
    none = "none"


def data_sets(values: list[str] | None) -> str | dict[str, float] | None:
    """A path, or several with their weights.

    Raises:
        ConfigError: one is given twice, or with a weight that is no positive number.

    >>> data_sets(["a.jsonl"]), data_sets(["a.jsonl=2", "b.jsonl"])
    ('a.jsonl', {'a.jsonl': 2.0, 'b.jsonl': 1.0})
    """
    from keel.core.errors import ConfigError

    found: dict[str, float] = {}
    for item in values or []:
        path, sign, text = item.rpartition("=")
        if not sign or Path(item).exists():
            path, text = item, "1"
        try:
            weight = float(text)
        except ValueError:
            raise ConfigError("must be PATH or PATH=WEIGHT", f"--data {item}", "For example a.jsonl=2.") from None
        if not 0 < weight < float("inf"):
            raise ConfigError("must have a positive weight", f"--data {item}")
        if path in found:
            raise ConfigError("is given twice", f"--data {path}", "Give it once, with the sum of the weights.")
        found[path] = weight
    if len(found) == 1:
        return next(iter(found))
    return found or None


def pairs(values: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """Options KEY=VALUE as keys and YAML values.

    Raises:
        ConfigError: one without `=`, or one twice.
    """
    from keel.train.configuration import parse_value

    return {key: parse_value(text) for key, text in texts(values, flag).items()}


def with_steps(settings: dict[str, Any], max_steps: int | None) -> dict[str, Any]:
    """The settings with the flag for their number of steps.

    Raises:
        ConfigError: it is among them, too.
    """
    from keel.core.errors import ConfigError

    for key in ("train.max_steps", "max_steps"):
        if max_steps is not None and key in settings:
            raise ConfigError("is given twice", f"--max-steps and --set {key}")
    return settings if max_steps is None else {**settings, "train.max_steps": max_steps}


def texts(values: list[str] | None, flag: str) -> dict[str, str]:
    """Options KEY=TEXT as keys and texts.

    Raises:
        ConfigError: one without `=`, or one twice.
    """
    from keel.core.errors import ConfigError

    out: dict[str, str] = {}
    for item in values or []:
        key, sign, text = item.partition("=")
        key = key.strip()
        if not sign or not key:
            example = "--set beta=0.04" if flag == "--set" else f"{flag} expert=runs/grpo"
            raise ConfigError("must be KEY=VALUE", f"{flag} {item}", f"For example {example}.")
        if key in out:
            raise ConfigError("is given twice", f"{flag} {key}")
        out[key] = text
    return out
