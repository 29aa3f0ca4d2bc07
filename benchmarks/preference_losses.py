"""`make preferences`: every loss of comparisons on the same data, for docs/pairs.md.

A cell (recipe, seed, settings) is run if its result is missing or of other code than there is now.
"""

import argparse
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks import fingerprint, results
from benchmarks.cells import BASE, Cell, base_of, checksum_of, machine, task_named
from benchmarks.measuring import ROOT
from benchmarks.page import processor
from keel.core.choice import counter_seed
from keel.core.errors import KeelError, nearest
from keel.evaluate.intervals import Interval, mean_interval
from keel.models.load import load
from keel.recipes.registry import recipes
from keel.statistics.functionals import LogProb
from keel.tasks.preferences import Preferences
from keel.train.comparisons import built_in_preferences
from keel.train.configuration import Configuration, Request, resolve
from keel.train.measure import assessed, draw
from keel.train.online import run
from keel.train.preferences import preference_rows
from keel.train.session import Session, build_session, reward_functions
from keel.train.setup import model_source

FOLDER = ROOT / "benchmarks" / "results" / "pairs"
PAGE = ROOT / "docs" / "pairs.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TASK, SEEDS = "countdown", 3
SETTINGS: dict[str, Any] = {
    "train.max_steps": 80,
    "train.batch_size": 32,
    "train.learning_rate": 3e-5,
    "train.log_completions": 0,
    "train.save_steps": 0,
    "evaluate.num_prompts": 96,
    "evaluate.num_generations": 16,
}
HELD_OUT = 128  # pairs
ROOTS = (
    "benchmarks.preference_losses:run_cell",
    "keel.core.aggregate:Aggregation",
    "keel.method:Method",
    "keel.parts.terms.pairs:PairLoss",
)
COLUMNS = ("win rate", "pass@1", "kl", "chosen", "rejected", "accuracy", "length")


def names() -> list[str]:
    """Recipes that learn from comparisons in a file, DPO first."""
    found = [name for name in recipes() if _kind(name) == "pairs"]
    return ["dpo", *(name for name in found if name != "dpo")]


def _kind(name: str) -> str | None:
    try:
        return recipes()[name]().kind
    except KeelError:  # one that needs an argument, such as a teacher's path
        return None


def cell(recipe: str, seed: int) -> Cell:
    """A cell; the settings are the same for all."""
    return Cell(recipe, TASK, seed, (), tuple(sorted(SETTINGS.items())))


def configured(one: Cell) -> Configuration:
    """The complete configuration of a cell."""
    name = "dpo" if one.recipe == BASE else one.recipe
    request = Request(name, {**dict(one.settings), **dict(one.arguments)}, task=one.task, seed=one.seed)
    return resolve(request, task_named(one.task))


@cache
def preferences(reads: str) -> Preferences:
    """The built-in comparisons; the same for every seed."""
    return built_in_preferences(task_named(TASK), reads)


def run_cell(one: Cell) -> dict[str, Any]:
    """Train and measure: `numbers`, which are the same again on the same machine, and `times`."""
    task, config = task_named(one.task), configured(one)
    begun = time.process_time()
    if one.recipe == BASE:
        session = build_session(config, task, base_of(one.task), preferences=preferences("pairs"))
    else:
        reads = config.method.reads
        assert reads is not None
        policy = load(model_source(None, task), device="cpu")
        session = build_session(config, task, policy, preferences=preferences(reads))
        run(session)
    trained = time.process_time()
    try:
        numbers = measured(session)
    finally:
        session.close()
    times = {"train_cpu": round(trained - begun, 3), "seconds": round(time.process_time() - begun, 3)}
    return {"numbers": numbers, "times": times, "machine": machine()}


def measured(session: Session) -> dict[str, Any]:
    """On held-out prompts, one number for each; on held-out pairs, log-ratios to the base of both sides."""
    config, task, base = session.config, session.task, base_of(TASK)
    rewards = reward_functions(config.task, task, None)
    known: dict[str, Any] = {
        "encoder": session.encoder,
        "max_completion_length": task.max_completion_length,
        "max_tokens": session.engine.max_tokens,
    }
    seed = counter_seed(config.seed, "evaluate")
    own = draw(session.policy, task, rewards, config.evaluate, seed=seed, reference=base, **known)
    other = draw(base, task, rewards, config.evaluate, seed=counter_seed(config.seed, "reference"), **known)
    found = assessed(own, config.evaluate, seed).values
    assert own.kl is not None
    values = {
        "win rate": wins(own.reward, own.lengths, other.reward, other.lengths).mean(1),
        "pass@1": np.asarray(found["pass@1"]),
        "pass@16": np.asarray(found["pass@16"]),
        "kl": np.nanmean(own.kl * own.lengths, 1),
        "length": own.lengths.mean(1),
        **on_pairs(session),
    }
    rounded = {name: [round(float(x), 4) for x in each] for name, each in values.items()}
    return {"values": rounded, "means": {k: round(float(np.mean(v)), 5) for k, v in rounded.items()}}


def wins(reward: np.ndarray, lengths: np.ndarray, other: np.ndarray, other_lengths: np.ndarray) -> np.ndarray:
    """1 where a sample is better than the reference's by the rule of the data, 0 where it is worse, 1/2 for a tie.

    >>> wins(np.array([[1.0, 1.0, 0.0]]), np.array([[5, 7, 3]]), np.array([[0.0, 1.0, 0.0]]), np.array([[3, 6, 9]]))
    array([[1. , 0. , 0.5]])
    """
    longer = np.sign(other_lengths - lengths) * (reward > 0.5) * (other > 0.5)
    return 0.5 + 0.5 * np.where(reward != other, np.sign(reward - other), longer)


@torch.no_grad()
def on_pairs(session: Session) -> dict[str, np.ndarray]:
    """log pi - log base of both completions of held-out pairs, and whether their order is right."""
    held_out = preferences("pairs").held_out[:HELD_OUT]
    rows, _ = preference_rows(held_out, "pairs", session.encoder, None, 0, 0)
    base = base_of(TASK)
    engine = type(session.engine)({"policy": session.policy, "base": base}, max_tokens=session.engine.max_tokens)
    live, before = LogProb(), LogProb(of=("base",))
    stats = engine.measure([live, before], rows)
    moved = ((stats[live] - stats[before]) * rows.mask).sum(1)
    assert rows.pairs is not None
    chosen, rejected = moved[rows.pairs.chosen], moved[rows.pairs.rejected]
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    found = {"chosen": chosen, "rejected": rejected, "accuracy": right}
    return {name: value.numpy() for name, value in found.items()}


# -- cells -----------------------------------------------------------------------------------------------------------


def code_of(one: Cell) -> results.Code:
    """Digests of all that decides the numbers of a cell."""
    config = configured(one)
    parts = sorted({fingerprint.place_of(part) for part in results.walk(config.method)})
    return {
        "engine": fingerprint.digest(*ROOTS),
        "parts": fingerprint.digest(*parts),
        "composition": results._digest(results.composition(config.method)),
        "train": results._digest(config.train.model_dump(mode="json")),
    }


def work(seeds: int, minutes: float | None, folder: Path, what: Sequence[str] = ()) -> None:
    """Run what is missing or stale of some recipes, or of all; several processes share the work."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for one in [cell(name, seed) for seed in range(seeds) for name in what or (BASE, *names())]:
        if end is not None and time.monotonic() > end:
            print("the budget is used up")
            return
        code = code_of(one)
        with results.claimed(one, folder) as mine:
            before = results.stored(one, folder)
            if not mine or (before is not None and before.code == code):
                continue
            try:
                found = run_cell(one)
                times, where = found["times"], checksum_of(one.task)
                result = results.Result(one, code, found["numbers"], times, found["machine"], where)
                said = ", ".join(f"{k} {found['numbers']['means'][k]:.3f}" for k in COLUMNS)
            except Exception as error:  # the page shows it
                said = f"{type(error).__name__}: {error}"[:300]
                result = results.Result(one, code, {}, {"seconds": 0.0}, machine(), error=said)
            results.write(result, folder)
            print(f"{time.strftime('%X')} {one.label}: {said}", flush=True)


# -- the page --------------------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """All losses, best win rate first, with 95% intervals over seeds and prompts."""
    by_recipe: dict[str, dict[int, Mapping[str, Any]]] = {}
    failed: dict[str, str] = {}
    for one in results.everything(folder):
        if one.cell.settings != tuple(sorted(SETTINGS.items())):
            continue
        if one.error:
            failed[one.cell.recipe] = one.error
        else:
            by_recipe.setdefault(one.cell.recipe, {})[one.cell.seed] = one.numbers["values"]
    known = [name for name in (BASE, *names()) if name in by_recipe]
    ranked = sorted(known, key=lambda name: -_mean(by_recipe[name], "win rate").value)
    count = max((len(seeds) for seeds in by_recipe.values()), default=0)
    many = "1 seed" if count == 1 else f"{count} seeds"
    lines = [
        f"{SETTINGS['train.max_steps']} steps of {SETTINGS['train.batch_size']} preferences at learning rate "
        f"{SETTINGS['train.learning_rate']:g}, {many}; measured on {processor()}, one thread. `±` is half of a "
        "95% interval over prompts, of which each is the mean of its seeds.",
        "",
        "| recipe | win rate | pass@1 | KL | chosen | rejected | accuracy | length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ranked:
        cells = [_shown(_mean(by_recipe[name], column)) for column in COLUMNS]
        lines.append(f"| {'*base*' if name == BASE else f'`{name}`'} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{name}` failed: {error}" for name, error in sorted(failed.items()) if name not in by_recipe)]
    return "\n".join(lines).rstrip()


def _mean(seeds: Mapping[int, Mapping[str, Any]], column: str) -> Interval:
    each = np.mean([values[column] for values in seeds.values()], 0)
    return mean_interval(each)


def _shown(found: Interval) -> str:
    half = (found.high - found.low) / 2
    return f"{found.value:.3f}" if not half else f"{found.value:.3f} ±{half:.3f}"


def write(folder: Path) -> None:
    """Put the table between the markers of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(folder)}\n\n{END}{after}", encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference_losses", description=__doc__)
    parser.add_argument("what", nargs="*", help="recipes, or base; all without any")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budget", type=float, help="minutes")
    parser.add_argument("--write", action="store_true", help="write docs/pairs.md")
    parser.add_argument("--results", type=Path, default=FOLDER)
    chosen = parser.parse_args(given)
    for name in chosen.what:
        if name not in (known := (BASE, *names())):
            parser.error(f"there is no '{name}'.{nearest(name, known)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work(chosen.seeds, chosen.budget, chosen.results, chosen.what)
    if chosen.write:
        write(chosen.results)


if __name__ == "__main__":
    main()
