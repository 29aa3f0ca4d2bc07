"""Samplers as rollouts: their weights reach the loss, their rewards are asked for once, their runs can be repeated."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

import keel
from keel.core.aggregate import Aggregation
from keel.core.chain import Meter, Prefix
from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, UserError
from keel.core.rows import Stop
from keel.models.load import checksum, load
from keel.parts.advantages.group import GroupCentre, LeaveOneOut
from keel.parts.advantages.tree import TreeAdvantage
from keel.parts.rewards.transforms import WeightedSum
from keel.recipes.registry import recipe_named
from keel.rollouts.local import LocalGenerator
from keel.rollouts.rollout import Rollout
from keel.sampling.beam import BeamSearch
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.catalogue import SAMPLERS, accepts, tilt_of
from keel.sampling.decode import Decode
from keel.sampling.fusion import DynamicFusion
from keel.sampling.particles import Particles
from keel.sampling.rejection import Rejection
from keel.sampling.smc import SMC
from keel.sampling.tree import TreeSampling
from keel.statistics.stats import Stats
from keel.train import strategies
from keel.train.configuration import Request, resolve
from keel.train.encode import Encoder
from keel.train.strategies import COST, draw_rows, rows_of_run


def digits(completions, **_):
    """A reward that differs: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def composed(recipe="grpo", **values):
    return resolve(Request(recipe=recipe, values=values)).method


# -- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_sampler_by_name_with_its_settings_in_any_order(turned):
    values = {"rollout": "smc", "rollout.sampler.beta": 0.5, "rollout.sampler.resampling": "residual", "beta": 0.1}
    values = dict(reversed(values.items())) if turned else values
    method = composed(**values, num_generations=4)
    assert method.rollout.sampler == SMC(num_particles=4, beta=0.5, resampling="residual")
    assert method.set("rollout.num_generations", 6).rollout.sampler.num_particles == 6


def test_settings_that_are_required_or_the_composing_functions():
    assert composed(**{"rollout.sampler.bound": 1, "rollout": "rejection"}).rollout.sampler == Rejection(1.0)
    twisted = composed(**{"rollout": "twisted_smc", "rollout.sampler.k": 3}).rollout.sampler
    assert twisted.kernel.k == 3 and twisted.num_particles == 8
    searched = composed(**{"rollout.sampler.num_particles": 3, "rollout": "tree_search"}).rollout
    assert searched.sampler == TreeSampling(3, mode="search") and not searched.grouped


def test_a_configuration_is_read_back():
    for sampler in (SMC(beta=0.3), BestOf(3), TreeSampling(), SoftBestOf()):
        method = recipe_named("rloo")(num_generations=4).set("rollout.sampler", sampler)
        assert from_config(to_config(method)) == method
    assert from_config({"part": "rollout", "num_generations": 5, "sampler": "smc"}).sampler == SMC(5)
    assert composed(**{"rollout.sampler": {"part": "smc", "beta": 2.0}}).rollout.sampler == SMC(8, 2.0)


def test_what_is_shown_runs(train, tmp_path):
    text = resolve(Request(recipe="grpo", values={"rollout": "smc", "rollout.num_prompts": 2})).to_yaml()
    (tmp_path / "shown.yaml").write_text(text)
    run = train(None, config=tmp_path / "shown.yaml", name="shown", max_steps=1, reward=digits)
    assert run.summary["steps"] == 1
    assert yaml.safe_load((run.path / "config.yaml").read_text())["method"]["rollout"]["sampler"]["part"] == "smc"


@pytest.mark.parametrize(
    ("recipe", "values", "said"),
    [
        ("grpo", {"rollout": "smcc"}, r"rollout.sampler: there is no sampler 'smcc'\. Did you mean 'smc'"),
        ("grpo", {"rollout": "smc", "rollout.sampler.bta": 1}, "Did you mean 'beta'"),
        ("grpo", {"rollout": "smc", "rollout.sampler.num_particles": 4}, "the particles are the rows of a group"),
        ("smc_distillation", {"rollout.sampler.num_particles": 4}, "the particles are the rows of a group"),
        ("grpo", {"rollout.sampler.beta": 1}, "there is no sampler to set"),
        ("grpo", {"rollout": "smc", "rollout.value": "fit"}, "monte_carlo:M"),
        ("grpo", {"rollout.value": "monte_carlo:2"}, "there is no sampler"),
        ("grpo", {"rollout": "rejection"}, "bound"),
        ("grpo", {"rollout": "beam_search"}, "set rollout.sampler.draw=true"),
        ("remax", {"rollout": "smc"}, "greedy baseline"),
        ("sft", {"rollout": "smc"}, "draws no completions"),
        ("grpo", {"rollout": "adaptive_best_of_n"}, "learnt prediction of whether to start again"),
        ("grpo", {"rollout": "introspection"}, "learnt prediction of reward and length"),
        ("grpo", {"rollout": "cfg"}, "further model"),
        ("grpo", {"rollout": DynamicFusion()}, "further model"),
        ("grpo", {"rollout": Decode(kernel=DynamicFusion())}, "further model"),
        ("grpo", {"rollout": GroupCentre()}, "GroupCentre is no sampler"),
        ("grpo", {"rollout": 3}, "whole section"),
    ],
)
def test_mistakes_are_named(recipe, values, said):
    with pytest.raises(ConfigError, match=said):
        composed(recipe, **values)


def test_other_generators_are_refused(train):
    with pytest.raises(ConfigError, match=r"SMC copies unfinished texts, which TransformersGenerator cannot do"):
        train("grpo", rollout="smc", name="elsewhere", **{"train.generator": "transformers"})


def test_the_law_of_each_sampler():
    """1 / beta of the tilt that the weighted rows stand for."""
    sharp = {n: tilt_of(e.make()) for n, e in SAMPLERS.items() if not e.needs and n != "rejection"}
    assert sharp["soft_best_of_n"] == sharp["tree_sampling"] == pytest.approx(10.0)
    assert sharp["decode"] == 0 and sharp["best_of_n"] is sharp["quasi_rejection"] is sharp["tree_search"] is None
    assert tilt_of(Decode(reweight=True, beta=0.5)) == 2 and tilt_of(Rejection(1.0)) == pytest.approx(10.0)


# -- weights ---------------------------------------------------------------------------------------------------------


def particles(shares, reward) -> Particles:
    """One prompt, completions 5 and 6 7, of the given weights and rewards."""
    log_w = torch.tensor([shares], dtype=torch.float64).log()
    states = Prefix(
        tokens=torch.tensor([[5, 0], [6, 7]]),
        logp=torch.tensor([[-1.0, 0.0], [-0.5, -0.25]]),
        length=torch.tensor([1, 2]),
        stop=torch.full((2,), int(Stop.EOS)),
        prompt=torch.zeros(2, dtype=torch.long),
    )
    none = torch.zeros(1, dtype=torch.float64)
    meter = Meter(1)
    meter.add("generated", torch.tensor([7]))
    earned = torch.tensor([reward], dtype=torch.float64)
    return Particles(states, log_w, earned, torch.tensor([1]), none + 0.3, none, none + 0.1, meter)


PROMPT = torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.bool), 0


def test_weights_reach_the_loss():
    """W = (3/4, 1/4), r = (1, 0): the tilt's mean is 3/4, A = (1/4, -3/4), and with l = (2; 3, 4) the mean over rows is
    (1.5 x 2 x 1/4 - 0.5 x 7 x 3/4) / 2."""
    rows = rows_of_run(particles([0.75, 0.25], [1.0, 0.0]), SMC(2, beta=0.5), *PROMPT)
    assert rows.weight.tolist() == [1.5, 0.5] and rows.columns["tilt"].tolist() == [2.0, 0.0]
    rows = GroupCentre()(rows, Stats())
    loss = Aggregation("sequence_mean_token_sum")(rows.advantage * torch.tensor([[2.0, 0.0], [3.0, 4.0]]), rows)
    assert float(loss) == pytest.approx((1.5 * 2 / 4 - 0.5 * 7 * 3 / 4) / 2)
    assert rows.columns[COST].tolist() == [3.5, 3.5]
    assert rows.columns["rollout/effective_particles"].tolist() == [pytest.approx(1 / (0.75**2 + 0.25**2))] * 2


def test_a_pick_is_a_row_of_weight_one():
    rows = rows_of_run(particles([0.75, 0.25], [1.0, 0.0]), BestOf(2), *PROMPT, grouped=False)
    assert rows.tokens.tolist() == [[6, 7]] and rows.weight.tolist() == [1.0] and rows.reward.tolist() == [[0.0]]
    assert rows.columns[COST].tolist() == [7.0] and math.isnan(rows.columns["tilt"][0])


def test_particles_without_weight_change_nothing():
    whole = rows_of_run(particles([1.0, 0.0], [1.0, 5.0]), SMC(2), *PROMPT)
    assert whole.weight.tolist() == [2.0, 0.0]
    assert LeaveOneOut()(whole, Stats()).advantage.abs().max() == 0


# -- a language model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(base):
    return load(base)


def session(policy, task, method, reward=digits, seed=0):
    return SimpleNamespace(
        method=method,
        task=None,
        config=SimpleNamespace(seed=seed),
        encoder=Encoder(policy),
        generator=LocalGenerator(policy),
        rewards={"reward": reward} if callable(reward) else reward,
    )


def drawn(policy, task, sampler, places=(3, 8, 5), value=None, step=2, **known):
    rollout = Rollout(num_generations=4, max_completion_length=12, sampler=sampler, value=value)
    method = recipe_named("rloo")(num_generations=4).replacing(rollout=rollout)
    examples = [task.train[place] for place in places]
    index = strategies.distinct([e.index for e in examples])
    return draw_rows(session(policy, task, known.pop("change", lambda m: m)(method), **known), examples, step, index)


def texts(rows) -> dict[tuple[int, int], tuple]:
    """What each row says and weighs, by prompt and number."""
    seen: dict = {}
    for i in range(len(rows)):
        key = int(rows.data_index[i])
        tokens = tuple(rows.tokens[i][rows.mask[i]].tolist())
        seen[key, sum(k[0] == key for k in seen)] = (tokens, round(float(rows.weight[i]), 5), int(rows.row[i]))
    return seen


@pytest.mark.parametrize("sampler", [SMC(beta=0.2), BestOf(3), SoftBestOf(beta=0.2)], ids=["smc", "best", "soft"])
def test_a_row_depends_on_seed_step_and_prompt_alone(policy, task, sampler, monkeypatch):
    rows, _ = drawn(policy, task, sampler)
    assert rows.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(rows.row.unique()) == 12
    monkeypatch.setattr(strategies, "STATES", 4)
    again, _ = drawn(policy, task, sampler, places=(5, 3, 8))
    assert texts(again) == texts(rows)
    assert texts(drawn(policy, task, sampler, step=3)[0]) != texts(rows)
    assert texts(drawn(policy, task, sampler, seed=1)[0]) != texts(rows)


@pytest.mark.parametrize("sampler", [SMC(beta=0.2), BestOf(3)], ids=["particles", "picks"])
def test_a_prompt_that_comes_twice_is_answered_twice(policy, task, sampler):
    rows, _ = drawn(policy, task, sampler, places=(3, 3))
    said = [tuple(row.tolist()) for row in rows.tokens]
    assert said[:4] != said[4:] and len(rows.row.unique()) == 8 and len(rows.data_index.unique()) == 2


def test_the_particles_of_a_run_are_a_group(policy, task):
    rows, judge = drawn(policy, task, SMC(beta=0.2), value="monte_carlo:2")
    assert rows.weight.view(3, 4).sum(1).tolist() == pytest.approx([4.0] * 3)
    tokens = [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)]
    values = judge.scores(rows.group.tolist(), tokens).values[:, 0].double()
    assert values.tolist() == pytest.approx(digits([Encoder(policy).decode(text) for text in tokens]))
    torch.testing.assert_close(rows.columns["tilt"], values / 0.2)
    cost = rows.columns[COST].view(3, 4)[:, 0] * 4
    assert bool((cost >= rows.mask.sum(1).view(3, 4).sum(1)).all())  # the completions of the value cost tokens, too
    assert strategies.tokens_drawn(rows) == int(cost.sum())


def test_branches_are_known_where_a_part_asks(policy, task):
    def treed(method):
        return method.replacing(advantage={"tree": TreeAdvantage()})

    plain, _ = drawn(policy, task, SMC(beta=0.02), value="monte_carlo:2")
    rows, _ = drawn(policy, task, SMC(beta=0.02), value="monte_carlo:2", change=treed)
    assert texts(rows) == texts(plain)
    assert int(plain.columns["mult"].max()) == 1 and int(rows.columns["mult"].max()) > 1


# -- rewards ---------------------------------------------------------------------------------------------------------


def test_each_text_is_scored_once(policy, task):
    asked = []

    def reward(prompts, completions, **_):
        asked.extend(zip(prompts, completions, strict=True))
        return digits(completions)

    rows, judge = drawn(policy, task, SMC(beta=0.1), value="monte_carlo:3", reward=reward)
    tokens = [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)]
    before = len(asked)
    assert not bool(judge.scores(rows.group.tolist(), tokens).values.isnan().any())
    assert before == len(asked) == len(judge.known) > len(rows)


def test_a_failing_group_leaves_and_the_others_are_the_same(policy, task):
    bad = task.train[8].prompt

    def fragile(prompts, completions, **_):
        if bad in prompts:
            raise ValueError("cannot read this one")
        return digits(completions)

    def silent(prompts, completions, **_):
        return [None if p == bad else v for p, v in zip(prompts, digits(completions), strict=True)]

    whole, _ = drawn(policy, task, SMC(beta=0.1))
    kept = [entry for (index, _), entry in texts(whole).items() if index != task.train[8].index]
    for reward, said in ((fragile, "cannot read this one"), (silent, "needs a reward for every completion")):
        rows, judge = drawn(policy, task, SMC(beta=0.1), reward=reward)
        tokens = [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)]
        scores = judge.scores(rows.group.tolist(), tokens)
        assert scores.failed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
        assert scores.errors == {"reward": 1} and said in scores.messages["reward"][0]
        assert [e for (index, _), e in texts(rows).items() if index != task.train[8].index] == kept


def test_the_sampler_is_told_the_weighted_sum(policy, task):
    functions = {"digits": digits, "noise": lambda completions, **_: [float(hash(c) % 7) for c in completions]}

    def weighted(method):
        return method.adding(transforms={"sum": WeightedSum((1.0, 0.0))})

    alone, _ = drawn(policy, task, SoftBestOf(beta=0.1))
    both, judge = drawn(policy, task, SoftBestOf(beta=0.1), reward=functions, change=weighted)
    assert texts(both) == texts(alone)
    assert judge.scores([0], [both.tokens[0][both.mask[0]].tolist()]).values.shape == (1, 2)


def test_in_training_a_failing_group_is_replaced(train, task):
    seen: dict[str, str] = {}

    def fragile(prompts, completions, **_):
        if seen.setdefault("bad", prompts[0]) in prompts:
            raise ValueError("cannot read this one")
        return digits(completions)

    run = train("grpo", rollout="smc", reward=fragile, name="errors", max_steps=1, num_generations=4)
    assert run.metrics["rewards/fragile/errors"][0][1] == 1
    assert run.metrics["num_rows"][0][1] == 16 and run.metrics["rounds"][0][1] == 2


# -- the loop --------------------------------------------------------------------------------------------------------

SETTINGS = {"rejection": {"rollout.sampler.bound": 1.0}, "beam_search": {"rollout.sampler.draw": True}}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_trains_or_says_why_not(name, train):
    def start(**settings):
        return train("grpo", rollout=name, name=name, reward=digits, max_steps=1, num_generations=4, **settings)

    settings = {"rollout.num_prompts": 2, **SETTINGS.get(name, {})}
    settings |= {"rollout.sampler.beta": 1.0} if accepts(name, "beta") else {}  # else one text takes over a group
    settings |= {"rollout.sampler.rollouts": 8} if accepts(name, "rollouts") else {}
    if SAMPLERS[name].needs in ("restart", "joint", "models"):
        with pytest.raises(UserError, match="so it cannot draw the rows of training"):
            start(**settings)
        return
    run = start(**settings)
    assert run.metrics["num_rows"][0][1] == 8 and run.metrics["grad_norm"][0][1] > 0
    assert math.isfinite(run.metrics["loss"][0][1]) and run.metrics["rollout/logp_gap"][0][1] < 1e-4
    assert run.metrics["rollout/tokens_per_row"][0][1] > 0


@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
def test_training_with_smc(recipe, train):
    run = train(recipe, rollout="smc", name=recipe, reward=digits, max_steps=2, num_generations=4, beta=0.1)
    for name in ("loss", "rollout/log_z", "rollout/kl", "rollout/effective_particles", "rollout/tokens_per_row"):
        assert len(run.metrics[name]) == 2 and all(math.isfinite(value) for _, value in run.metrics[name])
    assert all(1 <= value <= 4 for _, value in run.metrics["rollout/effective_particles"])
    cost = sum(value for _, value in run.metrics["rollout/tokens_per_row"]) * 16
    assert run.summary["num_tokens"] == round(cost)
    assert checksum(load(run.path / run.summary["checkpoint"]).module) == checksum(run.model)
    assert keel.sample(run.path, ["3 6 17>20="], 1, task="countdown")[0].text


@pytest.mark.parametrize("name", ["smc", "best_of_n"])
def test_a_run_that_was_cut_ends_with_the_same_bits(name, train):
    def stop_after_two(event, facts):
        if event == "step" and facts["step"] == 3:
            raise RuntimeError("power cut")

    settings = {"rollout": name, "reward": digits, "max_steps": 4, "num_generations": 4, "train.save_steps": 2}
    settings |= {"rollout.value": "monte_carlo:2"} if name == "smc" else {"rollout.sampler.num_particles": 3}
    whole = train("grpo", name="whole", **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        train("grpo", name="cut", report=stop_after_two, **settings)
    run = train("grpo", name="cut", resume=True, **settings)
    assert run.summary["checksum"] == whole.summary["checksum"]
    timed = ("step_time", "time/rollout", "time/reward")
    assert {k: v for k, v in run.summary["last"].items() if k not in timed} == {
        k: v for k, v in whole.summary["last"].items() if k not in timed
    }


def test_without_a_sampler_nothing_has_changed(policy, task):
    """Independent rows are those of the generator."""
    rollout = Rollout(num_generations=4, max_completion_length=12)
    method = recipe_named("rloo")(num_generations=4).replacing(rollout=rollout)
    examples = [task.train[place] for place in (3, 8)]
    index = [e.index for e in examples]
    rows, judge = draw_rows(session(policy, task, method), examples, 2, index)
    ids = [Encoder(policy).prompt(e.prompt) for e in examples]
    wanted = LocalGenerator(policy).generate(ids, 4, rollout.sampling, seed=0, step=2, data_index=index)
    assert judge is None and torch.equal(rows.tokens, wanted.tokens) and torch.equal(rows.row, wanted.row)
    beams = replace(rollout, sampler=BeamSearch(draw=True))
    assert not beams.grouped and replace(rollout, sampler="decode").grouped
