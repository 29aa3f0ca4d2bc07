"""Which tokens lost their entropy: by hand, from a store, and in the sentence of the diagnosis."""

import math

import numpy as np
import pytest

from keel.report.diagnosis import diagnose
from keel.report.entropy_tokens import Fall, falls, in_words, read_falls
from keel.report.run import read_run
from keel.store.records import StoredRollout
from keel.store.store import Store


def drawn(entropies: dict[str, list[float]]) -> list[StoredRollout]:
    """One completion of all these tokens."""
    tokens = tuple(text for text, values in entropies.items() for _ in values)
    numbers = np.array([value for values in entropies.values() for value in values], dtype="f4")
    return [StoredRollout("p", "c", 1.0, tokens=tokens, numbers={"entropy": numbers}, length=len(tokens))]


EARLY = {"+": [1.5, 0.5] * 4, "7": [0.8] * 8, "<": [0.1] * 8, "rare": [9.0] * 7, "tool": [math.nan] * 8}
LATE = {"+": [0.25] * 8, "7": [0.6] * 8, "<": [0.3] * 8, "rare": [0.0] * 9, "tool": [math.nan] * 8, "new": [0.0] * 9}


def test_falls_by_hand():
    """+ fell by .75 in the mean, 7 by .2; < rose, the rare and the new one are not known at both ends."""
    found = falls(drawn(EARLY), drawn(LATE))
    assert [f.text for f in found] == ["+", "7"]
    assert [(f.before, f.after) for f in found] == [pytest.approx((1.0, 0.25)), pytest.approx((0.8, 0.6))]
    assert falls(drawn(LATE), drawn(LATE)) == () and falls([], drawn(LATE)) == ()
    bare = StoredRollout("p", "c", 1.0, tokens=("a",) * 9, length=9)  # a step that measured nothing
    assert falls([bare], [bare]) == ()


def test_tokens_with_line_breaks_and_long_ones():
    assert in_words([Fall("\n\n", 1.0, 0.5)]) == r", and most at the token '\n\n' (from 1 to 0.5)"
    assert "'xxxxxxxxxxxxxxxxx...'" in in_words([Fall("x" * 50, 1.0, 0.5)])
    assert in_words(()) == ""


def test_the_sentence():
    curves = {"entropy": [(i, 0.6 if i < 10 else 0.1) for i in range(40)]}
    (plain,) = [f for f in diagnose(curves, {}) if f.kind == "entropy"]
    (told,) = [f for f in diagnose(curves, {}, fallen=falls(drawn(EARLY), drawn(LATE))) if f.kind == "entropy"]
    said = ", and most at the tokens '+' (from 1 to 0.25) and '7' (from 0.8 to 0.6)"
    assert said in told.sentence and told.sentence.replace(said, "") == plain.sentence
    risen = {"entropy": [(i, 0.1 if i < 10 else 0.6) for i in range(40)]}
    assert diagnose(risen, {}, fallen=falls(drawn(EARLY), drawn(LATE))) == diagnose(risen, {})


@pytest.mark.parametrize(("steps", "wanted"), [(1, []), (2, ["+", "7"]), (12, ["rare", "+"])])
def test_from_a_store(tmp_path, steps, wanted):
    """The first five of twelve logged steps against the last five, where the rare token is seen often enough; one step
    alone has no course.
    """
    with Store(tmp_path / "keel.sqlite") as store:
        run = store.create_run("one", {}, "grpo", "sums", "tiny", 0)
        for step in range(steps):
            store.log_rollouts(run, 10 * step, drawn(EARLY if step < max(1, steps // 2) else LATE))
        assert [fall.text for fall in read_falls(store, run)] == wanted
    assert [fall.text for fall in read_run(tmp_path / "one").fallen] == wanted
