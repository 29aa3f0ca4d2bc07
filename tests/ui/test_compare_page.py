"""The pages about comparisons: how far the cells are, and the report for the arms and the metric that are chosen."""

import os
import re
import time
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from tests.compare.synthetic import synthetic
from tests.ui.known_comparisons import begin, finish, store_comparison
from tests.ui.known_runs import HOSTILE
from tests.ui.reading import Text

from keel.compare.analysis import analyse
from keel.compare.record import load
from keel.compare.report import sections
from keel.store.store import Store
from keel.ui.app import create_app
from keel.ui.comparisons import Unreadable, View, overview, overviews, part_of, report

ARMS = {"grpo": 0.0, "dr_grpo": 0.05, "kl_cov": 1.0}
NOTHING = {"values": {}, "before": {}, "curves": {}}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two comparisons: `done` with three arms, and `going`, of which one cell failed, one runs and one waits."""
    runs = tmp_path_factory.mktemp("compared")
    done = synthetic(ARMS, seeds=2, prompts=30, steps=6)
    store_comparison(runs, done, name="done", took=61.0, notes=("a note",), tuned={"kl_cov": "coef 0.1 of 3"})
    store_comparison(runs, going(), "running", name="going", command="keel compare gspo luspo")
    (runs / "comparisons" / "broken").mkdir()
    (runs / "comparisons" / "broken" / "comparison.json").write_text('{"format": 1')
    (runs / "comparisons" / "done" / "report.html").write_text("<title>stands alone</title>")
    (runs / "comparisons" / "done" / "secret.txt").write_text("a secret")
    with Store(runs / "keel.sqlite") as store:
        begin(store, going(), going().outcomes[3], step=4)
    for place, name in enumerate(("done", "going", "broken")):
        os.utime(runs / "comparisons" / name / "comparison.json", (time.time() - 30 + place,) * 2)
    return runs


def going():
    """One finished cell, one that failed, two that are missing, of which the test begins one."""
    whole = synthetic({"gspo": 0.0, HOSTILE: 0.1}, seeds=2, prompts=20, steps=4)
    first, *others = (replace(o, run=f"going-{place}") for place, o in enumerate(whole.outcomes))
    failed = replace(others[0], status="failed", error="TrainingError: the <loss> is not finite", **NOTHING)
    return replace(whole, outcomes=(first, failed, *(replace(o, status="missing", **NOTHING) for o in others[1:])))


@pytest.fixture(scope="module")
def asked(compared):
    return TestClient(create_app(compared), base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


# The list


def test_the_list(asked):
    page = Text(asked.get("/compare").text)
    names = [link.rpartition("/")[2] for link in page.links if link.startswith("/compare/")]
    assert names == ["broken", "going", "done"]
    assert "6 of 6" in page.said and "1 of 4, 1 failed, 2 missing" in page.said and "40 steps" not in page.said
    assert "grpo, dr_grpo, kl_cov" in page.said and "is no record of a comparison" in page.said
    assert HOSTILE in page.said and ("script", {}) not in page.elements


def test_nothing_compared_yet(client, tmp_path):
    assert "keel compare grpo" in Text(client.get("/compare").text).said
    empty = TestClient(create_app(tmp_path / "nowhere"), base_url="http://localhost")
    assert empty.get("/compare").status_code == 200


def test_how_far_each_cell_is(compared):
    with Store(compared / "keel.sqlite", readonly=True) as store:
        found = overview(compared, "going", store)
        everything = overviews(compared, store)
    assert [(cell.arm, cell.seed, cell.state) for cell in found.cells] == [
        ("gspo", 0, "finished"),
        ("gspo", 1, "failed"),
        (HOSTILE, 0, "waiting"),
        (HOSTILE, 1, "running"),
    ]
    assert found.cells[3].step == 4 and found.cells[1].error.startswith("TrainingError")
    assert found.said == "1 of 4 cells finished, 1 failed, 1 running" and found.is_live
    assert [type(one) is Unreadable for one in everything] == [True, False, False]


def test_a_cell_of_which_nothing_was_heard_is_stopped(compared, monkeypatch):
    now = time.time()
    monkeypatch.setattr("keel.ui.comparisons.time.time", lambda: now + 3600)
    with Store(compared / "keel.sqlite", readonly=True) as store:
        found = overview(compared, "going", store)
    assert found.cells[3].state == "stopped" and not found.is_live


# One comparison


def test_the_report_is_that_of_the_page_that_stands_alone(asked, compared):
    page = asked.get("/compare/done").text
    whole = load("done", compared)
    for section in sections(whole, analyse(whole)):
        if "<h2>Settings" not in section:
            assert section in page
    said = Text(page).said
    assert "took 1 min 1 s" in said and "a note" in said and "coef 0.1 of 3" in said
    assert "/runs/cell-kl_cov-1" in Text(page).links


def test_another_metric_decides(asked):
    page = asked.get("/compare/done?metric=kl").text
    assert re.search(r"<h3>([^<]*), less", page)[1] == "KL"
    assert re.search(r"<h3>([^<]*), less", asked.get("/compare/done").text)[1] == "pass@1"
    assert '<option value="kl" selected>' in page
    wrong = asked.get("/compare/done?metric=kk")
    assert wrong.status_code == 200 and "No cell measured 'kk'. Did you mean 'kl'?" in Text(wrong.text).said


def test_another_baseline_and_fewer_arms(asked):
    page = asked.get("/compare/done?baseline=kl_cov&arm=grpo&arm=kl_cov").text
    report_of = Text(page.partition('<div id="report"')[2]).said
    assert "to kl_cov" in report_of and "dr_grpo" not in report_of
    assert re.search(r"<h3>([^<]*), less ([^<]*)</h3>", page).groups() == ("pass@1", "kl_cov&#x27;s")
    boxes = [known for tag, known in Text(page).elements if known.get("type") == "checkbox"]
    assert [(box["value"], "checked" in box) for box in boxes] == [("grpo", True), ("dr_grpo", False), ("kl_cov", True)]
    alone = asked.get("/compare/done?arm=grpo")
    assert alone.status_code == 200


@pytest.mark.parametrize(
    "path, status, said",
    [
        ("/compare/donee", 404, "Did you mean 'done'?"),
        ("/compare/done?arm=x", 400, "There is no 'x'."),
        ("/compare/done?baseline=kl_co", 400, "Did you mean 'kl_cov'?"),
        ("/compare/broken", 400, "is no record of a comparison"),
        ("/compare/..%2f..", 404, "no page"),
        ("/compare/nothing/state", 404, "There is no comparison"),
    ],
)
def test_wrong_addresses(asked, path, status, said):
    answer = asked.get(path)
    assert answer.status_code == status and said in Text(answer.text).said


def test_hostile_names_and_errors_are_text(asked):
    page = asked.get("/compare/going").text
    assert "<script>alert" not in page and "<loss>" not in page
    assert HOSTILE in Text(page).said and "the <loss> is not finite" in Text(page).said
    assert "keel compare gspo luspo" in Text(page).said


def test_files_of_a_comparison(asked):
    found = asked.get("/compare/done/files/report.html")
    assert "stands alone" in found.text and "sandbox allow-scripts" in found.headers["content-security-policy"]
    for name in ("secret.txt", "comparison.json", "results.csv", "..%2f..%2fkeel.sqlite"):
        assert asked.get(f"/compare/done/files/{name}").status_code == 404


# While it runs


def test_the_state_changes_when_a_cell_ends_and_so_does_the_report(compared, tmp_path):
    import shutil

    runs = tmp_path / "runs"
    shutil.copytree(compared, runs)
    client = TestClient(create_app(runs), base_url="http://localhost", raise_server_exceptions=False)
    first = client.get("/compare/going/state").json()
    assert first["live"] and first["said"].endswith("1 running") and "step 4" in first["cells"]
    assert client.get("/compare/going/state").json() == first
    with Store(runs / "keel.sqlite") as store:
        store.log_metrics(store.run("going-3").id, 5, {"reward": 0.2})
    second = client.get("/compare/going/state").json()
    assert "step 5" in second["cells"] and second["results"] == first["results"]
    assert "cannot be told" not in client.get("/compare/going").text
    whole = synthetic({"gspo": 0.0, HOSTILE: 0.1}, seeds=2, prompts=20, steps=4)
    with Store(runs / "keel.sqlite") as store:
        finish(store, going(), replace(whole.outcomes[2], run="going-2"))
    third = client.get("/compare/going/state").json()
    assert third["results"] != first["results"] and third["said"].startswith("2 of 4")
    assert "cannot be told" in client.get("/compare/going").text  # one seed of each


def test_before_the_first_cell_ends(tmp_path):
    empty = replace(going(), outcomes=tuple(replace(o, status="missing", **NOTHING) for o in going().outcomes))
    store_comparison(tmp_path, empty, "running", name="new")
    client = TestClient(create_app(tmp_path), base_url="http://localhost")
    said = Text(client.get("/compare/new").text).said
    assert "No cell is finished yet" in said and "0 of 4 cells finished" in said and said.count("waiting") == 4


def test_a_report_is_made_once_for_each_view(compared, monkeypatch):
    with Store(compared / "keel.sqlite", readonly=True) as store:
        known = overview(compared, "done", store)
    first = report(compared, "done", known.results, View(known.arms))
    monkeypatch.setattr("keel.compare.analysis.analyse", lambda *_, **__: pytest.fail("it was analysed again"))
    assert report(compared, "done", known.results, View(known.arms)) is first
    assert first.metric == "pass@1" and "kl" in first.metrics and first.problem == ""


def test_part_of_a_comparison_keeps_its_outcomes():
    whole = synthetic(ARMS, seeds=2, prompts=5, steps=2)
    part = part_of(whole, ("kl_cov", "grpo"))
    assert [arm.name for arm in part.arms] == ["kl_cov", "grpo"] and len(part.outcomes) == 4
    assert {o.run for o in part.outcomes} < {o.run for o in whole.outcomes}


def test_cells_that_cannot_be_compared_are_told(tmp_path):
    whole = synthetic({"grpo": 0.0, "kl_cov": 0.1}, seeds=2, prompts=20, steps=3)
    fewer = {name: column[:7] for name, column in whole.outcomes[-1].values.items()}
    store_comparison(
        tmp_path, replace(whole, outcomes=(*whole.outcomes[:-1], replace(whole.outcomes[-1], values=fewer)))
    )
    client = TestClient(create_app(tmp_path), base_url="http://localhost")
    said = Text(client.get("/compare/made-up").text).said
    assert "These cells cannot be compared" in said and "prompt by prompt" in said


def test_pages_write_nothing(compared, asked):
    files = [path for path in compared.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    before = {path: path.read_bytes() for path in files}
    for path in ("/compare", "/compare/done", "/compare/going/state", "/compare/done?metric=kl"):
        assert asked.get(path).status_code == 200
    assert {path: path.read_bytes() for path in files} == before
