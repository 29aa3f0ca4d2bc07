"""Rows at other temperatures in the loop: how they are drawn, what is measured of them, and that groups stay apart."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.parts.k8 import ALIKE, k8_rows, k8_stats

from keel.core.errors import ConfigError
from keel.core.rows import Rows, Stream, cat
from keel.models.load import checksum, load
from keel.parts.rewards.transforms import WeightedSum
from keel.recipes.registry import recipe_named
from keel.rollouts.adaptive import AdaptiveTemperature
from keel.rollouts.local import LocalGenerator
from keel.rollouts.transformers import TransformersGenerator
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.train import online
from keel.train.encode import Encoder
from keel.train.observe import rollout_metrics, sampled_log_probs, sampler_metrics
from keel.train.strategies import check_strategy, distinct, draw_rows


def digits(completions, **_):
    """A reward that differs within most groups."""
    return [float(sum(c.isdigit() for c in text) % 2) for text in completions]


@pytest.fixture(scope="module")
def policy(base):
    return load(base)


def drawn(policy, task, method, places=(3, 8, 5, 9), generator=LocalGenerator):
    session = SimpleNamespace(
        method=method.set("rollout.max_completion_length", 12),
        task=task,
        config=SimpleNamespace(seed=0),
        encoder=Encoder(policy),
        generator=generator(policy),
    )
    examples = [task.train[place] for place in places]
    rows, _ = draw_rows(session, examples, 2, distinct([e.index for e in examples]))
    return rows, session.method


def test_candidates_stand_beside_rows_that_are_what_they_were(policy, task):
    plain, _ = drawn(policy, task, recipe_named("grpo")(num_generations=4))
    rows, method = drawn(policy, task, recipe_named("aepo")(num_generations=4, share=0.5))
    assert rows.group.tolist() == [g for g in (0, 1, 2, 3, 4, 5) for _ in range(4)]
    assert rows.main.tolist() == [True] * 16 + [False] * 8 and len(rows.row.unique()) == 24
    same = rows.select(torch.arange(16)).trim()
    assert torch.equal(same.tokens, plain.tokens) and torch.equal(same.logp["behaviour"], plain.logp["behaviour"])
    assert rows.data_index[16:].tolist() == rows.data_index[:8].tolist()
    assert rows.columns["temperature"].tolist() == pytest.approx([1.0] * 16 + [1.2] * 8)
    assert not torch.equal(rows.tokens[16:], rows.tokens[:8])
    wanted = sampled_log_probs(method)
    stats = Engine({"policy": policy}).measure(list(wanted), rows)
    for functional, part in zip(wanted, (slice(0, 16), slice(16, 24)), strict=True):
        torch.testing.assert_close(stats[functional][part], rows.logp["behaviour"][part], rtol=0, atol=1e-4)
    assert float((stats[wanted[0]] - rows.logp["behaviour"])[16:].abs().max()) > 1e-2
    turned, _ = drawn(policy, task, recipe_named("aepo")(num_generations=4, share=0.5), places=(8, 3, 5, 9))
    width = min(rows.tokens.shape[1], turned.tokens.shape[1])
    assert torch.equal(turned.tokens[16:20, :width], rows.tokens[20:24, :width])


def test_filters_and_the_own_temperature_of_the_rollout(policy, task):
    method = recipe_named("aepo")(num_generations=4, share=0.5, temperature=0.9).set("rollout.top_p", 0.9)
    rows, method = drawn(policy, task, method)
    wanted = sampled_log_probs(method)
    stats = Engine({"policy": policy}, temperature=0.9).measure(list(wanted), rows)
    for functional, part in zip(wanted, (slice(0, 16), slice(16, 24)), strict=True):
        torch.testing.assert_close(stats[functional][part], rows.logp["behaviour"][part], rtol=0, atol=1e-3)


def test_the_loop_measures_rows_at_their_own_temperature(train):
    known = {"num_generations": 4, "reward": digits, "max_steps": 3, "rollout.num_prompts": 8}
    run = train("aepo", share=0.5, target_entropy=0.01, name="cold", **known)

    def curve(name):
        return [value for _, value in run.metrics[name]]

    assert curve("controllers/rollout.extra.temperature") == [1.2, 0.8, 0.8]  # nothing is known before the first
    assert sum(curve("rows/replaced")) > 0 and curve("num_rows") == [32.0] * 3
    assert max(curve("rollout/logp_gap")) < 1e-4 and min(curve("rollout/ess")) > 0.9999


def test_without_candidates_it_is_grpo(train):
    known = {"num_generations": 4, "reward": digits, "max_steps": 2}
    one = train("aepo", replaced=0, name="none", **known)
    other = train("grpo", name="grpo", **known)
    assert checksum(one.model) == checksum(other.model)
    assert checksum(train("aepo", name="some", **known).model) != checksum(other.model)


def test_a_tied_group_is_told_from_mixed_ones_and_from_candidates():
    tied = k8_rows().select(torch.arange(4))
    tied = tied.with_(group=tied.group + 2, reward=torch.ones_like(tied.reward))
    beside = tied.with_(group=tied.group + 1, stream=torch.full_like(tied.stream, int(Stream.CANDIDATE)))
    found = online.tied_rows(cat([k8_rows(), tied, beside]), {})
    assert found.tolist() == [False] * 8 + [True] * 4 + [False] * 4


def test_a_completion_without_a_reward_makes_no_group_mixed():
    """(1, 1, none, 1) and (none, ...) teach nothing; (1, 0, none, none) does."""
    rewards = [[1.0, 1.0, math.nan, 1.0], [math.nan] * 4, [1.0, 0.0, math.nan, math.nan]]
    rows = k8_rows().select(torch.arange(12) % 8).with_(group=torch.arange(12) // 4)
    found = online.tied_rows(rows.with_(reward=torch.tensor(rewards).flatten()[:, None]), {})
    assert found.tolist() == [True] * 8 + [False] * 4


def test_the_weights_of_rewards_say_what_is_tied():
    """(1, 0) and (0, 1) are tied if both count alike, (2, 0) and (0, 1) if the second counts twice."""
    rows = k8_rows().with_(reward=torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2 + [[2.0, 0.0], [0.0, 1.0]] * 2))
    assert online.tied_rows(rows, {}).tolist() == [True] * 4 + [False] * 4
    weighted = {"sum": WeightedSum((1.0, 2.0))}
    assert online.tied_rows(rows, weighted).tolist() == [False] * 4 + [True] * 4
    known = rollout_metrics(rows, {"a": None, "b": None}, weighted)
    assert known["reward"] == pytest.approx(1.75) and known["frac_reward_zero_std"] == 0.5
    assert known["rewards/a/mean"] == pytest.approx(0.75) and known["rewards/b/mean"] == pytest.approx(0.5)


def test_the_effective_share_of_rows():
    rows, old = k8_rows(), k8_stats()[LogProb(of=("old",))]
    whole = sampler_metrics(rows, old, old, torch.ones(8, dtype=torch.bool))
    assert float(whole["rollout/ess"]) == pytest.approx(0.583092, abs=ALIKE)
    assert float(whole["rollout/logp_gap"]) == pytest.approx(4.79 / 20, abs=1e-12)  # the sum of |old - behaviour|
    three = sampler_metrics(rows, old, old, torch.arange(8) == 4)
    pair = [math.exp(-0.05), math.exp(0.04)]
    assert float(three["rollout/ess"]) == pytest.approx(sum(pair) ** 2 / 2 / sum(w * w for w in pair), abs=1e-12)


def test_groups_of_several_rounds_stay_apart(monkeypatch):
    """Of six prompts the first and the last are kept, then all four of the second round: six groups of two, and the
    candidates of either round."""

    def rows_of(rewards, candidates):
        count = len(rewards)
        reward = torch.tensor([v for pair in [*rewards, *candidates] for v in pair])[:, None]
        group = torch.arange(count + len(candidates)).repeat_interleave(2)
        ones = torch.ones(len(group), 1, dtype=torch.bool)
        ids = torch.zeros(len(group), 1, dtype=torch.long)
        stream = torch.where(group < count, int(Stream.MAIN), int(Stream.CANDIDATE))
        return Rows.build(ids, ones, ids, ones, reward=reward, group=group, stream=stream)

    tied, mixed = (1.0, 1.0), (0.0, 1.0)
    rounds = iter([rows_of([mixed, tied, tied, tied, tied, mixed], [mixed, tied]), rows_of([mixed] * 4, [mixed])])

    def score_round(session, examples, number):
        rows = next(rounds)
        return rows, [("", str(g)) for g in rows.group.tolist()], torch.zeros(len(rows), dtype=torch.bool), {}

    monkeypatch.setattr(online, "next_examples", lambda session, count: [None] * count)
    monkeypatch.setattr(online, "score_round", score_round)
    method = recipe_named("grpo")()
    session = SimpleNamespace(
        method=method.replacing(rollout=replace(method.rollout, num_prompts=6)),
        config=SimpleNamespace(train=SimpleNamespace(max_rounds=4, dynamic_sampling=True)),
        position=SimpleNamespace(step=0, tokens=0),
        rewards={"digits": digits},
        report=lambda *_: None,
    )
    batch = online.rollout_batch(session)
    assert batch.metrics["rounds"] == 2 and batch.metrics["frac_reward_zero_std"] == 0
    assert batch.rows.group.tolist() == [g for g in range(9) for _ in range(2)]
    assert len(batch.rows.group[batch.rows.main].unique()) == 6 and len(batch.texts) == 18


# -- a temperature for each token ------------------------------------------------------------------------------------

SCORED = AdaptiveTemperature(0.3, math.log(0.5), 1.0, 2.0)


@pytest.mark.parametrize("generator", [LocalGenerator, TransformersGenerator])
def test_tokens_are_recorded_under_their_own_temperature(policy, task, generator):
    method = recipe_named("grpo")(num_generations=4, temperature=0.9).set("rollout.adaptive", SCORED)
    rows, method = drawn(policy, task, method, generator=generator)
    (sampled,) = sampled_log_probs(method)
    plain = LogProb()
    stats = Engine({"policy": policy}, temperature=0.9).measure([sampled, plain], rows)
    torch.testing.assert_close(stats[sampled], rows.logp["behaviour"], rtol=0, atol=1e-4)
    assert float((stats[plain] - stats[sampled]).abs().max()) > 1e-2


@pytest.mark.parametrize("adaptive", [replace(SCORED, tau=0.0), replace(SCORED, pivot=None)])
def test_without_a_scale_or_tau_rows_are_what_they_were(policy, task, adaptive):
    method = recipe_named("grpo")(num_generations=4)
    plain, _ = drawn(policy, task, method)
    rows, _ = drawn(policy, task, method.set("rollout.adaptive", adaptive))
    assert torch.equal(rows.tokens, plain.tokens) and torch.equal(rows.logp["behaviour"], plain.logp["behaviour"])


def test_the_scale_of_a_batch_serves_the_next(train):
    known = {"num_generations": 4, "reward": digits, "rollout.num_prompts": 8, "train.dynamic_sampling": False}
    run = train("hapo", tau=0.3, max_steps=3, name="hapo", **known)
    gap = [value for _, value in run.metrics["rollout/logp_gap"]]
    assert max(gap) < 1e-4  # the trainer knows the temperatures of all steps
    share = [value for _, value in run.metrics["rollout/ess"]]
    assert share[0] > 0.9999 and max(share[1:]) < 0.9999  # the first batch was drawn at one temperature
    assert len(run.metrics["entropy/score/pivot"]) == 3 and min(v for _, v in run.metrics["entropy/score/high"]) > 0


def test_servers_are_refused():
    with pytest.raises(ConfigError, match="one temperature for all tokens"):
        check_strategy(recipe_named("hapo")(), SimpleNamespace())
    check_strategy(recipe_named("hapo")(tau=0.0), SimpleNamespace())
