"""Tokens a second of the local generator against `generate` of transformers."""

from collections.abc import Iterator

import torch
from transformers import GenerationConfig

from benchmarks.measuring import Row, medians
from benchmarks.models import build
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
    group = min(batch, GROUP)
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (batch // group, PROMPT), generator=chance)
    asked = prompts.repeat_interleave(group, 0)
    config = GenerationConfig(do_sample=True, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, top_k=0)
    generator = LocalGenerator(model)

    def ours() -> None:
        drawn = generator.generate(prompts.tolist(), group, Sampling(max_completion_length=length), seed=0)
        assert int(drawn.mask.sum()) == batch * length

    def theirs() -> None:
        out = model.module.generate(asked, attention_mask=torch.ones_like(asked), generation_config=config)
        assert out.shape == (batch, PROMPT + length)

    spent = medians([theirs, ours], repeats)
    tokens = batch * length
    yield Row(
        work=f"sampling, {shape} parameters, vocabulary {vocabulary}, batch {batch}",
        setting="default",
        ours=tokens / spent[1],
        theirs=tokens / spent[0],
        unit="tokens/s",
        ratio=spent[0] / spent[1],
        goal=goal,
        accuracy="",
        command=f"python -m benchmarks sampling --shape {shape} --vocabulary {vocabulary} --batch {batch}",
    )
