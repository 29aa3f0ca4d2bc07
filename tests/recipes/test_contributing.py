"""A method is one file: the example of CONTRIBUTING.md, put beside the recipes, is listed, verified and documented."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keel

ROOT = Path(__file__).parents[2]
NAME = "grpo_entropy_floor"
BARE = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def overlay(tmp_path_factory) -> Path:
    """A copy of the package with one more file, and nothing else changed."""
    folder = tmp_path_factory.mktemp("overlay")
    shutil.copytree(Path(keel.__file__).parent, folder / "src" / "keel", ignore=BARE)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (folder / "src" / "keel" / "recipes" / "entropy_floor.py").write_text(code)
    return folder


def said(overlay: Path, *command: str) -> str:
    """What a Python of its own prints with that copy of the package."""
    environment = {**os.environ, "PYTHONPATH": str(overlay / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *command], cwd=overlay, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The commands one after another in one process, and the page with all but two recipes left out, which take minutes.
SCRIPT = f"""
import json
from pathlib import Path
from typer.testing import CliRunner
from keel.cli.main import app
from keel.verify import page
from keel.verify.entry import verify

def invoke(*words):
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout

asked = []
assert page.verify is verify
page.verify = lambda names=None, **options: asked.append(names) or verify(["grpo", "{NAME}"])
page.sweep, page.figure = lambda: [], lambda points, path: None
page.write(Path("."))
print(json.dumps({{
    "file": page.__file__,
    "methods": invoke("methods"),
    "verify": json.loads(invoke("verify", "{NAME}", "--json")),
    "asked": asked,
    "page": Path("verification.md").read_text(),
}}))
"""


def test_it_is_listed_verified_and_documented(overlay):
    found = json.loads(said(overlay, "-c", SCRIPT).splitlines()[-1])
    assert found["file"].startswith(str(overlay))
    (line,) = [line for line in found["methods"].splitlines() if line.startswith(f"{NAME} ")]
    assert "keeps the entropy of every token above a floor" in line and line.endswith("(varies grpo)")
    assert all(one["recipe"] == NAME and one["reduces_to_baseline"] for one in found["verify"]) and found["verify"]
    assert found["asked"] == [None]  # the page asks for all recipes that there are
    rows = [line.split("|")[1].strip(" `") for line in found["page"].splitlines() if line.startswith("| `")]
    assert rows.count(NAME) == 2 == rows.count("grpo")  # in both tables


@pytest.mark.slow
def test_the_whole_page_lists_it(overlay):
    said(overlay, "-m", "keel.verify.page", ".")
    assert f"`{NAME}`" in (overlay / "verification.md").read_text()


def test_the_tests_of_all_recipes_take_it(overlay):
    """They find it by themselves, and it passes."""
    for name in (*(path.name for path in (ROOT / "tests").glob("*.py")), "recipes", "verify"):
        source, target = ROOT / "tests" / name, overlay / "tests" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target, ignore=BARE) if source.is_dir() else shutil.copy(source, target)
    shutil.copy(ROOT / "pyproject.toml", overlay)
    chosen = ["tests/recipes/test_properties.py", "tests/recipes/test_registry.py", "tests/verify/test_recipes.py"]
    out = said(overlay, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "-k", NAME)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 8, out
