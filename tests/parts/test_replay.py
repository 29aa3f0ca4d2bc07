"""Replay: what stored rows weigh, how they are kept, and that fresh rows do not notice them."""

import math
from dataclasses import replace

import pytest
import torch
from tests.parts.k8 import k8_rows, k8_stats
from tests.worlds import assert_same, outcome, rows_for

from keel.core.aggregate import Aggregation
from keel.core.config import from_config, to_config
from keel.core.errors import MethodError
from keel.core.rows import REPLAYED, Rows, Stream, cat
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre, GroupStd, LeaveOneOut, Returns
from keel.parts.replay.memory import from_tensors, joined, to_tensors
from keel.parts.replay.stored import OLD, Replay, importance, replayed, size
from keel.parts.terms.penalties import NegativeEntropy, SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, LogLikelihood, Surrogate, Unclipped
from keel.parts.weights.importance import TruncatedImportance
from keel.recipes.registry import recipe_named
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.verify.objectives import Objective
from keel.verify.population import expected_update
from keel.verify.recipes import compare, worlds

PI, MU, R = (0.7, 0.3), (0.4, 0.6), (1.0, 0.0)
LIVE = LogProb()


def two(weight: tuple[float, float] = MU, dtype: torch.dtype = torch.float64) -> tuple[Rows, Stats]:
    """Both outcomes of one token, replayed, each as often as mu draws it; the policy is pi."""
    ids = torch.arange(2)[:, None]
    mask = torch.ones(2, 1, dtype=torch.bool)
    rows = Rows.build(
        torch.zeros_like(ids),
        mask,
        ids,
        mask,
        group=torch.zeros(2, dtype=torch.long),
        weight=torch.tensor(weight, dtype=dtype),
        reward=torch.tensor(R, dtype=dtype)[:, None],
        logp={"behaviour": torch.tensor(MU, dtype=dtype).log()[:, None]},
        columns={REPLAYED: torch.ones(2, dtype=torch.bool)},
        advantage=torch.tensor(R, dtype=dtype)[:, None],
    )
    live = torch.tensor(PI, dtype=dtype).log()[:, None]
    return rows, Stats({LIVE: live.clone().requires_grad_(), OLD: live})


def method(replay: Replay | None, f=None, **slots) -> Method:
    """-Agg[w A f(rho)], A = r."""
    return Method(
        rollout=Rollout(num_generations=2),
        advantage={"returns": Returns()},
        surrogate=Surrogate(f or Unclipped()),
        replay={} if replay is None else {"past": replay},
        **slots,
    )


def reduced(replay: Replay) -> float:
    rows, stats = two()
    return -float(method(replay).loss(rows, stats, {}).detach())


# -- the check of the specification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["sequence", "sequence_mean"])
def test_weights(weighting, dtype):
    rows, stats = two(dtype=dtype)
    found = Replay(weighting=weighting).weights(rows, stats)
    assert found.flatten().tolist() == pytest.approx([1.75, 0.5], abs=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    ("replay", "mean"),
    [
        (Replay(weighting="sequence"), 0.7),
        (Replay(weighting="sequence_mean"), 0.7),
        (Replay(weighting="token"), 0.7),
        (Replay(weighting="truncated", cap=1.5), 0.6),
        (Replay(weighting="truncated", cap=1.5, normalise=True), 2 / 3),
        (Replay(weighting="none"), 0.4),
    ],
)
def test_mean_reward(replay, mean):
    """Importance sampling 0.7 exactly, truncated at 1.5 0.6, self-normalised 2/3, and mu's own 0.4."""
    assert reduced(replay) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("weighting", ["sequence", "sequence_mean", "token", "none"])
def test_effective_share(weighting):
    rows, stats = two()
    assert float(Replay(weighting=weighting).metrics(rows, stats)["replay/ess"]) == pytest.approx(8 / 11, abs=1e-12)
    cut = Replay(weighting="truncated", cap=1.5).metrics(rows, stats)["replay/ess"]
    assert float(cut) == pytest.approx(0.9**2 / (0.4 * 2.25 + 0.6 * 0.25), abs=1e-12)


def test_rows_of_several_tokens():
    """exp of the sum, of the mean, of each; 0 is what nobody recorded."""
    gap = torch.tensor([[0.3, -0.1, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask)
    wanted = {
        "sequence": [[math.exp(0.2)] * 2, [math.exp(0.5)]],
        "sequence_mean": [[math.exp(0.1)] * 2, [math.exp(0.5)]],
        "token": [[math.exp(0.3), math.exp(-0.1)], [math.exp(0.5)]],
        "truncated": [[1.2, math.exp(-0.1)], [1.2]],
        "none": [[1.0, 1.0], [1.0]],
    }
    for weighting, ragged in wanted.items():
        found = importance(gap, rows, weighting, 1.2)
        assert [row[m].tolist() for row, m in zip(found, mask, strict=True)] == [pytest.approx(x) for x in ragged]
    assert bool(importance(gap * 1e4, rows, "sequence").isfinite().all())


def test_the_ratio_of_token_is_clipped_from_who_drew_the_row():
    """pi / mu = 1.75 is beyond 1.2, so the first token, which has earned more, gets no gradient."""
    rows, stats = two()
    for weighting, silent in (("token", True), ("truncated", False)):
        loss = method(Replay(weighting=weighting), Clipped()).loss(rows, stats, {})
        (grad,) = torch.autograd.grad(loss, stats[LIVE])
        assert (float(grad[0]) == 0) is silent


# -- behaviour = current policy --------------------------------------------------------------------------------------


def doubled(dtype: torch.dtype, gap: float = 0.0) -> tuple[Rows, Stats]:
    """K8 fresh, and the same rows replayed, `gap` nats away from who drew them."""
    rows, stats = k8_rows(dtype), k8_stats(dtype)
    old = stats[OLD]
    rows = rows.with_(logp={"behaviour": old})
    again = rows.with_(group=rows.group + 2, logp={"behaviour": old - gap})
    again = again.with_(columns={REPLAYED: torch.ones(8, dtype=torch.bool)})
    both = joined([rows, again])
    live = stats[LIVE].detach()
    return both, Stats({LIVE: torch.cat([live, live]).requires_grad_(), OLD: torch.cat([old, old])})


def grpo(**slots) -> Method:
    return Method(
        rollout=Rollout(num_generations=4),
        advantage={"centre": GroupCentre(), "std": GroupStd(1e-6)},
        surrogate=Surrogate(Clipped()),
        **slots,
    )


def gradient(made: Method, rows: Rows, stats: Stats) -> tuple[torch.Tensor, torch.Tensor]:
    rows = made.prepare(rows, stats, made.initial_states())
    loss = made.loss(rows, stats, made.initial_states())
    return loss.detach(), torch.autograd.grad(loss, stats[LIVE])[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["token", "truncated", "sequence", "sequence_mean", "none"])
def test_rows_of_the_policy_itself_are_fresh_rows_to_the_bit(weighting, dtype):
    """Ratio and weights are exactly 1, so that all is as if the rows had been drawn now."""
    rows, stats = doubled(dtype)
    made = grpo(replay={"past": Replay(weighting=weighting)})
    assert bool((made.replayed.weights(rows, stats) == 1).all())
    fresh = rows.with_(columns={})
    for found, wanted in zip(gradient(made, rows, stats), gradient(grpo(), fresh, stats), strict=True):
        assert torch.equal(found, wanted)


def test_other_weights_do_not_correct_twice():
    rows, stats = doubled(torch.float64, gap=0.1)
    rows = rows.with_(logp={"behaviour": torch.where(rows.mask, rows.logp["behaviour"], 0.0)})
    both = grpo(replay={"past": Replay(weighting="truncated")}, weights={"tis": TruncatedImportance(2.0)})
    alone = grpo(replay={"past": Replay(weighting="truncated")})
    for found, wanted in zip(gradient(both, rows, stats), gradient(alone, rows, stats), strict=True):
        assert torch.equal(found, wanted)
    plain = grpo(weights={"tis": TruncatedImportance(2.0)})
    torch.testing.assert_close(gradient(both, rows, stats), gradient(plain, rows.with_(columns={}), stats))


def test_weights_have_no_gradient_and_padding_does_not_count():
    rows, stats = doubled(torch.float64, gap=0.3)
    live = stats.merged({OLD: stats[OLD].clone().requires_grad_()})
    for weighting in ("truncated", "sequence", "sequence_mean"):
        found = Replay(weighting=weighting, normalise=True).weights(rows, live)
        assert not found.requires_grad and bool((found[~rows.mask] == 1).all()) and bool((found[:8] == 1).all())
    garbage = torch.where(rows.mask, rows.logp["behaviour"], 1e4)
    dirty = rows.with_(logp={"behaviour": garbage})
    for weighting in ("token", "sequence"):
        made = grpo(replay={"past": Replay(weighting=weighting)})
        torch.testing.assert_close(gradient(made, dirty, stats), gradient(made, rows, stats), rtol=0, atol=1e-12)
    nobody = rows.with_(logp={"behaviour": torch.full_like(garbage, math.nan)})
    assert bool(gradient(made, nobody, stats)[1].isfinite().all())


# -- groups, terms, statistics ---------------------------------------------------------------------------------------


def test_groups_keep_their_own_statistics():
    """Advantages of fresh rows are those without any replay, also under a deviation of the batch."""
    rows, stats = doubled(torch.float64)
    rows = rows.with_(reward=torch.cat([rows.reward[:8], 3 * rows.reward[8:] + 1]))
    for scope in ("group", "batch"):
        made = grpo(replay={"past": Replay()}).replacing(advantage={"c": GroupCentre(), "s": GroupStd(0.0, scope)})
        found = made.prepare(rows, stats, {}).advantage
        first = torch.arange(8)
        alone = made.prepare(rows.select(first).with_(columns={}), stats.select(first), {}).advantage
        assert torch.equal(found[:8], alone)
        torch.testing.assert_close(found[8:], alone)  # three times the reward over three times the deviation


def test_terms_read_fresh_rows_alone():
    rows, stats = doubled(torch.float64, gap=0.2)
    stats = stats.merged({LogProb(of=("ref",)): stats[OLD] - 0.1})
    terms = {"kl": Summand(SampledKL("k3"), 1.0)}
    made = grpo(replay={"past": Replay()}, terms=terms, models={"ref": Initial()})
    prepared = made.prepare(rows, stats, {})
    first = torch.arange(8)
    plain = grpo(terms=terms, models={"ref": Initial()})
    wanted = plain.contributions(prepared.select(first).with_(columns={}), stats.select(first), {})
    found = made.contributions(prepared, stats, {})
    assert torch.equal(found["kl"], wanted["kl"]) and not torch.equal(found["policy"], wanted["policy"])
    seen: dict = {}
    made.contributions(prepared, stats, {}, seen)
    alone: dict = {}
    plain.contributions(prepared.select(first).with_(columns={}), stats.select(first), {}, alone)
    assert torch.equal(seen["term/kl"], torch.cat([alone["term/kl"], torch.zeros_like(alone["term/kl"])]))
    assert alone["term/kl"].any() and seen["weight/replay"][8:].any()


def test_no_replay_is_the_method_without():
    plain, none = recipe_named("grpo")(), grpo(replay={"past": Replay(0.0)})
    assert recipe_named("grpo_replay")(share=0.0) == plain
    assert none.replayed is None and none.update_needs() == grpo().update_needs() and none.additive
    rows = rows_for(none)
    one, other = outcome(none, rows), outcome(grpo(), rows)
    assert torch.equal(one.loss, other.loss) and torch.equal(one.grads["policy.table"], other.grads["policy.table"])


def test_the_step_does_not_depend_on_slices():
    made = recipe_named("grpo_replay")(weighting="sequence", num_generations=4)
    rows = rows_for(recipe_named("grpo")())
    again = rows.with_(group=rows.group + 9, columns={REPLAYED: torch.ones(len(rows), dtype=torch.bool)})
    both = joined([rows, again])
    assert made.additive and not made.splits(both) and made.splits(rows)
    assert_same(outcome(made, both, max_tokens=16, additive=False), outcome(made, both))


# -- exact worlds ----------------------------------------------------------------------------------------------------

EXACT = {"scale_rewards": "none", "aggregation": "sequence_mean_token_sum"}


def test_whole_sequences_are_unbiased():
    """All completions under another policy than the present one, weighted: the gradient of E_pi[r], to rounding."""
    world = worlds()["far"]
    wanted = Objective().gradient(world)
    for weighting, exact in (("sequence", True), ("truncated", False), ("sequence_mean", False), ("none", False)):
        made = recipe_named("grpo_replay")(weighting=weighting, **EXACT)
        error = compare("", expected_update(made, world).direction, wanted).relative_error
        assert error < 1e-12 if exact else error > 0.05


def test_replayed_rows_are_part_of_the_expectation():
    world = worlds()["far"]
    none, half = (expected_update(grpo(replay={"past": Replay(s, weighting="none")}), world) for s in (0.0, 0.5))
    assert float((none.direction - half.direction).norm() / none.direction.norm()) > 0.05


# -- the memory ------------------------------------------------------------------------------------------------------


def batch(rewards: list[list[float]], seed: int = 0) -> Rows:
    """Groups of two completions of two tokens."""
    count = 2 * len(rewards)
    ids = torch.arange(count * 2).reshape(count, 2)
    mask = torch.ones(count, 2, dtype=torch.bool)
    return Rows.build(
        ids[:, :1],
        mask[:, :1],
        ids,
        mask,
        group=torch.arange(count) // 2,
        row=torch.arange(count) + 1000 * seed,
        reward=torch.tensor(rewards).reshape(-1, 1),
        logp={"behaviour": torch.full((count, 2), -0.5)},
        columns={"rewards/a b": torch.arange(count).float()},
    )


def filled(part: Replay, batches: int, groups: int = 2) -> dict:
    memory = part.init()
    for step in range(batches):
        memory, _ = part.after(memory, torch.zeros(0, dtype=torch.long), batch([[0.0, 1.0]] * groups, step), step)
    return memory


def test_groups_come_back_as_they_were():
    part = Replay(keep="all")
    memory = filled(part, 3)
    assert size(memory) == 6 and memory["version"].tolist() == [0, 0, 1, 1, 2, 2]
    drawn = part.draw(memory, 3, 3, 0)
    assert memory["version"][drawn].tolist() == [2, 2, 1]
    rows = part.rows_of(memory, drawn)
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2] and rows.row.tolist() == [2000, 2001, 2002, 2003, 1000, 1001]
    assert bool(replayed(rows).all()) and rows.columns["rewards/a b"].tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(rows.tokens[:4], batch([[0.0, 1.0]] * 2).tokens)
    again = part.rows_of(memory, drawn)
    assert all(torch.equal(a, b) for a, b in zip(to_tensors(rows).values(), to_tensors(again).values(), strict=True))


def test_uses_and_age():
    """A use costs `decay` batches; after max_uses uses, or max_lag batches, a group goes."""
    part = Replay(decay=2.0, max_uses=2, max_lag=3)
    memory = filled(part, 2)  # versions 0, 0, 1, 1
    memory, dropped = part.after(memory, torch.tensor([2]), batch([[1.0, 1.0]]), 2)  # tied: not kept
    assert memory["uses"].tolist() == [0, 0, 1, 0] and dropped == 0
    assert part.priority(memory).tolist() == [0, 0, -1, 1]
    assert part.draw(memory, 4, 3, 0).tolist() == [3, 0, 1, 2]
    memory, dropped = part.after(memory, torch.tensor([2]), batch([[0.0, 1.0]], 3), 3)
    assert dropped == 3 and memory["version"].tolist() == [1, 3]  # two are too old for batch 4, one is used up
    assert part.draw(memory, 9, 4, 0).tolist() == [1, 0] and part.draw(memory, 9, 7, 0).tolist() == []


def test_capacity():
    part = Replay(capacity=3, max_lag=None, max_uses=None)
    memory = filled(part, 3)
    assert memory["version"].tolist() == [1, 2, 2] and memory["first"].tolist() == [1000, 2000, 2002]
    assert from_tensors(memory).row.tolist() == [1000, 1001, 2000, 2001, 2002, 2003]


def test_what_is_kept():
    rows = batch([[0.0, 0.0], [0.0, 1.0], [0.0, 0.2], [0.0, 0.6]])
    assert Replay(keep="all").worth_keeping(rows).tolist() == [True] * 4
    assert Replay(keep="mixed").worth_keeping(rows).tolist() == [False, True, True, True]
    assert Replay(keep="best").worth_keeping(rows).tolist() == [False, True, False, True]
    unknown = rows.with_(reward=torch.full_like(rows.reward, math.nan))
    assert not Replay(keep="all").worth_keeping(unknown).any()


def test_candidates_are_not_kept():
    rows = batch([[0.0, 1.0], [0.0, 1.0]])
    rows = rows.with_(stream=torch.where(rows.group == 1, int(Stream.CANDIDATE), rows.stream))
    memory, _ = Replay().after(Replay().init(), torch.zeros(0, dtype=torch.long), rows, 0)
    assert size(memory) == 1


def test_count_is_the_share_over_the_batches():
    for share, fresh in ((0.25, 4), (0.1, 4), (0.5, 3), (0.4, 1)):
        total = sum(Replay(share).count(fresh, step) for step in range(360))
        assert total / (total + 360 * fresh) == pytest.approx(share, abs=1e-3)
    assert [Replay(0.1).count(4, step) for step in range(5)] == [0, 0, 1, 0, 1]


def test_chance_is_that_of_the_group():
    """With noise the order changes from batch to batch, and not with the place of a group in the memory."""
    part = Replay(noise=5.0, max_lag=None)
    memory = filled(part, 8, 1)
    orders = [tuple(memory["first"][part.draw(memory, 8, step, 0)].tolist()) for step in range(8, 14)]
    assert len(set(orders)) > 3
    turned = part._chosen(memory, torch.arange(7, -1, -1))
    assert tuple(turned["first"][part.draw(turned, 8, 8, 0)].tolist()) == orders[0]


def test_rows_as_tensors_and_back():
    rows = k8_rows(torch.float32).with_(columns={"a/b": torch.arange(8)}, features={"f": torch.ones(8, 2)})
    back = from_tensors(to_tensors(rows))
    assert not any("/" in name for name in to_tensors(rows))
    for name, value in to_tensors(rows).items():
        assert torch.equal(to_tensors(back)[name], value)
    with pytest.raises(ValueError, match="enumerated"):
        to_tensors(rows.with_(exact=True))


def test_origins_side_by_side():
    rows = k8_rows(torch.float32)
    wide = rows.with_(features={"f": torch.ones(8, 2)}, columns={"c": torch.ones(8)})
    both = joined([rows.with_(reward=None), wide, wide.with_(features={"f": torch.ones(8, 3)})])
    assert bool(both.reward[:8].isnan().all()) and bool(both.features["f"][:8].isnan().all())
    assert both.columns["c"].tolist() == [0] * 8 + [1] * 16
    assert both.features["f"][8:].nan_to_num(-1.0).tolist() == [[1, 1, -1]] * 8 + [[1, 1, 1]] * 8
    assert joined([rows]) is rows
    with pytest.raises(ValueError, match="model input 'pixels'"):
        joined([rows, rows.with_(inputs={"pixels": torch.ones(8, 1)})])


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"share": 1.0}, "share"),
        ({"share": -0.1}, "share"),
        ({"weighting": "all"}, "weighting"),
        ({"keep": "good"}, "keep"),
        ({"cap": 0.0}, "cap"),
        ({"capacity": 0}, "capacity"),
        ({"max_lag": 0}, "max_lag"),
        ({"max_uses": 0}, "max_uses"),
        ({"decay": -1.0}, "decay"),
        ({"noise": -1.0}, "noise"),
        ({"weighting": "token", "normalise": True}, "normalise"),
    ],
)
def test_bad_settings(settings, what):
    with pytest.raises((ValueError, TypeError), match=what):
        Replay(**settings)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: method(Replay(weighting="token"), LogLikelihood()), "ratio of the surrogate"),
        (lambda: method(Replay()).replacing(surrogate=None, terms={"h": Summand(NegativeEntropy(), 1.0)}), "none"),
        (lambda: method(Replay()).adding(replay={"more": Replay()}), "room for one"),
        (lambda: Method(kind="supervised", replay={"past": Replay(0.0)}), "online"),
    ],
)
def test_compositions_without_meaning(make, what):
    with pytest.raises(MethodError, match=what):
        make()


def test_a_configuration_is_read_back():
    made = recipe_named("grpo_replay")(share=0.5, keep="best")
    assert from_config(to_config(made)) == made
    changed = made.set("replay.past.max_uses", 3)
    assert changed.replay["past"].max_uses == 3 and "replay.past" in dict(made.parts())
    assert changed.replay["past"] == replace(made.replay["past"], max_uses=3)


def test_a_group_with_its_greedy_row():
    """ReMax's greedy completion is stored with its group, so that the group keeps its baseline."""
    rows = batch([[0.0, 1.0]])
    greedy = rows.select(torch.tensor([0])).with_(stream=torch.tensor([int(Stream.BASELINE)]), row=torch.tensor([77]))
    memory, _ = Replay().after(Replay().init(), torch.zeros(0, dtype=torch.long), cat([rows, greedy]), 0)
    again = Replay().rows_of(memory, torch.tensor([0]))
    assert again.stream.tolist() == [0, 0, int(Stream.BASELINE)] and again.group.tolist() == [0, 0, 0]
    assert LeaveOneOut()(again, Stats()).advantage[:2, 0].tolist() == [-1, 1]
    assert Aggregation()(torch.ones(3, 2), again) == 1
