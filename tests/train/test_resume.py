"""Checkpoints and resuming: to the same bits, from whatever is left."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from keel.core.errors import RunError
from keel.models.load import checksum

CODE = """
import sys, keel, torch
torch.set_num_threads(1)
keel.train({recipe!r}, model={base!r}, task="countdown", runs={runs!r}, name="run", resume="--resume" in sys.argv,
           learning_rate=1e-3, max_steps=12, **{{"rollout.num_prompts": 2, "train.save_steps": 2,
           "evaluate.before": False, "evaluate.after": False, **{settings!r}}})
"""
PARTS = {
    "grpo": {},
    "online_dpo": {"rollout.num_generations": 4, "train.num_minibatches": 2},
    "ppo": {"target_kl": 0.1, "rollout.num_generations": 4, "train.num_minibatches": 2},
    "reinforce": {"baseline": "running", "rollout.num_generations": 4},
}


def launch(base, runs, recipe, *flags):
    code = CODE.format(base=base, runs=str(runs), recipe=recipe, settings=PARTS[recipe])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *flags], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow  # forked runs, which begin faster, are killed in tests/promises
@pytest.mark.parametrize("recipe", sorted(PARTS))
def test_a_killed_run_ends_with_the_same_bits(recipe, base, tmp_path):
    whole = launch(base, tmp_path / "whole", recipe)
    killed = launch(base, tmp_path / "killed", recipe)
    folder = tmp_path / "killed" / "run"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-4").exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stderr.close()
    assert not (folder / "summary.json").exists()
    again = launch(base, tmp_path / "killed", recipe, "--resume")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "continuing from" in said
    _, said = whole.communicate(timeout=120)
    assert whole.returncode == 0, said
    one, other = (
        json.loads((p / "run" / "summary.json").read_text()) for p in (tmp_path / "whole", tmp_path / "killed")
    )
    assert one["checksum"] == other["checksum"]
    timed = ("step_time", "time/rollout", "time/reward")
    assert {k: v for k, v in one["last"].items() if k not in timed} == {
        k: v for k, v in other["last"].items() if k not in timed
    }


@pytest.mark.slow  # as are forked runs in tests/promises
def test_sigterm_writes_a_checkpoint_and_exits_143(base, tmp_path):
    runs = tmp_path / "runs"
    command = [
        sys.executable,
        "-m",
        "keel.cli.main",
        "train",
        "grpo",
        "--model",
        base,
        "--task",
        "countdown",
        "--runs",
        str(runs),
        "--name",
        "run",
        "--max-steps",
        "100000",
        "--set",
        "evaluate.before=false",
        "--set",
        "rollout.num_prompts=2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    store = runs / "keel.sqlite"
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        if store.exists() and _steps(store) >= 1:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "--resume" in said and "Traceback" not in said
    assert list((runs / "run").glob("checkpoint-*"))


def _steps(store):
    import sqlite3

    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as db:
            return db.execute("SELECT max(step) FROM runs").fetchone()[0] or 0
    except sqlite3.Error:
        return 0


def test_an_existing_name_is_refused(train):
    train("grpo", name="one", max_steps=1)
    with pytest.raises(RunError, match=r"there is a run of that name.*--resume"):
        train("grpo", name="one", max_steps=1)


def test_a_finished_run_is_given_back(train):
    first = train("grpo", name="one", max_steps=1)
    second = train("grpo", name="one", max_steps=1, resume=True)
    assert checksum(second.model) == checksum(first.model)
    assert second.metrics["loss"] == first.metrics["loss"]


def test_a_changed_configuration_is_refused_with_the_keys(train):
    train("grpo", name="one", max_steps=1)
    with pytest.raises(RunError, match=r"train\.max_steps: 1 -> 2"):
        train("grpo", name="one", max_steps=2, resume=True)
    with pytest.raises(RunError, match=r"method\.surrogate\.f\.epsilon: 0\.2 -> 0\.3"):
        train("grpo", name="one", max_steps=1, epsilon=0.3, resume=True)


def test_resuming_nothing_starts_from_the_beginning_and_says_so(train):
    said = []
    run = train("grpo", name="new", max_steps=1, resume=True, report=lambda event, facts: said.append((event, facts)))
    notes = [facts["text"] for event, facts in said if event == "note"]
    assert run.summary["steps"] == 1 and any("starting from the beginning" in note for note in notes)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, base):
    def stop_after_four(event, facts):
        if event == "step" and facts["step"] == 5:
            raise RuntimeError("power cut")

    settings = {"name": "cut", "max_steps": 6, "train.save_steps": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        train("grpo", report=stop_after_four, **settings)
    whole = train("grpo", **{**settings, "name": "whole"})
    newest = whole.path.parent / "cut" / "checkpoint-4"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    said = []
    run = train("grpo", resume=True, report=lambda event, facts: said.append((event, facts)), **settings)
    texts = [facts["text"] for event, facts in said if event in ("note", "warning")]
    assert any("checkpoint-4 is damaged (model.safetensors was changed)" in text for text in texts)
    assert any("checkpoint-2" in text for text in texts)
    assert run.summary["checksum"] == whole.summary["checksum"]


def test_another_initial_model_is_refused(train, base, tmp_path):
    import shutil

    from keel.models.load import load, save

    copy = tmp_path / "copy"
    shutil.copytree(base, copy)

    def stop(event, facts):
        if event == "step" and facts["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train("grpo", model=str(copy), name="moved", max_steps=4, report=stop, **{"train.save_steps": 2})
    model = load(copy)
    next(model.module.parameters()).data.add_(1.0)
    save(model, copy)
    with pytest.raises(RunError, match="not the one that this run began with"):
        train("grpo", model=str(copy), name="moved", max_steps=4, resume=True, **{"train.save_steps": 2})
