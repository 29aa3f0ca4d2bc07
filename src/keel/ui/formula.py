"""The loss of a composition as a formula, with the names of its parts for letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.ui.composition import in_words

_SHORT = 60  # characters up to which a part is written with its settings


def loss_formula(composition: Mapping[str, Any]) -> str:
    """The loss, and below it what each letter stands for.

    >>> method = {"surrogate": {"f": {"part": "clipped", "epsilon": 0.2}, "level": "token"},
    ...           "aggregation": {"mode": "token_mean"}, "advantage": {"a": {"part": "group_centre"}}}
    >>> print(loss_formula(method))
    loss = token_mean[ −A f(ρ) ]
    A    = group_centre
    f    = clipped(epsilon=0.2)
    ρ    = ratio to the policy that sampled, by token
    """
    surrogate = composition.get("surrogate")
    summands, where = [], []
    if surrogate:
        weights = composition.get("weights") or {}
        letters = f"{'w ' if weights else ''}A f(ρ)"
        summands.append(f"{_mode(composition)}[ −{letters} ]")
        where = [("w", " · ".join(_name(part) for part in weights.values()))] if weights else []
        chain = [_name(part) for part in (composition.get("advantage") or {}).values()]
        where.append(("A", ", then ".join(chain)))
        where.append(("f", _name(surrogate.get("f"))))
        where.append(("ρ", f"ratio to the policy that sampled, by {surrogate.get('level', 'token')}"))
    for name, term in (composition.get("terms") or {}).items():
        if term.get("coef") != 0:
            summands.append(_summand(name, term))
            where.append((name, in_words(_inner(term)).replace("()", "")))
    if not summands:
        return ""
    lines = [("loss", " + ".join(summands)), *((letter, text) for letter, text in where if text)]
    width = max(len(letter) for letter, _ in lines)
    return "\n".join(f"{letter:<{width}} = {text}" for letter, text in lines)


def _summand(name: str, term: Mapping[str, Any]) -> str:
    coef = term.get("coef", 1.0)
    factor = "" if coef in (1, 1.0, None) else f"{in_words(coef)} "
    where = f" on {term['where']}" if term.get("where") else ""
    return f"{factor}{name}{where}"


def _inner(term: Mapping[str, Any]) -> Any:
    """What a term is a multiple of."""
    if "penalty" in term:
        return term["penalty"]
    return {key: value for key, value in term.items() if key != "coef"}


def _mode(composition: Mapping[str, Any]) -> str:
    return str((composition.get("aggregation") or {}).get("mode", "mean"))


def _name(part: Any) -> str:
    if not isinstance(part, Mapping):
        return in_words(part)
    text = in_words(part).replace("()", "")
    return text if len(text) <= _SHORT else str(part.get("part", text))
