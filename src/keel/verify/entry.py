"""`keel.verify(...)` and `keel verify`: recipes, one's own, or all, held to their claims."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keel.recipes.registry import Recipe, recipe_named, recipes
from keel.verify.recipes import Verification, variants, verify_recipe

Told = Callable[[Verification], None]


def verify(
    names: str | Sequence[str] | None = None,
    *,
    full: bool = False,
    arguments: Mapping[str, Any] | None = None,
    told: Told | None = None,
) -> list[Verification]:
    """Hold recipes to their stated objectives on worlds where the exact answer is known.

    Args:
        names: one recipe or several, as `keel methods` lists them or as `file.py:name`; None is all.
        full: add fixed points, variances, larger groups and precisions.
        arguments: of the recipes, such as {"beta": 0.1}.
        told: called with each result as it comes.

    Returns:
        One result for each recipe; one more where a regulariser is off by default, with it switched on.

    Raises:
        ConfigError: an unknown recipe or argument.

    >>> [found] = verify("rloo")
    >>> found.status
    'holds'
    """
    chosen = [names] if isinstance(names, str) else list(names or [])
    known: list[Recipe] = [recipe_named(name) for name in chosen] if chosen else list(recipes().values())
    out = []
    for recipe in known:
        for variant in variants(recipe) if not arguments else [dict(arguments)]:
            out.append(verify_recipe(recipe, variant, full=full))
            if told is not None:
                told(out[-1])
    return out
