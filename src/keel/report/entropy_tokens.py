"""Which tokens lost their entropy: those of the first logged steps of a run against those of the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from keel.store.records import StoredRollout

if TYPE_CHECKING:
    from keel.store.store import Store

SEEN = 8  # occurrences, at the beginning and at the end, below which nothing is said about a token
STEPS = 5  # logged steps of either end that are read, at most
LIMIT = 64  # completions of a step that are read
NAMED = 2


@dataclass(frozen=True)
class Fall:
    """A token whose mean entropy has fallen.

    Args:
        text: of the token.
        before, after: mean entropy of the distribution that it was drawn from, in nats.
    """

    text: str
    before: float
    after: float


def falls(early: Sequence[StoredRollout], late: Sequence[StoredRollout]) -> tuple[Fall, ...]:
    """The tokens whose mean entropy fell most, the first being the one that fell farthest.

    Tokens are told apart by their text. What an environment said has no entropy, and what was seen fewer than eight
    times at either end is left out.

    Args:
        early, late: completions with `numbers["entropy"]`.
    """
    before, after = by_text(early), by_text(late)
    common = [text for text in before if min(len(before[text]), len(after.get(text, ()))) >= SEEN]
    found = [Fall(text, fmean(before[text]), fmean(after[text])) for text in common]
    fallen = sorted((fall for fall in found if fall.after < fall.before), key=lambda f: (f.after - f.before, f.text))
    return tuple(fallen[:NAMED])


def by_text(rollouts: Sequence[StoredRollout]) -> dict[str, list[float]]:
    """Entropies of every token by its text."""
    found: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        entropy = rollout.numbers.get("entropy")
        if entropy is None or len(entropy) != len(rollout.tokens):
            continue
        for text, value in zip(rollout.tokens, np.asarray(entropy, dtype=float).tolist(), strict=True):
            if value == value:
                found[text].append(value)
    return dict(found)


def read_falls(store: Store, run_id: int) -> tuple[Fall, ...]:
    """Those of a stored run: its first logged steps against its last ones; none where these would be the same."""
    steps = list(store.rollout_counts(run_id))
    size = min(STEPS, len(steps) // 2)
    if not size:
        return ()
    ends = [[r for s in some for r in store.rollouts(run_id, s, limit=LIMIT)] for some in (steps[:size], steps[-size:])]
    return falls(*ends)


def in_words(found: Sequence[Fall]) -> str:
    """Half a sentence about them; nothing about none.

    >>> in_words([Fall("+", 1.25, 0.01), Fall(" 7", 0.9, 0.1)])
    ", and most at the tokens '+' (from 1.25 to 0.01) and ' 7' (from 0.9 to 0.1)"
    """
    named = [f"{shown(fall.text)} (from {fall.before:.3g} to {fall.after:.3g})" for fall in found]
    return f", and most at the token{'s' if len(named) > 1 else ''} {' and '.join(named)}" if named else ""


def shown(text: str) -> str:
    """A token in quotes, without line breaks, and not too long."""
    return repr(text if len(text) <= 20 else f"{text[:17]}...")
