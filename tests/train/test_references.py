"""Completions of the reference: drawn once for each prompt, remembered, the same whoever asks."""

import json
import shutil

import pytest

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.models.load import checksum, load
from keel.parts.rewards.score import score
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.train.encode import Encoder

SETTINGS = {
    "rollout.max_completion_length": 12,
    "num_generations": 2,
    "references": 3,
    "rollout.num_prompts": 2,
    "train.critic_learning_rate": 1e-3,
}
DATA = [{"prompt": f"{n} 2 3>{n}=", "answer": str(n)} for n in (4, 5, 6)]


def length(completions, **_):
    return [float(len(c)) for c in completions]


def known(run) -> dict:
    facts = json.loads((run.path / run.summary["checkpoint"] / "keel/state.json").read_text())
    return facts["states"]["transforms.par"]["known"]


def test_each_prompt_is_measured_once(train, monkeypatch):
    """Three prompts in four batches of two: each is asked for once, and what it earned is that of fresh draws."""
    asked = []
    draw = LocalGenerator.generate

    def spy(self, ids, count, sampling, **settings):
        asked.append((len(ids), count))
        return draw(self, ids, count, sampling, **settings)

    monkeypatch.setattr(LocalGenerator, "generate", spy)
    data = {"data": DATA, "reward": length, "task.held_out": 0.0}
    run = train("par", name="once", max_steps=4, **SETTINGS, **data)
    assert sum(prompts for prompts, count in asked if count == 3) == 3
    found = known(run)
    assert sorted(found) == ["0", "1", "2"] and all(len(values) == 3 for values in found.values())
    apart = train("par", name="apart", max_steps=4, **{**SETTINGS, "rollout.num_prompts": 1}, **data)
    assert known(apart) == {key: found[key] for key in known(apart)}  # whoever else is in the batch
    other = train("par", name="other", max_steps=2, seed=1, **SETTINGS, **data)
    assert known(other) != {key: found[key] for key in known(other)}


def test_a_column_of_the_data_comes_first(train):
    """Rewards of 1000 and more cannot be beaten: every completion's probability to win is 0."""
    data = [{**row, "reference_rewards": [1e3, 2e3][: 1 + n % 2]} for n, row in enumerate(DATA)]
    run = train("par", name="column", max_steps=1, data=data, reward=length, **SETTINGS, **{"task.held_out": 0.0})
    assert known(run) and all(values[0] == 1e3 for values in known(run).values())
    assert run.metrics["par/saturated"][0][1] == 0
    for wrong in ("many", [True], [[1.0]]):
        with pytest.raises(DataError, match="reference_rewards"):
            bad = [{**row, "reference_rewards": wrong} for row in DATA]
            train(
                "par", name=f"bad {wrong}", max_steps=1, data=bad, reward=length, **SETTINGS, **{"task.held_out": 0.0}
            )


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_policy_before_training(rank, train, base):
    """With an adapter, too: what a prompt of the second batch earned is what the base earns there."""
    settings = {**SETTINGS, "model.lora_rank": rank, "learning_rate": 3e-2, "rollout.num_prompts": 1}
    run = train("par", name=f"rank {rank}", max_steps=3, data=DATA, reward=length, **settings, **{"task.held_out": 0.0})
    found, model = known(run), load(base)
    assert len(found) == 3 and (rank or checksum(run.model) != checksum(model.module))
    encoder = Encoder(model, None, None)
    sampling = Sampling(1.0, None, None, None, run.config.method.rollout.max_completion_length, ())
    ids = [encoder.prompt(row["prompt"]) for row in DATA]
    seed = counter_seed(0, "reference_rewards")
    rows = LocalGenerator(model).generate(ids, 3, sampling, seed=seed, step=0, data_index=[0, 1, 2])
    texts = [encoder.decode(row[mask].tolist()) for row, mask in zip(rows.tokens, rows.mask, strict=True)]
    values = score({"length": length}, [""] * 9, texts, [[]] * 9, {}, rows.group).values[:, 0]
    assert {key: values[rows.group == int(key)].tolist() for key in found} == found


def test_a_killed_run_remembers(train):
    """Two steps and two more, from the checkpoint, are four."""
    data = {"data": DATA, "reward": length, "task.held_out": 0.0, "train.save_steps": 2, "max_steps": 4}
    whole = train("par", name="whole", **SETTINGS, **data)
    run = train("par", name="part", **SETTINGS, **data)
    shutil.rmtree(run.path / "checkpoint-4")
    (run.path / "summary.json").unlink(missing_ok=True)
    again = train("par", name="part", resume=True, **SETTINGS, **data)
    assert checksum(again.model) == checksum(whole.model) and known(again) == known(whole)


def test_a_task_of_several_turns_is_refused(train):
    with pytest.raises(ConfigError, match="several turns"):
        train("par", name="turns", task="number_guessing", max_steps=1, **SETTINGS)
