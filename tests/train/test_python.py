"""`keel.train`, `keel.evaluate`, `keel.sample` with one's own data, rewards and models, and how they refuse."""

import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import keel
from keel.core.errors import ConfigError, DataError, RewardError, TrainingError, UserError
from keel.models.load import load
from keel.models.tiny import character_tokenizer
from keel.recipes.policy_gradient import grpo

ALPHABET = "0123456789 >=+-*/()"
SIZES = {"vocab_size": 3 + len(ALPHABET), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **SIZES,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            **SIZES,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES)),
}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_models_of_other_architectures(name, train, tmp_path):
    folder = tmp_path / name
    ARCHITECTURES[name]().save_pretrained(folder)
    character_tokenizer(ALPHABET, 64).save_pretrained(folder)
    run = train(
        "grpo",
        model=str(folder),
        name=name,
        beta=0.1,
        max_steps=2,
        reward=lambda completions, **_: [float(len(c)) for c in completions],
    )
    assert max(value for _, value in run.metrics["rollout/logp_gap"]) < 1e-4
    assert run.metrics["grad_norm"][0][1] > 0
    assert type(load(run.path / run.summary["checkpoint"]).module) is type(run.model)


def test_a_model_in_memory_is_trained_in_place(train, base):
    held = load(base)
    before = [p.clone() for p in held.module.parameters()]
    run = train(
        "grpo",
        model=held.module,
        tokenizer=held.tokenizer,
        name="memory",
        learning_rate=1e-2,
        reward=lambda completions, **_: [float(len(c)) for c in completions],
    )
    assert run.model is held.module
    assert any(not torch.equal(a, b) for a, b in zip(before, held.module.parameters(), strict=True))


def test_own_data_columns_reach_the_reward(train):
    data = [{"prompt": f"{n} 2 3>{n + 5}=", "answer": str(n), "level": n % 3} for n in range(1, 30)]
    seen = []

    def reward(prompts, completions, completion_ids, answer, level, **columns):
        seen.append(
            (len(prompts), len(completions), len(completion_ids), set(map(type, answer)), set(level) <= {0, 1, 2})
        )
        return [float(len(ids)) for ids in completion_ids]

    run = train("grpo", data=data, reward=reward, name="own", max_steps=1, num_generations=3)
    assert seen[0] == (12, 12, 12, {str}, True)
    assert run.metrics["rewards/reward/mean"][0][1] == pytest.approx(run.metrics["completions/mean_length"][0][1])


def test_a_prompt_that_comes_twice_in_a_batch_is_answered_twice(train):
    said = []

    def reward(completions, **_):
        said.append(list(completions))
        return [float(len(c)) for c in completions]

    train(
        "grpo",
        data=[{"prompt": "1 2 3>6="}, {"prompt": "1 2 4>7="}],
        reward=reward,
        name="twice",
        max_steps=1,
        **{"task.held_out": 0.5, "rollout.num_prompts": 2},
    )
    assert len(said[0]) == 16 and said[0][:8] != said[0][8:]


def test_none_leaves_a_column_out_and_failures_leave_a_group_out(train):
    def sometimes(completions, **_):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    def fragile(prompts, completions, **_):
        if len(set(prompts)) == 1 and prompts[0] == fragile.bad:
            raise ValueError("cannot read this one")
        if fragile.bad is None:
            fragile.bad = prompts[0]
        if fragile.bad in prompts:
            raise ValueError("cannot read this one")
        return [2.0] * len(prompts)

    fragile.bad = None
    said = []
    run = train(
        "grpo",
        reward=[sometimes, fragile],
        name="errors",
        max_steps=1,
        report=lambda event, facts: said.append((event, facts)),
    )
    assert run.metrics["rewards/fragile/errors"][0][1] == 1
    assert run.metrics["rewards/sometimes/mean"][0][1] == 1.0
    assert run.metrics["rewards/fragile/mean"][0][1] == 2.0
    assert run.metrics["num_rows"][0][1] == 4 * 8 and run.metrics["rounds"][0][1] == 2  # another prompt took its place
    assert any("cannot read this one" in facts["text"] for event, facts in said if event == "warning")


def test_a_hanging_callable_ends_the_run_with_a_checkpoint(train, tmp_path):
    calls = []

    def hangs(completions, **_):
        calls.append(1)
        if len(calls) > 1:
            time.sleep(3600)
        return [float(i) for i in range(len(completions))]

    with pytest.raises(RewardError, match=r"hangs|seconds"):
        train("grpo", reward=hangs, name="hang", **{"task.reward_timeout": 0.5})
    assert (tmp_path / "runs" / "hang" / "checkpoint-1" / "model.safetensors").exists()


def test_a_reward_that_always_fails_ends_the_run(train):
    def broken(completions, **_):
        raise KeyError("answer")

    with pytest.raises(TrainingError, match="no usable group"):
        train("grpo", reward=broken, name="broken")


def test_a_reward_in_a_process_of_its_own(train, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, completion_ids, **columns):\n"
        "    print('noise')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    run = train("grpo", reward="my_rewards:length", name="worker", max_steps=1)

    def length(completions, **_):
        return [float(len(c)) for c in completions]

    assert run.metrics["rewards/length/mean"][0][1] > 0
    here = train("grpo", reward=length, name="here", max_steps=1)
    for name in ("rewards/length/mean", "grad_norm"):
        assert run.metrics[name] == here.metrics[name]


def test_non_finite_updates_are_skipped_kept_and_end_the_run_after_three(train, tmp_path):
    def poisoned(completions, **_):
        return [1e38 * (-1) ** i for i in range(len(completions))]

    with pytest.raises(TrainingError, match="3 updates in a row were not finite"):
        train("grpo", reward=poisoned, name="inf", max_steps=10, scale_rewards="none", learning_rate=1e-3)
    kept = sorted(p.name for p in (tmp_path / "runs" / "inf" / "skipped").iterdir())
    assert kept == ["step-0-1.safetensors", "step-1-2.safetensors", "step-2-3.safetensors"]


def test_a_method_by_hand(train):
    run = train(grpo(num_generations=4).replacing(weights={}), name="hand", max_steps=1)
    assert run.summary["recipe"] is None and run.metrics["num_rows"][0][1] == 16


def test_the_rewards_of_a_method_are_used(train):
    from keel.parts.rewards.functions import ExactMatch

    method = grpo(num_generations=4, max_completion_length=11).replacing(rewards={"exact": ExactMatch()})
    data = [{"prompt": f"{n} 2 3>{n + 5}=", "answer": f"{n}+2+3"} for n in range(1, 20)]
    run = train(method, data=data, name="exact", max_steps=1)
    assert 0 <= run.metrics["rewards/exact/mean"][0][1] <= 1 and run.metrics["rewards/exact/errors"][0][1] == 0


def test_evaluation_and_samples_depend_on_the_seed_alone(base):
    settings = {"task": "countdown", "num_prompts": 8, "num_generations": 4}
    one, two = (keel.evaluate(base, seed=1, **settings).to_json() for _ in range(2))
    assert one == two
    assert one["metrics"]["pass@1"][0] <= one["metrics"]["pass@4"][0]
    first, again = (keel.sample(base, ["3 6 17>20=", "1 2 3>6="], 3, seed=5, task="countdown") for _ in range(2))
    assert first == again and len(first) == 6
    other = keel.sample(base, ["3 6 17>20=", "1 2 3>6="], 3, seed=6, task="countdown")
    assert [s.text for s in other] != [s.text for s in first]
    greedy = keel.sample(base, ["3 6 17>20="], 2, task="countdown", temperature=0.0)
    assert greedy[0].text == greedy[1].text


def test_the_kl_of_a_model_to_itself_is_zero(base):
    found = keel.evaluate(base, task="countdown", num_prompts=4, num_generations=2, reference=base)
    assert found.metrics["kl"].value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"beta": "high"}, ConfigError, "beta: .*valid number"),
        ({"betta": 1}, ConfigError, "Did you mean 'beta'"),
        ({"train.max_step": 1}, ConfigError, "Did you mean 'max_steps'"),
        ({"surrogate.f.epsilo": 1}, ConfigError, "Did you mean 'epsilon'"),
        ({"terms.kl.coef": 1}, ConfigError, "no entry 'kl'"),
        ({"num_generations": 1}, ConfigError, "at least 2"),
        ({"temperature": -1}, ConfigError, "temperature must be positive"),
        ({"seed": -1}, ConfigError, "non-negative"),
        ({"max_completion_length": 512}, UserError, "leaves no room"),
        ({"model": "/no/such/model"}, UserError, "does not exist"),
        ({"task": "countdwon"}, ConfigError, "Did you mean 'countdown'"),
        ({"data": [{"text": "no prompt"}]}, DataError, "prompt"),
        ({"data": [{"prompt": "1+1="}, {"prompt": "1+2="}], "task.held_out": 0.5}, ConfigError, "needs a reward"),
        ({"reward": "no_such_module:f"}, UserError, "no_such_module"),
    ],
)
def test_mistakes_are_named(train, arguments, error, said, tmp_path):
    with pytest.raises(error, match=said):
        train("grpo", name="wrong", **arguments)
    assert not (tmp_path / "runs" / "wrong").exists()


def test_a_configuration_runs_again(train, tmp_path):
    first = train("gspo", name="first", max_steps=2, beta=0.1, temperature=0.9)
    text = (first.path / "config.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text.replace("name: first", "name: second"))
    second = keel.train(None, config=tmp_path / "again.yaml", runs=tmp_path / "runs", report=lambda *_: None)
    assert second.path.name == "second"
    assert second.summary["checksum"] == first.summary["checksum"]


def test_evaluations_and_rollouts_are_stored(train):
    from keel.store.store import Store

    run = train(
        "grpo",
        name="stored",
        max_steps=2,
        **{
            "evaluate.before": True,
            "evaluate.after": True,
            "evaluate.num_prompts": 4,
            "evaluate.num_generations": 2,
            "train.eval_steps": 1,
            "train.log_completions": 1,
        },
    )
    with Store(run.path.parent / "keel.sqlite", readonly=True) as store:
        stored = store.run("stored")
        assert [(e.step, e.phase) for e in store.evaluations(stored.id)] == [(0, "before"), (1, "during"), (2, "after")]
        kept = store.rollouts(stored.id)
        assert {r.step for r in kept} == {1, 2} and len(kept) == 2 * 2 * 8
        assert all(r.numbers["entropy"].shape == (r.length,) and (r.numbers["entropy"] >= 0).all() for r in kept)
    assert "<script src=" not in (run.path / "report.html").read_text()


def test_trackers_receive_the_metrics(train):
    pytest.importorskip("tensorboard")
    run = train("grpo", name="tracked", max_steps=1, **{"train.trackers": ("tensorboard",)})
    assert list(run.path.rglob("events.out.tfevents*"))
