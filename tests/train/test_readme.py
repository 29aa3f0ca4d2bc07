"""The README's script and commands run as they stand, and the demonstration holds what it promises."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (float(word.strip("[,")) for word in re.findall(r"\[[0-9.]+,", done.stdout))
    assert after > before
    assert (tmp_path / done.stdout.split()[-1]).is_file()


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    text = README.read_text()
    commands = re.findall(r"^\$ (keel .*?)(?:  +#.*)?$", text, re.MULTILINE)
    commands = [command for command in commands if command != "keel ui"]  # which serves until it is stopped
    assert len(commands) == 14
    for command in commands:
        arguments = [sys.executable, "-m", "keel.cli.main", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_demonstration(tmp_path):
    command = [sys.executable, "-m", "keel.cli.main", "demo", "--max-steps", "2", "--control"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    for arm in ("before", "after", "after_regularised"):
        assert {"pass@1", "pass@16", "entropy", "kl"} <= set(summary[arm])
    assert summary["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert len(summary["arms"]) == 6
    assert "<script src=" not in (folder / "report.html").read_text()
    assert (folder / "demo.svg").read_text().startswith("<svg")
