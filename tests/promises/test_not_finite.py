"""Numbers that are not finite: the update is skipped, its batch kept, and the third in a row ends the run."""

import math

import pytest
import torch
from safetensors.torch import load_file

from keel.core.errors import TrainingError, UserError
from keel.models.load import checksum, load, save

GIVEN = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]


def poison(policy, name, value):
    """One weight becomes a number that is none."""
    parameters = dict(policy.module.named_parameters())
    with torch.no_grad():
        parameters[next(n for n in parameters if name in n)].view(-1)[3] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_whose_weights_are_no_numbers_is_refused_and_the_weight_is_named(train, model, tmp_path, value):
    policy = load(model)
    poison(policy, "up_proj", value)
    save(policy, tmp_path / "broken")
    with pytest.raises(UserError, match=r"up_proj\.weight is not finite"):
        train(model=str(tmp_path / "broken"))


@pytest.mark.parametrize("name", ["up_proj", "embed"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", ["grpo", "sft"])
def test_weights_that_break_on_the_way_end_the_run_after_three_updates(train, tmp_path, recipe, value, name):
    """Log-probabilities are no numbers, neither while it samples nor while it reads given completions."""

    def look(event, facts):
        if event == "start":
            look.session = facts["session"]
        if event == "step" and facts["step"] == 1:
            poison(look.session.policy, name, value)

    settings = {"data": GIVEN, "train.batch_size": 2} if recipe == "sft" else {}
    with pytest.raises(TrainingError, match="3 updates in a row were not finite"):
        train(recipe, report=look, max_steps=9, **settings)
    kept = sorted((tmp_path / "runs/run/skipped").iterdir())
    assert len(kept) == 3
    assert not bool(torch.isfinite(load_file(kept[0])["log_prob"]).all()) or recipe == "sft"


def hook_gradient(monkeypatch, value, steps):
    """The gradient of one weight is spoilt in some updates, the loss is not."""
    import keel.train.optimiser as module

    norm, seen = module.Optimiser.gradient_norm, []

    def spoilt(self):
        seen.append(self.count)
        if len(seen) - 1 in steps:
            next(p for p in self.parameters if p.grad is not None).grad.view(-1)[0] = value
        return norm(self)

    monkeypatch.setattr(module.Optimiser, "gradient_norm", spoilt)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update_and_leaves_the_weights(train, monkeypatch, value):
    hook_gradient(monkeypatch, value, {0})
    said, sums = [], {}

    def look(event, facts):
        said.append((event, facts))
        if event == "start":
            sums["session"] = facts["session"]
            sums[0] = checksum(facts["session"].policy.module)
        if event == "step":
            sums[facts["step"]] = checksum(sums["session"].policy.module)

    run = train(report=look, max_steps=2)
    assert sums[0] == sums[1] != sums[2]
    assert [v for _, v in run.metrics["updates/skipped"]] == [1.0, 0.0]
    assert any("the update is skipped" in facts["text"] for event, facts in said if event == "warning")
    (kept,) = (run.path / "skipped").iterdir()
    tensors = load_file(kept)
    assert {"prompt_ids", "tokens", "mask", "reward", "advantage", "log_prob"} <= set(tensors)
    assert tensors["tokens"].shape[0] == 4


def test_two_in_a_row_are_borne_and_three_are_not(train, monkeypatch, tmp_path):
    hook_gradient(monkeypatch, math.nan, {0, 1, 3, 4, 5})
    with pytest.raises(TrainingError, match=r"3 updates in a row were not finite \(step 5: .*norm nan") as error:
        train(max_steps=9)
    assert "learning_rate" in error.value.fix and "skipped" in error.value.where
    assert len(list((tmp_path / "runs/run/skipped").iterdir())) == 5


def test_skipped_updates_are_counted_across_a_resumption(train, monkeypatch, tmp_path):
    """Two before the power cut and one after it are three in a row."""
    hook_gradient(monkeypatch, math.nan, {0, 1, 2, 3})

    def power_cut(event, facts):
        if event == "step" and facts["step"] == 3:
            raise AssertionError("the third was not refused")
        if event == "step" and facts["step"] == 2:
            import keel.train.checkpoint as checkpoint

            checkpoint.save_checkpoint(power_cut.session)
            raise RuntimeError("power cut")
        if event == "start":
            power_cut.session = facts["session"]

    with pytest.raises(RuntimeError, match="power cut"):
        train(max_steps=9, report=power_cut)
    with pytest.raises(TrainingError, match="3 updates in a row"):
        train(max_steps=9, report=power_cut, resume=True)


def test_a_log_probability_of_the_sampler_that_is_not_finite_reaches_no_weight(train, monkeypatch):
    """Of one sampled token, in the first batch."""
    from keel.rollouts.decoding import Chooser

    choose, seen = Chooser.choose, []

    def spoilt(self, logits, alive, position):
        token, logp = choose(self, logits, alive, position)
        seen.append(1)
        if len(seen) == 1:
            logp = logp.clone()
            logp[0] = -math.inf
        return token, logp

    monkeypatch.setattr(Chooser, "choose", spoilt)
    run = train("grpo", max_steps=2)
    assert not math.isfinite(run.metrics["rollout/logp_gap"][0][1])
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_weights_that_overflow_are_told(train):
    """An absurd learning rate: weights overflow after a finite step, and the next step says so."""
    with pytest.raises(TrainingError, match="finite"):
        train(max_steps=12, learning_rate=1e6, max_grad_norm=None, **{"train.weight_decay": 1e6})
