"""The registry of recipes."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keel.core.config import check
from keel.core.errors import ConfigError, nearest
from keel.method import Method


@dataclass(frozen=True)
class Recipe:
    """A named composition.

    Args:
        name: as on the command line.
        make: the function that builds the method.
        paper: number, or numbers, in the catalogue.
        baseline: the recipe that it varies.
        neutral: arguments at which it equals the baseline.
        reduces_to: what it equals then, if not the baseline at its defaults.
        preset: training settings that belong to the method, as dotted keys.
        without: arguments of the baseline that nothing of it would read.
        passes: defaults of its own for arguments that it passes on.
    """

    name: str
    make: Callable[..., Method]
    paper: int | list[int] | None = None
    baseline: str | None = None
    neutral: Mapping[str, Any] = field(default_factory=dict)
    reduces_to: Callable[[], Method] | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    passes: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """Its arguments, those that it passes on to its baseline and are read there included."""
        own: dict[str, inspect.Parameter] = {}
        passes_on = False
        for name, parameter in inspect.signature(self.make).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passes_on = True
            else:
                own[name] = parameter
        if passes_on and self.baseline is not None:
            passed = {n: p for n, p in recipe_named(self.baseline).arguments.items() if n not in self.without}
            passed |= {name: passed[name].replace(default=value) for name, value in self.passes.items()}
            own = {**passed, **own}
        return own

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        return (inspect.getdoc(self.make) or "").split("\n\n")[0].replace("\n", " ")

    def __call__(self, **arguments: Any) -> Method:
        """The method.

        Raises:
            ConfigError: an unknown argument, a value that does not fit, or a function that returns no method.
        """
        checked = {}
        for name, value in arguments.items():
            if name not in self.arguments:
                allowed = ", ".join(self.arguments) or "none"
                what = f"recipe '{self.name}' has no argument '{name}'.{nearest(name, self.arguments)}"
                raise ConfigError(what, None, f"Arguments: {allowed}.")
            checked[name] = check(value, self._hint(name), name)
        try:
            method = self.make(**checked)
        except ValueError as error:
            raise ConfigError(str(error), f"recipe '{self.name}'") from error
        if not isinstance(method, Method):
            raise ConfigError(f"returns {type(method).__name__}, not a keel.Method", f"recipe '{self.name}'")
        return method

    def choices(self, name: str) -> tuple[Any, ...]:
        """The values that an argument may take, where its annotation lists them.

        >>> recipe_named("dapo").choices("scale_rewards")
        ('group', 'batch', 'none')
        """
        hint = self._hint(name)
        return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()

    def _hint(self, name: str) -> Any:
        hints = typing.get_type_hints(self.make)
        if name in hints:
            return hints[name]
        return recipe_named(self.baseline)._hint(name) if self.baseline else Any


_RECIPES: dict[str, Recipe] = {}


def recipe(
    paper: int | list[int] | None = None,
    baseline: str | None = None,
    neutral: Mapping[str, Any] | None = None,
    reduces_to: Callable[[], Method] | None = None,
    preset: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    passes: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function that builds a method, under its own name; what it passes on has the defaults `passes`.

    Raises:
        ConfigError: the name is taken, or the decorator stands without parentheses.
    """
    if callable(paper):
        raise ConfigError("has a decorator without parentheses", paper.__name__, "Write @keel.recipe().")

    def register(make: Callable[..., Method]) -> Callable[..., Method]:
        name = make.__name__
        known = _RECIPES.get(name)
        if known is not None and known.make.__module__ != make.__module__:
            raise ConfigError(f"recipe name '{name}' is taken by {known.make.__module__}")
        made = _passing(make, passes) if passes else make
        _RECIPES[name] = Recipe(
            name, made, paper, baseline, neutral or {}, reduces_to, preset or {}, without, passes or {}
        )
        return made

    return register


def _passing(make: Callable[..., Method], passes: Mapping[str, Any]) -> Callable[..., Method]:
    @functools.wraps(make)
    def made(*positional: Any, **given: Any) -> Method:
        return make(*positional, **{**passes, **given})

    return made


def recipes() -> dict[str, Recipe]:
    """All recipes by name: those of every file beside this one, and of the entry-point group `keel.recipes`."""
    _load_all()
    return dict(sorted(_RECIPES.items()))


@functools.cache
def _load_all() -> None:
    """Once: looking through the installed packages takes its time."""
    for family in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"keel.recipes.{family.name}")
    for entry in importlib.metadata.entry_points(group="keel.recipes"):
        entry.load()


def recipe_named(name: str) -> Recipe:
    """One recipe, by its name or as `file.py:name`.

    Raises:
        ConfigError: there is none of that name, a file without one, or a file that cannot be imported.
    """
    known = recipes()
    if ".py:" in name:
        return _from_file(name)
    if name.endswith(".py") and Path(name).is_file():
        own = f" Recipes: {', '.join(found)}." if (found := _recipes_of_file(name)) else ""
        raise ConfigError("is a file, which may define several recipes", name, f"Write {name}:NAME.{own}")
    if name not in known:
        raise ConfigError(f"there is no recipe '{name}'.{nearest(name, known)}", None, "`keel methods` lists them.")
    return known[name]


def is_recipe(place: str) -> bool:
    """Whether a name, or `file.py:name`, is that of a recipe; a file that cannot be imported is no matter of this.

    >>> is_recipe("grpo"), is_recipe("package.module:function")
    (True, False)
    """
    if ":" not in place:
        return True
    return ".py:" in place and place.rpartition(":")[2] in _recipes_of_file(place.rpartition(":")[0])


def _from_file(place: str) -> Recipe:
    """A recipe of a file of one's own."""
    path, _, name = place.rpartition(":")
    own = _recipes_of_file(path)
    if name not in own:
        raise ConfigError(f"has no recipe '{name}'.{nearest(name, own)}", path, f"Recipes: {', '.join(own) or 'none'}.")
    return replace(own[name], name=place)


def _recipes_of_file(path: str) -> dict[str, Recipe]:
    if not Path(path).is_file():
        raise ConfigError("there is no such file", path, "Write it as file.py:recipe.")
    spec = importlib.util.spec_from_file_location(f"keel_recipe_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(_RECIPES)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        _RECIPES.clear()  # of what it has registered before it failed
        _RECIPES.update(before)
        raise ConfigError(f"cannot be imported: {type(error).__name__}: {error}", path) from error
    return {n: r for n, r in _RECIPES.items() if r.make.__module__ == module.__name__}
