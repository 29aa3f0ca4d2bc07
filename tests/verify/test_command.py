"""What `keel verify` says: the command, its table, the page of all recipes and the figure."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from keel.cli.main import app
from keel.cli.verify import table
from keel.core.errors import ConfigError
from keel.verify.entry import verify
from keel.verify.page import figure, page
from keel.verify.placements import sweep
from keel.verify.recipes import HOLDS, SHORT, GroupCheck, Verification, verify_recipe


def test_json():
    told = CliRunner().invoke(app, ["verify", "rloo", "grpo", "--json"], catch_exceptions=False)
    found = json.loads(told.stdout)
    assert [one["recipe"] for one in found] == ["rloo", "grpo", "grpo"]
    for one in found:
        assert {"recipe", "objective", "gradient_relative_error", "fixed_point_tv", "status"} <= set(one)
    assert [one["status"] for one in found] == ["holds", "falls short", "falls short"]


def test_strict_fails_where_something_falls_short():
    assert CliRunner().invoke(app, ["verify", "rloo", "--strict"]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", "grpo", "--strict"]).exit_code == 1


def test_table():
    told = CliRunner().invoke(app, ["verify", "rloo", "--full"], catch_exceptions=False, env={"COLUMNS": "160"})
    assert "E_pi[r] - beta KL(pi || ref)" in told.stdout and "holds" in told.stdout
    narrow = CliRunner().invoke(app, ["verify", "rloo"], catch_exceptions=False, env={"COLUMNS": "80"}).stdout
    assert "rloo(beta=0.5)" in narrow and max(map(len, narrow.splitlines())) <= 80


@pytest.mark.parametrize("full", [False, True])
def test_a_long_name_is_folded_and_no_number_is_cut(full):
    name = "/some/folder/of/recipes/entropy_floor_with_a_long_name.py:entropy_floor"
    group = GroupCheck(16, 0.0123, 0.5)
    found = Verification(name, {"beta": 0.5}, "E[r]", "falls short", 0.000123, 1.0, 0.0456, 1.23e-05, groups=[group])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(table([found], full, wide=False))
    said = console.file.getvalue()
    whole = ["falls short", "0.000123", "0.0456", "0.0123 (16)", *(["1.23e-05"] if full else [])]
    assert all(word in said for word in whole) and "…" not in said
    rows = said.splitlines()[1:]
    width = rows[0].index("falls short")
    assert "".join(row[:width].rstrip() for row in rows) == f"{name}(beta=0.5)"


LOSS = """
def loss(log_prob, old_log_prob, advantages, mask):
    return -((log_prob - old_log_prob).exp() * advantages[:, None] * mask).sum(1).mean()
"""


def test_a_loss_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(LOSS)
    place = f"{tmp_path / 'mine.py'}:loss"
    told = CliRunner().invoke(app, ["verify", place, "--objective", "reward", "--json"], catch_exceptions=False)
    [found] = json.loads(told.stdout)
    assert found["status"] == HOLDS and found["follows"] == "E[r]"
    failing = ["verify", place, "--objective", "kl_policy_ref", "--beta", "0.5", "--strict"]
    told = CliRunner().invoke(app, failing)
    assert told.exit_code == 1 and "falls short" in told.stdout and "follows     E[r]" in told.stdout
    with pytest.raises(ConfigError, match="apart"):
        CliRunner().invoke(app, ["verify", place, "grpo"], catch_exceptions=False)


@pytest.mark.usefixtures("registered")
def test_a_recipe_of_ones_own(tmp_path):
    text = "import keel\nfrom keel.recipes.policy_gradient import rloo\n\n"
    (tmp_path / "mine.py").write_text(
        text + "@keel.recipe()\ndef half(beta: float = 0.5):\n    return rloo(beta=beta / 2)\n"
    )
    told = CliRunner().invoke(app, ["verify", f"{tmp_path / 'mine.py'}:half", "--json"], catch_exceptions=False)
    [found] = json.loads(told.stdout)
    assert found["status"] == SHORT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--all"),
        (["rlo"], "rloo"),
        (["rloo", "--all"], "both"),
        (["rloo", "--set", "x=1"], "x"),
        (["rloo", "--beta", "1"], "loss functions"),
        (["rloo", "--level", "up"], "state"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(app, ["verify", *arguments], catch_exceptions=False)


def test_python():
    import keel

    told = []
    [found] = keel.verify("rloo", told=told.append)
    assert told == [found] and verify(["rloo"])[0].status == HOLDS


def test_page(tmp_path):
    found = [verify_recipe("rloo", full=True), verify_recipe("grpo", full=True)]
    text = page(found)
    assert "1 holds, 1 falls short" in text
    assert "| `rloo(beta=0.5)` | **holds** | E_pi[r] - beta KL(pi \\|\\| ref), sequences | 0 |" in text
    assert "- `grpo`: the expected gradient misses" in text and "Exact with `scale_rewards=batch`." in text


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    figure(sweep(seeds=1, distances=(0.01, 2.0)), tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn.count("<path") > 20 and "<svg" in drawn
