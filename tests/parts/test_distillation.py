"""Distillation losses against the numbers of their papers, worked out by hand on five outcomes."""

import math

import pytest
import torch
from tests.recipes.exact import FIVE, POLICY, REF, outcomes

from keel.core.rows import Rows
from keel.method import Method
from keel.parts.advantages.teacher import TeacherAdvantage
from keel.parts.rewards.predictions import EarlierPredictions
from keel.parts.terms.distillation import (
    BalancedKL,
    ListwiseDistillation,
    MixedTarget,
    StoredDivergence,
    TeacherDivergence,
)
from keel.parts.terms.distillation_batch import (
    RelationalMatch,
    SinkhornDistillation,
    gram_match,
    jensen_shannon,
    sinkhorn_plan,
)
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand, VocabularyDivergence
from keel.parts.weights.drawn import MixtureWeight
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.statistics.teachers import Binned, LogProbsAt

TEACHER = torch.tensor([0.05, 0.45, 0.10, 0.25, 0.15], dtype=torch.float64)
SURE = torch.tensor([0.02, 0.80, 0.05, 0.08, 0.05], dtype=torch.float64)
ALIKE = 5.1e-7  # six digits


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def given(label: int = 1, columns: dict | None = None) -> Rows:
    """One row of one token."""
    token = torch.tensor([[label]])
    one = torch.ones_like(token, dtype=torch.bool)
    weight = torch.ones(1, dtype=torch.float64)
    return Rows.build(torch.zeros_like(token), one, token, one, weight=weight, columns=columns or {})


def found(penalty, policy=POLICY, teacher=TEACHER, rows: Rows | None = None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the logits, through the engine."""
    rows = given() if rows is None else rows
    models = {"policy": outcomes(policy), "teacher": outcomes(teacher)}
    method = Method(kind="supervised", models={"teacher": _Any()}, terms={"x": Summand(penalty, 1.0)})
    engine = Engine(models)
    frozen = engine.measure(method.frozen_needs(several_updates=True), rows)
    loss, _ = engine.step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    return float(loss), models["policy"].table.grad.flatten()


class _Any:
    """A source that nobody builds."""

    def __call__(self) -> None: ...


# -- BD-KD -----------------------------------------------------------------------------------------------------------


def test_balanced_kl_of_a_diffuse_policy_and_of_a_sure_one():
    assert found(BalancedKL())[0] == pytest.approx(0.196166, abs=ALIKE)
    assert found(BalancedKL(), SURE)[0] == pytest.approx(0.872954, abs=ALIKE)
    assert found(TeacherDivergence("kl_ref_policy"))[0] == pytest.approx(0.064103, abs=ALIKE)
    assert found(TeacherDivergence("kl_policy_ref"))[0] == pytest.approx(0.066031, abs=ALIKE)
    assert found(TeacherDivergence("kl_ref_policy"), SURE)[0] == pytest.approx(0.305866, abs=ALIKE)
    assert found(TeacherDivergence("kl_policy_ref"), SURE)[0] == pytest.approx(0.261223, abs=ALIKE)


@pytest.mark.parametrize(
    ("policy", "kind", "change"),
    [
        (SURE, "kl_ref_policy", 0.192576),
        (SURE, "kl_policy_ref", 0.137883),
        (POLICY, "kl_ref_policy", -0.022408),
        (POLICY, "kl_policy_ref", -0.023125),
    ],
)
def test_the_stronger_term_closes_the_gap_of_the_entropies_faster(policy, kind, change):
    entropy = -(policy * policy.log()).sum()
    slope = -policy * (policy.log() + entropy)
    assert float(-(slope * found(TeacherDivergence(kind), policy)[1]).sum()) == pytest.approx(change, abs=ALIKE)


def test_equal_weights_are_jeffreys():
    for policy in (POLICY, SURE):
        both, wanted = found(BalancedKL(nu=1.0), policy), found(TeacherDivergence("jeffreys"), policy)
        assert both[0] == pytest.approx(wanted[0], abs=1e-12)
        torch.testing.assert_close(both[1], wanted[1], rtol=0, atol=1e-12)


def test_equal_entropies_take_the_second_branch():
    turned = TEACHER[[1, 0, 2, 3, 4]]
    want = (
        found(TeacherDivergence("kl_ref_policy"), turned)[0] + 2 * found(TeacherDivergence("kl_policy_ref"), turned)[0]
    )
    assert found(BalancedKL(), turned)[0] == pytest.approx(want, abs=1e-12)


# -- Kullback and Leibler, by R1 and R3 ------------------------------------------------------------------------------


def test_the_divergences_of_the_tables():
    wanted = {
        "kl_policy_ref": 0.379246,
        "kl_ref_policy": 0.405530,
        "js": 0.091813,
        "js:0.1": 0.035285,
        "js:0.9": 0.033531,
    }
    for kind, value in wanted.items():
        assert found(TeacherDivergence(kind), teacher=REF)[0] == pytest.approx(value, abs=ALIKE)
    reverse = vector(-0.176554, -0.059077, -0.100039, 0.134261, 0.201410)
    torch.testing.assert_close(found(TeacherDivergence("kl_policy_ref"), teacher=REF)[1], reverse, rtol=0, atol=ALIKE)
    torch.testing.assert_close(found(TeacherDivergence(), teacher=REF)[1], POLICY - REF, rtol=0, atol=1e-12)


def test_the_factor_of_the_temperature_keeps_the_size_of_the_gradient():
    plain = found(VocabularyDivergence("kl_ref_policy", "teacher"))
    assert found(TeacherDivergence())[0] == plain[0]
    at_two = found(TeacherDivergence(temperature=2.0, squared=False))
    squared = found(TeacherDivergence(temperature=2.0))
    assert squared[0] == pytest.approx(4 * at_two[0], rel=1e-12)
    far = found(TeacherDivergence(temperature=1000.0))[1]  # of Hinton et al.: (z - zt) / V, centred
    gap = POLICY.log() - TEACHER.log()
    torch.testing.assert_close(far, (gap - gap.mean()) / 5, rtol=1e-2, atol=1e-4)


# -- PLD -------------------------------------------------------------------------------------------------------------


def test_a_ranking_through_the_engine():
    s, t = vector(1, 2, 0.5, -1, 0).softmax(0), vector(1.5, 2.5, 0, -0.5, 1).softmax(0)
    loss, grad = found(ListwiseDistillation(k=None), s, t, given(0))
    assert loss == pytest.approx(0.687482, abs=ALIKE)
    torch.testing.assert_close(grad, vector(-0.169299, -0.048045, 0.180882, 0.050991, -0.014528), rtol=0, atol=ALIKE)
    one_hot = vector(1, 1e-300, 1e-300, 1e-300, 1e-300)
    loss, grad = found(ListwiseDistillation(), s, one_hot, given(0))
    wanted, nll = found(NegativeLogLikelihood(), s, t, given(0))
    assert loss == pytest.approx(1.574438, abs=ALIKE) and loss == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(grad, nll, rtol=0, atol=1e-12)


# -- PS-KD -----------------------------------------------------------------------------------------------------------

EARLIER = vector(0.1, 0.6, 0.2, 0.05, 0.05)


def mixed(share: float, earlier=EARLIER) -> tuple[float, torch.Tensor]:
    columns = {
        "teacher_ids": torch.arange(5)[None, None],
        "teacher_logp": earlier.log()[None, None],
        "target_share": vector(share),
    }
    return found(MixedTarget(), rows=given(1, columns))


@pytest.mark.parametrize(
    ("share", "target", "loss"),
    [(0.4, (0.04, 0.84, 0.08, 0.02, 0.02), 1.315125), (0.8, (0.08, 0.68, 0.16, 0.04, 0.04), 1.426277)],
)
def test_a_mixed_target_by_hand(share, target, loss):
    value, grad = mixed(share)
    assert value == pytest.approx(loss, abs=ALIKE)
    torch.testing.assert_close(grad, POLICY - vector(*target), rtol=0, atol=1e-12)


def test_a_prediction_that_has_improved_weighs_the_label_down():
    label = 1 - 0.4 * (1 - EARLIER[1]) / (1 - POLICY[1])
    assert float(label) == pytest.approx(0.771429, abs=ALIKE)
    assert float(mixed(0.4)[1][1] / (POLICY[1] - 1)) == pytest.approx(float(label), abs=1e-12)


def test_without_a_share_or_of_the_label_itself_it_is_cross_entropy():
    wanted = found(NegativeLogLikelihood())
    for got in (mixed(0.0), mixed(0.7, vector(0, 1, 0, 0, 0))):
        assert got[0] == pytest.approx(wanted[0], abs=1e-12)
        torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-12)


def predicted(rows: Rows, policy=POLICY, k: int = 5) -> tuple[EarlierPredictions, Stats]:
    item = EarlierPredictions(0.8, 300, k)
    return item, Engine({"old": outcomes(policy)}).measure(item.needs, rows)


def test_the_memory_is_read_before_it_is_written():
    rows = given()
    item, stats = predicted(rows)
    state = item.init()
    first = item(rows, stats, state).columns
    assert float(first["target_share"]) == pytest.approx(0.002667, abs=ALIKE)
    assert first["teacher_ids"][0, 0, 0] == 1 and first["teacher_logp"][0, 0].exp().tolist() == [1, 0, 0, 0, 0]
    state = item.observe(rows, stats, {}, state)
    again, later = predicted(rows, TEACHER)
    second = again(rows, later, state).columns
    order = second["teacher_ids"][0, 0].argsort()
    torch.testing.assert_close(
        second["teacher_logp"][0, 0][order].exp(), POLICY, rtol=0, atol=1e-7
    )  # not the teacher's
    for _ in range(148):
        state = item.observe(rows, stats, {}, state)
    assert float(item(rows, stats, state).columns["target_share"]) == pytest.approx(0.4, abs=1e-12)
    for _ in range(400):
        state = item.observe(rows, stats, {}, state)
    assert float(item(rows, stats, state).columns["target_share"]) == pytest.approx(0.8, abs=1e-12)


def test_the_memory_goes_by_the_example_and_not_by_the_place():
    tokens = torch.tensor([[0, 1], [2, 0], [3, 0]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    ids = torch.zeros(3, 1, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, tokens, mask, data_index=torch.tensor([7, 3, 9]))
    item = EarlierPredictions(k=2)
    p = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
    stats = Stats({item.needs[0]: p})
    state = item.observe(rows, stats, {}, item.init())
    order = torch.tensor([2, 0])
    there = item(rows.select(order), Stats({item.needs[0]: p[order]}), state).columns
    torch.testing.assert_close(there["teacher_logp"][:, :, :], p[order][..., 2:4])
    # another completion of example 9 begins anew; a narrower batch reads the same memory
    changed = rows.with_(tokens=torch.tensor([[0, 1], [2, 0], [4, 0]]))
    begun = item(changed.select(torch.tensor([2])), Stats({item.needs[0]: p[2:]}), state).columns
    assert begun["teacher_ids"][0, 0, 0] == 4 and begun["target_share"][0] == pytest.approx(0.8 / 3)
    narrow = rows.select(torch.tensor([1])).trim()
    one = item(narrow, Stats({item.needs[0]: p[1:2, :1]}), state).columns
    torch.testing.assert_close(one["teacher_logp"], p[1:2, :1, 2:4])
    state = item.observe(changed, stats, {}, state)
    assert state["visits"].tolist() == [2, 2, 1] and state["index"].tolist() == [7, 3, 9]


def test_the_memory_of_an_example_that_comes_twice_does_not_depend_on_the_order():
    ids = torch.zeros(2, 1, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, torch.tensor([[1], [2]]), ids == 0, data_index=torch.tensor([5, 5]))
    item = EarlierPredictions(k=2)
    stats = Stats({item.needs[0]: torch.arange(10.0).reshape(2, 1, 5)})
    turned = torch.tensor([1, 0])
    one = item.observe(rows, stats, {}, item.init())
    two = item.observe(rows.select(turned), stats.select(turned), {}, item.init())
    assert one["index"].tolist() == [5] and all(torch.equal(one[name], two[name]) for name in one)


# -- from stored tokens ----------------------------------------------------------------------------------------------


def stored(kind: str, tail: str, k: int, policy=POLICY) -> tuple[float, torch.Tensor]:
    values, ids = TEACHER.topk(k)
    rest = (TEACHER.sum() - values.sum()).clamp(min=0).log() if k < 5 else vector(-math.inf)[0]
    columns = {
        "teacher_ids": ids[None, None],
        "teacher_logp": values.log()[None, None],
        "teacher_rest": rest[None, None],
    }
    return found(StoredDivergence(kind, tail), policy, rows=given(1, columns))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize(
    "kind", ["kl_ref_policy", "kl_policy_ref", "js:0.1", "alpha:0.5", "jeffreys", "chi2_policy_ref"]
)
def test_all_tokens_are_the_whole_divergence(kind, tail):
    wanted, got = found(TeacherDivergence(kind)), stored(kind, tail, 5)
    assert got[0] == pytest.approx(wanted[0], abs=1e-12)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-12)


def test_the_tail_is_one_outcome_or_none():
    p, q = POLICY[[1, 3]], TEACHER[[1, 3]]
    rest = (1 - p.sum(), 1 - q.sum())
    bucket = float((q * (q / p).log()).sum() + rest[1] * (rest[1] / rest[0]).log())
    assert stored("kl_ref_policy", "bucket", 2)[0] == pytest.approx(bucket, abs=1e-12)
    p, q = p / p.sum(), q / q.sum()
    assert stored("kl_ref_policy", "renormalise", 2)[0] == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-12)
    assert bucket < found(TeacherDivergence())[0]
    # the mass that the policy has elsewhere costs nothing once it is renormalised away
    lost = vector(0.5, 0.09, 0.20, 0.05, 0.16)
    lost[[1, 3]] = 0.14 * TEACHER[[1, 3]] / TEACHER[[1, 3]].sum()
    assert stored("kl_ref_policy", "renormalise", 2, lost)[0] == pytest.approx(0, abs=1e-12)
    assert stored("kl_ref_policy", "bucket", 2, lost)[0] > 0.5


@pytest.mark.parametrize("kind", ["kl_ref_policy", "js"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_the_gradient_of_a_stored_divergence(kind, tail):
    _, grad = stored(kind, tail, 2)
    for v in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[v] = 1e-6
        up, down = (stored(kind, tail, 2, (POLICY.log() + s * step).softmax(0))[0] for s in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(float(grad[v]), abs=1e-8)


def test_rows_without_the_columns_are_refused():
    stats = Stats({LogProbsAt("teacher_ids", rest=True): torch.zeros(1, 1, 3), LogProbsAt(): torch.zeros(1, 1, 2)})
    with pytest.raises(ValueError, match="teacher_ids"):
        StoredDivergence()(given(), stats)
    with pytest.raises(ValueError, match="teacher_ids"):
        MixedTarget()(given(), stats)


# -- SinKD -----------------------------------------------------------------------------------------------------------

ZS = torch.tensor([[2, 0, -1], [0, 1, 0.5], [-1, 0, 2]], dtype=torch.float64)
ZT = torch.tensor([[3, 0, -2], [0, 2, 0], [0, -1, 2]], dtype=torch.float64)


def transport(own=ZS, teacher=ZT, epsilon: float = 0.1, iterations: int = 20) -> tuple[float, torch.Tensor]:
    """Cost at mass N, and the plan, at temperature 2."""
    cost = torch.cdist((own / 2).softmax(-1), (teacher / 2).softmax(-1), p=1)
    one = torch.ones(len(own), dtype=torch.float64)
    plan = sinkhorn_plan(cost, one, one, epsilon, iterations)
    return float((plan * cost).sum()), plan


def test_transport_by_hand():
    value, plan = transport()
    assert value == pytest.approx(0.784998, abs=ALIKE) and float(plan.sum()) == pytest.approx(3, abs=1e-9)
    cost = torch.cdist((ZS / 2).softmax(-1), (ZT / 2).softmax(-1), p=1)
    assert cost.diagonal().tolist() == pytest.approx([0.275251, 0.313776, 0.181959], abs=ALIKE)
    assert transport(epsilon=1e-3)[0] == pytest.approx(0.770986, abs=ALIKE)  # the best assignment
    assert transport(ZT)[0] == pytest.approx(0.000347, abs=ALIKE)
    assert transport(ZS, ZS)[0] == pytest.approx(0.003818, abs=ALIKE)
    assert transport(ZS[:1], ZT[:1])[0] == pytest.approx(0.275251, abs=ALIKE)
    assert transport(ZS[[2, 0, 1]])[0] == pytest.approx(value, abs=1e-12)


def batch(own=ZS, teacher=ZT, extra: int = 0) -> tuple[Rows, Stats]:
    """Three positions in two rows; the padding holds anything."""
    mask = torch.tensor([[True, True] + [False] * extra, [True, False] + [False] * extra])
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    rows = Rows.build(tokens[:, :1], mask[:, :1] | True, tokens, mask, weight=torch.ones(2, dtype=torch.float64))

    def placed(z, temperature):
        out = torch.full((*mask.shape, 3), 9.0, dtype=torch.float64)
        out[mask] = (z / temperature).softmax(-1)
        return out

    stats = {}
    for bins, heat in ((1024, 2.0), (256, 1.0)):
        stats[Binned(bins, temperature=heat)] = placed(own, heat)
        stats[Binned(bins, ("teacher",), heat)] = placed(teacher, heat)
    return rows, Stats(stats)


def test_the_term_is_the_transport_per_unit_of_mass():
    for extra in (0, 3):
        assert float(SinkhornDistillation(coef=1.0)(*batch(extra=extra))) == pytest.approx(0.784998 / 3, abs=ALIKE)
    rows, stats = batch()
    nothing = SinkhornDistillation()(rows.with_(mask=torch.zeros_like(rows.mask)), stats)
    assert float(nothing) == 0.0


def test_the_gradient_goes_through_cost_and_plan():
    rows, stats = batch()
    key = Binned(1024, temperature=2.0)
    for item, name in (
        (SinkhornDistillation(1.0), key),
        (RelationalMatch(1.0), Binned(256)),
        (RelationalMatch(1.0, "gram"), Binned(256)),
    ):
        leaf = stats[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(item(rows, stats.merged({name: leaf})), leaf)
        for place in rows.mask.nonzero().tolist():
            for v in range(3):
                step = torch.zeros_like(leaf)
                step[place[0], place[1], v] = 1e-6
                up, down = (float(item(rows, stats.merged({name: stats[name] + s * step}))) for s in (1, -1))
                assert (up - down) / 2e-6 == pytest.approx(float(grad[place[0], place[1], v]), abs=1e-7)
        assert not bool(grad[~rows.mask].any())


# -- relations -------------------------------------------------------------------------------------------------------


def test_relations_by_hand():
    assert float(gram_match(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))) == pytest.approx(0.25, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    u, v = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind(0)
    torch.testing.assert_close(gram_match(u, v @ turn), gram_match(u, v))
    assert gram_match(u, torch.rand(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).ndim == 0
    assert float(jensen_shannon(torch.stack([POLICY, REF]))[0, 1]) == pytest.approx(0.091813, abs=ALIKE)


def test_the_mean_over_pairs_of_positions():
    p, q = ZS.softmax(-1), ZT.softmax(-1)
    gaps = [float(jensen_shannon(p)[i, j] - jensen_shannon(q)[i, j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    for extra in (0, 2):
        assert float(RelationalMatch(1.0)(*batch(extra=extra))) == pytest.approx(sum(gaps) / 3, abs=1e-12)
    assert float(RelationalMatch(1.0)(*batch(ZT))) == pytest.approx(0, abs=1e-12)
    assert float(RelationalMatch(1.0)(*batch(ZT[:, [2, 0, 1]]))) == pytest.approx(0, abs=1e-12)  # tokens renamed


# -- G-OPD -----------------------------------------------------------------------------------------------------------

SEQUENCES = FIVE.rows()


def advantages(item: TeacherAdvantage) -> torch.Tensor:
    rows = outcomes(POLICY).weighted(SEQUENCES)
    models = {"old": outcomes(POLICY), "teacher": outcomes(TEACHER), "ref": outcomes(REF)}
    return item(rows, Engine(models).measure(item.needs, rows)).advantage.flatten()


def test_the_advantage_past_the_teacher_by_hand():
    found = advantages(TeacherAdvantage(1.25))
    torch.testing.assert_close(found, vector(-1.213008, 0.552412, -0.578752, 0.229073, -0.013029), rtol=0, atol=ALIKE)
    slope = POLICY * (found - (POLICY * found).sum())
    torch.testing.assert_close(slope, vector(-0.122528, 0.162042, -0.088654, 0.054200, -0.005060), rtol=0, atol=ALIKE)


def test_at_one_the_base_is_not_read():
    assert LogProb(of=("ref",)) not in TeacherAdvantage(1.0).needs
    torch.testing.assert_close(advantages(TeacherAdvantage(1.0)), (TEACHER / POLICY).log())
    torch.testing.assert_close(advantages(TeacherAdvantage(0.0)), (REF / POLICY).log())


def test_later_tokens_by_hand():
    mask = torch.tensor([[True, True, False, True]])
    ids = torch.zeros_like(mask, dtype=torch.long)
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    gain = vector(1, 2, 100, 4)[None]
    stats = Stats({LogProb(of=("old",)): torch.zeros_like(gain), LogProb(of=("teacher",)): gain})

    def of(**settings) -> list[float]:
        return TeacherAdvantage(**settings)(rows, stats).advantage[0].tolist()

    assert of() == [1, 2, 0, 4]
    assert of(gamma=1.0) == [7, 6, 0, 4]
    assert of(gamma=0.5) == [3, 4, 0, 4]
    assert of(gamma=1.0, own=False) == [6, 4, 0, 0]
    assert of(gamma=1.0, own=False, mean=True) == [3, 4, 0, 0]
    assert of(gamma=1.0, mean=True) == pytest.approx([7 / 3, 3, 0, 4])
    assert of(gamma=0.0, own=False) == [0, 0, 0, 0]


# -- weights of a mixture --------------------------------------------------------------------------------------------


def test_weights_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    ids = torch.zeros_like(mask, dtype=torch.long)
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask, logp={"mixture": vector(-1, -1, -1, -9)[None]})
    old = vector(-1 + math.log(2), -1 + math.log(3), -1 - math.log(4), 5)[None]
    stats = Stats({LogProb(of=("old",)): old})

    def of(level, cap=None):
        return MixtureWeight(level, cap)(rows, stats)[0].tolist()

    assert of("token") == pytest.approx([2, 3, 0.25, 1])
    assert of("prefix") == pytest.approx([1, 2, 6, 1])
    assert of("sequence") == pytest.approx([1.5, 1.5, 1.5, 1])
    assert of("prefix", 2.5) == pytest.approx([1, 2, 2.5, 1])
    assert MixtureWeight("token")(rows.with_(logp={}), stats)[0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TeacherDivergence("nothing"),
        lambda: TeacherDivergence(temperature=0.0),
        lambda: TeacherDivergence(correction="all"),
        lambda: BalancedKL(nu=0.5),
        lambda: BalancedKL(temperature=-1.0),
        lambda: ListwiseDistillation(k=0),
        lambda: ListwiseDistillation(temperature=0.0),
        lambda: StoredDivergence(tail="none"),
        lambda: SinkhornDistillation(coef=-1.0),
        lambda: SinkhornDistillation(epsilon=0.0),
        lambda: SinkhornDistillation(bins=0),
        lambda: RelationalMatch(coef=-1.0),
        lambda: RelationalMatch(space="l2"),
        lambda: RelationalMatch(bins=0),
        lambda: EarlierPredictions(alpha=1.5),
        lambda: EarlierPredictions(epochs=0),
        lambda: EarlierPredictions(k=0),
        lambda: TeacherAdvantage(lam=-1.0),
        lambda: TeacherAdvantage(gamma=1.5),
        lambda: MixtureWeight("row"),
        lambda: MixtureWeight(cap=0.0),
    ],
)
def test_bad_settings(make):
    with pytest.raises((ValueError, TypeError)):
        make()


def test_a_wrong_temperature_of_the_teacher_is_named():
    with pytest.raises(ValueError, match="teacher_temperature must be positive, not 0"):
        TeacherDivergence(teacher_temperature=0.0)
