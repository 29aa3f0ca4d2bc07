"""pass@k, avg@k and maj@k against closed forms and enumeration of all subsets."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.evaluate.pass_at_k import avg_at_k, distinct_answers, majority_at_k, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.9166666666666667),
        (16, 2, 8, 0.7666666666666667),
        (4, 1, 2, 0.5),
        (4, 0, 4, 0.0),
        (4, 3, 2, 1.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_closed_forms(n, c, k, expected):
    assert float(pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    # One correct sample of n: exactly k / n. The binomials themselves overflow here.
    assert float(pass_at_k(100_000, 1, 5000)) == pytest.approx(0.05, abs=1e-10)


def test_pass_at_k_takes_prompts_at_once():
    assert pass_at_k([4, 10], [1, 3], 1).tolist() == pytest.approx([0.25, 0.3])
    assert pass_at_k(4, [0, 1, 2, 3, 4], 2).tolist() == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    n, c, k = case
    subsets = list(combinations(range(n), k))
    hit = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
    assert float(pass_at_k(n, c, k)) == pytest.approx(hit, abs=1e-12)


def test_pass_at_k_is_unbiased():
    # E over c ~ Binomial(n, p) of the estimate is 1 - (1 - p)^k exactly; the plug-in falls short.
    n, k, p = 12, 5, 0.15
    law = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert float(pass_at_k(n, range(n + 1), k) @ np.array(law)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(law))
    assert plug_in < 1 - (1 - p) ** k - 0.01


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match="number of correct samples" if k == 1 else "k must be at least 1 and at most"):
        pass_at_k(n, c, k)


def test_avg_at_k_is_the_share_of_correct_samples():
    assert avg_at_k(16, [0, 4, 16]).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("AAABBC", {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.75, 6: 1.0}),
        ("AABBB", {1: 0.4, 3: 0.3, 5: 0.0}),
        ("AAAA", {1: 1.0, 4: 1.0}),
        ("AB", {1: 0.5, 2: 0.5}),
    ],
)
def test_majority_closed_forms(answers, expected):
    for k, value in expected.items():
        assert majority_at_k(answers, [a == "A" for a in answers], k) == pytest.approx(value, abs=1e-12)


def test_no_answer_never_wins_against_an_answer():
    answers = ["A", None, None, None]
    correct = [1, 0, 0, 0]
    # A wins whenever it is in the subset: k / 4.
    for k in range(1, 5):
        assert majority_at_k(answers, correct, k) == pytest.approx(k / 4, abs=1e-12)
    assert majority_at_k([None, None], [1, 1], 2) == 0.0


def by_enumeration(answers, correct, k):
    credit = {a: np.mean([c for b, c in zip(answers, correct, strict=True) if b == a]) for a in set(answers)}
    subsets = list(combinations(range(len(answers)), k))
    total = 0.0
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        if votes:
            best = [a for a, v in votes.items() if v == max(votes.values())]
            total += np.mean([credit[a] for a in best])
    return total / len(subsets)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=9),
    st.data(),
)
def test_majority_is_the_mean_over_all_subsets(samples, data):
    answers, correct = [a for a, _ in samples], [float(c) for _, c in samples]
    k = data.draw(st.integers(1, len(answers)))
    assert majority_at_k(answers, correct, k) == pytest.approx(by_enumeration(answers, correct, k), abs=1e-10)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), st.data())
def test_one_of_the_answers_wins(answers, data):
    # If every answer is correct, so is the majority.
    k = data.draw(st.integers(1, len(answers)))
    assert majority_at_k(answers, [1.0] * len(answers), k) == pytest.approx(1.0, abs=1e-9)


def test_majority_of_many_samples_nears_certainty():
    answers = ["A"] * 700 + ["B"] * 500
    # The difference of votes among 301 has mean 50.2 and standard deviation about 14.8.
    assert majority_at_k(answers, [a == "A" for a in answers], 301) == pytest.approx(1.0, abs=1e-3)
    assert majority_at_k(answers, [a == "A" for a in answers], 1) == pytest.approx(7 / 12, abs=1e-9)


def test_majority_refuses_the_impossible():
    with pytest.raises(ValueError, match="k must be"):
        majority_at_k("AB", [1, 0], 3)
    with pytest.raises(ValueError, match="2 answers and 1"):
        majority_at_k("AB", [1], 1)


def test_distinct_answers():
    assert distinct_answers(["a", "b", None, "a"]) == 2
    assert distinct_answers([None]) == 0
