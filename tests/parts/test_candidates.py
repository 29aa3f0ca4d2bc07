"""Candidates at another temperature: who enters, who leaves, what the loss becomes, and where the entropy goes."""

import math

import pytest
import torch
from tests.parts.k8 import k8_rows, k8_stats
from tests.worlds import from_probs

from keel.core.aggregate import totals
from keel.core.rows import Rows, Stream, cat
from keel.exact.space import SequenceSpace
from keel.method import Method
from keel.parts.advantages.candidates import REPLACED, ReplaceWithCandidates
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.controllers.temperature import TemperatureSwitch
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.recipes.registry import recipe_named
from keel.rollouts.extra import ExtraCompletions
from keel.rollouts.rollout import Rollout
from keel.sampling.smc import SMC
from keel.statistics.engine import Engine
from keel.statistics.stats import Stats

MAIN, CANDIDATE = int(Stream.MAIN), int(Stream.CANDIDATE)


def batch(heat: float, rewards: list[float], dtype=torch.float64) -> Rows:
    """K8 at temperature 1, and K8 again as candidates with these rewards."""
    rows = k8_rows(dtype).with_(row=torch.arange(8))
    more = rows.with_(
        reward=torch.tensor(rewards, dtype=dtype)[:, None],
        group=rows.group + 2,
        row=torch.tensor([15, 14, 13, 12, 11, 10, 9, 8]),
        stream=torch.full((8,), CANDIDATE),
    )
    heats = [torch.full((8,), h, dtype=torch.float32) for h in (1.0, heat)]
    return cat([r.with_(columns={"temperature": h}) for r, h in zip((rows, more), heats, strict=True)])


def replaced(rows: Rows, **settings) -> Rows:
    part = ReplaceWithCandidates(**settings)
    for item in (GroupCentre(), GroupStd()):
        rows = item(rows, Stats())
    return part(rows, Stats(), part.init())


MIXED = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # the second group is tied, so that none of it is good


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_good_candidates_take_the_places_of_rows(dtype):
    """Rows 8 and 11 are good; of the batch, the first two row ids leave."""
    found = replaced(batch(1.2, MIXED, dtype))
    assert found.main.tolist() == [False, False] + [True] * 6 + [True, False, False, True] + [False] * 4
    assert set(found.stream.tolist()) == {MAIN, CANDIDATE}
    assert found.advantage[8].tolist() == [1.0, 1.0, 1.0, 0.0] and found.advantage[11].tolist() == [1.0, 0.0, 0.0, 0.0]
    before = GroupStd()(GroupCentre()(k8_rows(dtype), Stats()), Stats()).advantage
    assert torch.equal(found.advantage[:8], before)
    assert found.weight.tolist() == [1.0] * 16
    lengths = [2, 1, 2, 4, 3, 1, 3, 1]  # of rows 2 to 7, and of the two that entered
    assert (totals(found).tokens, totals(found).sequences, totals(found).rows) == (sum(lengths), 8, 8)


@pytest.mark.parametrize(
    ("heat", "largest", "entered"), [(1.2, 60, 2), (0.8, 60, 1), (1.2, 1, 1), (0.8, 1, 0), (1.0, 2, 2)]
)
def test_how_many(heat, largest, entered):
    """All good ones up to `largest`; half as many, rounded down, where they are colder than the batch."""
    found = replaced(batch(heat, MIXED), largest=largest)
    assert int(found.main[8:].sum()) == entered and int(found.main[:8].sum()) == 8 - entered
    part, metrics = ReplaceWithCandidates(largest=largest), {}
    part.observe(found, Stats(), metrics, part.init())
    assert metrics == {REPLACED: entered}
    if entered == 1:  # the smaller row id of the two
        assert bool(found.main[11]) and not bool(found.main[8])


def test_nothing_to_enter():
    for rewards in ([0.0] * 8, [1.0] * 8, [math.nan] * 8):
        found = replaced(batch(1.2, rewards))
        assert found.main.tolist() == [True] * 8 + [False] * 8 and totals(found).tokens == 20


def test_more_candidates_than_rows():
    """Five rows are good, and the batch has three."""
    whole = batch(1.2, [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    rows = whole.select(torch.tensor([0, 1, 2, *range(8, 16)]))
    found = replaced(rows)
    assert found.main[:3].tolist() == [False] * 3 and int(found.main[3:].sum()) == 5


def test_the_place_in_the_batch_does_not_matter():
    rows = batch(1.2, [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    order = torch.tensor([9, 3, 15, 0, 7, 11, 1, 12, 5, 14, 2, 8, 10, 4, 13, 6])
    wanted, found = replaced(rows, largest=3), replaced(rows.select(order), largest=3)
    assert torch.equal(found.main, wanted.main[order]) and torch.equal(found.advantage, wanted.advantage[order])


def test_none_at_all_is_the_method_without():
    """Bit for bit, with the candidates among the rows and without."""
    plain = Method(
        rollout=Rollout(num_generations=4),
        advantage={"centre": GroupCentre(), "std": GroupStd()},
        surrogate=Surrogate(Clipped()),
    )
    with_none = plain.adding(advantage={"candidates": ReplaceWithCandidates(0)})
    stats = k8_stats()
    twice = Stats({f: torch.cat([v.detach(), v.detach()]).requires_grad_(v.requires_grad) for f, v in stats.items()})
    states = with_none.initial_states()
    rows = with_none.prepare(batch(1.2, MIXED), twice, states)
    wanted = plain.loss(plain.prepare(k8_rows(), stats, {}), stats, {})
    assert torch.equal(with_none.loss(rows, twice, states), wanted)
    assert recipe_named("aepo")(replaced=0) == recipe_named("grpo")()


# -- the entropy -----------------------------------------------------------------------------------------------------

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
TEMPERED = {
    1.2: ([0.645312, 0.227185, 0.127503], 0.025559),
    0.8: ([0.771179, 0.161091, 0.067730], -0.033307),
    1.0: ([0.7, 0.2, 0.1], 0.0),
}


@pytest.mark.parametrize("heat", TEMPERED)
def test_the_entropy_moves_at_the_rate_of_the_temperature(heat):
    """A step along the loss's own gradient: the rows that enter are, by weight, all that a temperature draws."""
    wanted, rate = TEMPERED[heat]
    tempered = (POLICY.log() / heat).softmax(-1)
    assert tempered.tolist() == pytest.approx(wanted, abs=5e-7)
    space = SequenceSpace(vocab=3, horizon=1)
    policy = from_probs(POLICY.tolist(), space=space)
    tokens = torch.tensor([0, 0, 1, 2, 0, 1, 2, 0])[:, None]  # a row of the batch, twice three right ones, a wrong one
    weight = torch.cat([torch.ones(1).double(), tempered, tempered, torch.ones(1).double()])
    rows = Rows.build(
        torch.zeros(8, 1, dtype=torch.long),
        torch.ones(8, 1, dtype=torch.bool),
        tokens,
        torch.ones(8, 1, dtype=torch.bool),
        group=torch.tensor([0] + [1] * 7),
        stream=torch.tensor([MAIN] + [CANDIDATE] * 7),
        weight=weight,
        reward=torch.tensor([0, 1, 1, 1, 1, 1, 1, 0]).double()[:, None],
        columns={"temperature": torch.tensor([1.0] + [heat] * 7)},
    )
    method = recipe_named("aepo")(replaced=2 if heat < 1 else 1)
    engine = Engine({"policy": policy})
    frozen = engine.measure(method.frozen_needs(True), rows, alias={"old": "policy"})
    states = method.initial_states()
    rows = method.prepare(rows, frozen, states)
    assert totals(rows).tokens == pytest.approx(1.0, abs=1e-12)
    engine.step(list(method.live_needs()), rows, frozen, lambda r, s: method.loss(r, method.with_old(s), states))
    step = -policy.table.grad.flatten()[:3]
    torch.testing.assert_close(step, tempered - POLICY, rtol=0, atol=1e-9)
    entropy = -(POLICY * POLICY.log()).sum()
    assert float(-(POLICY * (POLICY.log() + entropy) * step).sum()) == pytest.approx(rate, abs=5e-7)


def test_the_switch():
    part = TemperatureSwitch(target=0.5)
    seen = [part.update(metrics, {}, 0)[0] for metrics in ({}, {"entropy": 0.5}, {"entropy": 0.51})]
    assert [values["rollout.extra.temperature"] for values in seen] == [1.2, 1.2, 0.8]
    method = recipe_named("aepo")().set("rollout.extra.temperature", 0.8)
    assert method.rollout.extra.temperature == 0.8


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ExtraCompletions(share=0.0), "share"),
        (lambda: ExtraCompletions(share=1.5), "share"),
        (lambda: ExtraCompletions(temperature=0.0), "temperature"),
        (lambda: ReplaceWithCandidates(-1), "largest"),
        (lambda: ReplaceWithCandidates(threshold=-0.1), "threshold"),
        (lambda: ReplaceWithCandidates(epsilon=-0.1), "epsilon"),
        (lambda: TemperatureSwitch(target=-1.0), "target"),
        (lambda: TemperatureSwitch(low=1.1), "low"),
        (lambda: Rollout(sampler=SMC(8), extra=ExtraCompletions()), "extra completions"),
        (lambda: replaced(batch(1.2, MIXED).with_(columns={})), "temperature"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()
