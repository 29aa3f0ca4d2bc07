"""Terminals without the characters that are printed, and files where a recipe is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.commands import keel

from keel.cli.options import recipes_given
from keel.core.errors import ConfigError

OWN = """
import keel

@keel.recipe()
def entropy_floor(): ...

@keel.recipe
def other(): ...

def plain(): ...
"""


def test_a_terminal_of_ascii_gets_question_marks_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keel.cli.main", "papers", "subscribe", "entropy ä±…"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "KEEL_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.strip() == b"entropy ???  (not told yet)"


@pytest.mark.parametrize(
    "command", [["train"], ["verify"], ["compare", "grpo"], ["methods", "show"]], ids=lambda words: words[0]
)
def test_a_file_without_the_name_of_a_recipe(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = keel(*command, "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine.py: is a file" in done.stderr
    assert "Write mine.py:NAME. Recipes: entropy_floor, other." in done.stderr


def test_a_file_that_defines_nothing_and_one_that_is_not_there(tmp_path: Path) -> None:
    place = tmp_path / "broken.py"
    place.write_text("def broken(:\n")
    with pytest.raises(ConfigError, match=r"broken\.py:NAME\.$"):
        recipes_given(str(place))
    assert recipes_given([str(tmp_path / "none.py"), "grpo"]) == [str(tmp_path / "none.py"), "grpo"]
    assert recipes_given(None) is None
