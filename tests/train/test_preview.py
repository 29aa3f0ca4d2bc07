"""Steps that are shortened, and heads that follow."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.parts.k8 import k8_rows

from keel.core.errors import ConfigError
from keel.models.heads import SlowCopy, follow
from keel.models.load import load
from keel.parts.controllers.pid import KLPreview
from keel.statistics.stats import Stats
from keel.train.preview import step_within

SETTINGS = {"rollout.num_prompts": 4, "train.critic_learning_rate": 1e-2, "train.num_iterations": 1}


def length(completions, **_):
    return [float(len(c)) for c in completions]


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_a_step_that_leads_too_far_is_shortened(train, base):
    """The same first step, once whole and once cut to the share that was reported."""
    whole = train("safe", name="whole", max_steps=1, max_preview_kl=None, reward=length, learning_rate=3e-2, **SETTINGS)
    cut = train("safe", name="cut", max_steps=1, max_preview_kl=1e-3, reward=length, learning_rate=3e-2, **SETTINGS)
    share = cut.metrics["updates/scale"][0][1]
    assert 0 < share < 1 and "updates/scale" not in whole.metrics
    start = weights(load(base).module)
    torch.testing.assert_close(weights(cut.model) - start, share * (weights(whole.model) - start), rtol=1e-3, atol=1e-7)
    free = train("safe", name="free", max_steps=1, max_preview_kl=1e9, reward=length, learning_rate=3e-2, **SETTINGS)
    assert torch.equal(weights(free.model), weights(whole.model))


def test_a_step_after_which_nothing_has_a_probability_is_not_taken():
    """The weights are infinite then, of which no share can be taken."""
    module = torch.nn.Linear(2, 1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before, rows, judge = weights(module), k8_rows(), KLPreview()

    def step(norm):
        for p in module.parameters():
            p.data.fill_(torch.inf)

    session = SimpleNamespace(
        method=SimpleNamespace(controllers={"preview": judge}),
        policy=SimpleNamespace(module=module),
        optimiser=SimpleNamespace(step=step),
        engine=SimpleNamespace(measure=lambda what, rows: Stats({w: torch.full((8, 4), torch.nan) for w in what})),
    )
    assert step_within(session, rows, torch.tensor(1.0)) == 0.0
    assert torch.equal(weights(module), before)


def test_slow_heads_follow_once_a_batch(train):
    """From 0 with rate .25: after one batch a quarter of the way to the critic, after two the next quarter."""
    settings = {**SETTINGS, "train.save_steps": 1}
    run = train("safe", name="slow", max_steps=2, slow=0.25, reward=length, **settings)
    one, two = (load_file(run.path / f"checkpoint-{n}" / "keel/heads.safetensors") for n in (1, 2))
    for key in ("weight", "bias"):
        assert bool(one[f"value_a/{key}"].any())
        torch.testing.assert_close(one[f"slow_a/{key}"], 0.25 * one[f"value_a/{key}"])
        wanted = 0.75 * one[f"slow_a/{key}"] + 0.25 * two[f"value_a/{key}"]
        torch.testing.assert_close(two[f"slow_a/{key}"], wanted)


def test_a_copy_of_nothing_is_refused():
    line, other = torch.nn.Linear(2, 1), torch.nn.Sequential(torch.nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="no head"):
        follow({"slow": SlowCopy("value")}, {"slow": line})
    with pytest.raises(ConfigError, match="no copy"):
        follow({"slow": SlowCopy("value")}, {"slow": line, "value": other})
