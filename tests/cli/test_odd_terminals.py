"""Terminals without the characters that are printed, and files where a recipe is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.commands import keel

from keel import train
from keel.core.errors import ConfigError
from keel.recipes import registry

OWN = """
import keel

@keel.recipe()
def entropy_floor(): ...

@keel.recipe()
def other(): ...

def plain(): ...
"""


def test_a_terminal_of_ascii_gets_question_marks_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keel.cli.main", "papers", "subscribe", "entropy ä±…"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "KEEL_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.strip() == b"entropy ???  (not told yet)"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "command", [["train"], ["verify"], ["compare", "grpo"], ["methods", "show"]], ids=lambda words: words[0]
)
def test_a_file_without_the_name_of_a_recipe(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = keel(*command, "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine.py: is a file" in done.stderr
    assert "Write mine.py:NAME. Recipes: entropy_floor, other." in done.stderr


@pytest.mark.usefixtures("registered")
def test_a_file_without_the_name_of_a_recipe_in_python(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("import keel\n\n@keel.recipe()\ndef only_here(): ...\n")
    with pytest.raises(ConfigError, match=r"own\.py: is a file.*Write .*own\.py:NAME\. Recipes: only_here\.$"):
        train(str(own))
    own.write_text("def broken(:\n")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        train(str(own))
    own.write_text("import keel\n\n@keel.recipe()\ndef half_done(): ...\n\nraise OSError('no disk')\n")
    with pytest.raises(ConfigError, match="cannot be imported: OSError: no disk"):
        train(str(own))
    assert "only_here" in registry.recipes() and "half_done" not in registry.recipes()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_recipe_that_returns_nothing(command: str, tmp_path: Path) -> None:
    (tmp_path / f"no_{command}.py").write_text(f"import keel\n\n@keel.recipe()\ndef nothing_{command}(): ...\n")
    done = keel(command, f"no_{command}.py:nothing_{command}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"recipe 'no_{command}.py:nothing_{command}': returns NoneType, not a keel.Method" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("@keel.recipe\ndef bare(): ...", "bare: has a decorator without parentheses. Write @keel.recipe()."),
        ("@keel.part\nclass Bare: ...", 'Bare: has a decorator without a name. Write @keel.part("name").'),
    ],
)
def test_a_decorator_without_parentheses(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(f"import keel\n\n{text}\n")
    command = [sys.executable, "-m", "keel.cli.main", "methods", "show", "bare.py:bare"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--max-steps", "2", "--set", "train.max_steps=3"], "--max-steps and --set train.max_steps: is given twice"),
        (["--max-steps", "2", "--set", "max_steps=3"], "--max-steps and --set max_steps: is given twice"),
        (["--set", "train.trackers=wandb"], "train.trackers: Input should be a list, such as [wandb] (got 'wandb')"),
    ],
)
def test_settings_that_contradict_or_are_no_lists(given: list[str], said: str, tmp_path: Path) -> None:
    done = keel("train", "grpo", "--task", "countdown", *given, "--runs", tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
