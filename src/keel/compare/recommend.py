"""`keel recommend`: which recipes to try first on a task, from comparisons made here and from what comes with Keel."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from keel.compare.outcomes import Arm, Budget, Comparison, Outcome
from keel.compare.record import load, names
from keel.core.errors import UserError
from keel.core.plain import finite
from keel.evaluate.intervals import mean_interval
from keel.store.store import Store
from keel.tasks.environment import InteractiveTask
from keel.tasks.load import load_task
from keel.train.setup import DEFAULT_TASK

METRIC = "pass@1"
SHOWN = 5  # recipes that are named
FEW, MOST = 0.1, 0.9  # pass rates of the base below and above which a task is like `sparse` and like `saturated`


@dataclass(frozen=True)
class Evidence:
    """What is known of a recipe on a task.

    Args:
        recipe: its name.
        settings: in which it differs from its defaults.
        source: where it was measured: a comparison's name, or "Keel's benchmark".
        task: on which.
        seeds: how many runs.
        score: pass@1 after training on held-out prompts, mean and 95% interval.
        gain: what training has added to it, paired by prompt, mean and interval.
        step: seconds of a step; None where it is not known.
        steps: of training.
        worth: the gain that a budget of time leaves, if gains grow in proportion to steps; without one, the gain.
    """

    recipe: str
    settings: Mapping[str, Any]
    source: str
    task: str
    seeds: int
    score: tuple[float, float, float]
    gain: tuple[float, float, float]
    step: float | None
    steps: int
    worth: float

    @property
    def label(self) -> str:
        """The recipe with its settings."""
        return " ".join([self.recipe, *(f"{key}={value}" for key, value in self.settings.items())])


@dataclass(frozen=True)
class Advice:
    """What to try first, and why.

    Args:
        task: asked for.
        budget: of one run, in words; None without one.
        near: the task whose evidence stands in, and why; None where there is some on the task itself.
        first: the recipes, best first; those measured here before those that come with Keel.
        tied: those that cannot be told from the first of their source.
        notes: what limits the advice.
        command: that compares the first of them here.
    """

    task: str
    budget: str | None
    near: str | None
    first: tuple[Evidence, ...]
    tied: tuple[str, ...]
    notes: tuple[str, ...] = ()
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for NaN."""
        return finite(asdict(self))

    def text(self) -> str:
        """For a terminal."""
        over = f" with {self.budget} a run" if self.budget else ""
        lines = [f"To try first on {self.task}{over}:"]
        lines += [f"note: {self.near}"] if self.near else []
        width = max((len(one.label) for one in self.first), default=0)
        for place, one in enumerate(self.first, 1):
            runs = f"{one.seeds} seed{'' if one.seeds == 1 else 's'}, {one.steps} steps"
            speed = "" if one.step is None else f", {one.step:.2f} s a step"
            lines.append(
                f"{place}. {one.label:<{width}}  pass@1 {one.score[0]:.3f}, {_signed(one.gain)} over the base "
                f"({one.source}: {runs}{speed})"
            )
        if self.tied:
            lines.append(f"Not told apart from the first: {', '.join(self.tied)}.")
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join([*lines, *([f"Compare them: {self.command}"] if self.command else [])])


def recommend(task: str | None = None, budget: Budget | None = None, runs: str | Path = "runs") -> Advice:
    """Recipes to try first.

    Args:
        task: its name; None is the usual one.
        budget: of one run. Where it is time, a recipe whose steps take longer gets fewer of them, and its gain is cut
            in proportion.
        runs: folder whose comparisons count.

    Raises:
        UserError: an unknown task.
    """
    name, runs = task or DEFAULT_TASK, Path(runs)
    here = _here(name, runs, budget)
    near, why = (name, None) if name in _packaged()["tasks"] else _nearest(name, runs)
    known = [one for one in _from_package(near, budget) if one.recipe not in {e.recipe for e in here}]
    helped = [one for one in _best(here) if one.worth > 0]
    others = _best(known)[: max(2, SHOWN - len(helped))]
    tied = _tied(here, helped[0]) if helped else _tied(known, others[0]) if others else []
    chosen = [*helped[:SHOWN], *others]
    return Advice(
        task=name,
        budget=None if budget is None else str(budget),
        near=why if others else None,
        first=tuple(chosen),
        tied=tuple(tied),
        notes=tuple(_notes(here, known, budget, near)),
        command=_command(name, chosen, budget),
    )


def _best(found: Sequence[Evidence]) -> list[Evidence]:
    """Best first, each recipe once."""
    ranked = sorted((one for one in found if math.isfinite(one.worth)), key=lambda one: -one.worth)
    seen: dict[str, Evidence] = {}
    for one in ranked:
        seen.setdefault(one.recipe, one)
    return list(seen.values())


def _tied(found: Sequence[Evidence], first: Evidence) -> list[str]:
    """Those whose interval reaches the first one's mean; a rough word, which a comparison makes precise."""
    rest = [one for one in _best(found) if one is not first]
    return [one.label for one in rest if one.gain[2] >= first.gain[0]][:8]


def _notes(here: Sequence[Evidence], known: Sequence[Evidence], budget: Budget | None, near: str) -> list[str]:
    notes = []
    if known:
        facts = _packaged()["tasks"][near]
        notes.append(
            f"Keel's benchmark trained the built-in model on {near} for {facts['steps']} steps of "
            f"{facts['completions']} completions, all at one learning rate: what an update does, not what it is worth "
            "at scale"
        )
    if not here:
        notes.append("nothing was compared here on this task yet")
    if idle := [one.label for one in here if one.worth <= 0]:
        notes.append(f"tried here without a gain: {', '.join(idle)}")
    if budget is not None and budget.unit == "seconds":
        notes.append("slower steps mean fewer of them: gains are cut in proportion to the time of a step")
    return notes


def _command(task: str, chosen: Sequence[Evidence], budget: Budget | None) -> str:
    if not chosen:
        return ""
    recipes = list(dict.fromkeys(one.recipe for one in chosen))[:3]
    parts = ["keel compare", *recipes]
    parts += [] if task == DEFAULT_TASK else ["--task", task]
    parts += [] if budget is None else ["--budget", budget.typed]
    return " ".join([*parts, "--seeds 3"])


# -- what was measured here ------------------------------------------------------------------------------------------


def _here(task: str, runs: Path, budget: Budget | None) -> list[Evidence]:
    """Arms of the comparisons on a task; of several on one recipe the one whose budget is nearest."""
    found: dict[tuple, tuple[float, Evidence]] = {}
    for name in names(runs):
        try:
            comparison = load(name, runs)
        except UserError:
            continue  # one that cannot be read is no evidence
        if comparison.task != task:
            continue
        fastest = _fastest([_step(comparison.of(arm.name)) for arm in comparison.arms])
        for arm in comparison.arms:
            one = _measured(comparison, arm, budget, fastest)
            key = (arm.recipe, arm.settings)
            far = _distance(comparison.budget, budget)
            if one is not None and (key not in found or far < found[key][0]):
                found[key] = (far, one)
    return [one for _, one in found.values()]


def _distance(one: Budget, other: Budget | None) -> float:
    if other is None:
        return 0.0
    return abs(math.log(one.amount / other.amount)) if one.unit == other.unit else math.inf


def _measured(comparison: Comparison, arm: Arm, budget: Budget | None, fastest: float | None) -> Evidence | None:
    cells = comparison.of(arm.name)
    if not cells or METRIC not in cells[0].values:
        return None
    after = np.stack([cell.values[METRIC] for cell in cells])
    before = [cell.before.get(METRIC) for cell in cells]
    gains = np.stack([a - b for a, b in zip(after, before, strict=True) if b is not None and b.shape == a.shape] or [])
    step = _step(cells)
    gain = _interval(gains) if len(gains) else (math.nan,) * 3
    return Evidence(
        recipe=arm.recipe,
        settings=dict(arm.settings),
        source=comparison.name,
        task=comparison.task,
        seeds=len(cells),
        score=_interval(after),
        gain=gain,
        step=step,
        steps=int(np.median([cell.steps for cell in cells])),
        worth=(gain[0] if math.isfinite(gain[0]) else _interval(after)[0])
        * (1.0 if comparison.budget.unit == "seconds" else _share(budget, step, fastest)),
    )


def _interval(table: np.ndarray) -> tuple[float, float, float]:
    """Mean over runs and prompts, its interval over runs where there are several, else over prompts."""
    if len(table) == 1:
        found = mean_interval(table[0])
        return found.value, found.low, found.high
    from scipy.stats import t

    means = np.nanmean(table, 1)
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    return float(means.mean()), float(means.mean()) - half, float(means.mean()) + half


def _step(cells: Sequence[Outcome]) -> float | None:
    known = [cell.seconds / cell.steps for cell in cells if cell.steps and cell.seconds]
    return float(np.median(known)) if known else None


def _fastest(steps: Sequence[float | None]) -> float | None:
    return min((step for step in steps if step), default=None)


def _share(budget: Budget | None, step: float | None, fastest: float | None) -> float:
    """The steps that a recipe gets in the time in which the fastest one does as many as were measured."""
    if budget is None or budget.unit != "seconds" or not step or not fastest:
        return 1.0
    return min(1.0, fastest / step)


# -- what comes with Keel --------------------------------------------------------------------------------------------


@cache
def _packaged() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("evidence.json").read_text(encoding="utf-8"))


def _from_package(task: str, budget: Budget | None) -> list[Evidence]:
    facts = _packaged()["tasks"][task]
    fastest = _fastest([one["step"] for one in facts["recipes"].values()])
    return [
        Evidence(
            recipe=recipe,
            settings=one["settings"],
            source="Keel's benchmark",
            task=task,
            seeds=one["seeds"],
            score=_three(one[METRIC]),
            gain=_three(one["gain"]),
            step=one["step"],
            steps=facts["steps"],
            worth=_three(one["gain"])[0] * _share(budget, one["step"], fastest),
        )
        for recipe, one in facts["recipes"].items()
    ]


def _three(values: Sequence[float | None]) -> tuple[float, float, float]:
    mean, low, high = (math.nan if value is None else float(value) for value in values)
    return mean, low, high


def _nearest(task: str, runs: Path) -> tuple[str, str]:
    """The task of the benchmark that is most like another one, and in what."""
    loaded = load_task(task)
    there = f"there is no evidence on {task}"
    if isinstance(loaded, InteractiveTask):
        return "number_guessing", f"{there}; number_guessing is nearest: episodes of several turns"
    rate = _base_rate(task, runs)
    if rate is None:
        why = "single completions, verified; how often its base model is right is not known before a first run"
        return DEFAULT_TASK, f"{there}; {DEFAULT_TASK} is nearest: {why}"
    name = "sparse" if rate < FEW else "saturated" if rate > MOST else DEFAULT_TASK
    base = _packaged()["tasks"][name]["base"][METRIC][0]
    return name, f"{there}; {name} is nearest: its base model solves {base:.0%}, here {rate:.0%} were solved"


def _base_rate(task: str, runs: Path) -> float | None:
    """pass@1 before training, of the newest run on a task."""
    file = runs / "keel.sqlite"
    if not file.is_file():
        return None
    with Store(file, readonly=True) as store:
        for run in store.runs(task=task, limit=20):
            found = (run.summary.get("before") or {}).get(METRIC)
            if found:
                return float(found[0])
    return None


def _signed(gain: tuple[float, float, float]) -> str:
    if not math.isfinite(gain[0]):
        return "gain not known"
    return f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
