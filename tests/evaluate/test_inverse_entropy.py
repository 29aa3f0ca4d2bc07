"""Inverse entropy: numbers of the worked examples, limits, what it is not, draws of answers, and how it is judged."""

import math

import numpy as np
import pytest

from keel.evaluate.inverse_entropy import auroc, averaged, inverse_entropy, ordered_share, similarity, walk


def pair(off: float) -> np.ndarray:
    return np.array([[1, off], [off, 1]])


def triple(a: float, b: float, c: float) -> np.ndarray:
    return np.array([[1, a, b], [a, 1, c], [b, c, 1]])


def test_two_questions():
    found = inverse_entropy(pair(0.5), pair(0.25))
    assert walk(pair(0.25)) @ walk(pair(0.5)) == pytest.approx(np.array([[0.6, 0.4], [0.4, 0.6]]))
    assert found.inverse == pytest.approx(0.612991, abs=1e-6)
    assert found.forward == pytest.approx(0.612991, abs=1e-6)  # symmetric: both marginals are even
    assert found.distance == pytest.approx(0) and found.confidence == pytest.approx(0.5)


@pytest.mark.parametrize("n", [2, 5])
def test_limits(n):
    assert inverse_entropy(np.eye(n), np.eye(n)).inverse == 0
    assert inverse_entropy(np.ones((n, n)), np.ones((n, n))).inverse == pytest.approx(math.log(n))


def test_three_questions_tell_it_from_its_neighbours():
    inputs, answers = triple(0.8, 0.2, 0.3), triple(0.1, 0.6, 0.4)
    found = inverse_entropy(inputs, answers)
    assert found.inverse == pytest.approx(1.101687, abs=1e-6)
    given = walk(answers) @ walk(inputs)
    y = walk(answers).mean(0)
    conditional = float(-(y[:, None] * given * np.log(given)).sum())
    assert conditional == pytest.approx(1.091507, abs=1e-6)  # H(X | Y), which it is not
    other = np.diag(walk(inputs) @ walk(answers))
    assert float(-(other * np.log(other)).sum()) == pytest.approx(1.097665, abs=1e-6)  # nor the other order
    joint = y[:, None] * given
    by_bayes = np.diag(joint / joint.sum(0))
    assert found.forward == pytest.approx(float(-(by_bayes * np.log(by_bayes)).sum()))
    assert found.confidence == pytest.approx(float(y.max()))
    x = joint.sum(0)
    assert found.distance == pytest.approx(float(np.abs(np.sort(x) - np.sort(y)).mean()))


def test_similarity_is_the_absolute_cosine():
    found = similarity(np.array([[1.0, 0], [-2, 0], [3, 4]]))
    assert found == pytest.approx(np.array([[1, 1, 0.6], [1, 1, 0.6], [0.6, 0.6, 1]]))
    with pytest.raises(ValueError, match="zero"):
        similarity(np.array([[0.0, 0], [1, 0]]))
    with pytest.raises(ValueError, match="absolute"):
        walk(np.array([[1.0, -0.5], [-0.5, 1]]))


def test_the_order_of_the_questions_does_not_matter():
    rng = np.random.default_rng(0)
    x, y = similarity(rng.normal(size=(6, 4))), similarity(rng.normal(size=(6, 4)))
    order = rng.permutation(6)
    turned = inverse_entropy(x[np.ix_(order, order)], y[np.ix_(order, order)])
    assert turned.inverse == pytest.approx(inverse_entropy(x, y).inverse)
    assert turned.distance == pytest.approx(inverse_entropy(x, y).distance)


def test_averages_over_answers_are_those_of_all_choices():
    rng = np.random.default_rng(1)
    inputs, answers = rng.normal(size=(2, 3)), rng.normal(size=(2, 2, 3))
    of_inputs = similarity(inputs)
    each = [
        inverse_entropy(of_inputs, similarity(np.stack([answers[0, i], answers[1, j]]))).inverse
        for i in range(2)
        for j in range(2)
    ]
    found = averaged(inputs, answers, draws=2000, seed=3)
    assert found.inverse == pytest.approx(np.mean(each), abs=4 * np.std(each) / math.sqrt(2000))
    assert np.std(each) > 0.01
    assert averaged(inputs, answers, seed=3) == averaged(inputs, answers, seed=3)
    assert averaged(inputs, answers, seed=3) != averaged(inputs, answers, seed=4)
    one = averaged(inputs, answers[:, :1])
    assert one.inverse == pytest.approx(each[0])  # nothing to draw


def letters(texts) -> np.ndarray:
    """Counts of letters."""
    return np.array([[text.count(c) + 0.1 for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def test_texts_need_a_callable():
    inputs, answers = ["who is it", "what is its name"], [["anna", "anna"], ["anna", "otto"]]
    assert 0 < averaged(inputs, answers, embed=letters).inverse < math.log(2) + 0.1
    stable = averaged(inputs, [["anna"], ["anna"]], embed=letters).confidence
    assert stable == pytest.approx(0.5)
    with pytest.raises(ValueError, match="embed"):
        averaged(inputs, answers)
    with pytest.raises(ValueError, match="same number"):
        averaged(inputs, answers[:1], embed=letters)
    with pytest.raises(ValueError, match="draws"):
        averaged(inputs, answers, embed=letters, draws=0)


def test_the_share_of_questions_in_order():
    rng = np.random.default_rng(2)
    assert ordered_share(rng.random((6000, 3))) == pytest.approx(1 / 6, abs=0.02)
    assert ordered_share(np.array([[1.0, 1.0]])) == 0
    with pytest.raises(ValueError, match="temperatures"):
        ordered_share(np.ones((3, 1)))


def test_auroc_counts_pairs():
    rng = np.random.default_rng(3)
    value, correct = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.6
    wrong, right = value[~correct][:, None], value[correct][None]
    assert auroc(value, correct) == pytest.approx(((wrong > right) + 0.5 * (wrong == right)).mean())
    assert auroc(np.arange(4.0), [True, True, False, False]) == 1
    assert math.isnan(auroc(np.arange(3.0), [True] * 3))
    with pytest.raises(ValueError, match="same number"):
        auroc(np.arange(3.0), [True])
