"""Rejected completions by the optimal sampler: the numbers of its specification through the method's own code."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from keel.core.rows import Rows, Stream, cat
from keel.evaluate.differential_information import dpo_optimum
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.parts.rewards.informed_pairs import SHARES, InformedPairs
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TARGET = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
BETA = 0.5
SPACE = SequenceSpace(vocab=3, horizon=1)
SIX = {"rtol": 0, "atol": 5.1e-7}


def stats_of(logits: torch.Tensor | None = None) -> Stats:
    known = {LogProb(of=("ref",)): REF.log()[:, None], LogProb(of=("teacher",)): TARGET.log()[:, None]}
    return Stats(known if logits is None else {**known, LogProb(): logits.log_softmax(0)[:, None]})


def everything(reward: torch.Tensor) -> Rows:
    rows = TabularPolicy(SPACE, REF.log()[None, None]).weighted(SPACE.rows(0))
    return rows.with_(reward=reward[:, None])


def minimum(method: Method, rows: Rows) -> torch.Tensor:
    states = method.initial_states()
    rows = method.prepare(rows, stats_of(), states)

    def loss(flat):
        logits = torch.tensor(flat, requires_grad=True)
        value = method.loss(rows, stats_of(logits), states)
        value.backward()
        return float(value.detach()), logits.grad.numpy()

    found = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
    return torch.tensor(found.x).softmax(0)


def test_the_optimum_is_the_target_by_its_reward_or_by_a_model():
    """ref (.5, .3, .2), target (.2, .3, .5), beta .5: the rejected sampler is (0.649573, 0.246496, 0.103932)."""
    reward = BETA * (TARGET / REF).log()
    for options, rows in (({}, everything(reward)), ({"target": "teacher"}, everything(0 * reward))):
        method = recipe_named("did_dpo")(beta=BETA, **options)
        assert torch.allclose(minimum(method, rows), TARGET, rtol=0, atol=1e-6)
        pairs = method.prepare(rows, stats_of(), method.initial_states()).pairs
        law = torch.zeros(3, dtype=torch.float64).index_add(0, pairs.rejected, pairs.measure)
        torch.testing.assert_close(law, torch.tensor([0.649573, 0.246496, 0.103932], dtype=torch.float64), **SIX)
        chosen = torch.zeros(3, dtype=torch.float64).index_add(0, pairs.chosen, pairs.measure)
        torch.testing.assert_close(chosen, REF)


def test_another_rejected_sampler_rests_elsewhere():
    """Uniform ones lead to (0.781250, 0.168750, 0.050000), and weights of beta 1 to (0.339134, 0.321731, 0.339134)."""
    reward = BETA * (TARGET / REF).log()
    method = recipe_named("did_dpo")(beta=BETA)
    uniform = everything(REF.log())  # ref exp(-r) is then uniform
    wanted = torch.tensor([0.781250, 0.168750, 0.050000], dtype=torch.float64)
    torch.testing.assert_close(minimum(method, uniform), wanted, **SIX)
    mismatched = method.set("terms.pairs.beta", 1.0)  # the weights are those of beta 0.5
    wrong = minimum(mismatched, everything(reward))
    drawn = torch.tensor([0.649573, 0.246496, 0.103932], dtype=torch.float64)
    torch.testing.assert_close(wrong, dpo_optimum(REF.log(), REF.log(), drawn.log(), 1.0).exp(), rtol=0, atol=2e-6)
    torch.testing.assert_close(wrong, torch.tensor([0.339134, 0.321731, 0.339134], dtype=torch.float64), **SIX)


def group(reward: list[float], start: int = 0) -> Rows:
    """A group of drawn completions of one prompt."""
    n = len(reward)
    ids = torch.zeros(n, 1, dtype=torch.long)
    known = {"group": torch.full((n,), start), "row": torch.arange(n) + 100 * start}
    values = torch.tensor(reward, dtype=torch.float64)[:, None]
    return Rows.build(ids, ids == 0, ids, ids == 0, reward=values, weight=torch.ones(n, dtype=torch.float64), **known)


def test_weights_over_the_others_of_a_group():
    """r = (0, log 2, log 4): the others of the first have exp(-r) = 1/2 and 1/4, so 2/3 and 1/3."""
    rows = group([0.0, float(np.log(2)), float(np.log(4))])
    found = InformedPairs("weighted")(rows, Stats(), {})
    table = torch.zeros(3, 3, dtype=torch.float64)
    table[found.pairs.chosen, found.pairs.rejected] = found.pairs.measure
    wanted = [[0, 2 / 3, 1 / 3], [4 / 5, 0, 1 / 5], [2 / 3, 1 / 3, 0]]
    torch.testing.assert_close(table, torch.tensor(wanted, dtype=torch.float64))
    assert found.columns[SHARES].tolist() == pytest.approx([0.9, 1 / 0.68 / 2, 0.9])  # 1 / sum of squares, of two
    hot = InformedPairs("weighted", temperature=2.0)(rows, Stats(), {})
    assert float(hot.pairs.measure[0]) == pytest.approx(1 / (1 + 2**-0.5))


def test_draws_follow_the_weights_and_the_row_ids_alone():
    rows = group([0.0, 1.0, 2.0, 0.5])
    copies = [rows.with_(group=rows.group + i, row=rows.row + 4 * i) for i in range(800)]
    many = cat(copies)
    found = InformedPairs()(many, Stats(), {}).pairs
    assert torch.equal(found.chosen, torch.arange(3200)) and bool((found.measure == 1).all())
    first = found.rejected[found.chosen % 4 == 0] % 4
    law = first.bincount(minlength=4) / len(first)
    wanted = torch.tensor([0.0, np.exp(-1.0), np.exp(-2.0), np.exp(-0.5)])
    assert torch.allclose(law.double(), wanted / wanted.sum(), atol=0.04)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    two = cat(copies[:2])
    plain, turned = (InformedPairs()(r, Stats(), {}) for r in (two, two.select(order)))
    sets = [set(zip(f.row[f.pairs.chosen].tolist(), f.row[f.pairs.rejected].tolist(), strict=True))
            for f in (plain, turned)]  # fmt: skip
    assert sets[0] == sets[1]


def test_rows_without_a_reward_or_of_another_stream_are_in_no_pair():
    rows = group([0.0, float("nan"), 1.0, 2.0])
    stream = torch.tensor([0, 0, 0, int(Stream.CANDIDATE)])
    found = InformedPairs("weighted")(rows.with_(stream=stream), Stats(), {}).pairs
    assert sorted(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)) == [(0, 2), (2, 0)]
    alone = InformedPairs()(group([1.0]), Stats(), {})
    assert not len(alone.pairs.chosen)


@pytest.mark.parametrize("wrong", [{"rejected": "all"}, {"temperature": 0.0}, {"beta": -1.0}])
def test_bad_settings(wrong):
    with pytest.raises((ValueError, TypeError)):
        InformedPairs(**wrong)


def test_several_rewards_are_refused():
    rows = group([0.0, 1.0])
    with pytest.raises(ValueError, match="one reward column"):
        InformedPairs()(rows.with_(reward=rows.reward.expand(-1, 2)), Stats(), {})
