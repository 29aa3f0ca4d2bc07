"""The commands: exit codes, JSON, and no traceback for a user's mistake."""

import json
import subprocess
import sys

import pytest
from tests.commands import keel


def test_a_process_exits_as_the_command_does_here(tmp_path):
    """The tests below run in one process; this is what a shell sees."""
    command = [sys.executable, "-m", "keel.cli.main", "train", "grppo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    here = keel("train", "grppo", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (here.returncode, here.stdout, here.stderr)
    assert here.returncode == 2 and here.stderr.startswith("keel: ") and here.stderr.count("\n") == 1


def test_methods_as_json():
    listed = json.loads(keel("methods", "--json").stdout)
    names = {facts["name"] for facts in listed}
    assert {
        "reinforce",
        "reinforce_pp",
        "rloo",
        "remax",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "ppo",
        "sft",
    } <= names
    assert all({"name", "paper", "baseline", "slots", "kind"} <= set(facts) for facts in listed)
    assert {facts["kind"] for facts in listed} == {"online", "supervised", "pairs", "reward", "distillation"}


def test_show_prints_a_configuration_that_runs(base, tmp_path):
    shown = keel("methods", "show", "grpo", "--set", "beta=0.1")
    assert shown.returncode == 0
    (tmp_path / "config.yaml").write_text(shown.stdout)
    ran = keel(
        "train",
        "--config",
        "config.yaml",
        "--model",
        base,
        "--task",
        "countdown",
        "--max-steps",
        1,
        "--name",
        "shown",
        "--set",
        "evaluate.before=false",
        "--set",
        "evaluate.after=false",
        "--set",
        "rollout.num_prompts=2",
        "--set",
        "rollout.max_completion_length=12",
        "--json",
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "grppo"], "Did you mean 'grpo'"),
        (["train", "grpo", "--set", "beta"], "KEY=VALUE"),
        (["train", "grpo", "--set", "betta=1"], "Did you mean 'beta'"),
        (["train", "grpo", "--set", "beta=1", "--set", "beta=2"], "twice"),
        (["train", "grpo", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "grpo", "--data", "missing.jsonl"], "missing.jsonl"),
        (["train", "grpo", "--model", "missing", "--task", "countdown"], "missing"),
        (["train"], "no recipe"),
        (["export", "nothing", "there"], "no such run"),
        (["eval", "missing-model", "--task", "countdown"], "missing-model"),
        (["sample", "1 2 3>6=", "--set", "temperatur=1"], "Did you mean 'temperature'"),
    ],
)
def test_a_mistake_exits_with_two_and_one_line(arguments, said, tmp_path):
    done = keel(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_a_malformed_line_is_named_before_training(tmp_path, base):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": 3}\n{broken\n')
    done = keel(
        "train",
        "grpo",
        "--data",
        "bad.jsonl",
        "--model",
        base,
        "--reward",
        "keel.parts.rewards.functions:ExactMatch",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "bad.jsonl" in done.stderr and "2" in done.stderr and "3" in done.stderr
    assert not (tmp_path / "runs" / "grpo").exists()


def test_a_dry_run_trains_nothing(base, tmp_path):
    done = keel("train", "grpo", "--model", base, "--task", "countdown", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["parameters"] == facts["trained_parameters"] > 1000
    assert facts["memory_gib"] > 0 and facts["seconds_per_step"] > 0 and len(facts["first_batch"]) == 4
    assert not (tmp_path / "runs").exists()


def test_runs_eval_sample_export(base, tmp_path, train):
    run = train("grpo", name="one", max_steps=1)
    runs = run.path.parent
    listed = json.loads(keel("runs", "--runs", runs, "--json").stdout)
    assert [(r["name"], r["status"], r["step"]) for r in listed] == [("one", "finished", 1)]
    assert keel("export", run.path, tmp_path / "out").returncode == 0
    scores = keel(
        "eval",
        tmp_path / "out",
        "--task",
        "countdown",
        "--set",
        "num_prompts=4",
        "--set",
        "num_generations=2",
        "--json",
    )
    assert 0 <= json.loads(scores.stdout)["pass@1"][0] <= 1
    drawn = keel("sample", "3 6 17>20=", "--model", tmp_path / "out", "--task", "countdown", "-n", 3, "--json")
    assert len(json.loads(drawn.stdout)) == 3


def test_doctor_as_json():
    found = json.loads(keel("doctor", "--json").stdout)
    assert found["packages"]["torch"] and found["problems"] == []
