"""A configuration in the reader's terms: its slots with their parts, its settings by path, and two of them compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.report.findings import short

_NO_SLOTS = ("part", "kind", "claim")
_ABOUT = ("name",)  # what tells runs apart by itself


@dataclass(frozen=True)
class Filled:
    """One part in its slot.

    Args:
        slot: of the method.
        name: within the slot, where it holds several; may be empty.
        part: the registered name.
        settings: its own, in the order of the part; other parts within are written out.
    """

    slot: str
    name: str
    part: str
    settings: tuple[tuple[str, str], ...]


def slots(config: Mapping[str, Any]) -> list[Filled]:
    """The parts of a resolved configuration, in the order in which data passes them.

    >>> [f.part for f in slots({"method": {"surrogate": {"part": "surrogate"}, "masks": {}}})]
    ['surrogate']
    """
    found = []
    for slot, value in _mapping(config.get("method")).items():
        if slot in _NO_SLOTS or not value:
            continue
        entries = [("", value)] if not isinstance(value, Mapping) or "part" in value else list(value.items())
        found += [_filled(slot, str(name), item) for name, item in entries]
    return found


def objective(config: Mapping[str, Any]) -> str:
    """What the method is meant to maximise; empty where it claims nothing."""
    claim = _mapping(_mapping(config.get("method")).get("claim"))
    return str(claim.get("objective") or "")


def sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings beside the method, by section, without those that are not set."""
    found = [("recipe", list(_leaves(_mapping(_mapping(config.get("recipe")).get("arguments")))))]
    for name, value in config.items():
        if name not in ("recipe", "method"):
            found.append((name, list(_leaves(value)) if isinstance(value, Mapping) else [("", value)]))
    shown = [(name, [(path, in_words(v)) for path, v in own if v not in (None, [], {}, "")]) for name, own in found]
    return [(name, own) for name, own in shown if own]


@dataclass(frozen=True)
class Difference:
    """A setting that two configurations do not share; None where one lacks it."""

    path: str
    first: str | None
    second: str | None


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Difference], int]:
    """What differs between two configurations, by path, and how many settings are the same; None is as good as none."""
    sides = [dict(_leaves(config)) for config in (first, second)]
    paths = [path for path in dict.fromkeys([*sides[0], *sides[1]]) if path not in _ABOUT]
    found = [
        Difference(path, *(_shown(side, path) for side in sides))
        for path in paths
        if sides[0].get(path) != sides[1].get(path)
    ]
    return found, len(paths) - len(found)


def in_words(value: Any) -> str:
    """A setting as one line; a part within is written as it would be called.

    >>> in_words({"part": "kl", "estimator": "k3", "level": None}), in_words(True), in_words(1e-05)
    ('kl(estimator=k3)', 'yes', '1e-05')
    """
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={in_words(v)}" for k, v in value.items() if k != "part" and v not in (None, [], {}))
        return f"{value['part']}({inner})" if "part" in value else inner
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(in_words(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return short(value)


def _filled(slot: str, name: str, item: Any) -> Filled:
    if not isinstance(item, Mapping) or "part" not in item:
        return Filled(slot, name, in_words(item), ())
    settings = tuple((k, in_words(v)) for k, v in item.items() if k != "part" and v not in (None, [], {}))
    return Filled(slot, name, str(item["part"]), settings)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif path:
        yield path, value


def _shown(side: Mapping[str, Any], path: str) -> str | None:
    return in_words(side[path]) if path in side else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
