"""A comparison as files."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from keel.compare.analysis import Analysis, analyse
from keel.compare.export import cells_csv, from_json, summary_csv, to_json, write_csv, write_json, write_summary
from keel.compare.outcomes import Arm, Outcome
from keel.core.errors import UserError
from tests.compare.synthetic import synthetic


def comparison():
    made = synthetic({"grpo": 0.0, "kl_cov": 0.5}, prompts=20, steps=5)
    arms = (made.arms[0], Arm("kl_cov", "kl_cov", (("coef", 0.01), ("layers", (1, 2)), ("name", None))))
    holed = dict(made.outcomes[0].values) | {"kl": np.full(20, math.nan)}
    cells = [replace(made.outcomes[0], values=holed), *made.outcomes[1:4]]
    cells += [Outcome("kl_cov", 1, "failed", "cell-x", "it broke, badly"), Outcome("kl_cov", 2)]
    return replace(made, arms=arms, outcomes=tuple(cells), tuned={"kl_cov": "0.01"}, settings=(("train.lr", 1e-4),))


def lines(content):
    return list(csv.DictReader(io.StringIO(content)))


def test_json_holds_everything():
    first = comparison()
    data = json.loads(json.dumps(to_json(first), allow_nan=False))
    assert data["outcomes"][0]["values"]["kl"] == [None] * 20
    back = from_json(data)
    for name in ("name", "arms", "seeds", "task", "model", "budget", "settings", "tuned", "created"):
        assert getattr(back, name) == getattr(first, name), name
    for one, other in zip(back.outcomes, first.outcomes, strict=True):
        for name in ("arm", "seed", "status", "run", "error", "tokens", "seconds", "steps"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.curves == dict(other.curves)
        for name in ("values", "before"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key], equal_nan=True) for key in mine)


def test_statistics_are_those_of_what_was_written():
    first = comparison()
    analysis = analyse(first)
    data = json.loads(json.dumps(to_json(first, analysis), allow_nan=False))
    assert analyse(from_json(data)).to_json() == data["analysis"]
    assert Analysis.from_json(data["analysis"]).to_json() == analysis.to_json()


@pytest.mark.parametrize("data", [{}, {"format": 1}, {"format": 1, "name": "x", "arms": 3}, {"format": 99}])
def test_what_is_no_comparison_is_refused(data):
    with pytest.raises(ValueError, match=r"no comparison of Keel|cannot be read"):
        from_json(data)


def test_a_line_for_each_cell():
    first = comparison()
    rows = lines(cells_csv(first))
    assert len(rows) == 6
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["failed", "missing"]
    assert float(rows[1]["pass@1"]) == pytest.approx(first.outcomes[1].values["pass@1"].mean())
    assert float(rows[1]["before/entropy"]) == pytest.approx(0.6) and rows[0]["kl"] == ""
    assert (rows[3]["settings"], rows[0]["settings"]) == ("coef=0.01 layers=(1, 2) name=None", "")
    assert rows[4]["error"] == "it broke, badly" and rows[4]["pass@1"] == ""
    assert (rows[1]["tokens"], rows[1]["seconds"], rows[1]["steps"]) == ("5010", "60.0", "5")


def test_a_line_for_each_arm_and_metric():
    analysis = analyse(comparison())
    rows = lines(summary_csv(analysis))
    assert len(rows) == 2 * len(analysis.metrics)
    grpo, other = rows[0], next(row for row in rows if (row["arm"], row["metric"]) == ("kl_cov", "pass@1"))
    d = analysis.difference("kl_cov", "pass@1")
    assert (grpo["verdict"], grpo["difference"]) == ("baseline", "")
    assert other["verdict"] == "cannot be told: 1 seed" and other["p"] == ""
    assert float(other["difference_low"]) == d.mean.low
    assert other["seeds_needed"] == "cannot be known from one seed" and other["seeds_compared"] == "1"
    assert {len(row) for row in csv.reader(io.StringIO(summary_csv(analysis)))} == {len(grpo)}


def test_text_is_no_formula():
    first = comparison()
    cells = (replace(first.outcomes[4], error="=HYPERLINK(1)"), replace(first.outcomes[5], error="-1"))
    rows = lines(cells_csv(replace(first, outcomes=cells)))
    assert [row["error"] for row in rows] == ["'=HYPERLINK(1)", "'-1"]


def test_files(tmp_path):
    first = comparison()
    analysis = analyse(first)
    assert json.loads(write_json(tmp_path / "a.json", first, analysis).read_text())["analysis"]["baseline"] == "grpo"
    assert write_csv(tmp_path / "a.csv", first).read_text() == cells_csv(first)
    assert write_summary(tmp_path / "b.csv", analysis).read_text() == summary_csv(analysis)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.csv: The file cannot be written"):
        write_csv(tmp_path / "file" / "a.csv", first)
