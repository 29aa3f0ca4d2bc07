"""Datamodel matching: what a model that never saw some examples would say, written as a teacher to distil from.

    f_x(S) = c_x + sum_{i in S} theta_x[i]          a linear datamodel of a logit, S the examples of the training
    target = z_x - sum_{i in F} theta_x[i]          F those to forget, z_x the logit of the model trained on all

c and theta are least squares over models that were trained on subsets. The prediction is linear in their logits, with
weights that only the subsets decide, so that the target is one fixed mixture of the models' logits, whatever the input.
`stored_distillation` learns from the file, on the examples to forget and a sample of those to retain.

Source: "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", 2024.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.errors import ConfigError, UserError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.models.load import load
from keel.statistics.engine import CHUNK_BYTES_CPU, Engine
from keel.statistics.teachers import TopOfMixture
from keel.tasks.data import load_data
from keel.tasks.task import Task
from keel.train.setup import run_checkpoint
from keel.train.teachers import completion_rows, measured_into


def effect_weights(subsets: Bool[Tensor, "N n"], forget: Sequence[int], ridge: float = 0.0) -> Float[Tensor, "N"]:
    """d such that -sum_{i in F} theta[i] = sum_k d_k y_k for all outputs y of N models; they add up to 0.

    >>> effect_weights(torch.tensor([[True, True], [True, False]]), [1]).round(decimals=6).abs().tolist()
    [1.0, 1.0]

    Args:
        subsets: which examples each model was trained on.
        forget: F.
        ridge: added to the squares of theta, in units of one model; 0 takes the solution of the least norm.

    Raises:
        ValueError: no model, an example that there is not, a negative ridge, or one to forget that all models or none
            have seen: nothing tells its effect.
    """
    if not subsets.numel() or ridge < 0:
        raise ValueError(f"there must be models and examples, and ridge not be negative, not {ridge}")
    count = subsets.shape[1]
    for i in forget:
        if not 0 <= i < count:
            raise ValueError(f"there is no example {i} among {count}")
        if bool(subsets[:, i].all()) or not bool(subsets[:, i].any()):
            raise ValueError(f"example {i} is in all subsets or in none: nothing tells what it does")
    seen = subsets.double()
    centred = seen - seen.mean(0)  # the constant is then free of theta
    inner = centred.T @ centred + ridge * torch.eye(count, dtype=torch.float64)
    theta = torch.linalg.pinv(inner, hermitian=True) @ centred.T  # [n, N]: theta = theta @ y
    return -theta[list(forget)].sum(0)


def store_datamodel_targets(
    model: Any,
    models: Sequence[Any],
    subsets: Bool[Tensor, "N n"],
    forget: Sequence[int],
    data: Any,
    path: str | Path,
    k: int = 32,
    *,
    ridge: float = 0.0,
    max_length: int | None = None,
    held_out: float | str = 0.05,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Write the datamodel's targets at each token of given completions, in the form that `stored_distillation` reads.

    Args:
        model: trained on all examples: a folder, a run's folder, a hub name, or a model in memory.
        models: trained on the subsets; all are held in memory at once.
        subsets: which of n examples each of them has seen.
        forget: those to be forgotten.
        data: completions, as of `store_top_k`; n need not be their number.
        path: of the file.
        k: the likeliest tokens of a target that are kept, with the mass of the rest.
        ridge: of the datamodels' least squares.
        max_length, held_out, seed, device: as of `store_top_k`.

    Returns:
        The path.

    Raises:
        ConfigError: k below 1, as many subsets as there are no models, or subsets that do not tell what is to be known.
        UserError: a model with another vocabulary.
    """
    if k < 1:
        raise ConfigError(f"must be at least 1, not {k}", "k")
    if len(models) != len(subsets):
        raise ConfigError(f"{len(subsets)} subsets for {len(models)} models", "subsets")
    try:
        weights = effect_weights(subsets, forget, ridge).tolist()
    except ValueError as error:
        raise ConfigError(str(error), "subsets") from error
    loaded = [_opened(item, device) for item in (model, *models)]
    _check_vocabulary(loaded)
    names = tuple(f"model{i}" for i in range(len(loaded)))
    engine = Engine(dict(zip(names, loaded, strict=True)), {}, chunk_bytes=max(1, CHUNK_BYTES_CPU // len(loaded)))
    task = None if isinstance(data, Rows) else data if isinstance(data, Task) else load_data(data, held_out, seed)
    parts = [data] if isinstance(data, Rows) else completion_rows(task, loaded[0], max_length)
    return measured_into(Path(path), engine, TopOfMixture(k, names, (1.0, *weights)), parts, loaded[0])


def _opened(model: Any, device: str | None) -> Any:
    if not isinstance(model, (str, Path)):
        return model
    return load(str(run_checkpoint(Path(model)) or model), device=device)


def _check_vocabulary(models: Sequence[Any]) -> None:
    """One vocabulary for all, where they are language models."""
    known = [m for m in models if isinstance(m, LanguageModel)]
    for model in known[1:]:
        if model.tokenizer.get_vocab() != known[0].tokenizer.get_vocab():
            raise UserError("its vocabulary is not that of the model trained on all", "models", "Take one tokenizer.")
