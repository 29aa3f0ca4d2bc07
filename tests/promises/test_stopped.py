"""SIGTERM, Ctrl-C and a reward that hangs: what is saved is a whole step, and going on gives the same bits."""

import signal
import time

import pytest
from tests.promises.test_killed import outcome, whole

from keel.core.errors import RewardError
from keel.train.checkpoint import checkpoints, damage
from keel.train.lifecycle import Stopped

LONG = {"max_steps": 400, "train.save_steps": 1000}


def test_sigterm_writes_a_checkpoint_and_a_second_one_does_not_disturb_it(launch, tmp_path):
    process = launch(attack={"slow_saves": 0.8}, **LONG)
    process.until("step 2")
    process.kill(signal.SIGTERM)
    process.until("writing a checkpoint")
    for _ in range(3):
        process.kill(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait() == 143, process.said
    assert "--resume" in process.said and "Traceback" not in process.said
    (found,) = checkpoints(tmp_path / "runs" / "run")
    assert damage(found) is None and int(found.name.split("-")[1]) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_bits(launch, tmp_path, number):
    settings = {"max_steps": 12, "train.save_steps": 1000, "train.num_minibatches": 2}
    expected, _ = whole(launch, tmp_path, settings)
    process = launch(tmp_path / "stopped", **settings)
    process.until("step 3")
    process.kill(number)
    assert process.wait() == 143, process.said
    again = launch(tmp_path / "stopped", resume=True, **settings)
    assert again.wait() == 0, again.said
    assert outcome(tmp_path / "stopped") == expected


def test_an_impatient_second_interrupt_saves_nothing_that_is_half_done(train, tmp_path):
    """Raised between the optimiser steps of one batch, whose first has moved the weights."""
    import keel.train.optimiser as module

    def interrupted(self, norm, step=module.Optimiser.step):
        step(self, norm)
        if self.count == 5:  # the first of two in step 3
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has put the tests into the background
    settings = {"max_steps": 4, "train.save_steps": 1, "train.num_minibatches": 2}
    expected = train(**settings, name="whole").summary["checksum"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Optimiser, "step", interrupted)
        with pytest.raises(Stopped, match="at once"):
            train(**settings)
    assert [p.name for p in checkpoints(tmp_path / "runs/run")] == ["checkpoint-1", "checkpoint-2"]
    assert train(**settings, resume=True).summary["checksum"] == expected
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_while_measuring_ends_soon(launch, tmp_path):
    """Before the first step, and with many prompts to go."""
    settings = {"evaluate.before": True, "task.held_out": 0.5, "evaluate.num_generations": 512}
    process = launch(**{**LONG, **settings, "rollout.max_completion_length": 30})
    process.until("measuring")
    time.sleep(0.3)
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.said
    assert "stopped while measuring before training" in process.said or "stopped at step 0" in process.said


def test_a_reward_that_hangs_later_saves_the_step_before_it_whole(train, tmp_path):
    """The prompts that the broken step had drawn are drawn again."""
    from tests.promises.runs import length

    calls = []

    def hangs(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(3600)
        return length(completions)

    def named(function):
        return {"reward": {"own": function}}

    settings = {"max_steps": 4, "task.reward_timeout": 0.5, "train.save_steps": 100}
    expected = train(**settings, **named(length), name="whole").summary["checksum"]
    with pytest.raises(RewardError, match="no result after"):
        train(**settings, **named(hangs))
    assert [p.name for p in checkpoints(tmp_path / "runs/run")] == ["checkpoint-2"]
    assert train(**settings, **named(length), resume=True).summary["checksum"] == expected
