"""Whether pairs state what a method reads of them beside their order: scores, margins."""

from dataclasses import replace

from keel.core.errors import DataError
from keel.method import Method
from keel.parts.terms.pair_weights import ScoreGap
from keel.parts.terms.pairs import PairLoss
from keel.tasks.preferences import Preferences
from keel.tasks.task import Text, completion_text

_SHOWN = 60  # characters of a prompt in a message


def with_gaps_checked(method: Method, preferences: Preferences) -> Preferences:
    """The preferences, with a note where a margin that is asked for is not stated by any pair.

    Raises:
        DataError: a term reads by how much the scores of a pair differ, and a pair has no scores, or, for their
            logarithm, none that puts the chosen completion first.
    """
    notes = []
    for name, term in method.terms.items():
        if not isinstance(term, PairLoss) or not term.margin:
            continue
        if isinstance(term.gap, ScoreGap):
            _check_scores(preferences, name, term.gap.log)
        elif term.gap is None and not method.transforms and not any(p.margin for p in preferences.train):
            notes.append(
                f"no pair has a `margin`, so terms.{name}.margin={term.margin:g} changes nothing. State it, or set 0."
            )
    return replace(preferences, notes=(*preferences.notes, *notes)) if notes else preferences


def _check_scores(preferences: Preferences, term: str, log: bool) -> None:
    everyone = [*preferences.train, *preferences.held_out]
    without = [p for p in everyone if p.ratings is None]
    if without:
        what = f"terms.{term} reads the scores of both completions, and {_of(without, everyone)} none"
        fix = "Give the columns `score_chosen` and `score_rejected`, or take a method that reads the order alone: dpo."
        raise DataError(what, preferences.name, fix)
    turned = [p for p in everyone if log and p.ratings is not None and p.ratings[0] <= p.ratings[1]]
    if turned:
        said = _of(turned, everyone)
        what = f"terms.{term} reads the logarithm of score_chosen - score_rejected, and {said} none above 0"
        fix = "Correct or remove them, or read the difference itself (odpo: gap=score)."
        raise DataError(what, preferences.name, fix)


def _of(some: list, everyone: list) -> str:
    """
    >>> from keel.tasks.preferences import Preference
    >>> pairs = [Preference(f"q{i}", ("a", "b"), (1.0, 0.0), i) for i in range(3)]
    >>> _of(pairs[:1], pairs), _of(pairs[1:], pairs)
    ("1 pair of 3 (prompt 'q0') has", "2 pairs of 3 (the first: prompt 'q1') have")
    """
    prompt: Text = some[0].prompt
    text = prompt if isinstance(prompt, str) else completion_text(prompt)
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if len(some) == 1:
        return f"1 pair of {len(everyone)} (prompt {shown}) has"
    return f"{len(some)} pairs of {len(everyone)} (the first: prompt {shown}) have"
