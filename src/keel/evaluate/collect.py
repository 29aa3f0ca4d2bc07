"""Sampling and scoring held-out prompts, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.rows import Rows, Stop
from keel.evaluate.evaluation import Completion, Samples
from keel.rollouts.episodes import Played
from keel.rollouts.sampling import Generator, Sampling

RECORDED = "rewards/"  # prefix of the numbers of one reward function


@runtime_checkable
class Prompted(Protocol):
    """What is needed of a task's example."""

    @property
    def prompt(self) -> Any:
        """Text or messages."""
        ...

    @property
    def columns(self) -> dict[str, Any]:
        """What reaches the reward functions."""
        ...

    @property
    def index(self) -> int:
        """Number of the example."""
        ...


@runtime_checkable
class Scored(Protocol):
    """What is needed of scores: a column for each reward function (NaN: does not apply), and rows that failed."""

    @property
    def values(self) -> Float[Tensor, "B K"]:
        """Rewards."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the columns."""
        ...

    @property
    def failed(self) -> Bool[Tensor, "B"]:
        """Rows that could not be scored."""
        ...


Score = Callable[[list, list, list[list[int]], dict[str, list], Tensor], Scored]


def collect(
    generator: Generator,
    examples: Sequence[Prompted],
    score: Score,
    *,
    num_generations: int,
    sampling: Sampling,
    seed: int,
    encode: Callable[[Any], Sequence[int]],
    decode: Callable[[list[int]], str],
    answer: Callable[[Any, Any], Hashable | None] | None = None,
    statistics: Callable[[Rows], dict[str, Float[Tensor, "B T"]]] | None = None,
    combine: Callable[[Float[Tensor, "B K"]], Float[Tensor, "B"]] | None = None,
    verdict: str | None = None,
    hidden: Sequence[str] = (),
    episodes: Callable[[list[Any]], Played] | None = None,
    max_rows: int = 1024,
    keep: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Draw `num_generations` completions of each example and score them.

    Args:
        generator: draws the completions; with equal seeds, the same ones for the same weights.
        examples: prompts with the columns of their reward functions; needs `len` and `[i]` only.
        score: (prompts, completions, completion_ids, columns, group) -> scores. Where the prompt is a list of messages,
            the completion is one message in a list.
        num_generations: n, samples of each prompt.
        sampling: temperature, filters, length.
        seed: of the completions.
        encode: a prompt's tokens.
        decode: a completion's text.
        answer: (completion, example) -> canonical answer, or None; without it there is no majority.
        statistics: rows -> numbers per token, of which "entropy" and "kl" are used.
        combine: columns of rewards -> one reward; by default their sum, NaN left out.
        verdict: name of the reward function that tells correct from wrong; by default the combined reward does.
        hidden: names of reward functions that are measured but not part of the reward.
        episodes: plays `num_generations` episodes of each of some examples, in place of the generator.
        max_rows: completions in one batch, at most (a prompt's samples stay together).
        keep: prompts of which two completions are kept to be looked at, spread over the examples.
        progress: called with (prompts done, all prompts) after each batch.

    Raises:
        ValueError: no examples, or no reward function named `verdict` or as one of `hidden`.
    """
    if not len(examples):
        raise ValueError("there are no examples to evaluate on")
    size = max(1, max_rows // num_generations)
    spread = min(keep, len(examples))
    kept = {place * len(examples) // spread for place in range(spread)}
    batches: list[dict[str, Any]] = []
    completions: list[Completion] = []
    for start in range(0, len(examples), size):
        some = [examples[place] for place in range(start, min(start + size, len(examples)))]
        played = None if episodes is None else episodes(some)
        rows = (
            played.rows
            if played is not None
            else generator.generate(
                [encode(example.prompt) for example in some],
                num_generations,
                sampling,
                seed=seed,
                data_index=[example.index for example in some],
            )
        )
        repeated = [example for example in some for _ in range(num_generations)]
        ids = [row[mask].tolist() for row, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
        present = zip(rows.tokens.cpu(), rows.present.cpu(), strict=True)  # with what an environment said
        texts = [decode(row[seen].tolist()) for row, seen in present]
        replies = [_reply(text, example) for text, example in zip(texts, repeated, strict=True)]
        columns = _columns(repeated)
        if played is not None:
            replies, columns = list(played.replies), columns | played.columns
        scores = score([e.prompt for e in repeated], replies, ids, columns, rows.group)
        batch = _rewards(scores, combine, verdict, hidden) | _measured(rows, statistics)
        batch["answers"] = [answer(reply, e) for reply, e in zip(replies, repeated, strict=True)] if answer else None
        batch["texts"] = [text.strip() for text in texts]
        batches.append(batch)
        shown = [place for place in range(len(some)) if start + place in kept]
        completions += _shown(some, shown, texts, batch, num_generations, encode, decode)
        if progress is not None:
            progress(start + len(some), len(examples))
    stacked = {n: _stack(batches, n, num_generations) for n in batches[0] if n not in ("answers", "texts")}
    return Samples(
        **{name: values for name, values in stacked.items() if not name.startswith(RECORDED)},
        rewards={name.removeprefix(RECORDED): stacked[name] for name in stacked if name.startswith(RECORDED)},
        answers=_listed(batches, "answers", num_generations) if answer else None,
        texts=_listed(batches, "texts", num_generations),
        index=tuple(int(example.index) for example in examples),
        completions=tuple(completions),
    )


def _reply(text: str, example: Prompted) -> str | list[dict[str, str]]:
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]


def _columns(examples: Sequence[Prompted]) -> dict[str, list]:
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}


def _rewards(scores: Scored, combine, verdict: str | None, hidden: Sequence[str]) -> dict[str, Any]:
    values, names = scores.values.detach().cpu().double(), list(scores.names)
    for name in (*hidden, *([] if verdict is None else [verdict])):
        if name not in names:
            raise ValueError(f"no reward function is named '{name}'; there are {', '.join(names)}")
    failed = scores.failed.cpu().bool()
    counted = values[:, [k for k, name in enumerate(names) if name not in hidden]]
    found: dict[str, Any] = {"reward": (combine(counted) if combine else _sum(counted)).masked_fill(failed, math.nan)}
    if verdict is not None:
        found["verdict"] = values[:, names.index(verdict)].masked_fill(failed, math.nan)
    if len(names) > 1:
        found |= {f"{RECORDED}{name}": values[:, k].masked_fill(failed, math.nan) for k, name in enumerate(names)}
    return found


def _sum(values: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Sum of the columns, NaN left out; NaN where no column applies."""
    return values.nansum(1).masked_fill(values.isnan().all(1), math.nan)


def _measured(rows: Rows, statistics) -> dict[str, Any]:
    measured: dict[str, Any] = {"lengths": rows.lengths, "clipped": rows.stop == int(Stop.LENGTH)}
    if statistics is not None:
        found = statistics(rows)
        for name in ("entropy", "kl"):
            if name in found:
                values, mask = found[name].detach().cpu().double(), rows.mask.cpu()
                measured[name] = ratio(torch.where(mask, values, 0.0).sum(1), mask.sum(1).double())
    return measured


def _shown(some, shown: list[int], texts: list[str], batch, n: int, encode, decode) -> Iterator[Completion]:
    for place in shown:
        prompt = some[place].prompt
        for row in range(place * n, place * n + min(n, 2)):
            answered = batch["answers"][row] if batch["answers"] else None
            yield Completion(
                index=int(some[place].index),
                prompt=prompt if isinstance(prompt, str) else decode(list(encode(prompt))),
                text=texts[row],
                reward=float(batch["reward"][row]),
                answer=None if answered is None else str(answered),
                length=int(batch["lengths"][row]),
                clipped=bool(batch["clipped"][row]),
            )


def _stack(batches: list[dict[str, Any]], name: str, n: int) -> np.ndarray:
    return torch.cat([batch[name].cpu() for batch in batches]).reshape(-1, n).numpy()


def _listed(batches: list[dict[str, Any]], name: str, n: int) -> list[list[Any]]:
    flat = [entry for batch in batches for entry in batch[name]]
    return [flat[start : start + n] for start in range(0, len(flat), n)]
