"""`keel compare` and `keel recommend` from the command line; the whole of it in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from keel.cli.main import app
from keel.compare.record import load
from tests.compare.small import SETTINGS, TASK, Pretending

SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def keel(model, tmp_path, monkeypatch):
    """The command, with pretended cells."""
    launch = Pretending(score=lambda cell: 0.5 + 0.1 * cell.seed)
    monkeypatch.setattr("keel.compare.work.local", lambda gpus: launch)

    def run(*words):
        return CliRunner().invoke(app, [*words, "--runs", str(tmp_path / "runs")], catch_exceptions=False)

    def compare(*words):
        given = ["--task", TASK, "--model", model, "--budget", "2steps", "--workers", "1", *SETS]
        return run("compare", *words, *given)

    run.compare, run.launch = compare, launch
    return run


def test_the_table_and_the_files(keel, tmp_path):
    lines, page = tmp_path / "lines.csv", tmp_path / "deep" / "page.html"
    done = keel.compare("grpo", "dr_grpo", "--seeds", "3", "--name", "one", "--csv", str(lines), "--html", str(page))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs/comparisons/one"
    assert "dr_grpo" in done.stdout
    assert str(folder / "report.html") in done.stdout.replace("\n", "")
    with lines.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["status"]) for row in rows][:2] == [
        ("grpo", "0", "finished"),
        ("grpo", "1", "finished"),
    ]
    assert page.read_text() == (folder / "report.html").read_text()
    assert "<html" in page.read_text()
    assert {path.name for path in folder.iterdir()} >= {"comparison.json", "results.json", "results.csv", "summary.csv"}
    command = json.loads((folder / "comparison.json").read_text())["command"]
    assert command.startswith("keel compare grpo dr_grpo --seeds 3 --budget 2steps --task")
    assert "--set evaluate.num_prompts=8" in command


def test_json_for_programs(keel):
    done = keel.compare("grpo", "dr_grpo", "--seeds", "2", "--name", "one", "--json")
    data = json.loads(done.stdout)
    assert (data["name"], len(data["outcomes"]), data["analysis"]["baseline"]) == ("one", 4, "grpo")
    assert data["report"].endswith("one/report.html")
    assert data["announced"] > 0


def test_failed_cells_end_with_1_after_the_report(keel, tmp_path):
    keel.launch.ends = {"dr_grpo, seed 0": [1]}
    done = keel.compare("grpo", "dr_grpo", "--seeds", "2", "--name", "one")
    assert done.exit_code == 1
    assert "dr_grpo seed 0 (dr_grpo, seed 0 went wrong)" in " ".join(done.stdout.split()), done.stdout
    assert (tmp_path / "runs/comparisons/one/report.html").exists()
    assert keel.compare("grpo", "dr_grpo", "--seeds", "2", "--name", "one", "--retry-failed").exit_code == 0


def test_every_cell_failed_is_still_a_report(keel, tmp_path):
    keel.launch.ends = {"grpo, seed 0": [1]}
    done = keel.compare("grpo", "--seeds", "1", "--name", "one")
    assert done.exit_code == 1
    assert (tmp_path / "runs/comparisons/one/report.html").exists()


def test_a_dry_run_says_what_would_run(keel, tmp_path):
    words = ("grpo", "--param", "beta=0,0.1", "--seeds", "2", "--name", "one", "--dry-run")
    done = keel.compare(*words, "--json")
    found = json.loads(done.stdout)
    assert [cell["arm"] for cell in found["cells"]] == ["grpo beta=0", "grpo beta=0.1"] * 2
    assert (found["cells"][0]["state"], found["workers"], keel.launch.begun) == ("new", 1, [])
    said = keel.compare(*words).stdout
    assert said.count("new ") == 4


def test_mistakes_end_with_2(keel):
    from keel.core.errors import UserError

    for words, said in ((("grpo", "--seeds", "0"), "--seeds"), (("grpo", "dr_grop"), "dr_grpo"), ((), "no recipe")):
        with pytest.raises(UserError, match=said) as error:
            keel.compare(*words)
        assert error.value.exit_code == 2


def test_recommendations(keel):
    done = keel("recommend", "--json")
    assert len(json.loads(done.stdout)["first"]) == 5
    done = keel("recommend", "--task", "sparse", "--budget", "5min")
    assert done.stdout.startswith("To try first on sparse with 5min a run:")


# -- real processes ---------------------------------------------------------------------------------------------------


def launched(model, runs, *more):
    words = ["compare", "grpo", "dr_grpo", "--seeds", "1", "--name", "one", "--task", TASK, "--model", model]
    words += ["--budget", "60steps", *SETS, "--set", "train.save_steps=2"]
    words += ["--workers", "2", "--runs", str(runs), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = "from keel.cli.main import main; main()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **streams)


def until(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_parent_that_is_killed_takes_its_cells_along_and_nothing_is_lost(model, tmp_path):
    """SIGKILL for the parent: its cells write a checkpoint and end; the same command goes on, to the same numbers."""
    runs = tmp_path / "runs"
    first = launched(model, runs)
    until(lambda: len(list(runs.glob("cell-*/checkpoint-*"))) >= 2 or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    first.kill()
    first.communicate()
    second = launched(model, runs, "--json")
    said, noise = second.communicate(timeout=400)
    assert second.returncode == 0, noise
    whole = launched(model, tmp_path / "whole", "--json")
    expected, noise = whole.communicate(timeout=400)
    assert whole.returncode == 0, noise
    one, other = (json.loads(text)["outcomes"] for text in (said, expected))
    assert [o["values"] for o in one] == [o["values"] for o in other]
    logs = [path.read_text() for path in runs.glob("comparisons/one/cells/cell-*.log")]
    assert any("continuing from" in log for log in logs), logs


@pytest.mark.slow
def test_ctrl_c_stops_with_checkpoints(model, tmp_path):
    runs = tmp_path / "runs"
    process = launched(model, runs)
    until(lambda: len(list(runs.glob("cell-*/checkpoint-*"))) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "the same command goes on where it was" in said
    assert "Traceback" not in said
    assert [o.status for o in load("one", runs).outcomes] == ["missing", "missing"]
