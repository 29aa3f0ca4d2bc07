"""The registry of parts: a name for each class, so that a composition can be written as YAML and read back."""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, TypeVar

from keel.core.errors import ConfigError, nearest

T = TypeVar("T")
_PARTS: dict[str, type] = {}
_NAMES: dict[type, str] = {}
PAPERS: dict[str, Any] = {}


def part(name: str, paper: int | list[int] | None = None) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass under a name; making one with NaN, or with a negative `epsilon`, is a ValueError.

    Args:
        name: unique among all parts, lower case with underscores.
        paper: number, or numbers, in the catalogue.

    Raises:
        ConfigError: the name is taken by another class, or the decorator stands without one.
    """
    if not isinstance(name, str):
        raise ConfigError("has a decorator without a name", f"{name.__name__}", 'Write @keel.part("name").')

    def register(cls: type[T]) -> type[T]:
        known = _PARTS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"part name '{name}' is taken by {known.__module__}.{known.__qualname__}")
        _PARTS[name], _NAMES[cls], PAPERS[name] = cls, name, paper
        if dataclasses.is_dataclass(cls):
            cls.__init__ = _checking(cls.__init__)  # type: ignore[method-assign]
        return cls

    return register


def _checking(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *positional, **named)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{item.name} must be a number, not nan")
            if item.name == "epsilon" and isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"epsilon must not be negative, got {value}")

    return checked


def part_class(name: str) -> type:
    """The class registered under a name.

    Raises:
        ConfigError: nothing is registered under it.
    """
    load_plugins()
    if name not in _PARTS:
        raise ConfigError(f"there is no part named '{name}'.{nearest(name, _PARTS)}")
    return _PARTS[name]


def part_name(cls: type) -> str | None:
    """The name of a registered class, or None."""
    return _NAMES.get(cls)


_loaded = False


def load_plugins() -> None:
    """Import the parts that other packages offer through the entry-point group `keel.parts`, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in importlib.metadata.entry_points(group="keel.parts"):
        entry.load()
