"""The perplexity-entropy test: a memoryless source by hand, the bound, both sides, and rollouts of a small model."""

import math
from dataclasses import replace

import pytest
import torch
from tests.rollouts.architectures import model

from keel.core.choice import generator
from keel.evaluate.source_test import (
    from_logits,
    hoeffding_bound,
    hoeffding_delta,
    judge_source,
    likelier_source,
    rollout_source,
    source_statistic,
    widest,
)
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.statistics.transforms import KeepTopK

A = torch.tensor([0.9, 0.1], dtype=torch.float64)
R = math.log(9)


def measured(tokens):
    """log A and entropy of a memoryless source along texts."""
    logp, entropy = from_logits(A.log().expand(*tokens.shape, 2), tokens)
    return logp, entropy, torch.ones_like(tokens, dtype=torch.bool)


def drawn(p, rows: int, length: int, seed: int = 0):
    return (torch.rand(rows, length, generator=generator(seed), dtype=torch.float64) > p[0]).long()


def test_a_memoryless_source():
    both = torch.tensor([[0, 1]])
    logp, entropy, _ = measured(both)
    assert float(entropy[0, 0]) == pytest.approx(0.325083, abs=1e-6)
    difference = -logp - entropy
    assert float((A * difference[0]).sum()) == pytest.approx(0, abs=1e-12)
    assert float((A * difference[0].square()).sum()) == pytest.approx(0.434502, abs=1e-6)
    cross = float(-logp.mean())
    assert cross == pytest.approx(1.203973, abs=1e-6)
    assert cross - float(entropy[0, 0]) == pytest.approx(0.878890, abs=1e-6)
    assert float(source_statistic(*measured(both))) == pytest.approx(0.878890, abs=1e-6)  # half of each token
    assert widest(A.log()[None]) == pytest.approx(2.197225, abs=1e-6)


def test_the_bound_and_its_threshold():
    assert hoeffding_bound(200, 0.3, R) == pytest.approx(0.001155, abs=1e-6)
    assert hoeffding_bound(200, hoeffding_delta(200, 0.01, R), R) == pytest.approx(0.01)
    assert hoeffding_bound(5, 0.0, R) == 1
    for setting, name in (((0, 0.1, R), "count"), ((5, 0.1, 0.0), "width")):
        with pytest.raises(ValueError, match=name):
            hoeffding_bound(*setting)
    with pytest.raises(ValueError, match="level"):
        hoeffding_delta(5, 1.5, R)


def test_false_alarms_stay_below_the_level():
    found = source_statistic(*measured(drawn(A, 20_000, 200)))
    assert float(found.mean()) == pytest.approx(0, abs=4 * math.sqrt(0.434502 / 200 / 20_000))
    assert float(found.var()) == pytest.approx(0.434502 / 200, rel=0.05)
    assert float((found.abs() > 0.3).double().mean()) < hoeffding_bound(200, 0.3, R)
    z = [judge_source(*measured(drawn(A, 1, 400, seed)), level=0.05).rejected for seed in range(400)]
    assert sum(z) / 400 == pytest.approx(0.05, abs=0.035)


def test_another_source_is_rejected_on_its_side():
    uniform = judge_source(*measured(drawn(torch.tensor([0.5, 0.5]), 1, 200)), width=R, level=0.01)
    assert uniform.rejected and uniform.statistic == pytest.approx(0.878890, abs=0.3) and uniform.bound < 1e-6
    greedy = judge_source(*measured(torch.zeros(1, 200, dtype=torch.long)), width=R, level=0.01)
    assert greedy.statistic == pytest.approx(math.log(1 / 0.9) - 0.325083, abs=1e-6) and greedy.statistic < 0
    assert judge_source(*measured(torch.zeros(1, 200, dtype=torch.long))).rejected
    own = judge_source(*measured(drawn(A, 1, 200)), width=R, level=0.01)
    assert not own.rejected and own.delta == pytest.approx(hoeffding_delta(200, 0.01, R))
    assert greedy.rejected == (abs(greedy.statistic) > own.delta)
    assert "another source" in str(uniform) and "no objection" in str(own)


def test_masked_tokens_do_not_count():
    tokens = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    logp, entropy, mask = measured(tokens)
    mask[0, 2:] = False
    logp[0, 2:] = -math.inf
    assert float(source_statistic(logp, entropy, mask)[0]) == pytest.approx(0.878890, abs=1e-6)
    assert source_statistic(logp, entropy, mask & False).tolist() == [0, 0]
    assert judge_source(logp, entropy, mask).count == 6
    with pytest.raises(ValueError, match="mask"):
        judge_source(logp, entropy, mask & False)


def test_of_two_models_the_one_that_wrote_it():
    b = torch.tensor([0.4, 0.6], dtype=torch.float64)
    first, second = drawn(A, 300, 200), drawn(b, 300, 200, seed=1)
    for tokens, wanted in ((first, 0), (second, 1)):
        of_a = source_statistic(*measured(tokens))
        logp, entropy = from_logits(b.log().expand(*tokens.shape, 2), tokens)
        of_b = source_statistic(logp, entropy, torch.ones_like(tokens, dtype=torch.bool))
        assert float((likelier_source(of_a, of_b) == wanted).double().mean()) > 0.97


def test_filters_belong_to_the_source():
    logits = torch.tensor([[[2.0, 1.0, 0.0]]]).double()
    logp, entropy = from_logits(logits, torch.tensor([[1]]), KeepTopK(2))
    p = torch.tensor([2.0, 1.0]).double().softmax(0)
    assert float(logp) == pytest.approx(float(p[1].log())) and float(entropy) == pytest.approx(
        float(-(p * p.log()).sum())
    )
    assert widest(torch.tensor([[2.0, 1.0, -math.inf]])) == 1.0


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}]
)
def test_rollouts_are_accepted_and_wrong_settings_are_not(settings):
    policy = model("llama")
    sampling = Sampling(max_completion_length=24, **settings)
    rows = LocalGenerator(policy).generate([[5, 6, 7], [9], [4, 4]], 24, sampling, seed=11)
    own = rollout_source(policy, rows, sampling)
    assert not own.rejected and abs(own.z) < 2 and own.count == int(rows.mask.sum())
    assert own.p_value > 0.045 and math.isnan(own.bound)
    hotter = replace(sampling, temperature=sampling.temperature * 1.3)
    cooler = replace(sampling, temperature=sampling.temperature / 1.3)
    assert rollout_source(policy, rows, hotter).z < -3 and rollout_source(policy, rows, cooler).z > 3
    if sampling.filter is not None:
        assert rollout_source(policy, rows, Sampling(temperature=sampling.temperature)).z < -4  # a forgotten filter
        narrower = rollout_source(policy, rows, replace(sampling, top_k=2))
        assert narrower.rejected and narrower.statistic == math.inf == narrower.z  # tokens that it could not write
    greedy = LocalGenerator(policy).generate([[5, 6, 7]], 1, Sampling(0.0, max_completion_length=24), seed=0)
    assert rollout_source(policy, greedy).statistic < 0 and rollout_source(policy, greedy).rejected


def test_greedy_settings_are_refused():
    policy = model("llama")
    rows = LocalGenerator(policy).generate([[5]], 1, Sampling(max_completion_length=4), seed=0)
    with pytest.raises(ValueError, match="temperature"):
        rollout_source(policy, rows, Sampling(temperature=0.0))
