"""Choosing traces for a cold start: from a file to a file that `sft` learns from."""

import json

import pytest
from typer.testing import CliRunner

import keel
from keel.cli.main import app
from keel.core.errors import ConfigError
from keel.tasks.data import load_data
from keel.train.cold_start import cold_start

ROWS = [
    {"prompt": "1 2 3>6=", "completion": text, "pass_rate": rate, "source": "teacher"}
    for text, rate in (("1+2+3", 0.0), ("(1+2)+3", 0.0), ("((1+2)+(3))", 0.0))
] + [{"prompt": "2 2 2>6=", "completion": text, "pass_rate": 1.0} for text in ("((2+2)+(2))", "2+2+2")]


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_a_file_to_a_file_that_is_learnt(base, tmp_path):
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "some" / "chosen.jsonl"
    given = [str(tmp_path / "traces.jsonl"), str(out), "--easy-length", "5", "--hard-length", "11", "--json"]
    found = CliRunner().invoke(app, ["cold-start", *given])
    assert found.exit_code == 0
    assert json.loads(found.stdout) == {
        "prompts": 2, "left_out": 0, "traces": 2, "easy_length": 5.0, "hard_length": 11.0, "pass_rate": 0.5
    }  # fmt: skip
    rows = written(out)
    assert [row["completion"] for row in rows] == ["((1+2)+(3))", "2+2+2"] and rows[0]["source"] == "teacher"
    assert [e.completion for e in load_data(str(out), held_out=0.0).train] == ["((1+2)+(3))", "2+2+2"]
    with pytest.raises(ConfigError, match="exists already"):
        cold_start(ROWS, out)
    run = keel.train(
        "sft", base, data=str(out), runs=tmp_path / "runs", max_steps=1,
        **{"evaluate.before": False, "evaluate.after": False, "train.batch_size": 2},
    )  # fmt: skip
    assert run.summary["steps"] == 1


def test_pass_rates_are_measured_where_there_are_none(base, tmp_path):
    """The reward tells the prompts apart: the one is always right, the other never."""
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in ROWS if row["completion"] != "((2+2)+(2))"]

    def reward(prompts, completions, **_):
        return [float(prompt.startswith("2")) for prompt in prompts]

    facts = cold_start(rows, tmp_path / "out.jsonl", base, reward, num_generations=2, max_completion_length=8)
    assert facts["easy_length"] == 6  # tokens are characters here, and an end
    assert facts["hard_length"] == pytest.approx((6 + 8 + 12) / 3)
    chosen = [(row["completion"], row["pass_rate"]) for row in written(tmp_path / "out.jsonl")]
    assert chosen == [("(1+2)+3", 0.0), ("2+2+2", 1.0)]


def test_nothing_to_measure_with(base, tmp_path):
    rows = [{"prompt": "1 2 3>6=", "completion": "1+2+3"}]
    with pytest.raises(ConfigError, match="nothing to score"):
        cold_start(rows, tmp_path / "out.jsonl", base)
    assert not (tmp_path / "out.jsonl").exists()
