"""Conformal pursuit: thresholds, coverage, the choice of a query, a bound, twenty questions with a distorted model."""

import math

import numpy as np
import pytest

from keel.evaluate.information_pursuit import (
    Confidence,
    SetSize,
    calibrate,
    choose_query,
    conformal_threshold,
    entropy_bound,
    expected_entropy,
    expected_log_size,
    prediction_sets,
    pursue,
    set_sizes,
)


def test_the_quantile_is_that_of_one_more_example():
    scores = np.random.default_rng(0).permutation(np.arange(1, 10) / 10)
    assert conformal_threshold(scores, 0.1) == 0.9  # the largest of nine
    assert conformal_threshold(scores[:8], 0.1) == 1.0  # eight are too few: all labels
    assert conformal_threshold(scores, 0.2) == 0.8
    assert prediction_sets(np.array([0.0, 1.0]), 1.0).all()
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="alpha"):
            conformal_threshold(scores, alpha)
    with pytest.raises(ValueError, match="scores"):
        conformal_threshold(np.array([]), 0.1)


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (19, 0.25), (40, 0.2)])
def test_coverage_lies_where_it_must(n, alpha):
    """One fresh example after each calibration, probabilities off by a power: exchangeability is all that counts."""
    rng, runs, labels = np.random.default_rng(n), 4000, 6
    held = 0
    for _ in range(runs):
        p = rng.dirichlet(np.ones(labels), n + 1)
        y = (p.cumsum(1) > rng.random((n + 1, 1))).argmax(1)
        f = p**3 / (p**3).sum(1, keepdims=True)
        threshold = calibrate([f[:n]], y[:n], alpha)[0]
        held += prediction_sets(f[n], threshold)[y[n]]
    error = 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert 1 - alpha - error <= held / runs <= 1 - alpha + 1 / (n + 1) + error


def four_classes():
    """Two queries on four classes of equal probability: one halves them, one takes a single class off."""
    halves = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    single = [[1.0, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]]
    return np.full(4, 0.25), np.array([single, halves]), np.array([[0.25, 0.75], [0.5, 0.5]])


def test_the_query_that_halves_the_set_is_chosen():
    now, probs, answers = four_classes()
    value = expected_log_size(probs, answers, 0.75)
    assert np.exp(value) == pytest.approx([2.5, 2.0]) and value[1] == pytest.approx(math.log(2))
    entropy = expected_entropy(probs, answers)
    assert entropy == pytest.approx([0.75 * math.log(3), math.log(2)]) and (value >= entropy - 1e-12).all()
    query = choose_query(now, probs, answers, (0.75, 0.75))
    assert (query.index, query.size) == (1, 4.0) and query.value == pytest.approx(math.log(2))


def test_when_to_stop():
    _, probs, answers = four_classes()
    sure = np.array([0.97, 0.01, 0.01, 0.01])
    assert choose_query(sure, probs, answers, (0.5, 0.75)).index == -1  # a single label
    assert choose_query(np.full(4, 0.25), probs, answers, (0.5, 0.75)).index == -1  # empty: as good as one label
    same = np.broadcast_to(np.full(4, 0.25), probs.shape)
    assert choose_query(np.full(4, 0.25), same, answers, (0.75, 0.75), patient=False).index == -1
    assert choose_query(np.full(4, 0.25), same, answers, (0.75, 0.75)).index == 0
    assert choose_query(np.full(4, 0.25), probs[:0], answers[:0], (0.75, 0.75)).index == -1  # nothing left to ask
    assert set_sizes(np.array([[0.5, 0.5], [0.9, 0.1]]), 0.3).tolist() == [1.0, 1.0]  # the first set is empty


def test_the_bound():
    assert entropy_bound(0.1, 20, 3.0) == pytest.approx(1.723268, abs=1e-6)
    assert entropy_bound(0.0, 20, 3.0) == pytest.approx(math.log(3))
    rng = np.random.default_rng(1)
    for _ in range(200):  # of one input: the entropy of its labels against the smallest set that misses at most alpha
        p = np.sort(rng.dirichlet(np.full(12, rng.uniform(0.1, 3))))[::-1]
        alpha = rng.uniform(0.01, 0.5)
        size = int((p.cumsum() < 1 - alpha).sum()) + 1
        assert -(p * np.log(np.maximum(p, 1e-300))).sum() <= entropy_bound(alpha, 12, float(size)) + 1e-12
    for setting, name in (((0.6, 20, 3.0), "alpha"), ((0.1, 20, 0.5), "size")):
        with pytest.raises(ValueError, match=name):
            entropy_bound(*setting)


class Game:
    """Twenty labels, twenty questions with yes or no, one answer in ten wrong; the model's logits times `sharpness`."""

    count = 20

    def __init__(self, sharpness: float, seed: int, games: int):
        self.sharpness, rng = sharpness, np.random.default_rng(seed)
        yes = rng.random((self.count, self.count)) < rng.uniform(0.15, 0.85, (self.count, 1))
        chance = np.where(yes, 0.9, 0.1)
        self.log_answer = np.log(np.stack([1 - chance, chance], 1))  # of query, answer, label
        self.rng = np.random.default_rng(seed + 1000)
        self.truth, self.given = self.play(games)

    def play(self, games: int):
        truth = self.rng.integers(0, self.count, games)
        return truth, (self.rng.random((games, self.count)) < np.exp(self.log_answer[:, 1, truth]).T).astype(int)

    def probs(self, log_p):
        scaled = np.exp(self.sharpness * (log_p - log_p.max(-1, keepdims=True)))
        return scaled / scaled.sum(-1, keepdims=True)

    def thresholds(self, alpha: float) -> tuple[float, ...]:
        """From histories of random queries."""
        truth, given = self.play(300)
        order = np.stack([self.rng.permutation(self.count) for _ in truth])
        log_p, rounds = np.zeros((300, self.count)), []
        for k in range(self.count + 1):
            rounds.append(self.probs(log_p))
            if k < self.count:
                log_p = log_p + self.log_answer[order[:, k], given[np.arange(300), order[:, k]]]
        return tuple(calibrate(rounds, truth, alpha))

    def belief(self, history):
        return self.probs(sum((self.log_answer[q, a] for q, a in history), np.zeros(self.count)))

    def simulated(self, history, query):
        return np.exp(self.log_answer[query]) @ self.belief(history)

    def results(self, rule) -> tuple[float, float]:
        """Mean number of queries, and accuracy."""
        played = [
            pursue(self.belief, self.simulated, lambda q, row=row: int(row[q]), self.count, rule) for row in self.given
        ]
        right = [one.label == truth for one, truth in zip(played, self.truth, strict=True)]
        return float(np.mean([len(one.queries) for one in played])), float(np.mean(right))


def test_twenty_questions_with_a_distorted_model():
    """Prediction sets do not mind a distortion that keeps the order; entropies, and confidence, do."""
    games = {s: [Game(s, seed, 30) for seed in range(3)] for s in (1.0, 3.0)}

    def mean(sharpness, rule):
        return np.mean([game.results(rule(game)) for game in games[sharpness]], 0)

    sets = {s: mean(s, lambda game: SetSize(game.thresholds(0.1))) for s in (1.0, 3.0)}
    assert abs(sets[3.0] - sets[1.0])[0] < 1.0 and abs(sets[3.0] - sets[1.0])[1] < 0.1
    sure = {s: mean(s, lambda _: Confidence(0.95)) for s in (1.0, 3.0)}
    assert sure[1.0][1] > sets[1.0][1] + 0.1  # with true probabilities entropy is the better guide ...
    assert sure[3.0][0] < 5 and sure[3.0][1] < sure[1.0][1] - 0.2  # ... with false ones it stops far too early
    assert sure[3.0][1] < sets[3.0][1] - 0.05
    hasty = mean(3.0, lambda game: SetSize(game.thresholds(0.1), patient=False))
    assert hasty[0] < 5 and hasty[1] < 0.5  # a size that does not shrink once is no reason to stop


def test_a_game_without_noise_is_a_binary_search():
    bits = np.array([[(y >> q) & 1 for y in range(8)] for q in range(3)])
    asked = []

    def belief(history):
        fits = np.ones(8)
        for q, a in history:
            fits = fits * (bits[q] == a)
        return fits / fits.sum()

    def simulated(history, q):
        share = belief(history)[bits[q] == 1].sum()
        return np.array([1 - share, share])

    def answer(q):
        asked.append(q)
        return int(bits[q, 5])

    found = pursue(belief, simulated, answer, 3, SetSize((0.875, 0.75, 0.5, 0.0)), threshold=0.0)
    assert found.label == 5 and found.labels == {5} and sorted(found.queries) == [0, 1, 2] == sorted(asked)
    assert len(pursue(belief, simulated, answer, 3, SetSize((0.9,)), limit=1).queries) == 1
