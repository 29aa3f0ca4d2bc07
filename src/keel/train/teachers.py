"""A teacher's likeliest tokens, measured once and stored, so that training needs no teacher in memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from keel.core.errors import ConfigError, DataError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.parts.rewards.stored_teacher import FORMAT
from keel.statistics.engine import Engine
from keel.statistics.functionals import Functional
from keel.statistics.teachers import TopTokens
from keel.tasks.data import load_data
from keel.tasks.task import Example, Task, Text
from keel.train.encode import Encoder, supervised_rows
from keel.train.setup import open_model

BATCH = 256  # completions that are measured at once


def store_top_k(
    teacher: Any,
    data: Any,
    path: str | Path,
    k: int = 32,
    *,
    max_length: int | None = None,
    temperature: float = 1.0,
    held_out: float | str = 0.05,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Write the teacher's k likeliest tokens at each token of given completions, with the mass of all others.

    Args:
        teacher: a folder, a run's folder, a hub name, or a model in memory.
        data: a task, rows, or what `keel.train(data=...)` takes, with completions; its examples are numbered alike.
        path: of the safetensors file; `keel.parts.rewards.stored_teacher` says what stands in it.
        k: tokens; the whole vocabulary where it is no larger.
        max_length: tokens of prompt and completion at most, as in training.
        temperature: of the teacher.
        held_out, seed: which rows of the data are set aside, as in training; they decide the examples' numbers.
        device: None takes the best there is.

    Returns:
        The path.

    Raises:
        ConfigError: k below 1, or a temperature that is not positive.
        DataError: an example without a completion.
    """
    if k < 1:
        raise ConfigError(f"must be at least 1, not {k}", "k")
    if not temperature > 0:
        raise ConfigError(f"must be positive, not {temperature}", "temperature")
    task = None if isinstance(data, Rows) else data if isinstance(data, Task) else load_data(data, held_out, seed)
    model = teacher if task is None or not isinstance(teacher, (str, Path)) else open_model(teacher, task, None, device)
    parts = [data] if isinstance(data, Rows) else completion_rows(task, model, max_length)
    engine, asked = Engine({"teacher": model}, {}, temperature=temperature), TopTokens(k)
    return measured_into(Path(path), engine, asked, parts, model)


def measured_into(path: Path, engine: Engine, asked: Functional, parts: Iterable[Rows], model: Any) -> Path:
    """Write what a functional of the form of `TopTokens` says of completions; the path.

    Args:
        path: of the file.
        engine: with the models that the functional reads.
        asked: ids, log-probabilities and the log-mass of the rest.
        parts: the completions.
        model: whose device the rows go to, where it is a language model.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for rows in parts:
        rows = rows.to(model.device) if isinstance(model, LanguageModel) else rows
        numbers = engine.measure([asked], rows)[asked]
        for i, index in enumerate(rows.data_index.tolist()):
            own = rows.mask[i]
            found[index] = rows.tokens[i][own].cpu(), numbers[i][own].cpu()
    _write(path, found)
    return path


def completion_rows(task: Any, model: LanguageModel, max_length: int | None) -> Iterator[Rows]:
    """The completions of a task's examples, some at a time."""
    examples: Sequence[Example] = task.train
    limit = max_length or model.context_length
    for start in range(0, len(examples), BATCH):
        some = [examples[i] for i in range(start, min(len(examples), start + BATCH))]
        yield supervised_rows(some, [_given(e, task.name) for e in some], Encoder(model), limit, 0, 0)[0]


def _given(example: Example, name: str) -> Text:
    """What the data say; a solution that a task makes up may be another one each time."""
    if example.completion is None:
        fix = "Give `prompt` and `completion`, or `messages` that end with the assistant's."
        raise DataError("has no completion to learn from", f"{name}, example {example.index}", fix)
    return example.completion


def _write(path: Path, found: dict[int, tuple[Tensor, Tensor]]) -> None:
    index = sorted(found)
    numbers = torch.cat([found[i][1] for i in index])
    k = (numbers.shape[-1] - 1) // 2
    length = torch.tensor([0, *(len(found[i][0]) for i in index)])
    tensors = {
        "data_index": torch.tensor(index),
        "start": length.cumsum(0),
        "tokens": torch.cat([found[i][0] for i in index]),
        "ids": numbers[:, :k].to(torch.int32),
        "logp": numbers[:, k : 2 * k].float(),
        "rest": numbers[:, 2 * k].float(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": FORMAT, "k": str(k)})
