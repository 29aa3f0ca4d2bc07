"""`make bench`: prints medians of Keel and of its peer on the same work, and their ratio."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig

from keel.models.tiny import build_tiny
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling

ALPHABET = "0123456789 >=+-*/()"
PROMPT, LENGTH, GROUP = 12, 16, 8


def alternate(ours: Callable[[], int], theirs: Callable[[], int], repeats: int) -> tuple[float, float]:
    """Median tokens a second of two ways, measured in turn after one warm-up each."""
    rates: tuple[list[float], list[float]] = ([], [])
    ours(), theirs()
    for _ in range(repeats):
        for way, found in zip((ours, theirs), rates, strict=True):
            begun = time.perf_counter()
            tokens = way()
            found.append(tokens / (time.perf_counter() - begun))
    return statistics.median(rates[0]), statistics.median(rates[1])


def sampling(rows: int, repeats: int) -> tuple[float, float]:
    """Tokens a second of the local generator and of `generate`, the same prompts, no end token."""
    model = build_tiny(ALPHABET)
    model.eos_ids = []
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 22, (max(1, rows // GROUP), PROMPT), generator=chance)
    group = min(rows, GROUP)
    generator = LocalGenerator(model)
    asked = prompts.repeat_interleave(group, 0)
    config = GenerationConfig(do_sample=True, max_new_tokens=LENGTH, min_new_tokens=LENGTH, pad_token_id=0, top_k=0)

    def ours() -> int:
        drawn = generator.generate(prompts.tolist(), group, Sampling(max_completion_length=LENGTH), seed=0)
        return int(drawn.mask.sum())

    def theirs() -> int:
        out = model.module.generate(asked, attention_mask=torch.ones_like(asked), generation_config=config)
        return (out.shape[1] - PROMPT) * len(out)

    return alternate(ours, theirs, repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"sampling, 0.86M parameters, vocabulary 22, {LENGTH} tokens, fp32, {arguments.threads} threads")
    print(f"{'rows':>6} {'keel':>12} {'generate':>12} {'ratio':>7}   tokens/s, medians of {arguments.repeats}")
    for rows in (1, 64, 256):
        ours, theirs = sampling(rows, arguments.repeats)
        print(f"{rows:>6} {ours:>12,.0f} {theirs:>12,.0f} {ours / theirs:>7.2f}")


if __name__ == "__main__":
    main()
