"""Checks of annotations, which take more time than what they check: what is called often is checked now and then.

The first calls of a function in a process are checked, and from then on every so many. So are classes that hold
tensors; all others are always checked, for these are where settings of the wrong type are refused.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jaxtyping

FIRST, EVERY = 100, 20
_checking = jaxtyping.jaxtyped


def install(modules: list[str]) -> None:
    """Check what these modules and all below them define, from their import on."""
    jaxtyping.jaxtyped = jaxtyped  # the name by which the hook calls it
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def jaxtyped(made: Any = None, *, typechecker: Any) -> Any:
    """As `jaxtyping.jaxtyped`, but that most calls of what is called often go unchecked."""
    if made is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not inspect.isclass(made):
        checked = _checking(made, typechecker=typechecker)
        return now_and_then(made, checked) if inspect.isfunction(made) else checked
    plain = made.__init__
    checked = _checking(made, typechecker=typechecker)
    if dataclasses.is_dataclass(made) and any("Tensor" in str(field.type) for field in dataclasses.fields(made)):
        checked.__init__ = now_and_then(plain, checked.__init__)
    return checked


def now_and_then(plain: Callable, checked: Callable) -> Callable:
    """`checked` for the first calls and every so many later ones, `plain` for the others.

    >>> often = now_and_then(lambda: 0, lambda: 1)
    >>> [sum(often() for _ in range(100)) for _ in range(3)]
    [100, 5, 5]
    """
    count = itertools.count()

    @functools.wraps(plain)
    def either(*arguments: Any, **named: Any) -> Any:
        n = next(count)
        return (checked if n < FIRST or not n % EVERY else plain)(*arguments, **named)

    return either
