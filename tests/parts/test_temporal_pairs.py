"""Pairs with rejected completions of the past and chosen ones of the future: the numbers of their specification."""

import pytest
import torch

from keel.core.errors import MethodError
from keel.core.rows import Rows, Stream, cat
from keel.parts.controllers.going_back import GoBack
from keel.parts.rewards.self_rewarding import temporal_pair
from keel.parts.rewards.temporal import AHEAD, ANCHORED, TemporalPairs
from keel.recipes.registry import recipe_named
from keel.rollouts.beside import AUTHOR, CompletionsOf
from keel.rollouts.rollout import Rollout
from keel.rollouts.taught import WrittenBy
from keel.statistics.stats import Stats

CURRENT, ANCHOR, FUTURE = (6.0, 8.0, 5.0), (4.0, 7.0, 3.0), (9.0, 2.0, 7.0)


def prompt(current=CURRENT, anchor=ANCHOR, future=FUTURE, group: int = 0) -> Rows:
    """The completions of one prompt with their scores."""
    score = [*current, *anchor, *future]
    author = torch.tensor([0] * len(current) + [1] * len(anchor) + [2] * len(future))
    ids = torch.zeros(len(score), 1, dtype=torch.long)
    return Rows.build(
        ids, ids == 0, ids, ids == 0,
        reward=torch.tensor(score, dtype=torch.float64)[:, None],
        weight=torch.ones(len(score), dtype=torch.float64),
        group=torch.full((len(score),), group),
        row=torch.arange(len(score)) + 100 * group,
        stream=torch.where(author == 0, int(Stream.MAIN), int(Stream.CANDIDATE)),
        columns={AUTHOR: author},
    )  # fmt: skip


def found(rows: Rows, **options) -> list[tuple[int, int]]:
    pairs = TemporalPairs(**options)(rows, Stats(), {}).pairs
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def test_the_example():
    """Phase 1 takes (current 2, anchor 3), phase 2 (future 1, anchor 3); rows count from 0."""
    assert found(prompt(future=())) == [(1, 5)]
    assert found(prompt()) == [(6, 5)]
    assert found(prompt(anchor=(6.0, 7.0, 6.0), future=())) == [(1, 2)]  # no anchor is below
    assert found(prompt(future=(8.0, 2.0, 7.0))) == [(1, 5)]  # strictly above
    assert found(prompt((4.0, 4.0), (4.0,), (4.0,))) == []
    assert found(prompt(), anchor=0, future=0) == [(1, 2)]  # plain self-rewarding
    assert found(prompt(anchor=CURRENT, future=())) == [(1, 2)]


def test_against_one_prompt_at_a_time():
    """All of a batch at once as `temporal_pair` does it for each prompt."""
    chance = torch.Generator().manual_seed(0)
    rows, wanted = [], []
    for g in range(40):
        pools = [torch.randint(4, (3,), generator=chance).tolist() for _ in range(3)]
        rows.append(prompt(*pools, group=g))
        wanted.append(temporal_pair(*pools))
    batch = cat(rows)
    order = torch.randperm(len(batch), generator=chance)
    out = TemporalPairs()(batch.select(order), Stats(), {})
    place = {"current": 0, "anchor": 3, "future": 6}
    named = {(g, place[p] + i) for g, two in enumerate(wanted) if two for p, i in two}
    entered = torch.cat([out.pairs.chosen, out.pairs.rejected])
    assert {(int(out.group[i]), int(out.row[i]) % 100) for i in entered} == named
    assert bool(out.main[entered].all()) and bool((out.pairs.offset > 0).all())
    left = torch.ones(len(out), dtype=torch.bool).index_fill(0, entered, False) & (out.columns[AUTHOR] > 0)
    assert not bool(out.main[left].any())
    metrics: dict[str, float] = {}
    TemporalPairs().observe(out, Stats(), metrics, {})
    count = sum(two is not None for two in wanted)
    assert metrics["pairs/number"] == count
    assert metrics[ANCHORED] == pytest.approx(sum(two[1][0] == "anchor" for two in wanted if two) / count)
    assert metrics[AHEAD] == pytest.approx(sum(two[0][0] == "future" for two in wanted if two) / count)


def test_a_missing_score_is_no_candidate():
    assert found(prompt((6.0, 8.0), (float("nan"), 3.0), (float("nan"),))) == [(1, 3)]


def test_who_draws_and_when():
    """Of a round of 2 x 3 batches M_f draws in the second half, and in the middle the policy goes back to M_i."""
    method = recipe_named("temporal_self_rewarding")(every=3)
    assert method.rollout.written == WrittenBy("past") and [b.model for b in method.rollout.beside] == ["ref", "future"]
    assert [method.rollout.beside[1].due(step) for step in range(7)] == [False] * 3 + [True] * 3 + [False]
    assert [step for step in range(1, 14) if method.controllers["ahead"].due(step)] == [3, 9]
    assert method.models["future"].every == 6 and method.models["future"].offset == 3
    assert recipe_named("temporal_self_rewarding")(anchor=0, future=0) == recipe_named("self_rewarding")()


def test_what_makes_no_sense_is_refused():
    for make in (lambda: TemporalPairs(1, 1), lambda: TemporalPairs(-1), lambda: GoBack(half=0),
                 lambda: CompletionsOf(share=0.0), lambda: CompletionsOf(share=1.5), lambda: CompletionsOf(count=0),
                 lambda: CompletionsOf(every=-1),
                 lambda: Rollout(beside=(CompletionsOf(),), greedy_baseline=True)):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            make()
    with pytest.raises(MethodError, match=r"rollout\.beside"):
        TemporalPairs()(prompt().with_(columns={}), Stats(), {})
    grpo = recipe_named("grpo")()
    with pytest.raises(MethodError, match="no model 'ref' to write"):
        grpo.set("rollout.beside", (CompletionsOf("ref"),))
    with pytest.raises(MethodError, match="no policy gradient"):
        recipe_named("nash_md")().set("rollout.written", WrittenBy("ref"))
    with pytest.raises(MethodError, match="beside the policy for online"):
        recipe_named("on_policy_distillation")().set("rollout.beside", (CompletionsOf("teacher"),))
