"""Which cells the evidence is made of, and in which order they are worth their time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.cells import BASE, Cell
from keel.core.errors import KeelError
from keel.recipes.registry import recipes
from keel.tasks.load import task_names

MAIN, SEEDS, MORE_SEEDS = "countdown", 3, 10
OTHERS = ("sparse", "saturated", "proxy", "number_guessing", "countdown_calculator")
LOOP: dict[str, Any] = {
    "rollout.num_prompts": 16,
    "rollout.num_generations": 8,
    "train.max_steps": 80,
    "train.learning_rate": 1e-4,
    "train.num_minibatches": 2,
    "train.log_completions": 0,
    "train.save_steps": 0,
    "evaluate.num_prompts": 96,
    "evaluate.num_generations": 32,
}
EPISODES: dict[str, Any] = {"evaluate.num_prompts": 24}  # of several turns
SHORT: dict[str, Any] = {"train.max_steps": 60, "evaluate.num_prompts": 64}  # enough for what these are to show
OF_TASK: dict[str, dict[str, Any]] = {
    "sparse": SHORT,
    "saturated": SHORT,
    "proxy": {**SHORT, "train.learning_rate": 3e-4},  # at 1e-4 nobody finds the loophole in this time
    "number_guessing": {**EPISODES, "train.learning_rate": 1e-3},  # at 5e-4 half the gain, at 2e-3 none
    "countdown_calculator": {  # its episodes are longer
        **EPISODES,
        "train.max_steps": 30,
        "train.learning_rate": 3e-4,
        "evaluate.num_generations": 16,
    },
}
# Arguments without which a recipe does nothing, or not what it is for, in so short a run.
GIVEN: dict[str, dict[str, Any]] = {
    "dph_rl": {"solved": 0.75},  # next to no prompt is solved eight times in eight by these bases
}
# Further settings of recipes that claims are held against, on countdown.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (("grpo", {"entropy_coef": 0.001}), ("grpo", {"beta": 0.04}))
KINDS = ("online", "supervised")  # those whose data any task has
WHY_NOT = {
    "pairs": "needs pairs of answers",
    "reward": "trains a reward model, not a policy",
    "distillation": "needs a teacher and its completions",
    "sampling": "trains nothing",
}
NOT_RUN: dict[str, str] = {  # recipes that no task here serves, and why
    "grpo_implicit_prm": "needs a reward model that was trained before",
    "self_judge": "trains a judge, on judgements with a reference",
    "spct": "trains a judge, on preferences",
}


def settings(task: str) -> tuple[tuple[str, Any], ...]:
    """Of the cells of a task."""
    return tuple(sorted({**LOOP, **OF_TASK.get(task, {})}.items()))


def cell(recipe: str, task: str = MAIN, seed: int = 0, **arguments: Any) -> Cell:
    """A cell with the settings of its task."""
    given = {**GIVEN.get(recipe, {}), **arguments}
    return Cell(recipe, task, seed, tuple(sorted(given.items())), settings(task))


@cache
def tasks() -> tuple[str, ...]:
    """Those that exist."""
    known = task_names()
    return tuple(name for name in (MAIN, *OTHERS) if name in known)


@cache
def compared() -> tuple[str, ...]:
    """Recipes that a task here can serve; grpo, against which all are held, comes first."""
    return ("grpo", *(name for name in recipes() if name != "grpo" and left_out(name) is None))


@cache
def left_out(name: str) -> str | None:
    """Why a recipe is not run; None if it is."""
    if name in NOT_RUN:
        return NOT_RUN[name]
    try:
        kind = recipes()[name]().kind
    except KeelError:
        return None  # its cells say what is wrong
    return None if kind in KINDS else WHY_NOT.get(kind, f"its rows are of kind {kind}")


def first_round() -> Iterator[Cell]:
    """Countdown with one seed, every other task, then further seeds of countdown."""
    names = (BASE, *compared())
    for task in tasks():
        yield from (cell(name, task) for name in names)
        if task == MAIN:
            yield from variants(0)
    for seed in range(1, SEEDS):
        yield from (cell(name, MAIN, seed) for name in names)
        yield from variants(seed)


def variants(seed: int) -> Iterator[Cell]:
    """The cells of `VARIANTS`."""
    return (cell(name, MAIN, seed, **arguments) for name, arguments in VARIANTS)


def baselines(one: Cell) -> list[Cell]:
    """What a cell is compared with: the base, grpo, and the recipe that it varies, all with its seed."""
    names = dict.fromkeys([BASE, "grpo", recipes()[one.recipe].baseline if one.recipe != BASE else None])
    return [cell(name, one.task, one.seed) for name in names if name in (BASE, *compared()) and name != one.recipe]


def with_seeds(one: Cell, count: int) -> list[Cell]:
    """A cell with seeds 0 .. count - 1."""
    return [replace(one, seed=seed) for seed in range(count)]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Each once, in the order of its first place."""
    return list(dict.fromkeys(cells))
