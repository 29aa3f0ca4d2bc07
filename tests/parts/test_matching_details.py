"""Rows that are left out, prompts that are remembered, and metrics over several groups, in numbers."""

import math

import pytest
import torch
from tests.parts.test_targets import OLD, POLICY, REF, TEACHER, drawn

from keel.core.aggregate import Groups
from keel.core.rows import cat
from keel.parts.terms.matching import MatchTarget, PosteriorMatching, log_mean_exp
from keel.parts.terms.targets import PosteriorTarget, TeacherTarget, TiltTarget
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

# P / q of the tilt with beta = 1/2 on rows drawn from OLD, at outcomes 0 and 3: 0.4 / 0.25 and 0.1 e^4 / 0.15
FIRST, FOURTH = 1.6, 0.1 * math.exp(4) / 0.15


def statistics(rows, logits=None, **models) -> Stats:
    """The policy's with a graph where logits are given."""
    known = {"old": OLD, "ref": REF, **models}
    live = {} if logits is None else {LogProb(): logits.log_softmax(0)[rows.tokens]}
    return Stats(live | {LogProb(of=(name,)): p.log()[rows.tokens] for name, p in known.items()})


def gradient(loss, rows, state) -> torch.Tensor:
    logits = POLICY.log().clone().requires_grad_()
    return torch.autograd.grad(loss(rows, statistics(rows, logits), state), logits)[0]


def test_rows_that_are_left_out_are_not_counted_as_capped():
    """Only outcome 4, with log old / ref = ln(0.1 / 1e-6) = 11.5, meets a cap of 10; unless it has no reward."""
    loss = MatchTarget(TiltTarget(0.5), "kl_ref_policy", "reference", "none", log_z=0.0, cap=10.0)
    ref = torch.tensor([0.4, 0.25, 0.2, 0.15 - 1e-6, 1e-6], dtype=torch.float64)
    rows = drawn([1, 0, 0, 0, 1])
    hidden = rows.with_(reward=rows.reward.masked_fill(rows.tokens == 4, torch.nan))
    assert _capped(loss, rows) == 0
    assert _capped(loss, rows, ref=ref) == 1
    assert _capped(loss, hidden, ref=ref) == 0


def _capped(loss, rows, **models) -> float:
    metrics = {}
    loss.observe(rows, statistics(rows, **models), metrics, loss.init())
    return metrics["target/capped"]


@pytest.mark.parametrize(("cap", "weight"), [(1.0, math.e), (2.0, 4.0)])
def test_a_cap_bounds_the_weight(cap, weight):
    """Outcome 4: pi / ref = 4, or e at a cap of 1; R = -l = ln(0.15 / 0.2) for KL(pi || teacher)."""
    loss = MatchTarget(TeacherTarget(), "kl_policy_ref", "reference", "none", cap=cap)
    rows, logits = drawn([0, 0, 0, 0, 1]), POLICY.log().clone().requires_grad_()
    value = loss(rows, statistics(rows, logits, teacher=TEACHER), loss.init())
    at = torch.eye(5, dtype=torch.float64)[4] - POLICY
    found = torch.autograd.grad(value, logits)[0]
    torch.testing.assert_close(found, weight * math.log(0.2 / 0.15) * at, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -2000.0, 2000.0])
def test_means_of_weights_far_from_one(shift):
    """Weights e^shift (1, 1/3, 1/3) and one that is not counted; a group with all its mass gone; one without rows."""
    rows = cat([drawn([4, 0, 0, 0, 0]), drawn([2, 0, 0, 0, 0], group=1), drawn([1, 0, 0, 0, 0], group=2)])
    third, gone = shift - math.log(3), -math.inf
    values = torch.tensor([shift, third, third, 3000.0, gone, gone, shift], dtype=torch.float64)
    counted = torch.tensor([True, True, True, False, True, True, False])
    found = log_mean_exp(Groups.of(rows, counted), values).tolist()
    assert found[0] == pytest.approx(shift + math.log(5 / 9), rel=1e-12, abs=1e-12)
    assert found[1:] == [-math.inf, -math.inf]


def test_each_prompt_has_its_own_z():
    """Outcome 0 at prompt 5 and outcome 3 at prompt 6 are remembered; both come back, and a prompt never seen.

    For KL(p || pi) a row's weight is P / (q Z) - pi / q, with pi / q = 0.4 and 5 / 3.
    """
    loss = MatchTarget(TiltTarget(0.5), "kl_ref_policy", "old", "none")
    state = loss.init()
    for outcome, prompt in (([1, 0, 0, 0, 0], 5), ([0, 0, 0, 1, 0], 6)):
        rows = drawn(outcome).with_(data_index=torch.tensor([prompt]))
        state = loss.observe(rows, statistics(rows), {}, state)
    assert state["prompts"].tolist() == [5, 6]
    at = torch.eye(5, dtype=torch.float64) - POLICY
    for outcome, prompt, z in (
        (0, 6, (FIRST + FOURTH) / 2),
        (3, 6, FOURTH),
        (3, 5, (FIRST + FOURTH) / 2),
        (0, 9, FIRST),
    ):
        rows = drawn([int(i == outcome) for i in range(5)]).with_(data_index=torch.tensor([prompt]))
        weight = (FIRST / z - 0.4) if outcome == 0 else (FOURTH / z - 5 / 3)
        torch.testing.assert_close(gradient(loss, rows, state), -weight * at[outcome], rtol=1e-9, atol=1e-12)


METRICS = {"target/ess", "target/max_weight", "target/log_z"}


@pytest.mark.parametrize("make", [MatchTarget, PosteriorMatching])
def test_observed_weights_are_means_over_groups_with_mass(make):
    """Outcomes 0, 3 and an unscored row in one group, outcome 0 three times in another, and a group without rewards."""
    target = TiltTarget(0.5) if make is MatchTarget else PosteriorTarget(0.5)
    loss, metrics = make(target), {}
    first = drawn([1, 0, 0, 1, 1])
    first = first.with_(reward=first.reward.masked_fill(first.tokens == 4, torch.nan))
    nothing = drawn([2, 0, 0, 0, 0], group=2)
    rows = cat([first, drawn([3, 0, 0, 0, 0], group=1), nothing.with_(reward=nothing.reward * torch.nan)])
    loss.observe(rows, statistics(rows), metrics, loss.init())
    total = FIRST + FOURTH
    assert {name: metrics[name] for name in METRICS} == {
        "target/ess": pytest.approx((total**2 / (FIRST**2 + FOURTH**2) + 3) / 2),
        "target/max_weight": pytest.approx((FOURTH / total + 1 / 3) / 2),
        "target/log_z": pytest.approx((math.log(total / 2) + math.log(FIRST)) / 2),
    }


@pytest.mark.parametrize("make", [MatchTarget, PosteriorMatching])
def test_what_says_the_sampler_when_a_batch_is_observed(make):
    """The policy that prepared the batch, if it was measured; else what was recorded, never the policy as it is now."""
    target = TiltTarget(0.5) if make is MatchTarget else PosteriorTarget(0.5)
    loss, rows = make(target, samples="old"), drawn([1, 0, 0, 0, 0])
    recorded = rows.with_(logp={"behaviour": POLICY.log()[rows.tokens]})  # 0.1 at outcome 0

    def log_z(rows, **models) -> float:
        metrics = {}
        known = {LogProb(of=(name,)): p.log()[rows.tokens] for name, p in models.items()}
        loss.observe(rows, Stats(known), metrics, loss.init())
        return metrics.get("target/log_z", math.nan)

    assert log_z(recorded, old=OLD, ref=REF) == pytest.approx(math.log(0.4 / 0.25))
    assert log_z(recorded, policy=OLD, ref=REF) == pytest.approx(math.log(0.4 / 0.1))
    assert math.isnan(log_z(rows, policy=OLD, ref=REF))
