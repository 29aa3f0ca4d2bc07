"""Bundles and quantiles, consistency of answers: numbers by hand, limits, what must not matter."""

import math

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows, k8_stats
from tests.recipes.exact import groups as sampled_groups
from tests.worlds import online_rows, outcome

from keel.core.aggregate import Aggregation, Groups
from keel.core.rows import Rows
from keel.method import Method
from keel.parts.advantages.consistency import AnswerConsistency, answer_entropy, answers
from keel.parts.advantages.group import GroupCentre, Returns
from keel.parts.advantages.risk import BundleRisk, Papers, credit_shares, papers, risk
from keel.parts.terms.second import SecondSurrogate
from keel.parts.terms.surrogate import Clipped, Surrogate, Unclipped
from keel.parts.weights.importance import TruncatedImportance
from keel.parts.weights.mismatch import StaleNegatives
from keel.recipes.registry import recipe_named
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

DIGITS = 5.1e-7
OLD = LogProb(of=("old",))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- risk ------------------------------------------------------------------------------------------------------------

TOTALS = double(0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [(0.0, [0, 0, 1.666667, 3.333333, 5, 5]), (1.5, [-3, 0, 0.666667, 1.333333, 2, 2])],
)
def test_gain_of_a_bundle(tail, wanted):
    found = risk(TOTALS, torch.tensor(1.0), torch.tensor(4.0), 0.2, 0.8, tail)
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"natural": True}, [-5, -5, -3.333333, -1.666667, 0, 0]),
        ({"seeking": True}, [0, 0, 1.666667, 3.333333, 5, 10]),
        ({"natural": True, "tail": 1.5}, [-5, -2, -1.333333, -0.666667, 0, 0]),
    ],
)
def test_gains_of_variants(settings, wanted):
    """X = 0 .. 5 as papers of one prompt each, q = 1 and 4: the range's width is 3 / .6 = 5, the tail above 1 / .2."""
    rows = sampled_groups(torch.arange(6)[None], TOTALS)
    part = BundleRisk(1, credit="same", scale=False, **{"tail": 0.0, **settings})
    state = {"low": torch.tensor(1.0), "high": torch.tensor(4.0)}
    found = part(rows, Stats(), state).advantage[:, 0]
    assert found.tolist() == pytest.approx(wanted, abs=DIGITS)


def test_the_gain_is_the_gradient_of_the_range():
    """X ~ N(theta, 1) with its exact quantiles: d RVaR / d theta = 1."""
    q = 0.8416212335729143
    x = torch.linspace(-9, 9, 200001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * float(x[1] - x[0])
    found = (density * x * risk(x, torch.tensor(-q), torch.tensor(q), 0.2, 0.8, 0.0)).sum()
    assert float(found) == pytest.approx(1.0, abs=1e-6)


def test_credit_of_a_bundle():
    centred = double(1 - 0.9, 1 - 0.5, 0 - 0.4, 1 - 0.7, 1 - 0.2)
    one = Papers(torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.float64))
    found = credit_shares(torch.full_like(centred, 2.0), centred, one)
    assert found.tolist() == pytest.approx([0.153846, 0.769231, -0.615385, 0.461538, 1.230769], abs=DIGITS)
    level = credit_shares(torch.full_like(centred, 2.0), double(0.1, -0.1, 0, 0, 0), one)
    assert level.tolist() == pytest.approx([0.4] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_of_nothing_are_equal_shares_in_any_precision(dtype):
    """Centred rewards .1, .2 and -.3 add up to 1.5e-8 in single precision."""
    one = Papers(torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.float64))
    centred = torch.tensor([0.1, 0.2, -0.3], dtype=dtype)
    assert credit_shares(torch.ones(3, dtype=dtype), centred, one).tolist() == pytest.approx([1 / 3] * 3)


def lonely(reward) -> Rows:
    """One completion for each of several prompts."""
    return sampled_groups(torch.arange(len(reward))[:, None], double(*reward))


def test_quantiles_are_tracked():
    part = BundleRisk(1, low=0.2, high=0.8, rate=0.1)
    state = {"low": torch.tensor(2.0).double(), "high": torch.tensor(4.0).double()}
    after = part.observe(lonely([3, 1, 2, 5, 0, 4]), Stats(), {}, state)
    assert float(after["low"]) == pytest.approx(1.986667, abs=DIGITS)  # 2 + .1 (.2 - 2 / 6)
    assert float(after["high"]) == pytest.approx(4 + 0.1 * (0.8 - 4 / 6), abs=1e-9)
    first = part.observe(lonely([3, 1, 2, 5, 0, 4]), Stats(), {}, part.init())
    assert (float(first["low"]), float(first["high"])) == (1.0, 4.0)
    empty = part.observe(lonely([math.nan] * 3), Stats(), {}, part.init())
    assert bool(empty["low"].isnan())


def test_the_batch_is_judged_by_the_quantiles_of_before():
    part = BundleRisk(1, credit="same", scale=False)
    rows = sampled_groups(torch.arange(6)[None], TOTALS)
    state = {"low": torch.tensor(1.0), "high": torch.tensor(4.0)}
    found = part(rows, Stats(), state).advantage[:, 0]
    assert found.tolist() == pytest.approx([-3, 0, 0.666667, 1.333333, 2, 2], abs=DIGITS)


def test_the_whole_range_of_single_prompts_is_reinforce():
    """Levels 0 and 1, no tail: X less its minimum, which is 0 on K8."""
    part = BundleRisk(1, low=0.0, high=1.0, tail=0.0, credit="same", scale=False)
    slots = dict(rollout=Rollout(), surrogate=Surrogate(Unclipped()), aggregation=Aggregation("token_mean"))
    found, plain = (Method(advantage={"a": a}, **slots) for a in (part, Returns()))
    loss = []
    for method in (found, plain):
        stats = k8_stats()
        loss.append(method.loss(method.prepare(k8_rows(), stats, method.initial_states()), stats, {}))
    assert torch.equal(*loss)


def test_a_bundle_has_one_completion_of_each_of_its_prompts():
    rows = sampled_groups(torch.zeros(7, 3, dtype=torch.long), TOTALS)
    rows = rows.with_(data_index=rows.group, row=(rows.row * 7919) % 1000)
    counted = torch.ones(21, dtype=torch.bool)
    counted[4] = False
    found = papers(rows, counted, 3)
    sizes = []
    for paper in found.index[counted].unique():
        members = rows.group[(found.index == paper) & counted]
        assert len(members.unique()) == len(members)
        sizes.append(len(members))
    assert sorted(sizes) in ([2, 3, 3, 4, 4, 4], [3, 3, 3, 3, 4, 4])  # 3 and 4 prompts, one of which lacks a row
    assert int((found.index == found.index[4]).sum()) == 1 and found.share[4] == 0
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    again = papers(rows.select(order), counted[order], 3)
    together = found.index[:, None] == found.index
    assert torch.equal(again.index[:, None] == again.index, together[order][:, order])


def test_advantages_of_a_bundle_by_hand():
    """Two prompts, two completions each: papers (1, 0) and (1, 1) or (1, 1) and (0, 1) by the hashes."""
    rows = sampled_groups(torch.tensor([[5, 0], [5, 5]]), double(0, 0, 0, 0, 0, 1))
    rows = rows.with_(data_index=rows.group, row=torch.tensor([11, 12, 21, 22]))
    state = {"low": torch.tensor(1.0), "high": torch.tensor(2.0)}
    part = BundleRisk(2, tail=0.0, low=0.2, high=0.7, scale=True)
    # X of the papers 2 and 1: gains 1 / .5 and 0 over their deviation sqrt(1 / 2); centred rewards (.5, 0), (-.5, 0)
    found = part(rows, Stats(), state).advantage[:, 0]
    assert found.tolist() == pytest.approx([2 / math.sqrt(0.5), 0, 0, 0], abs=1e-5)
    same = BundleRisk(2, tail=0.0, low=0.2, high=0.7, credit="same", scale=False)(rows, Stats(), state)
    assert same.advantage[:, 0].tolist() == pytest.approx([2, 0, 2, 0])
    each = BundleRisk(2, tail=0.0, low=0.2, high=0.7, credit="std", scale=False)(rows, Stats(), state)
    assert each.advantage[0, 0].item() == pytest.approx(2 / math.sqrt(0.5), abs=1e-5)


def test_bundles_that_are_all_alike_teach_nothing():
    rows = sampled_groups(torch.zeros(4, 3, dtype=torch.long), double(1.0)).with_(data_index=torch.arange(12) // 3)
    assert not BundleRisk(2)(rows, Stats(), BundleRisk().init()).advantage.any()


def test_a_completion_without_a_reward_is_in_no_bundle():
    method = recipe_named("riskpo")(num_generations=4, bundle_size=1)
    rows = online_rows()
    assert not outcome(method, rows).rows.advantage[2].any()


# -- consistency -----------------------------------------------------------------------------------------------------

ANSWERS = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 7, 8])
RIGHT = [1.0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def answered(**known) -> Rows:
    """Four prompts: AABC with A right; AAAA right; DDDD wrong; four different wrong answers."""
    rows = sampled_groups(torch.arange(16).reshape(4, 4), double(*RIGHT))
    return rows.with_(columns={"answer": ANSWERS}, **known)


def local(rows: Rows) -> Rows:
    return GroupCentre()(rows, Stats())


def test_answer_entropy():
    rows = answered()
    found = answer_entropy(answers(rows), Groups.of(rows))
    assert found.tolist() == pytest.approx([1.5, 0, 0, 2], abs=1e-9)


def test_consistency_of_answers():
    """Worth .21875, 1, 0, 0; blend 1, .000045, .000045, 1 before forcing and 0 after it for the tied."""
    across = double(-0.180969, 1.464204, -0.641617, -0.641617).repeat_interleave(4)
    soft = AnswerConsistency(20.0, 0.5, "soft")(local(answered()), Stats())
    weight = double(1 / (1 + math.exp(-20.0)), 4.5398e-05, 4.5398e-05, 1.0).repeat_interleave(4)
    wanted = ((1 - weight) * across).tolist()
    assert soft.columns["global_advantage"][:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(soft.advantage[:, 0], weight * local(answered()).advantage[:, 0], rtol=1e-6, atol=1e-9)
    gentle = AnswerConsistency(5.0, 1.0, "soft")(local(answered()), Stats()).advantage[0, 0]
    assert float(gentle) == pytest.approx(0.924142 * 0.5, abs=DIGITS)
    forced = AnswerConsistency()(local(answered()), Stats()).columns["global_advantage"][4:, 0]
    assert forced.tolist() == pytest.approx(across[4:].tolist(), abs=DIGITS)
    whole = AnswerConsistency(blend="global")(local(answered()), Stats())
    assert whole.columns["global_advantage"][:, 0].tolist() == pytest.approx(across.tolist(), abs=DIGITS)
    assert not whole.advantage.any()
    plain = AnswerConsistency(blend="global", coefficient=False)(local(answered()), Stats())
    assert plain.columns["global_advantage"][0, 0].item() == pytest.approx((0.5 - 0.375) / 0.478714, abs=2e-6)


def test_limits_of_the_midpoint():
    rows = local(answered())
    early, late = (AnswerConsistency(midpoint=m, blend="soft")(rows, Stats()) for m in (-math.inf, math.inf))
    assert torch.equal(early.advantage, rows.advantage) and not early.columns["global_advantage"].any()
    whole = AnswerConsistency(blend="global")(rows, Stats())
    assert torch.equal(late.columns["global_advantage"], whole.columns["global_advantage"])


def test_groups_that_agree_have_a_gradient():
    """GRPO's is 0 on the last three groups."""
    rows = answered()
    live = torch.zeros(16, 1, dtype=torch.float64, requires_grad=True)
    stats = Stats({LogProb(): live, LogProb(of=("old",)): torch.zeros(16, 1, dtype=torch.float64)})
    for name, learns in (("grpo", False), ("copo", True)):
        method = recipe_named(name)(num_generations=4)
        loss = method.loss(method.prepare(rows, stats, {}), stats, {})
        (grad,) = torch.autograd.grad(loss, live)
        assert bool(grad[:4].any()) and bool(grad[4:].any()) is learns
    assert float(grad[4]) < 0 < float(grad[8])  # a right answer goes up, a wrong one down


def test_one_prompt_alone_has_nothing_to_compare():
    rows = local(answered().select(torch.arange(4)))
    found = AnswerConsistency(blend="global")(rows, Stats())
    assert not found.columns["global_advantage"].any()


def test_answers_from_tokens():
    ids = torch.tensor([[7, 1, 2, 9], [1, 2, 9, 9], [3, 1, 2, 9], [2, 9, 9, 9]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [True, True, True, False],
                         [True, False, False, False]])  # fmt: skip
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    for tail, wanted in ((None, [0, 1, 2, 3]), (2, [0, 0, 0, 1]), (1, [0, 0, 0, 0]), (9, [0, 1, 2, 3])):
        for more in (rows, rows.padded(1, 7)):
            found = answers(more, tail)
            first = {int(a): i for i, a in reversed(list(enumerate(found.tolist())))}
            pattern = [first[a] for a in found.tolist()]
            assert pattern == [wanted.index(w) for w in wanted], tail


def test_both_steps_of_copo_are_corrected_for_the_sampler():
    """Each token's loss of both steps times min(w, 2); and a weight that asks for the sign sees that of either."""
    answer = torch.tensor([0, 0, 1, 1, 4, 4, 4, 5])  # on K8 the second group is then the worse one
    rows, stats = k8_rows().with_(columns={"answer": answer}), k8_stats()
    plain = recipe_named("copo")(num_generations=4, blend="soft", midpoint=1.0, sharpness=2.0)
    states = plain.initial_states()
    prepared = plain.prepare(rows, stats, states)
    seen: dict[str, torch.Tensor] = {}
    plain.contributions(prepared, stats, states, seen)
    policy, across = seen["term/policy"].detach(), seen["term/global"].detach()
    wanted = (policy + across) * TruncatedImportance(2.0)(prepared, stats)
    corrected = plain.replacing(weights={"importance": TruncatedImportance(2.0)})
    found = corrected.loss(prepared, stats, states)
    per_row = (wanted * MASK).sum(1) / prepared.lengths
    assert float((across * MASK).abs().max()) > 0.1
    assert float(found.detach()) == pytest.approx(float(per_row.mean()), abs=1e-12)
    punished = corrected.replacing(weights={"stale": StaleNegatives(0.0, "old")})
    noted: dict[str, torch.Tensor] = {}
    punished.contributions(prepared, stats, states, noted)
    gone = prepared.columns["global_advantage"][:, 0] < 0
    moved = (stats[OLD] - stats[LogProb()].detach()).where(MASK, 0.0).sum(1) > 0
    assert bool((gone & moved).any()) and bool((gone & ~moved).any())
    kept = torch.where((gone & moved)[:, None], 0.0, across)
    torch.testing.assert_close(noted["term/global"].detach() * MASK, kept * MASK)


def test_a_second_surrogate_is_clipped_for_itself():
    stats, rows = k8_stats(), GroupCentre()(k8_rows(), Stats())
    rows = rows.with_(columns={"global_advantage": -rows.advantage})
    found = SecondSurrogate(Clipped(0.2))(rows, stats)
    wanted = -Surrogate(Clipped(0.2))(rows.with_(advantage=-rows.advantage), stats)
    assert torch.equal(found, wanted) and not torch.equal(found, -wanted)
    (grad,) = torch.autograd.grad(Aggregation()(found, rows), stats[LogProb()])
    assert float(grad.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: BundleRisk(0), "bundle_size"),
        (lambda: BundleRisk(low=0.9), "low < high"),
        (lambda: BundleRisk(low=0.0), "tail"),
        (lambda: BundleRisk(rate=2.0), "rate"),
        (lambda: BundleRisk(credit="none"), "credit"),
        (lambda: AnswerConsistency(blend="hard"), "blend"),
        (lambda: AnswerConsistency(sharpness=-1.0), "sharpness"),
        (lambda: AnswerConsistency(tail=0), "tail"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises((ValueError, TypeError), match=what):  # the annotations are checked in tests, too
        make()
