"""How long the pages of `keel ui` take over a store of a thousand runs and a hundred thousand completions.

    python -m benchmarks.ui [--write]

makes such a store in a temporary folder (some minutes, half a gigabyte), asks for every page in turns, and writes the
medians into docs/ui.md.
"""

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from benchmarks.measuring import ROOT
from benchmarks.page import BEGIN, END, processor
from keel.compare.outcomes import Arm
from keel.compare.record import Record, folder_of
from keel.compare.record import place as place_of
from keel.evaluate.evaluation import Samples, assess
from keel.store.records import StoredRollout
from keel.store.store import Store
from keel.train.configuration import Request, resolve
from keel.ui.app import create_app
from keel.ui.warming import warm

PAGE = ROOT / "docs" / "ui.md"
RUNS, ROLLOUTS, LARGEST = 1000, 100_000, 10_000  # the last: completions of the largest run
STEPS, TOKENS = 50, 48
COMPARED = "five-recipes"
RECIPES = ("grpo", "dr_grpo", "kl_cov", "rloo", "gspo")
WORDS = ("so", "we", "take", "the", "first", "number", "and", "then", "add", "it", "to", "gives", "again", "exactly")
RARE = "thirty-six apples"
NUMBERS = ("entropy", "advantage", "kl", "log_prob", "ratio", "weight/clip", "term/policy", "gradient")


def build(folder: Path, runs: int = RUNS, rollouts: int = ROLLOUTS, largest: int = LARGEST) -> None:
    """Write the store: one run with many completions, the others with equal shares of the rest."""
    chance = Random(0)
    configs = {name: resolve(Request(recipe=name)).to_dict() for name in RECIPES}
    share = (rollouts - largest) // (runs - 1)
    with Store(folder / "keel.sqlite", timeout=60) as store:
        for place in range(runs):
            recipe = RECIPES[place % len(RECIPES)]
            run = store.create_run(f"{recipe}-{place:04}", configs[recipe], recipe, "countdown", "tiny", place)
            for step in range(1, STEPS + 1):
                store.log_metrics(run, step, {f"metric/{i}": chance.random() for i in range(16)} | curves(chance, step))
            count = largest if place == 0 else share
            if place == 1:
                count += rollouts - largest - share * (runs - 1)
            for start in range(0, count, 500):
                many = [completion(chance, start + i) for i in range(min(500, count - start))]
                store.log_rollouts(run, 1 + start // 500, many)
            finish(store, run, place)
        compare(folder, store, configs)


def compare(folder: Path, store: Store, configs: dict[str, Any]) -> None:
    """A comparison of five recipes with five seeds, measured on 256 prompts."""
    chance, arms = np.random.default_rng(0), tuple(Arm(name, name) for name in RECIPES)
    conditions = {"budget": f"{STEPS} steps", "settings": {}}
    record = Record(folder_of(folder, COMPARED), conditions, "countdown", "tiny", arms, tuple(range(5)))
    for arm in arms:
        for seed in record.seeds:
            name = f"cell-{arm.name}-{seed}"
            run = store.create_run(name, configs[arm.recipe], arm.recipe, "countdown", "tiny", seed)
            for step in range(1, STEPS + 1):
                told = curves(Random(seed), step) | {"step_time": 1.0, "num_tokens": 1000.0 * step}
                store.log_metrics(run, step, told)
            for phase in ("before", "after"):
                correct = (chance.random((256, 16)) < chance.random((256, 1))).astype(float)
                measured = assess(Samples(correct, np.full((256, 16), TOKENS), np.zeros((256, 16), dtype=bool)))
                store.log_evaluation(run, STEPS, phase, measured.to_json())
            store.finish(run, "finished", {"num_tokens": 1000 * STEPS, "seconds": float(STEPS), "steps": STEPS})
            record.cells[place_of(arm.name, seed)] = {"run": name}
    record.status = "finished"
    record.write()


def curves(chance: Random, step: int) -> dict[str, float]:
    """The metrics that a page draws."""
    names = ("entropy", "kl", "grad_norm", "completions/mean_length")
    return {"reward": step / STEPS + 0.1 * chance.random(), **{name: chance.random() for name in names}}


def completion(chance: Random, place: int) -> StoredRollout:
    """48 words, one token each, with eight numbers a token; one completion in a thousand has the rare words."""
    words = [chance.choice(WORDS) for _ in range(TOKENS)]
    if place % 1000 == 999:
        words[5] = RARE
    return StoredRollout(
        prompt=f"{place // 8} 10 7 > 58 =",
        completion=" ".join(words),
        reward=float(place % 3 == 0),
        rewards={"correct": float(place % 3 == 0)},
        group=place // 8,
        stop="length" if place % 10 == 0 else "eos",
        length=TOKENS,
        tokens=tuple(f"{word} " for word in words),
        numbers={name: np.full(TOKENS, chance.random()) for name in NUMBERS},
    )


def finish(store: Store, run: int, place: int) -> None:
    """An evaluation before and one after, of 256 prompts with 16 samples."""
    for phase, solved in (("before", 5), ("after", 6 + place % 5)):
        correct = np.array([[float(j < solved) for j in range(16)] for _ in range(256)])
        measured = assess(Samples(correct, np.full((256, 16), TOKENS), np.zeros((256, 16), dtype=bool)))
        if place < 3:
            store.log_evaluation(run, 0 if phase == "before" else STEPS, phase, measured.to_json())
    store.finish(run, "finished", {"after": {"pass@1": [(6 + place % 5) / 16, 0.3, 0.5]}})


def pages() -> Iterator[tuple[str, str]]:
    """What is asked, in words, and its address."""
    yield "runs, the newest", "/runs"
    yield "runs, page 20", "/runs?page=20"
    yield "runs, of one recipe, by pass@1", "/runs?recipe=grpo&sort=score"
    yield "runs, a part of the name", "/runs?name=cov-09"
    yield "one run, first time", "/runs/grpo-0000"
    yield "one run, again", "/runs/grpo-0000"
    yield "one run against another", "/runs/grpo-0000?against=kl_cov-0002"
    yield "new points of a run", "/points/grpo-0000?since=40"
    yield "completions, the newest", "/tokens"
    yield "completions of reward 0 that were cut off", "/tokens?highest=0&stop=length"
    yield "of a run with 10,000, by reward, page 100", "/tokens?run=grpo-0000&order=lowest&page=100"
    yield "search, rare words", "/tokens?q=thirty-six%20apples"
    yield "search, frequent words", "/tokens?q=first%20number"
    yield "search, words that never occur", "/tokens?q=gives%20exactly%20nothing"
    yield "search within one run", "/tokens?q=first%20number&run=kl_cov-0002"
    yield "search of two letters, the newest 5,000", "/tokens?q=zz"
    yield "one completion, token by token", "/tokens/50000"
    yield "a group side by side", "/tokens/50000/group"
    yield "comparisons", "/compare"
    yield "one comparison of 5 recipes with 5 seeds, first time", f"/compare/{COMPARED}"
    yield "one comparison, again", f"/compare/{COMPARED}"
    yield "one comparison by another metric, first time", f"/compare/{COMPARED}?metric=pass%4016"
    yield "how far its cells are", f"/compare/{COMPARED}/state"
    yield "verification", "/verify"
    yield "verification, what falls short, the largest error first", "/verify?status=falls%20short&sort=error"
    yield "methods", "/methods"
    yield "methods, a search", "/methods?q=entropy"
    yield "one method", "/methods/kl_cov"
    yield "papers", "/papers"
    yield "papers, a search by meaning", "/papers?q=exploration&mode=semantic"
    yield "papers, a search by words and meaning", "/papers?q=entropy%20bonus"
    yield "papers, a search by words", "/papers?q=entropy%20bonus&mode=lexical"
    yield "papers, trending", "/papers?sort=trending"
    yield "one paper", "/papers/47"
    yield "the feed", "/papers/feed.xml"


def measure(folder: Path, turns: int) -> list[tuple[str, str, float]]:
    """Median milliseconds of every page, asked in turns; what is said to be the first time is asked once."""
    client: Any = TestClient(create_app(folder), base_url="http://127.0.0.1")
    warm()  # as the server does while nobody asks
    asked = list(pages())
    taken: dict[str, list[float]] = {said: [] for said, _ in asked}
    for turn in range(turns):
        for said, path in asked:
            if turn and "first time" in said:
                continue
            start = time.perf_counter()
            answer = client.get(path)
            taken[said].append(1000 * (time.perf_counter() - start))
            assert answer.status_code == 200, (path, answer.status_code)
    return [(said, path, median(taken[said])) for said, path in asked]


def table(found: list[tuple[str, str, float]], size: int, seconds: float, turns: int) -> str:
    """The machine and the medians, as Markdown."""
    lines = [
        f"{RUNS:,} runs of {STEPS} steps, {ROLLOUTS:,} completions of {TOKENS} tokens with {len(NUMBERS)} numbers",
        f"each: a store of {size / 2**20:,.0f} MiB, written in {seconds:,.0f} s.",
        f"Medians of {turns} turns on {processor()}, {os.cpu_count()} cores; Python {platform.python_version()},",
        f"SQLite {sqlite3.sqlite_version}. Without the browser's own time.",
        "",
        "| page | address | ms |",
        "|---|---|--:|",
        *(f"| {said} | `{path}` | {taken:.0f} |" for said, path, taken in found),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Build, measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/ui.md")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the store here, or use the one that is here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        os.environ["KEEL_HOME"] = str(folder / "library")  # where looking at papers is counted
        note = folder / "seconds"
        if not note.exists():
            start = time.perf_counter()
            build(folder)
            note.write_text(f"{time.perf_counter() - start}")
        size = (folder / "keel.sqlite").stat().st_size
        told = table(measure(folder, given.turns), size, float(note.read_text()), given.turns)
    print(told)
    if given.write:
        text = PAGE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{told}\n{END}{after}")


if __name__ == "__main__":
    main()
