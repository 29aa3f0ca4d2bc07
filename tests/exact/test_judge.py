"""Best-of-k under a judge: numbers of the worked example, limits, direct sums, and the sampler itself."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from keel.core.chain import Meter
from keel.core.chance import Sample
from keel.exact.judge import aligned_limit, best_of_k_error, optimal_k, optimal_temperature, softmax_of_k_error
from keel.sampling.best_of import BestOf, SoftBestOf

BIASED = {"m": -1.0, "s": 1.0, "c": 0.8, "y_star": 0.0}


def test_an_aligned_judge():
    tries = np.array([1, 4, 16, 64, 256])
    error = best_of_k_error(0.0, 1.0, 0.0, 0.0, tries)
    assert error[:3] == pytest.approx([1, 0.120702, 0.0104446], abs=1e-6)
    assert error[3:] == pytest.approx([0.00073332, 4.7385e-5], abs=1e-8)
    assert (tries**2 * error)[1:] == pytest.approx([1.931, 2.674, 3.004, 3.105], abs=5e-4)
    assert 1e8 * best_of_k_error(0.0, 1.0, 0.0, 0.0, 10_000) == pytest.approx(np.pi, rel=1e-3)


def test_a_biased_judge_has_an_optimal_number_of_tries():
    error = best_of_k_error(**BIASED, k=[1, 2, 4, 8, 16, 32, 64])
    wanted = [2, 0.858998, 0.435898, 0.379049, 0.464251, 0.557654, 0.610924]
    assert error == pytest.approx(wanted, abs=1e-6)
    assert best_of_k_error(**BIASED, k=10**7) == pytest.approx(0.64, abs=1e-4)
    assert optimal_k(**BIASED) == 7  # 8 among the powers of two
    assert optimal_k(0.0, 1.0, 0.0, 0.0, largest=50) == 50  # an aligned judge: the more, the better
    assert optimal_k(1.0, 1.0, 3.0, 0.0) == 1  # a judge that is worse than none


def test_the_optimal_number_shrinks_as_the_bias_grows():
    found = [optimal_k(-1.0, 1.0, c, 0.0) for c in (0.2, 0.4, 0.8, 1.2, 2.0)]
    assert found == [1024, 30, 7, 5, 5]  # the first judge is close enough to the truth to be used without end


def test_the_limit_of_many_tries():
    for m, s in ((0.0, 1.0), (0.7, 2.0)):
        limit = aligned_limit(m, s, 0.0, 4096)
        assert float(best_of_k_error(m, s, 0.0, 0.0, 4096)) == pytest.approx(limit, rel=5e-3)
    assert 100 * aligned_limit(0.0, 1.0, 0.0, 10) == pytest.approx(np.pi)


def test_units_and_origin_do_not_matter():
    plain = best_of_k_error(**BIASED, k=[3, 30])
    moved = best_of_k_error(5 - 100.0, 100.0, 5 + 80.0, 5.0, [3, 30])
    assert moved == pytest.approx(1e4 * plain, rel=1e-9)
    soft = softmax_of_k_error(**BIASED, k=[3, 30], temperature=0.5)
    assert softmax_of_k_error(5 - 100.0, 100.0, 85.0, 5.0, [3, 30], 0.5e4) == pytest.approx(1e4 * soft, rel=1e-8)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
def test_two_tries_by_softmax_as_a_double_sum(temperature):
    node = np.linspace(-9, 9, 1801)
    weight = np.exp(-(node**2) / 2)
    weight, y = weight / weight.sum(), BIASED["m"] + node
    r = -((y - BIASED["c"]) ** 2) / temperature
    first = expit(r[:, None] - r[None])
    picked = first * y[:, None] ** 2 + (1 - first) * y[None] ** 2
    direct = float((weight[:, None] * weight * picked).sum())
    assert float(softmax_of_k_error(**BIASED, k=2, temperature=temperature)) == pytest.approx(direct, abs=1e-8)


def test_softmax_between_its_limits():
    cold = softmax_of_k_error(**BIASED, k=[1, 2, 8, 64], temperature=1e-5)
    assert cold == pytest.approx(best_of_k_error(**BIASED, k=[1, 2, 8, 64]), abs=1e-5)
    assert softmax_of_k_error(**BIASED, k=[1, 2, 64], temperature=1e7) == pytest.approx([2.0] * 3, abs=1e-5)
    best = optimal_temperature(**BIASED, k=64)
    at = softmax_of_k_error(**BIASED, k=64, temperature=best)
    for around in (0.8 * best, 1.25 * best, 1e-3, 1e3):
        assert float(softmax_of_k_error(**BIASED, k=64, temperature=around)) > float(at)
    assert float(at) < float(best_of_k_error(**BIASED, k=64)) - 0.2  # a wrong judge is better not believed in full


class Answers:
    """A chain of one step: numbers drawn from N(m, s^2), judged by their distance to c."""

    horizon = 1

    def __init__(self, prompts: int, m: float, s: float, c: float):
        self.prompts, self.m, self.s, self.c, self.meter = prompts, m, s, c, Meter(prompts)

    def init(self, n):
        return torch.zeros(self.prompts * n, dtype=torch.float64)

    def complete(self, x, m, rng):
        return self.m + self.s * rng.normal((self.prompts, len(x) // self.prompts * m), "answer").flatten()

    def reward(self, x, where=None):
        return -((x - self.c) ** 2)

    def unused(self, *given):
        """What best-of-k does not ask of a chain."""
        raise AssertionError("best-of-k asked a chain for more than completions and rewards")

    propose = extend = select = is_done = value = key = unused


@pytest.mark.parametrize(("k", "runs"), [(2, 300_000), (8, 80_000), (32, 20_000)])
def test_the_sampler_makes_this_error(k, runs):
    found = BestOf(k)(Answers(runs, -1.0, 1.0, 0.8), Sample(k))
    error = found.states[found.picked].square()
    assert float(error.mean()) == pytest.approx(float(best_of_k_error(**BIASED, k=k)), rel=0.01)
    assert float(error.std()) / runs**0.5 < 0.005 * float(error.mean())  # the test can see 1%


def test_soft_best_of_k_makes_the_other():
    runs, temperature = 100_000, 0.7
    found = SoftBestOf(6, temperature)(Answers(runs, -1.0, 1.0, 0.8), Sample(1))
    error = found.states[found.picked].square()
    wanted = float(softmax_of_k_error(**BIASED, k=6, temperature=temperature))
    assert float(error.mean()) == pytest.approx(wanted, rel=0.012)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="s must"):
        best_of_k_error(0.0, 0.0, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="k must"):
        best_of_k_error(0.0, 1.0, 0.0, 0.0, [4, 0])
    with pytest.raises(ValueError, match="temperature"):
        softmax_of_k_error(0.0, 1.0, 0.0, 0.0, 1, 0.0)
