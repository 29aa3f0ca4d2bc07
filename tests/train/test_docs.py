"""The pages on uncertainty and engines: what their examples print, and that their commands run."""

import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def same(printed: str, shown: str, near: float = 0.03) -> None:
    """Word for word, and the numbers up to the last digit of other machines, or as near as another base lets them."""
    assert NUMBER.sub("0", printed).split() == NUMBER.sub("0", shown).split()
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=near, abs=near)


def example(place: int) -> tuple[str, str]:
    """Code and output of the examples of the page on uncertainty, in their order."""
    found = EXAMPLE.findall((DOCS / "uncertainty.md").read_text())
    assert len(found) == 4
    return found[place]


@pytest.mark.parametrize(
    ("place", "near"), [(0, 0.03), (2, 0.03), (3, 0.03), pytest.param(1, 0.1, marks=pytest.mark.slow)]
)
def test_the_examples_on_uncertainty_print_what_is_shown(place, near, tmp_path, capsys):
    """The second asks the built-in model, which another processor or number of threads trains to other weights."""
    code, shown = example(place)
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    same(capsys.readouterr().out, shown, near)


@pytest.mark.slow
def test_the_commands_on_engines_run(tmp_path):
    """Against a server on a free port."""
    keel = [sys.executable, "-m", "keel.cli.main"]
    page = (DOCS / "engines.md").read_text()
    (tmp_path / "likes.py").write_text(re.findall(r"```python\n# likes.py\n(.*?)```", page, re.DOTALL)[0])
    commands = re.findall(r"^\$ ((?:keel (?:sample|fit-value)|curl) .*)$", page, re.MULTILINE)
    assert len(commands) == 6
    server = subprocess.Popen([*keel, "serve", "tiny", "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        address = server.stdout.readline().split(";")[0].split()[-1].removesuffix("/v1")
        for command in commands:
            words = shlex.split(command.replace("http://127.0.0.1:8000", address))
            arguments = words if words[0] == "curl" else [*keel, *words[1:]]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=tmp_path)
            assert done.returncode == 0 and done.stdout.strip(), f"{command}\n{done.stderr}"
            assert "error" not in done.stdout
        ((code, shown),) = EXAMPLE.findall(page)
        run = [sys.executable, "-c", code.replace("http://127.0.0.1:8000", address)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert len(done.stdout.splitlines()) == len(shown.splitlines()), done.stderr
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
