"""Heads that learn before the policy moves."""

import pytest
import torch
from safetensors.torch import load_file

from keel.core.errors import ConfigError
from keel.models.load import checksum, load
from keel.recipes.registry import recipe_named
from keel.tasks.load import load_task
from keel.train.configuration import Request, resolve


def odd(completions, **_):
    """Half of the completions, whatever they say."""
    return [float(len(c) % 2) for c in completions]


def test_the_heads_alone_learn_at_first(train, base):
    """Bit for bit the initial policy at step 2, even with weight decay; from step 3 on it moves."""
    settings = {"train.critic_warmup_steps": 2, "train.save_steps": 2, "train.weight_decay": 0.1}
    run = train("oreal", token_rewards="head", num_generations=4, reward=odd, name="warm", max_steps=4, **settings)
    at_two = run.path / "checkpoint-2"
    assert checksum(load(at_two).module) == checksum(load(base).module) != checksum(run.model)
    head = load_file(at_two / "keel/heads.safetensors")
    assert len(head) == 2 and all(bool(value.any()) for value in head.values())
    moments = load_file(at_two / "keel/optimiser.safetensors")
    assert moments and all(name.startswith("heads.") for name in moments)


def test_a_policy_that_never_moves_is_refused(train):
    with pytest.raises(ConfigError, match="critic_warmup_steps"):
        train("oreal", name="never", max_steps=3)


def test_a_method_without_heads_has_no_warm_up(train, base):
    plain, warm = (
        train("grpo", name=f"{n}", reward=odd, max_steps=1, **{"train.critic_warmup_steps": n}) for n in (0, 1)
    )
    assert checksum(plain.model) == checksum(warm.model) != checksum(load(base).module)


@pytest.mark.parametrize(("path", "rates"), [("somewhere", (5e-7, 2e-6)), ("tiny", (7e-5, 2.8e-4))])
def test_the_heads_of_oreal_learn_four_times_as_fast(path, rates):
    found = resolve(Request("oreal", model=path), load_task("countdown")).train
    assert (found.learning_rate, found.critic_learning_rate) == pytest.approx(rates)
    assert found.critic_warmup_steps == 10 == recipe_named("oreal").preset["train.critic_warmup_steps"]
    assert torch.tensor(found.critic_learning_rate / found.learning_rate) == pytest.approx(4)
