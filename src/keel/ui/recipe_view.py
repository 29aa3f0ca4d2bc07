"""A recipe as its page shows it; recipes are code, so that all of this is made once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from keel.core.config import to_config
from keel.core.errors import KeelError
from keel.core.registry import part_class
from keel.papers.catalogue import Paper, catalogue
from keel.recipes.registry import Recipe, recipe_named, recipes
from keel.ui.composition import Filled, in_words, slots
from keel.ui.docstrings import Docstring, read_docstring
from keel.ui.formula import loss_formula

KINDS = {
    "online": "online, draws its own completions",
    "pairs": "from comparisons",
    "supervised": "from given completions",
    "distillation": "from a teacher",
    "reward": "trains a reward model",
    "sampling": "draws, trains nothing",
}
# Kinds that give a policy, which `keel compare` measures on held-out prompts.
COMPARED = ("online", "pairs", "supervised", "distillation")


@dataclass(frozen=True)
class Entry:
    """A recipe in a list.

    Args:
        name: as on the command line.
        summary: one sentence.
        family: the file that it stands in, in words.
        kind: where its rows come from, one of `KINDS`.
        baseline: the recipe that it varies, or None.
        papers: numbers in the catalogue.
        words: what a search reads, in lower case.
    """

    name: str
    summary: str
    family: str
    kind: str
    baseline: str | None
    papers: tuple[int, ...]
    words: str


@dataclass(frozen=True)
class Argument:
    """An argument of a recipe.

    Args:
        name: of the argument.
        default: as one would write it; None where a value must be given.
        choices: what it may be, where that is a list.
        meaning: from the docstring.
        of: the recipe that it is passed on to; "" for its own.
    """

    name: str
    default: str | None
    choices: tuple[str, ...]
    meaning: str
    of: str = ""


@dataclass(frozen=True)
class Part:
    """A part in its slot, with what its docstring says."""

    filled: Filled
    doc: Docstring


@dataclass(frozen=True)
class RecipeView:
    """What the page of a recipe says.

    Args:
        entry: as in the list.
        doc: its docstring.
        objective: what it claims to optimise; "" for nothing.
        loss: as a formula of its parts.
        parts: by slot, in the order in which data passes them.
        yaml: the composition as a configuration has it.
        arguments: its own first.
        preset: training settings that belong to it, in words.
        neutral: arguments at which it is its baseline.
        papers: of the catalogue.
        variants: recipes that vary it.
        commands: what shows, trains, verifies and compares it, each with what it does.
    """

    entry: Entry
    doc: Docstring
    objective: str
    loss: str
    parts: tuple[Part, ...]
    yaml: str
    arguments: tuple[Argument, ...]
    preset: tuple[tuple[str, str], ...]
    neutral: str
    papers: tuple[Paper, ...]
    variants: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All recipes by name; one that cannot be built at its defaults is of kind "online"."""
    return tuple(_entry(recipe) for recipe in recipes().values())


@functools.lru_cache(maxsize=512)
def recipe_view(name: str) -> RecipeView:
    """The page of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    recipe = recipe_named(name)
    entry = next(known for known in entries() if known.name == name)
    composition = to_config(recipe())
    claim = composition.get("claim") or {}
    doc = read_docstring(recipe.make)
    return RecipeView(
        entry=entry,
        doc=doc,
        objective=str(claim.get("objective") or ""),
        loss=loss_formula(composition),
        parts=tuple(Part(filled, _part_doc(filled.part)) for filled in slots({"method": composition})),
        yaml=yaml.safe_dump({"method": _used(composition)}, sort_keys=False, allow_unicode=True, width=100),
        arguments=tuple(_arguments(recipe)),
        preset=tuple((key, in_words(value)) for key, value in recipe.preset.items()),
        neutral=", ".join(f"{key}={in_words(value)}" for key, value in recipe.neutral.items()),
        papers=tuple(paper for paper in catalogue() if paper.n in entry.papers),
        variants=tuple(other.name for other in entries() if other.baseline == name),
        commands=tuple(_commands(entry)),
    )


def _entry(recipe: Recipe) -> Entry:
    family = recipe.make.__module__.rpartition(".")[2].replace("_", " ")
    numbers = [recipe.paper] if isinstance(recipe.paper, int) else list(recipe.paper or ())
    numbers += [paper.n for paper in catalogue() if recipe.name in paper.recipes]
    papers = tuple(dict.fromkeys(numbers))
    titles = [paper.title for paper in catalogue() if paper.n in papers]
    kind = _kind(recipe)
    words = " ".join([recipe.name, recipe.name.replace("_", " "), inspect.getdoc(recipe.make) or "", family, *titles])
    return Entry(recipe.name, recipe.summary, family, kind, recipe.baseline, papers, words.lower())


def _kind(recipe: Recipe) -> str:
    try:
        return recipe().kind
    except KeelError:  # an argument without a default
        return "online"


def _part_doc(name: str) -> Docstring:
    try:
        return read_docstring(part_class(name))
    except KeelError:  # a setting that is no part, such as the name of a task
        return Docstring()


def _used(composition: Mapping[str, Any]) -> dict[str, Any]:
    """The composition without empty slots, and without the claim, which changes nothing."""
    return {
        key: value for key, value in composition.items() if value not in (None, {}) and key not in ("part", "claim")
    }


def _arguments(recipe: Recipe) -> list[Argument]:
    own = inspect.signature(recipe.make).parameters
    found = []
    for name, parameter in recipe.arguments.items():
        holder = _holder(recipe, name)
        default = None if parameter.default is inspect.Parameter.empty else in_words(parameter.default)
        meaning = read_docstring(holder.make).arguments.get(name, "")
        choices = tuple(in_words(value) for value in recipe.choices(name))
        found.append(Argument(name, default, choices, meaning, "" if name in own else holder.name))
    return sorted(found, key=lambda argument: argument.of != "")


def _holder(recipe: Recipe, argument: str) -> Recipe:
    """The recipe of a chain of baselines whose own argument it is."""
    while argument not in inspect.signature(recipe.make).parameters and recipe.baseline is not None:
        recipe = recipe_named(recipe.baseline)
    return recipe


def _commands(entry: Entry) -> list[tuple[str, str]]:
    name = entry.name
    found = [
        (f"keel methods {name}", "shows its complete configuration"),
        (f"keel train {name}", "trains by it"),
        (f"keel verify {name} --full", "holds it to its objective"),
    ]
    other = entry.baseline or ("grpo" if entry.kind == "online" and name != "grpo" else None)
    if entry.kind in COMPARED and other is not None and _comparable(other, entry.kind):
        found.append((f"keel compare {other} {name} --seeds 3", f"sets it beside {other} under equal conditions"))
    return found


def _comparable(name: str, kind: str) -> bool:
    return any(entry.name == name and entry.kind == kind for entry in entries())
