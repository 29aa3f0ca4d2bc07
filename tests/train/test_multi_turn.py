"""Training and evaluation on tasks of several turns."""

import json
import math

import pytest
import torch

import keel
from keel.core.errors import ConfigError
from keel.core.rows import Stop, Stream
from keel.models.load import load
from keel.models.tiny import TinyConfig
from keel.parts.rewards.turns import TurnReward
from keel.store.store import Store
from keel.tasks.environment import Answer, Ended
from keel.tasks.load import load_task
from keel.tasks.number_guessing import NumberGuessing
from keel.train import online
from keel.train.base import BaseRecipe, ensure_base
from keel.train.encode import Encoder, demonstration_rows
from keel.train.lifecycle import Stopped

SHAPE = TinyConfig(dim=32, layers=2, heads=2, feed_forward=64)
OPTIONS = {"max_number": 12, "turns": 5}


@pytest.fixture(scope="module")
def guessing():
    return NumberGuessing(**OPTIONS, held_out=6)


@pytest.fixture(scope="module")
def base(guessing) -> str:
    how = BaseRecipe(SHAPE, steps=70, batch_size=24, learning_rate=5e-3, warmup_steps=10)
    return str(ensure_base(guessing, how))


@pytest.fixture
def play(base, guessing, tmp_path):
    def start(recipe, **settings):
        given = {
            "model": base,
            "task": guessing,
            "runs": tmp_path / "runs",
            "max_steps": 3,
            "learning_rate": 3e-3,
            "evaluate.before": False,
            "evaluate.after": False,
            "train.log_completions": 0,
            "rollout.num_prompts": 4,
            **settings,
        }
        return keel.train(recipe, **given)

    return start


def last(run, name):
    return run.metrics[name][-1][1]


def batches(monkeypatch):
    """The batches that a run makes."""
    seen, make = [], online.prepare
    monkeypatch.setattr(online, "prepare", lambda session: seen.append(make(session)) or seen[-1])
    return seen


# -- methods ---------------------------------------------------------------------------------------------------------


def test_epo_remembers_the_entropy_of_each_turn(play):
    run = play("epo", entropy_coef=0.01, low=0.8, high=1.2, num_generations=4)
    with Store(run.path.parent / "keel.sqlite", readonly=True) as store:
        metrics = store.metrics(store.run("epo").id)
    turns = [metrics[f"entropy/turn/{k}"] for k in range(5)]
    assert all(0 < value < math.log(20) for curve in turns for _, value in curve)
    assert last(run, "terms/band") > 0 and last(run, "rollout/logp_gap") < 1e-4
    assert 1 < last(run, "turns/mean") <= 5 and last(run, "rewards/environment/errors") == 0
    shares = {reason: last(run, f"turns/ended/{reason.name.lower()}") for reason in Ended}
    assert sum(shares.values()) == pytest.approx(1) and shares[Ended.ENVIRONMENT] == 1
    assert last(run, "reward") == last(run, "rewards/environment/mean")
    assert last(run, "completions/mean_length") <= 3 * last(run, "turns/mean")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_history_is_that_of_all_batches(play, level, monkeypatch):
    """Hbar of a turn after three batches is the mean of the three means; both levels of the band run on it."""
    sessions, control = [], online.control
    monkeypatch.setattr(online, "control", lambda session: sessions.append(session) or control(session))
    path = "terms.band.penalty.level"
    run = play("epo", entropy_coef=0.01, low=0.9, high=1.1, num_generations=4, max_steps=4, **{path: level})
    history = sessions[-1].method.terms["band"].penalty.history
    assert len(history) == 5
    for k in (0, 1):
        curve = [value for _, value in run.metrics[f"entropy/turn/{k}"]]
        assert history[k] == pytest.approx(sum(curve[:3]) / 3)


def test_turn_rewards_credit_turns(play, monkeypatch):
    """Returns to go of a won game: the whole reward up to the winning token; with GAE they differ by turn, too."""
    seen = batches(monkeypatch)
    plain = play("reinforce_pp", name="plain", beta=0.0, num_generations=4, max_steps=1)
    moved = play(
        "reinforce_pp", name="moved", beta=0.0, num_generations=4, max_steps=1, **{"transforms.turns": TurnReward()}
    )
    one, other = (batch.rows for batch in seen)
    assert torch.equal(one.tokens, other.tokens)
    assert other.token_reward.sum(1).tolist() == one.reward[:, 0].tolist() and not bool(other.reward.any())
    torch.testing.assert_close(one.advantage, other.advantage)  # only the last turn of this game is paid
    assert plain.summary["checksum"] == moved.summary["checksum"]


class Paid(NumberGuessing):
    """Each turn pays its own number, so that credit can be told apart."""

    def environment(self, example, seed):
        game = super().environment(example, seed)

        class Game:
            reset = staticmethod(game.reset)

            def step(self, text):
                answer = game.step(text)
                return Answer(answer.text, float(game.used), answer.done)

        return Game()


def test_returns_to_go_turn_by_turn(play, monkeypatch):
    """Turn k (from 1) of n pays k: its tokens are credited with k + ... + n, then whitened."""
    seen = batches(monkeypatch)
    task = Paid(**OPTIONS, held_out=6)
    settings = {"task": task, "beta": 0.0, "num_generations": 4, "max_steps": 1}
    play("reinforce_pp", name="paid", **settings, **{"transforms.turns": TurnReward()})
    rows = seen[0].rows
    turn = rows.columns["turn"] + 1
    n = rows.columns["num_turns"][:, None]
    wanted = torch.where(rows.mask, (n * (n + 1) - turn * (turn - 1)) / 2.0, 0.0)
    value = wanted[rows.mask]
    whitened = (wanted - value.mean()) / (value.var() + 1e-8).sqrt()
    torch.testing.assert_close(rows.advantage, torch.where(rows.mask, whitened, 0.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["ppo", "reinforce_pp"])
def test_methods_learn_with_turn_rewards(play, recipe):
    run = play(recipe, max_steps=1, **{"transforms.turns": TurnReward(), "rollout.num_generations": 4})
    assert last(run, "grad_norm") > 0 and math.isfinite(last(run, "loss"))


def test_group_advantages_do_not_notice_turn_rewards(play):
    one = play("grpo", name="one", num_generations=4, max_steps=1)
    two = play("grpo", name="two", num_generations=4, max_steps=1, **{"transforms.turns": TurnReward()})
    assert one.summary["checksum"] == two.summary["checksum"]


def test_a_transform_is_added_by_its_name(play):
    run = play("grpo", name="named", max_steps=1, **{"transforms.turns": {"part": "turn_reward", "weight": 1.0}})
    assert run.config.method.transforms == {"turns": TurnReward(1.0)}
    with pytest.raises(ConfigError, match="there is no entry 'turns'"):
        play("grpo", name="wrong", **{"transforms.turns": 3})


def test_remax_plays_a_greedy_episode(play, monkeypatch):
    seen = batches(monkeypatch)
    play("remax", num_generations=2, max_steps=1)
    for batch in seen:
        rows = batch.rows
        greedy = rows.stream == int(Stream.BASELINE)
        assert greedy.sum() == 4 and len(rows) == 12 and len(rows.row.unique()) == 12
        assert "num_turns" in rows.columns and bool((rows.advantage[greedy] == 0).all())
    first = seen[0].rows
    assert first.group[first.stream == int(Stream.BASELINE)].tolist() == [0, 1, 2, 3]


# -- promises --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_ends_with_the_same_bits(play, monkeypatch):
    settings = {"entropy_coef": 0.01, "low": 0.8, "high": 1.2, "num_generations": 4, "max_steps": 4}
    whole = play("epo", name="whole", **settings)
    count, control = [0], online.control

    def stop(session):
        count[0] += 1
        session.stopping = lambda: count[0] >= 2
        control(session)

    monkeypatch.setattr(online, "control", stop)
    with pytest.raises(Stopped):
        play("epo", name="part", **settings)
    monkeypatch.undo()
    part = play("epo", name="part", resume=True, **settings)
    assert part.summary["checksum"] == whole.summary["checksum"]


class Failing(NumberGuessing):
    def environment(self, example, seed):
        game = super().environment(example, seed)
        if example.columns["secret"] % 2:
            return game

        class Broken:
            reset = staticmethod(game.reset)

            def step(self, text):
                raise RuntimeError("the lamp went out")

        return Broken()


def test_groups_of_broken_environments_leave_the_batch(play, monkeypatch):
    seen, said = batches(monkeypatch), []
    task = Failing(**OPTIONS, held_out=6)
    run = play(
        "grpo",
        task=task,
        max_steps=2,
        report=lambda event, facts: said.append(facts.get("text", "")),
        num_generations=4,
    )
    assert sum(value for _, value in run.metrics["rewards/environment/errors"]) > 0
    assert any("reward 'environment' failed" in text and "RuntimeError: the lamp went out" in text for text in said)
    secrets = [e.columns["secret"] for e in task.train]
    for batch in seen:
        assert all(secrets[i] % 2 for i in batch.rows.data_index.tolist())
        assert not bool(batch.rows.reward.isnan().any())


def shout(completions, episode_turns, episode_ended, **_):
    told = zip(completions, episode_turns, episode_ended, strict=True)
    return [float(text != "" and text.count("\n") <= n <= 5 and ended == "environment") for text, n, ended in told]


def test_other_rewards_see_the_whole_episode(play):
    run = play("grpo", reward=shout, max_steps=1, num_generations=4)
    assert last(run, "rewards/shout/mean") == 1
    assert last(run, "reward") == pytest.approx(1 + last(run, "rewards/environment/mean"))
    with pytest.raises(ConfigError, match="'environment' is the environment's own reward"):
        play("grpo", name="taken", reward={"environment": shout})


def test_limits_of_the_rollout(play):
    run = play("grpo", max_steps=1, num_generations=4, **{"rollout.max_turns": 1})
    assert last(run, "turns/mean") == 1 and last(run, "turns/ended/turns") > 0
    run = play("grpo", name="short", max_steps=1, num_generations=4, **{"rollout.max_completion_length": 4})
    assert last(run, "turns/ended/tokens") > 0 and last(run, "completions/clipped_ratio") > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rollout": "smc"}, "an environment cannot be copied in the middle of an episode"),
        ({"task": "countdown", "rollout.max_turns": 3}, "rollout.max_turns: is for tasks of several turns"),
        ({"task": "countdown", "transforms.t": TurnReward()}, "transforms.t: is for tasks of several turns"),
        ({"rollout.max_turns": 0}, "max_turns must be at least 1"),
    ],
)
def test_what_does_not_go_together(play, settings, said):
    with pytest.raises(ConfigError, match=said):
        play("grpo", **settings)


# -- supervised ------------------------------------------------------------------------------------------------------


def test_rows_of_demonstrations_by_hand(base, guessing):
    model = load(base)
    example = next(e for e in guessing.train if e.columns["max_number"] == 12)
    pieces = [("7\n", True), ("<", False), ("12", True), (">", False), ("3\n", True)]
    rows, cut = demonstration_rows([example], [pieces], Encoder(model), ("\n",), None, 0, 0)
    assert model.tokenizer.decode(rows.tokens[0]) == "7\n<12<eos>>3\n" and cut.completions == 0
    assert rows.mask[0].tolist() == [True, True, False, True, True, True, False, True, True]
    assert rows.columns["turn"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2]] and rows.stop.tolist() == [int(Stop.DATA)]
    prompt = len(Encoder(model).prompt(example.prompt))
    rows, cut = demonstration_rows([example], [pieces], Encoder(model), ("\n",), prompt + 4, 0, 0)
    assert rows.tokens.shape[1] == 4 and cut.completions == 1 and rows.mask[0].tolist() == [True, True, False, True]


def test_the_base_has_learnt_the_form_but_not_the_game(base, guessing):
    found = keel.sample(base, 8, 8, task=guessing)  # of six held-out examples
    assert len(found) == 48 and all(s.stop == "environment" for s in found)
    lines = [line.lstrip("<>?") for s in found for line in s.text.splitlines()]
    assert sum(line.isdigit() and 1 <= int(line) <= 12 for line in lines) > 0.8 * len(lines)
    won = sum(s.reward for s in found) / len(found)
    assert 0.1 < won < 0.9
    assert {s.reward for s in found} == {0.0, 1.0}


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_episodes_are_evaluated(base, guessing):
    found = keel.evaluate(base, task=guessing, num_prompts=8, num_generations=8)
    metrics = {name: interval.value for name, interval in found.metrics.items()}
    assert 0.1 < metrics["pass@1"] < 0.9 and metrics["pass@1"] < metrics["pass@8"]
    assert metrics["reward"] == pytest.approx(metrics["pass@1"])
    assert metrics["completions/mean_length"] <= 15 and metrics["completions/clipped_ratio"] == 0
    for completion in found.completions:
        secret = guessing.held_out[completion.index].columns["secret"]
        assert (completion.reward == 1) == (completion.answer == str(secret))
        assert completion.text.count("\n") <= 5


def test_before_and_after_a_run(play):
    run = play("grpo", max_steps=1, num_generations=4, **{
        "evaluate.before": True, "evaluate.after": True, "evaluate.num_prompts": 4, "evaluate.num_generations": 4,
        "rollout.max_turns": 2,
    })  # fmt: skip
    assert set(run.evaluations) == {"before", "after"}
    assert run.evaluations["before"].metrics["completions/mean_length"].value <= 6


def test_prompts_and_samplers_are_refused(base, guessing):
    with pytest.raises(ConfigError, match="belong to its examples"):
        keel.sample(base, ["12:"], task=guessing)
    with pytest.raises(ConfigError, match="cannot be copied"):
        keel.sample(base, 2, task=guessing, method="smc")


# -- thirty turns ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_turns_of_epo(tmp_path):
    thirty = {"max_number": 100, "turns": 30}
    task = load_task("number_guessing", **thirty)
    run = keel.train(
        "epo",
        task=task,
        runs=tmp_path,
        max_steps=4,
        low=0.8,
        high=1.2,
        **{"rollout.num_prompts": 4, "evaluate.before": False, "evaluate.after": False},
    )
    assert task.max_turns == 30 and last(run, "turns/mean") > 10
    assert {f"entropy/turn/{k}" for k in range(30)} <= set(run.metrics)
    assert 0 < last(run, "reward") < 1 and last(run, "terms/band") > 0 and last(run, "rollout/logp_gap") < 1e-4
    assert json.loads((run.path / "summary.json").read_text())["steps"] == 4
