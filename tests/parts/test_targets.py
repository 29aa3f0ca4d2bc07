"""Targets on five outcomes whose numbers are known, enumerated, reweighted and as samples of the right proportions."""

import math

import pytest
import torch

from keel.core.errors import KeelError, UserError
from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.parts.rewards.moments import MomentFeatures
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.moments import MomentTarget
from keel.parts.terms.targets import (
    BestOfNTarget,
    LogLinearTarget,
    PosteriorTarget,
    TeacherTarget,
    TiltTarget,
    sampler_log_prob,
    sequence,
)
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
POLICY = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
OLD = torch.tensor([0.25, 0.20, 0.30, 0.15, 0.10], dtype=torch.float64)
TEACHER = torch.tensor([0.05, 0.45, 0.10, 0.25, 0.15], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
TILT = [0.043220, 0.199596, 0.058742, 0.589931, 0.108512]  # beta 0.5
PHI = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.float64)
MODELS = {"policy": POLICY, "old": OLD, "ref": REF, "teacher": TEACHER}


def enumerated(sampler=REF, reward=REWARD) -> Rows:
    rows = SequenceSpace(5, 1).rows()
    return rows.with_(weight=sampler, exact=True, reward=reward[:, None], features={"moments": PHI})


def drawn(counts, reward=REWARD, group=0) -> Rows:
    """Samples, each outcome as often as said."""
    outcome = torch.arange(5).repeat_interleave(torch.tensor(counts))
    rows = enumerated(reward=reward).select(outcome)
    return rows.with_(weight=torch.ones(len(rows)), exact=False, group=torch.full_like(outcome, group))


def statistics(rows: Rows) -> Stats:
    return Stats({LogProb(of=(name,)): p.log()[rows.tokens] for name, p in MODELS.items()})


def normalised(score: torch.Tensor) -> torch.Tensor:
    return score.softmax(0)


def assert_six(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=0, atol=6e-7)


# -- scores ----------------------------------------------------------------------------------------------------------


def test_tilt():
    rows = enumerated()
    score = TiltTarget(0.5)(rows, statistics(rows))
    assert_six(normalised(score), TILT)
    assert_six(score.logsumexp(0), 2.225165)


@pytest.mark.parametrize("centre", [0.0, 2.0])
def test_an_exponential_likelihood_is_the_tilt(centre):
    rows = enumerated()
    score = PosteriorTarget(0.5, centre)(rows, statistics(rows))
    assert_six(normalised(score), TILT)
    assert_six(score.logsumexp(0), 2.225165 - centre / 0.5)


def test_sigmoid_likelihood():
    """sigmoid of -1, 0, -1/2, 1, 1/2."""
    rows = enumerated()
    score = PosteriorTarget(1.0, 1.0, "sigmoid")(rows, statistics(rows))
    good = torch.tensor([0.26894142, 0.5, 0.37754067, 0.73105858, 0.62245933], dtype=torch.float64)
    torch.testing.assert_close(score.exp(), REF * good, rtol=1e-7, atol=0)


def test_models():
    rows = enumerated()
    assert_six(TeacherTarget()(rows, statistics(rows)).exp(), TEACHER.tolist())
    half = LogLinearTarget(("ref", "teacher"), (0.5, 0.5))
    assert_six(half(rows, statistics(rows)).exp(), (REF * TEACHER).sqrt().tolist())
    beyond = LogLinearTarget(("ref", "teacher"), (-1.0, 2.0))  # teacher^2 / ref
    assert_six(beyond(rows, statistics(rows)).exp(), [0.00625, 0.81, 0.05, 0.625, 0.45])


BEST = {
    1: [0.400000, 0.250000, 0.200000, 0.100000, 0.050000],
    2: [0.160000, 0.362500, 0.200000, 0.190000, 0.087500],
    4: [0.025600, 0.392406, 0.104000, 0.343900, 0.134094],
    8: [0.000655, 0.255694, 0.016141, 0.569533, 0.157977],
    16: [0.000000, 0.073969, 0.000282, 0.814698, 0.111051],
}


@pytest.mark.parametrize("n", BEST)
@pytest.mark.parametrize("sampler", ["ref", "old", "policy"])
def test_best_of_n(n, sampler):
    """The sampler's own probabilities do not matter: the mass below a reward is that under the reference."""
    rows = enumerated(MODELS[sampler])
    target = BestOfNTarget(n, samples={"ref": "reference"}.get(sampler, sampler))
    assert_six(target(rows, statistics(rows)).exp(), BEST[n])


def test_best_of_n_from_samples_with_ties():
    tied = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    rows = drawn([8, 5, 4, 2, 1], tied)
    score = BestOfNTarget(4, samples="reference")(rows, statistics(rows))
    first = torch.tensor([0, 8, 13, 17, 19])
    assert_six(score[first].exp(), [0.025600, 0.275781, 0.220625, 0.318662, 0.159331])


@pytest.mark.parametrize("target", [TiltTarget(), PosteriorTarget(), BestOfNTarget(samples="reference")], ids=repr)
def test_what_is_not_scored_is_nan(target):
    """... and does not count for the others: without outcome 4, the best of many is outcome 3."""
    rows = enumerated(reward=REWARD.where(REWARD != 1.5, torch.nan))
    score = target(rows, statistics(rows))
    assert score.isnan().tolist() == [False] * 4 + [True]
    if isinstance(target, BestOfNTarget):
        below, upto = (torch.tensor(x).double() / 0.95 for x in ([0.0, 0.60, 0.40, 0.85], [0.40, 0.85, 0.60, 0.95]))
        torch.testing.assert_close(score[:4].exp(), 0.95 * (upto**4 - below**4), rtol=1e-6, atol=0)  # ref is as it was


# -- moments ---------------------------------------------------------------------------------------------------------

MOMENTS = MomentTarget(("a", "b"), (0.5, 0.4), fit_batches=1)
LAMBDA = [0.263748, 1.230859]


def test_given_multipliers():
    target = MomentTarget(("a", "b"), (0.5, 0.4), (0.263748, 1.230859))
    rows, state = enumerated(), target.init()
    score = target(rows, statistics(rows), state)
    assert_six(normalised(score), [0.259333, 0.211000, 0.129667, 0.289000, 0.111000])
    assert target.settled(state)


@pytest.mark.parametrize(
    ("moments", "wanted"),
    [
        ((1.0, 0.5), [0, 0.5, 0, 0.5, 0]),  # only {1, 3}, half of it with feature b, which only 3 has
        ((0.0, 0.0), [2 / 3, 0, 1 / 3, 0, 0]),
    ],
)
def test_hard_constraints(moments, wanted):
    target = MomentTarget(("a", "b"), moments, fit_batches=1)
    rows, state = drawn([8, 5, 4, 2, 1]), target.init()
    state = target.observe(rows, torch.zeros(len(rows)), {}, state)
    rows = enumerated()
    torch.testing.assert_close(
        normalised(target(rows, statistics(rows), state)), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-9
    )


def test_a_pointwise_constraint_alone():
    target = MomentTarget(("a",), (1.0,))
    rows = enumerated().with_(features={"moments": PHI[:, :1]})
    score = target(rows, statistics(rows), target.init())
    assert_six(normalised(score), [0, 0.714286, 0, 0.285714, 0])
    assert_six(-score.logsumexp(0), 1.049822)  # KL(P || ref)
    assert target.settled(target.init())


@pytest.mark.parametrize(
    ("counts", "sampler"), [([8, 5, 4, 2, 1], "ref"), ([5, 4, 6, 3, 2], "old")], ids=["reference", "moved"]
)
def test_multipliers_are_fitted(counts, sampler):
    """Also from a policy that has moved: the samples are weighed by ref / q."""
    rows, state, metrics = drawn(counts), MOMENTS.init(), {}
    weight = (REF / MODELS[sampler]).log()[rows.tokens[:, 0]]
    state = MOMENTS.observe(rows, weight, metrics, state)
    assert_six(state["multipliers"], LAMBDA)
    assert_six(torch.tensor(metrics["moments/kl"]).double(), 0.190867)
    assert MOMENTS.settled(state) and not state["features"].numel()
    share = torch.tensor(counts).double() / 20
    assert metrics["moments/a"] == pytest.approx(float(share @ PHI[:, 0]))
    assert metrics["multipliers/b"] == pytest.approx(1.230859, abs=6e-7)


@pytest.mark.parametrize("sampler", [REF, OLD], ids=["reference", "moved"])
def test_enumerated_rows_count_at_their_probability(sampler):
    rows, metrics = enumerated(sampler), {}
    state = MOMENTS.observe(rows, (REF / sampler).log(), metrics, MOMENTS.init())
    assert_six(state["multipliers"], LAMBDA)
    assert metrics["moments/a"] == pytest.approx(float(sampler[1] + sampler[3]))


def test_batches_are_kept_until_the_fit_is_done():
    """A group of 20 and one of 40 in a later batch, both with the reference's shares; then a batch that is ignored."""
    target = MomentTarget(("a", "b"), (0.5, 0.4), fit_batches=2)
    state = target.observe(drawn([8, 5, 4, 2, 1]), torch.zeros(20), {}, target.init())
    assert not target.settled(state)
    assert torch.equal(state["features"][0].double(), PHI.repeat_interleave(torch.tensor([8, 5, 4, 2, 1]), 0).double())
    assert_six(state["multipliers"], LAMBDA)
    state = target.observe(drawn([16, 10, 8, 4, 2], group=7), torch.zeros(40), {}, state)
    assert target.settled(state)
    assert_six(state["multipliers"], LAMBDA)
    again = target.observe(drawn([1, 5, 5, 5, 5]), torch.zeros(21), {}, state)
    assert torch.equal(again["multipliers"], state["multipliers"])


def test_multipliers_that_follow_the_policy():
    """After the fit lambda_a grows by 0.2 (0.5 - 8/10) and lambda_b by 0.2 (0.4 - 5/10); a hard one has none."""
    target = MomentTarget(("a", "b"), (0.5, 0.4), (0.25, 1.0), track=0.2)
    state = target.observe(drawn([1, 4, 0, 4, 1]), torch.zeros(10), {}, target.init())
    assert_six(state["multipliers"], [0.25 - 0.06, 1.0 - 0.02])
    assert not target.settled(state)
    assert MomentTarget(("a",), (1.0,), track=0.2).settled(MomentTarget(("a",), (1.0,), track=0.2).init())


def test_means_are_over_prompts():
    """Two prompts with shares 1/4 and 3/4 of a feature share one lambda: t/(t + 3) + 3t/(3t + 1) = 1.4, t = e^lambda.

    That is 1.8 t^2 - 4 t - 4.2 = 0.
    """
    target = MomentTarget(("a",), (0.7,), fit_batches=1)
    phi = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.float64)[:, None]
    rows = drawn([8, 0, 0, 0, 0]).with_(features={"moments": phi}, group=torch.arange(8) // 4)
    state = target.observe(rows, torch.zeros(8), {}, target.init())
    t = (4 + math.sqrt(16 + 4 * 1.8 * 4.2)) / 3.6
    assert float(state["multipliers"][0]) == pytest.approx(math.log(t), abs=1e-9)


def test_out_of_reach():
    """Feature a is on 7 of 20 rows; without them no weights give it a mean of 1/2."""
    target = MomentTarget(("a",), (0.5,), fit_batches=2)
    rows = drawn([8, 0, 4, 0, 1])
    rows = rows.with_(features={"moments": PHI[rows.tokens[:, 0], :1]})
    state = target.observe(rows, torch.zeros(13), {}, target.init())
    assert state["multipliers"].tolist() == [0.0]
    with pytest.raises(UserError, match=r"moment 0 = 0\.5 cannot be reached.*raise num_generations"):
        target.observe(rows, torch.zeros(13), {}, state)


def test_just_within_reach_before_the_last_fit():
    """A mean of 5 of the reward, which is at most 2: for now 2% of its range below the largest, 2 - 0.04 = 1.96."""
    target = MomentTarget(("reward",), (5.0,), fit_batches=2)
    rows = drawn([8, 5, 4, 2, 1])
    rows = rows.with_(features={"moments": rows.reward})
    state = target.observe(rows, torch.zeros(20), {}, target.init())
    tilted = (REF.log() + state["multipliers"][0] * REWARD).softmax(0)
    assert float(tilted @ REWARD) == pytest.approx(1.96)


def test_features_of_reward_functions():
    nan = torch.nan
    rows = drawn([1, 1, 1, 0, 0]).with_(reward=torch.tensor([[1.0, nan], [0.0, 2.0], [nan, nan]]), columns={})

    def column(names, **recorded):
        given = rows.with_(columns={f"rewards/{name}": value for name, value in recorded.items()})
        return MomentFeatures(names)(given, Stats()).features["moments"].nan_to_num(-1.0).tolist()

    assert column(("reward",)) == [[1], [2], [-1]]
    assert column(("right", "form")) == [[1, -1], [0, 2], [-1, -1]]
    by_name = {"form": torch.tensor([5.0, 6.0, 7.0]), "right": torch.zeros(3)}
    assert column(("form", "reward"), **by_name) == [[5, 1], [6, 2], [7, -1]]
    with pytest.raises(UserError, match=r"there is no reward 'forms'\. Did you mean 'form'"):
        column(("forms",), **by_name)
    with pytest.raises(UserError, match="there is no reward 'form'"):
        column(("form",))  # two rewards without names: which is it?
    summed = WeightedSum()(MomentFeatures(("right", "form"))(rows, Stats()), Stats())
    assert summed.features["moments"].nan_to_num(-1.0).tolist() == column(("right", "form"))
    assert summed.reward[:, 0].nan_to_num(-1.0).tolist() == [1, 2, -1]  # the last has none at all


def test_rows_without_features():
    rows = drawn([1, 1, 1, 1, 1]).with_(features={})
    with pytest.raises(KeelError, match="no 'moments' of 2 features"):
        MOMENTS(rows, statistics(rows), MOMENTS.init())


# -- the sampler -----------------------------------------------------------------------------------------------------


def test_sampler():
    rows = enumerated()
    for samples, p in (("policy", POLICY), ("old", OLD), ("reference", REF)):
        assert_six(sampler_log_prob(samples, rows, statistics(rows)).exp(), p.tolist())
    with pytest.raises(ValueError, match="do not say with which probability"):
        sampler_log_prob("behaviour", rows, Stats())
    recorded = rows.with_(logp={"behaviour": TEACHER.log()[:, None]})
    assert_six(sampler_log_prob("behaviour", recorded, Stats()).exp(), TEACHER.tolist())


def test_a_long_sequence_is_summed_in_fp32():
    """512 tokens of log-probability -1.5 in bf16, of which 500 count: -750, which bf16 rounds to -752."""
    ids = torch.zeros(1, 512, dtype=torch.long)
    mask = torch.arange(512)[None] < 500
    found = sequence(torch.full((1, 512), -1.5, dtype=torch.bfloat16), Rows.build(ids[:, :1], mask[:, :1], ids, mask))
    assert found.dtype == torch.float32 and found.tolist() == [-750.0]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: TiltTarget(0.0), "beta must be positive"),
        (lambda: PosteriorTarget(-1.0), "gamma must be positive"),
        (lambda: LogLinearTarget(("a",), (1.0, 2.0)), "1 models need as many weights, not 2"),
        (lambda: BestOfNTarget(0), "n of at least 1"),
        (lambda: MomentTarget(("a",), (0.1, 0.2)), "1 features need as many moments, not 2"),
        (lambda: MomentTarget(("a",), (0.1,), (1.0, 2.0)), "as many multipliers"),
        (lambda: MomentTarget(fit_batches=0), "fit_batches must be at least 1"),
        (lambda: MomentTarget(track=-1.0), "track must not be negative"),
        (lambda: MomentFeatures(("a", "a")), "each of them once"),
    ],
)
def test_wrong_settings(make, what):
    with pytest.raises(ValueError, match=what):
        make()
