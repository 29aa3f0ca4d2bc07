"""The second round: the best of the first on each measure get a tuned coefficient and ten seeds."""

import json
import math
from collections.abc import Iterator, Sequence

from benchmarks import plan
from benchmarks.cells import BASE, Cell
from benchmarks.evidence import Arm, Evidence
from keel.core.errors import KeelError
from keel.recipes.registry import recipe_named

BEST = 10
MEASURES = (("pass@1", plan.MAIN), ("pass@16", plan.MAIN))  # what methods are for; all others are means to these
TUNING_SEED = 100  # of runs that choose a coefficient and count for nothing else
FACTORS, FROM_ZERO = (0.3, 3.0), (0.01, 0.04)


def arm_of(cell: Cell) -> Arm:
    """A cell of whatever seed."""
    return Arm(cell.recipe, cell.task, cell.arguments)


def finalists(evidence: Evidence, names: Sequence[str]) -> dict[str, list[str]]:
    """The best recipes on each task by its measures in the first round, best first; of those that do the same, one."""
    found: dict[str, list[str]] = {}
    first = evidence.on(range(plan.SEEDS))
    for measure, task in MEASURES:
        same = {name for names_ in alike(evidence, names, task) for name in names_[1:]}
        values = {name: reached(first, arm_of(plan.cell(name, task)), measure) for name in names if name not in same}
        ranked = sorted((name for name in values if math.isfinite(values[name])), key=lambda name: -values[name])
        found[task] = list(dict.fromkeys([*found.get(task, []), *ranked[:BEST]]))
    return found


def reached(evidence: Evidence, arm: Arm, measure: str) -> float:
    """The mean of an arm; of one that began with another base grpo's and the difference to it, as of the usual base."""
    if not evidence.apart(arm):
        return evidence.measure(arm, measure).value
    grpo = Arm("grpo", arm.task)
    return evidence.measure(grpo, measure).value + evidence.difference(arm, grpo, measure).value


def alike(evidence: Evidence, names: Sequence[str], task: str) -> list[list[str]]:
    """Recipes whose numbers on a task are the very same, prompt by prompt, in the first round."""
    groups: dict[str, list[str]] = {}
    for name in names:
        known = evidence.numbers.get(arm_of(plan.cell(name, task)), {})
        values = {str(seed): known[seed]["values"] for seed in range(plan.SEEDS) if seed in known}
        if values:
            groups.setdefault(json.dumps(values, sort_keys=True), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def coefficient(name: str) -> str | None:
    """The argument that holds a recipe's coefficient, as its claim says it."""
    known = recipe_named(name)
    try:
        claim = known().claim
    except KeelError:
        return None
    named = claim.beta if claim is not None else None
    return next((n for n in (named, "beta", "coef") if n is not None and n in known.arguments), None)


def grid(name: str) -> list[float]:
    """Values to try beside the default."""
    argument = coefficient(name)
    if argument is None:
        return []
    default = recipe_named(name).arguments[argument].default
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return []
    return [round(default * factor, 10) for factor in FACTORS] if default else list(FROM_ZERO)


def trials(name: str, task: str) -> list[Cell]:
    """The cells that choose a coefficient, the default's first."""
    argument = coefficient(name)
    values = grid(name)
    if argument is None or not values:
        return []
    first = plan.cell(name, task, TUNING_SEED)
    return [first, *(plan.cell(name, task, TUNING_SEED, **{argument: value}) for value in values)]


def tuned(name: str, task: str, trial: Evidence) -> Cell | None:
    """The best of the trials by pass@1; None as long as one is missing."""
    cells = trials(name, task)
    values = [trial.measure(arm_of(cell), "pass@1").value for cell in cells]
    if not cells or not all(math.isfinite(value) for value in values):
        return None
    return cells[values.index(max(values))]


def second_round(evidence: Evidence, trial: Evidence, names: Sequence[str]) -> Iterator[Cell]:
    """Trials first; then ten seeds of base, grpo and the finalists, at the coefficient that the trials have chosen."""
    chosen = finalists(evidence, names)
    for task, best in chosen.items():
        for name in best:
            yield from trials(name, task)
    for task, best in chosen.items():
        for name in dict.fromkeys([BASE, "grpo", *best]):
            usual = plan.cell(name, task)
            found = tuned(name, task, trial) if name != BASE else None
            if name in (BASE, "grpo") or found is None or found.arguments == usual.arguments:
                yield from plan.with_seeds(usual, plan.MORE_SEEDS)
            if found is not None and found.arguments != usual.arguments:
                yield from plan.with_seeds(found, plan.MORE_SEEDS)


def again(evidence: Evidence, trial: Evidence, names: Sequence[str]) -> list[Arm]:
    """Who runs with ten seeds on the main task, base and grpo first."""
    cells = second_round(evidence, trial, names)
    return list(dict.fromkeys(arm_of(cell) for cell in cells if cell.task == plan.MAIN and cell.seed != TUNING_SEED))


def said(evidence: Evidence, trial: Evidence, names: Sequence[str]) -> dict[str, str]:
    """What the trials found, in words, by recipe and task."""
    out = {}
    for task, best in finalists(evidence, names).items():
        for name in best:
            argument, found = coefficient(name), tuned(name, task, trial)
            if argument is None or found is None:
                continue
            default = recipe_named(name).arguments[argument].default
            tried = []
            for cell in trials(name, task):
                value = dict(cell.arguments).get(argument, default)
                tried.append(f"{value:g}: {trial.measure(arm_of(cell), 'pass@1').value:.3f}")
            best_value = dict(found.arguments).get(argument, default)
            where = "" if task == plan.MAIN else f" on {task}"
            out[f"{name}{where}"] = f"{argument} = {best_value:g} of {', '.join(tried)}"
    return out
