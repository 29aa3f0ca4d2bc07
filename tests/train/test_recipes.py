"""Every recipe trains the tiny model for a few steps, and the weights move."""

import math

import pytest
import torch

from keel.models.load import checksum, load
from keel.models.sources import Pretrained
from keel.recipes.registry import recipes

SETTINGS = {
    "dapo": {"rollout.num_generations": 4},
    "rloo": {"num_generations": 4},
    "oreal": {"train.critic_warmup_steps": 1},
}


def length(completions, **_):
    """A reward that seldom ties."""
    return [float(len(c)) for c in completions]


DATA_OF_THEIR_OWN = {"stored_distillation", "self_judge"}  # they have tests of their own


def taught(name, teacher):
    """The paths that a recipe leaves to its user."""
    models = recipes()[name]().models
    return {f"models.{n}.path": teacher for n, m in models.items() if isinstance(m, Pretrained) and not m.path}


def trained():
    """All recipes; those that vary another take its way through the loop, and wait for slow runs."""
    for name in sorted(set(recipes()) - DATA_OF_THEIR_OWN):
        varied = recipes()[name].baseline is not None
        yield pytest.param(name, marks=pytest.mark.slow if varied else ())


@pytest.mark.parametrize("name", list(trained()))
def test_every_recipe_trains(name, train, base, teacher, tmp_path):
    before = checksum(load(base).module)
    run = train(name, name=name, max_steps=2, reward=length, **taught(name, teacher), **SETTINGS.get(name, {}))
    assert run.summary["status"] == "finished"
    assert all(math.isfinite(value) for curve in run.metrics.values() for _, value in curve)
    assert checksum(run.model) != before
    again = load(run.path / run.summary["checkpoint"])
    assert checksum(again.module) == run.summary["checksum"] == checksum(run.model)


def test_the_reward_goes_up(train):
    """Reward for a first digit that is even: the share must rise well beyond chance in 25 steps."""

    def even(prompts, completions, completion_ids, **columns):
        return [float(c[:1] in tuple("2468")) for c in completions]

    run = train("grpo", reward=even, max_steps=25, name="even", learning_rate=3e-3, **{"rollout.num_prompts": 8})
    curve = [value for _, value in run.metrics["reward"]]
    assert sum(curve[-5:]) / 5 > sum(curve[:5]) / 5 + 0.15


def test_a_penalty_keeps_the_policy_closer(train):
    """The same run with a large KL(ref || policy) ends nearer to the reference."""

    def even(prompts, completions, completion_ids, **columns):
        return [float(c[:1] in tuple("2468")) for c in completions]

    settings = {"reward": even, "max_steps": 15, "learning_rate": 3e-3, "rollout.num_prompts": 8}
    free = train("grpo_forward_kl", beta=1e-6, name="free", **settings)
    held = train("grpo_forward_kl", beta=1.0, name="held", **settings)
    name = "divergence/kl_ref_policy"
    assert held.metrics[name][-1][1] < 0.5 * free.metrics[name][-1][1]


def test_supervised_training_lowers_the_loss(train):
    data = [{"prompt": f"{n} {n} {n}>{3 * n}=", "completion": f"{n}+{n}+{n}"} for n in range(1, 20)]
    run = train("sft", data=data, max_steps=40, learning_rate=1e-2, name="copy", **{"train.batch_size": 16})
    losses = [value for _, value in run.metrics["loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_several_updates_a_batch_leave_the_ratio_at_one_only_at_first(train):
    run = train("grpo", name="several", max_steps=2, **{"train.num_minibatches": 2, "train.num_iterations": 2})
    assert run.metrics["approx_kl"][0][1] == pytest.approx(0.0, abs=1e-9)
    assert run.summary["last"]["updates/skipped"] == 0


@pytest.mark.parametrize("filters", [{}, {"rollout.top_p": 0.8}, {"rollout.top_k": 3}, {"rollout.min_p": 0.1}])
def test_the_sampler_and_the_trainer_agree(train, filters):
    """Under whatever distribution is sampled; the weights are 1 where nothing is filtered."""
    run = train("grpo", name="gap", max_steps=2, temperature=0.8, reward=length, **filters)
    assert max(value for _, value in run.metrics["rollout/logp_gap"]) < 1e-4
    share = min(value for _, value in run.metrics["rollout/ess"])
    assert share < 0.999 if filters else share > 0.9999


def test_critics_learn_values(train):
    """The value loss falls with a head and with a critic of its own."""
    for critic in ("head", "model"):
        run = train(
            "ppo",
            critic=critic,
            beta=0.0,
            max_steps=12,
            learning_rate=1e-3,
            name=f"ppo_{critic}",
            reward=lambda completions, **_: [1.0] * len(completions),
            num_generations=8,
            value_coef=1.0,
            value_epsilon=None,
            lam=1.0,
        )
        losses = [value for _, value in run.metrics["terms/value"]]
        assert losses[0] == pytest.approx(0.5, abs=1e-6) and losses[-1] < 0.3


def test_lora_trains_the_adapter_alone(train, base, tmp_path):
    import keel
    from keel.train.entry import export

    plain = load(base)
    before = {name: p.clone() for name, p in plain.module.named_parameters()}
    run = train("grpo", name="lora", beta=0.05, reward=length, **{"model.lora_rank": 4, "learning_rate": 1e-2})
    files = {p.name for p in (run.path / run.summary["checkpoint"]).iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    base_now = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in run.model.named_parameters()
    }
    assert all(torch.equal(base_now[name], value) for name, value in before.items() if name in base_now)
    merged = load(export(run.path, tmp_path / "merged"))
    assert any(not torch.equal(p, before[name]) for name, p in merged.module.named_parameters())
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        difference = merged.module(ids).logits - run.model(ids).logits
    assert float(difference.abs().max()) < 1e-4
    assert keel.sample(str(run.path), ["3 6 17>20="], task="countdown")[0].text


def test_mixed_precision_and_checkpointing_train_the_same_model_but_for_rounding(train):
    """bf16 stays near fp32; recomputing the layers changes nothing beyond rounding."""
    settings = {"reward": length, "max_steps": 2, "beta": 0.1, "learning_rate": 1e-3}
    plain = train("grpo", name="fp32", **settings)
    mixed = train("grpo", name="bf16", **{"model.autocast": "bfloat16"}, **settings)
    again = train("grpo", name="recomputed", **{"model.gradient_checkpointing": True}, **settings)
    first = {run.config.name: {k: v[0][1] for k, v in run.metrics.items()} for run in (plain, mixed, again)}
    assert first["bf16"]["entropy"] == pytest.approx(first["fp32"]["entropy"], rel=0.02)
    assert first["bf16"]["rollout/logp_gap"] < 0.05
    assert first["recomputed"]["grad_norm"] == pytest.approx(first["fp32"]["grad_norm"], rel=1e-4)
    assert first["recomputed"]["entropy"] == pytest.approx(first["fp32"]["entropy"], rel=1e-6)


def test_micro_batches_change_nothing_but_rounding(train):
    """The whole loop under max_tokens small and large: the same curves."""
    settings = {"reward": length, "max_steps": 3, "beta": 0.1, "kl": "kl_ref_policy", "learning_rate": 1e-3}
    whole = train("grpo", name="whole", **settings)
    split = train("grpo", name="split", **{"train.max_tokens": 60, "train.chunk_megabytes": 0.001}, **settings)
    for name in ("grad_norm", "loss", "entropy", "reward"):
        assert [v for _, v in split.metrics[name]] == pytest.approx(
            [v for _, v in whole.metrics[name]], rel=2e-4, abs=1e-6
        )


def test_controllers_move_their_coefficient(train):
    from keel.parts.controllers.coefficients import Schedule
    from keel.recipes.policy_gradient import grpo

    method = grpo(beta=0.1, max_completion_length=11).adding(
        controllers={"beta": Schedule("terms.kl.coef", start=0.4, end=0.0, steps=4)}
    )
    run = train(method, name="scheduled", reward=length, max_steps=3)
    curve = [value for _, value in run.metrics["controllers/terms.kl.coef"]]
    assert curve == pytest.approx([0.4, 0.3, 0.2])
