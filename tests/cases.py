"""Every recipe and every part as a method, for tests that hold for all of them."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from keel.composition import ALWAYS
from keel.core.errors import UserError
from keel.core.registry import PAPERS, part_class, part_name
from keel.method import Method
from keel.models.classifier import Classifier
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre
from keel.parts.advantages.stream import GAE
from keel.parts.terms.degrees import DeletionDegree
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import Link, PairLoss, Score, Side
from keel.parts.terms.penalties import Summand
from keel.parts.terms.scores import Feature, HeadScore, LogRatio, TokenWeight
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.parts.terms.token_scores import DifferingTokens, SequentialKL
from keel.recipes.registry import recipes
from keel.rollouts.rollout import Rollout

SMALL = {"num_generations": 4, "max_completion_length": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with the name under which its tests are reported."""

    name: str
    method: Method

    def __str__(self) -> str:
        return self.name


@cache
def recipe_cases() -> tuple[Case, ...]:
    """Every recipe at its defaults, and once for each other choice of each of its own arguments."""
    return tuple(_recipe_cases())


def _recipe_cases() -> Iterator[Case]:
    for name, recipe in recipes().items():
        small = {k: v for k, v in SMALL.items() if k in recipe.arguments}
        yield Case(name, recipe(**small))
        hints = typing.get_type_hints(recipe.make)
        for argument, parameter in inspect.signature(recipe.make).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD or argument in small:
                continue
            penalty = {"beta": 0.1} if "beta" in recipe.arguments else {}
            for value in _others(hints[argument], parameter.default):
                try:
                    method = recipe(**{**small, **penalty, argument: value})
                except UserError:  # a combination that the recipe refuses
                    continue
                yield Case(f"{name}-{argument}={value}", method)


def _others(hint: Any, default: Any) -> list[Any]:
    """Values of an argument that switch on what its default leaves off."""
    if typing.get_origin(hint) is typing.Literal:
        return [value for value in typing.get_args(hint) if value != default]
    if isinstance(default, bool):
        return [not default]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind in (int, float)]
        return [None] if default is not None else [2 if kind is int else 2.0 for kind in kinds]
    if isinstance(default, float) and default == 0:
        return [0.1]
    return []


@cache
def part_cases() -> tuple[Case, ...]:
    """Every registered part of a slot, alone in a method that is otherwise as plain as possible."""
    recipes()  # registers the parts
    found = [method_with(part_class(name)) for name in sorted(PAPERS)]
    return tuple(case for case in found if case is not None)


def method_with(cls: type) -> Case | None:
    """The part in its slot, its required settings filled in; None for what is no part of a slot."""
    package, _, family = cls.__module__.removeprefix("keel.parts.").partition(".")
    slot = {"advantages": "advantage", "masks": "masks", "weights": "weights", "terms": "terms"}.get(package)
    if not cls.__module__.startswith("keel.parts.") or cls in (Surrogate, Summand):
        return None
    if package == "rewards" and family == "transforms":
        slot = "transforms"
    if slot is None:
        return None
    item = cls(**required(cls))
    if slot == "terms" and (term := comparing(item)) is not None:
        return _pair_case(cls, term)
    needs = getattr(item, "needs", ())
    heads = {name: Critic() for name in getattr(item, "heads_read", ())}
    slots: dict[str, Any] = {
        "rollout": Rollout(num_generations=4, greedy_baseline=True),
        "advantage": {"centre": GroupCentre(), **{f"gae {name}": GAE(head=name) for name in heads}},
        "surrogate": Surrogate(Clipped()),
        "heads": heads,
        "models": {name: Initial() for f in needs for name in f.of if name not in ALWAYS},
    }
    if slot == "terms":
        if "log_ratio" in inspect.signature(cls.__call__).parameters:
            slots["surrogate"] = Surrogate(item)
        elif _shape(cls) == "B T":
            slots["terms"] = {"part": Summand(item, 0.5)}
        elif _shape(cls) == "":
            slots["terms"] = {"part": item}
        else:  # a target, which a loss reads
            return None
    elif slot == "masks":
        slots["masks"] = {"part": item}
        slots["terms"] = {"confined": Summand(next(iter(penalties().values())), 0.5, where="part", per="where")}
    elif slot == "advantage":
        slots["advantage"] = {"centre": GroupCentre(), "part": item}
    else:
        slots[slot] = {"part": item}
    return Case(f"part-{part_name(cls)}", Method(**slots))


def required(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    needed = [
        f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing
    ]
    usual = {int: 2, float: 0.5, str: "ref", **COMPARED}
    return {name: usual[hints[name]] for name in needed}


COMPARED: dict[Any, Any] = {
    Link: LogSigmoid(),
    Score: LogRatio(),
    Feature: SequentialKL(),
    TokenWeight: DifferingTokens(),
}  # what stands where a part of a comparison needs another


def comparing(item: Any) -> Any:
    """The loss in which a part of a comparison stands; None for parts of other kinds."""
    hints = typing.get_type_hints(type(item).__call__)
    names = [name for name in hints if name != "return"]
    if hasattr(item, "reads") or hasattr(item, "twin"):
        return item
    if names[:2] == ["chosen", "rejected"]:
        if hints["chosen"] is Side:
            return PairLoss(LogSigmoid(), LogRatio(), weight=item)
        return PairLoss(item, LogRatio(), 0.5)
    if names == ["log_ratio"]:
        return PairLoss(LogSigmoid(), LogRatio(map=item), 0.5)
    if names != ["side"]:
        return None
    if _shape(type(item)) == "N T":
        return PairLoss(LogSigmoid(), LogRatio(weight=item), 0.5)
    if isinstance(item, (LogRatio, HeadScore)):
        return PairLoss(LogSigmoid(), item, 0.5)
    return PairLoss(LogSigmoid(), LogRatio(features=(item,)), 0.5)


def _pair_case(cls: type, term: Any) -> Case:
    head = Classifier() if isinstance(term, DeletionDegree) else Critic()
    heads = {name: head for name in getattr(term, "heads_read", ())}
    models = {name: Initial() for f in term.needs for name in f.of if name not in ALWAYS}
    return Case(f"part-{part_name(cls)}", Method(kind="pairs", terms={"part": term}, heads=heads, models=models))


def _shape(cls: type) -> str | None:
    """What a part returns, as its annotation says."""
    return getattr(typing.get_type_hints(cls.__call__).get("return"), "dim_str", None)


def penalties() -> dict[str, Any]:
    """Every registered penalty, at its defaults."""
    recipes()
    found = {}
    for name in sorted(PAPERS):
        cls = part_class(name)
        if not cls.__module__.startswith("keel.parts.terms.") or cls in (Surrogate, Summand):
            continue
        if _shape(cls) == "B T" and "rows" in inspect.signature(cls.__call__).parameters:
            found[name] = cls(**required(cls))
    return found


def cases() -> tuple[Case, ...]:
    """Recipes and parts."""
    return (*recipe_cases(), *part_cases())
