"""How often the intervals of comparisons hold the truth: `python -m benchmarks.coverage`.

A recipe is held against itself under another name, many times, with made-up outcomes: the answers of two policies that
are equally able on average, but differ by luck of seeds and by prompts. `--write` puts the table into
docs/compare_statistics.md (some five minutes on a free core).
"""

import argparse
import math
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from tests.compare.synthetic import answers, synthetic

from benchmarks.measuring import ROOT
from benchmarks.page import BEGIN, END
from keel.compare.analysis import analyse
from keel.compare.statistics import (
    Drawn,
    bootstrap,
    improvement_draws,
    interquartile_draws,
    interquartile_mean,
    probability_of_improvement,
    resamples,
    spread,
)

PAGE = ROOT / "docs" / "compare_statistics.md"
SEEDS, UNLIKE = (2, 3, 5, 10), (0.0, 0.05, 0.15, 0.4)  # of seeds, in log-odds
PROMPTS, SAMPLES = 100, 16


def pairs(count: int, unlike: float, rounds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """pass@1 of two arms that are the same on average, [R, S, P]."""
    rng = np.random.default_rng([seed, count, round(1000 * unlike)])
    base = rng.normal(-0.3, 1.5, (rounds, 1, PROMPTS))
    one, other = (answers(rng, (rounds, count, PROMPTS), SAMPLES, 0.0, unlike, base=base) / SAMPLES for _ in range(2))
    return one, other


def plain(tables: np.ndarray) -> float:
    """How often percentiles of the paired bootstrap, as it comes, hold 0."""
    seeds, prompts = resamples(*tables.shape[-2:])
    held = 0
    for table in tables:
        low, high = np.quantile(((seeds @ table) * prompts).sum(1), [0.025, 0.975])
        held += low <= 0 <= high
    return held / len(tables)


def held(value: float, drawn: Drawn) -> bool:
    """Whether the interval of an estimate holds 0."""
    return abs(value) <= float(drawn.spread().half())


def row(count: int, unlike: float, rounds: int) -> list[str]:
    """A line of the table."""
    one, other = pairs(count, unlike, rounds, 0)
    found = spread(one - other)
    apart = math.sqrt(max(0.0, count * float((found.seeds - found.rest).mean())))
    mean = float((np.abs((one - other).mean((1, 2))) <= found.half()).mean())
    few = range(max(1, rounds // 10))
    iqm = [
        held(
            interquartile_mean(one[r]) - interquartile_mean(other[r]),
            bootstrap(interquartile_draws(one[r]), count, PROMPTS)
            - bootstrap(interquartile_draws(other[r]), count, PROMPTS),
        )
        for r in few
    ]
    wins = [
        held(
            probability_of_improvement(one[r], other[r]) - 0.5,
            bootstrap(improvement_draws(one[r], other[r]), count, PROMPTS),
        )
        for r in few
    ]
    shares = [plain((one - other)[: rounds // 4]), mean, float(np.mean(iqm)), float(np.mean(wins))]
    return [str(count), f"{apart:.3f}", *(f"{share:.1%}" for share in shares), f"{found.half().mean():.3f}"]


def nothing_found(rounds: int, count: int, unlike: float) -> float:
    """How often a comparison of a recipe with itself under two other names finds no difference in any metric."""
    told = 0
    for seed in range(rounds):
        made = synthetic(["a", "b", "c"], count, PROMPTS, SAMPLES, seed, steps=2, spread=unlike, unlike=False)
        told += any(d.told for d in analyse(made).differences)
    return 1 - told / rounds


def measured(rounds: int) -> str:
    """The table as Markdown."""
    top = ["seeds", "spread", "plain bootstrap", "mean", "IQM", "P(X > Y)", "half of the interval"]
    lines = ["| " + " | ".join(top) + " |", "|" + "--:|" * len(top)]
    for count in SEEDS:
        lines += ["| " + " | ".join(row(count, unlike, rounds)) + " |" for unlike in UNLIKE]
    few = max(1, rounds // 10)
    null = {(count, unlike): nothing_found(few, count, unlike) for count in (3, 5) for unlike in (0.05, 0.4)}
    said = ", ".join(f"{share:.1%} ({count} seeds, {unlike:g})" for (count, unlike), share in null.items())
    drawn = (
        f"{rounds:,} repetitions of each line for the mean, {rounds // 4:,} for the plain bootstrap, {few:,} for IQM "
        f"and P(X > Y); {PROMPTS} prompts, {SAMPLES} samples of each."
    )
    whole = (
        f"Whole comparisons of a recipe with itself under two other names, {few:,} of each, in which no difference is "
        f"seen in any of five metrics, by seeds and their spread in log-odds: {said}."
    )
    return "\n".join([fill(drawn, 120), "", *lines, "", fill(whole, 120)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--write", action="store_true", help="put the table into docs/compare_statistics.md")
    asked = parser.parse_args(arguments)
    table = measured(asked.repetitions)
    print(table)
    if asked.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
