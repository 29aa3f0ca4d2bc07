"""What is imported on the way to an answer, seen in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keel.models.tiny import SMALL, build_tiny

LISTED = "import json, sys; print(json.dumps(sorted(sys.modules)))"
SESSION = """
import sys
from keel.models.load import load
from keel.train.session import build_session
from keel.train.setup import prepare_setup
setup = prepare_setup("grpo", {folder!r}, None, None, [{{"prompt": "1+1="}}] * 8,
    lambda completions, **columns: [0.0] * len(completions), seed=0, name=None, config=None,
    settings={{"beta": 0.04, "max_completion_length": 8}})
assert "transformers" not in sys.modules, "before there is a model to read"
session = build_session(setup.config, setup.task, load({folder!r}), setup.rewards)
assert sorted(session.engine.models) == ["policy", "ref"], "what a KL penalty needs stands ready"
"""
COMMAND = """
import sys
from keel.cli.main import main
sys.argv = {argv!r}
try:
    main()
except SystemExit as stop:
    assert stop.code == {code}, stop.code
"""
DATA = {"datasets", "pandas", "pyarrow", "reasoning_gym", "math_verify", "latex2sympy2_extended"}
REPORTS = {"plotly", "matplotlib", "trl", "wandb", "mlflow"}
LIBRARIES = {"torch", "transformers", "huggingface_hub", "tokenizers", "peft", "accelerate", "scipy", "sympy", "numpy"}


def imported(code: str) -> set[str]:
    """The top-level packages that a fresh process has imported after `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{LISTED}"], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return {name.split(".")[0] for name in json.loads(done.stdout.strip().splitlines()[-1])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = build_tiny("0123456789+=", SMALL)
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def test_a_session_on_a_list_of_prompts_needs_neither_peft_nor_libraries_of_data_and_reports(folder: Path) -> None:
    found = imported(SESSION.format(folder=str(folder)))
    assert {"torch", "transformers", "keel"} <= found
    assert not found & ({"peft"} | DATA | REPORTS)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["keel", "train", "grop"], 2),
        pytest.param(["keel", "train", "grpo", "--set", "bta=1"], 2, marks=pytest.mark.slow),
        pytest.param(["keel", "methods"], 0, marks=pytest.mark.slow),
    ],
)
def test_recipes_and_their_arguments_are_known_before_transformers_is_imported(argv: list[str], code: int) -> None:
    found = imported(COMMAND.format(argv=argv, code=code))
    assert "keel" in found
    assert not found & ({"transformers", "huggingface_hub", "peft", "accelerate", "sympy"} | DATA | REPORTS)


def test_help_imports_no_library_at_all() -> None:
    found = imported(COMMAND.format(argv=["keel", "--help"], code=0))
    assert "keel" in found
    assert not found & (LIBRARIES | DATA | REPORTS)
