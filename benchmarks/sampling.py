"""Tokens a second of the local generator against `generate` of transformers."""

import copy
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig

from benchmarks.measuring import Row, medians
from benchmarks.models import build
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling

PROMPT, GROUP = 12, 8
GOALS = {
    ("1M", 64): {1: 2.3, 64: 3.0, 256: 3.0},
    ("1M", 32768): {16: 5.0, 64: 6.0, 256: 6.0},
    ("10M", 32768): {64: 3.5},
}


def rows(
    shape: str | None = None,
    vocabulary: int | None = None,
    batch: int | None = None,
    length: int = 32,
    repeats: int = 5,
) -> Iterator[Row]:
    """The lines that fit what is asked for."""
    for (name, size), goals in GOALS.items():
        for count, goal in goals.items():
            if shape in (None, name) and vocabulary in (None, size) and batch in (None, count):
                yield from measure(name, size, count, length, repeats, goal)


def measure(shape: str, vocabulary: int, batch: int, length: int, repeats: int, goal: float) -> Iterator[Row]:
    """The same prompts, groups of eight, no end token, temperature 1, the whole vocabulary."""
    model = build(shape, vocabulary)
    model.eos_ids = ()
    mixed = copy.copy(model)
    mixed.autocast = torch.bfloat16
    group = min(batch, GROUP)
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (batch // group, PROMPT), generator=chance)
    asked = prompts.repeat_interleave(group, 0)
    config = GenerationConfig(do_sample=True, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, top_k=0)

    def generate() -> None:
        out = model.module.generate(asked, attention_mask=torch.ones_like(asked), generation_config=config)
        assert out.shape == (batch, PROMPT + length)

    def local(generator: LocalGenerator) -> Callable[[], Rows]:
        sampling = Sampling(max_completion_length=length)
        return lambda: generator.generate(prompts.tolist(), group, sampling, seed=0)

    ours = {"default": local(LocalGenerator(model)), "model.autocast=bfloat16": local(LocalGenerator(mixed))}
    assert int(ours["default"]().mask.sum()) == batch * length
    theirs, *spent = medians([generate, *ours.values()], repeats)
    tokens = batch * length
    for (setting, way), seconds in zip(ours.items(), spent, strict=True):
        yield Row(
            work=f"sampling (tokens), {shape} parameters, vocabulary {vocabulary}, batch {batch}",
            setting=setting,
            ours=tokens / seconds,
            theirs=tokens / theirs,
            unit="tokens/s",
            ratio=theirs / seconds,
            goal=goal,
            accuracy=f"log p to {gap(model, way()):.0e}",
            command=f"python -m benchmarks sampling --shape {shape} --vocabulary {vocabulary} --batch {batch}",
        )


@torch.no_grad()
def gap(model: LanguageModel, rows: Rows) -> float:
    """Mean distance of the recorded log-probabilities from those of a whole forward pass in fp32, in nats."""
    rows = rows.select(torch.arange(min(len(rows), 16)))
    recorded = rows.logp["behaviour"][rows.mask]
    logits = model.head.logits(model.hidden(rows)[rows.mask])
    again = logits.log_softmax(-1).gather(1, rows.tokens[rows.mask][:, None])[:, 0]
    return float((recorded - again).abs().mean())
