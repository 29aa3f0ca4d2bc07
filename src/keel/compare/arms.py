"""Arms from recipes: one for each value of a swept setting, the argument that holds a recipe's strength."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from keel.compare.outcomes import Arm
from keel.core.errors import ConfigError, KeelError, UserError, nearest
from keel.recipes.registry import recipe_named
from keel.train.configuration import SECTIONS, Request, parse_value, resolve
from keel.train.settings import TrainSettings

Swept = Mapping[str, Sequence[Any]]
FACTORS, FROM_ZERO = (0.3, 1.0, 3.0), (0.0, 0.01, 0.04)  # of the default, and where that is 0


def arms_of(recipes: Sequence[str], swept: Swept) -> tuple[list[Arm], list[str]]:
    """The arms, those of one recipe side by side, and what is to be said of recipes that a sweep passes by.

    Raises:
        ConfigError: no recipe, one twice, one that does not exist, or a setting that none of them has.
    """
    if not recipes:
        raise ConfigError("no recipe is named", "compare", "For example: keel compare grpo dr_grpo kl_cov.")
    for name in recipes:
        recipe_named(name)
        if list(recipes).count(name) > 1:
            raise ConfigError(f"'{name}' is given twice", "compare", "Each arm stands once; --seeds repeats it.")
    for key in swept:
        if not any(has_setting(name, key) for name in recipes):
            known = sorted({argument for name in recipes for argument in recipe_named(name).arguments})
            raise ConfigError(f"none of these recipes has it.{nearest(key, known)}", f"--param {key}")
    arms, notes = [], []
    for name in recipes:
        own = [key for key in swept if has_setting(name, key)]
        for values in product(*(swept[key] for key in own)):
            given = tuple(sorted(zip(own, values, strict=True)))
            arms.append(Arm(arm_name(name, given), name, given))
        if lacking := [key for key in swept if key not in own]:
            notes.append(f"{name} has no {' and no '.join(lacking)}, which does not set it apart")
    return arms, notes


def arm_name(recipe: str, settings: Sequence[tuple[str, Any]]) -> str:
    """The recipe with what sets it apart.

    >>> arm_name("grpo", [("beta", 0.04)]), arm_name("mine.py:grpo", [])
    ('grpo beta=0.04', 'grpo')
    """
    short = recipe.rpartition(":")[2]
    return " ".join([short, *(f"{key}={_shown(value)}" for key, value in settings)])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def has_setting(recipe: str, key: str) -> bool:
    """Whether a recipe has an argument of that name, or a run of it a setting at that path."""
    known = recipe_named(recipe)
    section, _, rest = key.partition(".")
    if not rest:
        return key in known.arguments or key in TrainSettings.model_fields
    if section in SECTIONS:
        return rest.split(".")[0] in SECTIONS[section].model_fields
    try:
        place: Any = resolve(Request(recipe)).method
    except UserError:
        return True  # what is wrong with the recipe is said where it is resolved
    for name in key.split("."):
        if isinstance(place, Mapping) and name in place:
            place = place[name]
        elif hasattr(place, "__dataclass_fields__") and name in place.__dataclass_fields__:
            place = getattr(place, name)
        else:
            return False
    return True


def swept_values(texts: Sequence[str], flag: str) -> dict[str, list[Any]]:
    """Options `KEY=VALUE,VALUE` as values by key.

    Raises:
        ConfigError: one without `=` or without values, or one twice.

    >>> swept_values(["beta=0.01,0.1"], "--param")
    {'beta': [0.01, 0.1]}
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, given = text.partition("=")
        key, given = key.strip(), given.strip()
        if not sign or not key or not given:
            raise ConfigError("must be KEY=VALUE,VALUE", f"{flag} {text}", f"For example {flag} beta=0.01,0.1.")
        if key in found:
            raise ConfigError("is given twice", f"{flag} {key}")
        whole = parse_value(f"[{given}]")
        values = whole if isinstance(whole, list) else [parse_value(part) for part in given.split(",")]
        found[key] = [_number(value) for value in values]
        if any(found[key].count(value) > 1 for value in found[key]):
            raise ConfigError("a value is given twice", f"{flag} {key}")
    return found


def _number(value: Any) -> Any:
    """`1e-3` is text in YAML 1.1, and a number for everybody else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def strength(recipe: str) -> str | None:
    """The argument that holds the strength of a recipe's regulariser.

    The one that its claim names; else `beta` or `coef`, of its own before those that it passes on to its baseline.

    >>> strength("grpo"), strength("kl_cov")
    ('beta', 'coef')
    """
    known = recipe_named(recipe)
    try:
        claim = known().claim
    except KeelError:
        return None
    own = inspect.signature(known.make).parameters
    named = claim.beta if claim is not None else None
    for name in (named, *(n for n in ("beta", "coef") if n in own), "beta", "coef"):
        if name is not None and name in known.arguments:
            return name
    return None


def default_grid(recipe: str, argument: str) -> list[float]:
    """Values to try: the default and a third and three times as much; from a default of 0 upwards."""
    default = recipe_named(recipe).arguments[argument].default
    if isinstance(default, bool) or not isinstance(default, int | float):
        return []
    return [float(f"{default * factor:.10g}") for factor in FACTORS] if default else list(FROM_ZERO)
