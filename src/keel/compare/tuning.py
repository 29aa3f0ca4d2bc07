"""The strength of each arm's regulariser, chosen by trials under the same budget, on other seeds and other prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.compare.arms import arm_name, default_grid, has_setting, strength
from keel.compare.outcomes import Arm, Outcome
from keel.core.errors import ConfigError
from keel.recipes.registry import recipe_named

STRENGTH = "beta"  # asked for by this name, it is each recipe's own strength, whatever that is called
METRIC = "pass@1"
FEWEST = 16  # held-out prompts beside those that are compared, below which the trials are measured on the same ones


@dataclass(frozen=True)
class Tuning:
    """What is tuned.

    Args:
        name: `beta` for the strength of each recipe, or an argument or a path.
        values: to try; none takes the default and a third and three times as much.
    """

    name: str = STRENGTH
    values: tuple[Any, ...] = ()


def trial_arms(arms: Sequence[Arm], tuning: Tuning) -> tuple[dict[str, list[Arm]], list[str]]:
    """The trials of each arm by its name, and what is to be said of arms without any.

    Raises:
        ConfigError: no arm can be tuned, one has a value already, or values must be given.
    """
    found: dict[str, list[Arm]] = {}
    notes = []
    for arm in arms:
        key = tuned_setting(arm.recipe, tuning.name)
        if key is None:
            notes.append(f"{arm.name} has no {tuning.name} to tune: it is compared as it is")
            continue
        if key in dict(arm.settings):
            raise ConfigError(f"'{arm.name}' has a value already", f"--tune {tuning.name}", "Sweep it or tune it.")
        values = list(tuning.values)
        if not values and key in recipe_named(arm.recipe).arguments:
            values = default_grid(arm.recipe, key)
        if not values:
            fix = f"For example --tune {tuning.name}=0.01,0.03,0.1."
            raise ConfigError(f"'{arm.name}' has no default to start from", f"--tune {tuning.name}", fix)
        found[arm.name] = [_with(arm, key, value) for value in values]
    if not found:
        raise ConfigError("no arm has it", f"--tune {tuning.name}", "Name an argument, or a path into the method.")
    return found, notes


def tuned_setting(recipe: str, name: str) -> str | None:
    """What is set to tune a recipe; None if it has no such thing.

    >>> tuned_setting("kl_cov", "beta"), tuned_setting("grpo", "epsilon"), tuned_setting("grpo", "nothing")
    ('coef', 'epsilon', None)
    """
    if name == STRENGTH:
        return strength(recipe)
    return name if has_setting(recipe, name) else None


def _with(arm: Arm, key: str, value: Any) -> Arm:
    given = tuple(sorted({**dict(arm.settings), key: value}.items()))
    return Arm(arm_name(arm.recipe, given), arm.recipe, given)


def skipped(num_prompts: int, held_out: int) -> int:
    """Held-out prompts that trials pass over, because the arms will be compared on them; 0 if too few are left.

    >>> skipped(256, 512), skipped(256, 300), skipped(256, 260)
    (256, 256, 0)
    """
    return num_prompts if held_out - num_prompts >= FEWEST else 0


def choose(trials: Mapping[str, Sequence[Arm]], outcomes: Sequence[Outcome], where: str) -> dict[str, tuple[Arm, str]]:
    """The best trial of each arm by mean pass@1, and all of them in words; an arm whose trials all failed has none.

    Args:
        trials: of each arm by its name.
        outcomes: of all trials.
        where: on what they were measured, in words.
    """
    scores: dict[str, list[float]] = {}
    for one in outcomes:
        if one.status == "finished" and METRIC in one.values:
            scores.setdefault(one.arm, []).append(float(np.nanmean(one.values[METRIC])))
    found = {}
    for name, arms in trials.items():
        key = _tried(arms)
        means = {arm.name: float(np.mean(scores[arm.name])) if arm.name in scores else -math.inf for arm in arms}
        best = max(arms, key=lambda arm: means[arm.name])
        if means[best.name] == -math.inf:
            continue
        tried = ", ".join(f"{_plain(dict(arm.settings)[key])}: {_score(means[arm.name])}" for arm in arms)
        found[name] = (best, f"{key} = {_plain(dict(best.settings)[key])} of {tried} ({METRIC} {where})")
    return found


def _tried(arms: Sequence[Arm]) -> str:
    """The setting in which the trials of an arm differ; with one trial the first."""
    settings = [dict(arm.settings) for arm in arms]
    return next((key for key in settings[0] if len({s[key] for s in settings}) > 1), next(iter(settings[0])))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _score(value: float) -> str:
    return "failed" if value == -math.inf else f"{value:.3f}"


def tuned_arms(arms: Sequence[Arm], chosen: Mapping[str, tuple[Arm, str]]) -> list[Arm]:
    """The arms under their own names, with the settings that the trials chose."""
    return [Arm(arm.name, arm.recipe, chosen[arm.name][0].settings) if arm.name in chosen else arm for arm in arms]
