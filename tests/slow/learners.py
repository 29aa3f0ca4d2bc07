"""Which recipes learn from comparisons, labels, lists or teachers, as the registry has them: each is trained here."""

from functools import cache

from keel.method import Method
from keel.recipes.registry import recipes


@cache
def _methods() -> dict[str, Method]:
    return {name: recipe() for name, recipe in sorted(recipes().items())}


def reading(what: str) -> list[str]:
    """Recipes of policies that learn from data of that kind: pairs, labels or lists."""
    return [name for name, method in _methods().items() if method.kind == "pairs" and method.reads == what]


def of_kind(kind: str) -> list[str]:
    """Recipes of that kind."""
    return [name for name, method in _methods().items() if method.kind == kind]


def comparing(own_judge: bool) -> list[str]:
    """Recipes that compare completions that they draw, by the policy's own judgement or by a reward."""
    return [
        name
        for name, method in _methods().items()
        if method.kind == "online" and method.transforms.keys() & {"pairs", "win"}
        if ("score" in method.transforms) == own_judge
    ]


def drawn_by_policy(name: str) -> bool:
    """Whether the policy draws the completions that this recipe learns from."""
    rollout = _methods()[name].rollout
    return rollout is not None and rollout.written is None
