"""Preferences: pairs, labelled completions and ranked lists, in one type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keel.tasks.task import Text

Kind = Literal["pairs", "labels", "lists"]
GOLD = "gold"  # column of pairs: a third completion, the answer that is right
COLUMNS = {
    "pairs": "`prompt`, `chosen` and `rejected`",
    "labels": "`prompt`, `completion` and `label` (true or false)",
    "lists": "`prompt`, `completions` and `scores` (one number each), or `completions` from the best to the worst",
}


@dataclass(frozen=True)
class Preference:
    """One prompt, and what is known of its completions.

    Args:
        prompt: text, or messages.
        completions: chosen and rejected of a pair, the one of a label, or those of a list in the order of the data.
        scores: of each completion, larger is better: (1, 0) of a pair, 1 or 0 of a label, ratings of a list.
        index: number of the preference, unique within its split.
        probability: that the order of a pair is right.
        weight: how often it counts.
        margin: by which the chosen completion of a pair leads, as the data state it.
        domain: name of the part of the data that it belongs to.
        columns: every other column.
        ratings: what the data say of each completion of a pair beside its order; None where they say nothing.
    """

    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...]
    index: int
    probability: float = 1.0
    weight: float = 1.0
    margin: float = 0.0
    domain: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    ratings: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Preferences:
    """Preferences to train on, and some held out.

    Args:
        name: for messages.
        kind: what each of them is.
        train, held_out: the preferences; no prompt is in both.
        notes: what was noticed in the data, a sentence each: duplicates, contradictions.
    """

    name: str
    kind: Kind
    train: Sequence[Preference]
    held_out: Sequence[Preference]
    notes: tuple[str, ...] = ()
