"""The pages about runs: what they say, in which order, and what hostile names cannot do."""

import math
import re
import sqlite3

import pytest
from tests.ui.known_runs import HOSTILE, STEPS, config
from tests.ui.reading import Text, rows

from keel.store.store import Store
from keel.ui.composition import Difference, differences, slots

ALL = ["sweep/a", HOSTILE, "going", "base"]  # the newest first


def test_the_list_has_every_run(client):
    page = client.get("/runs").text
    assert rows(page) == ALL
    said = Text(page).said
    assert "0.250 → 0.750" in said and "4 runs" in said
    assert "/runs/sweep%2Fa" in Text(page).links


@pytest.mark.parametrize(
    "query, names",
    [
        ("name=BAS", ["base"]),
        ("recipe=grpo", ["going", "base"]),
        ("recipe=grpo&status=finished", ["base"]),
        ("task=sparse", ["sweep/a"]),
        ("sort=name&way=up", [HOSTILE, "base", "going", "sweep/a"]),
        ("sort=score", ["base", "sweep/a", HOSTILE, "going"]),
        ("sort=step", ["base", "going", HOSTILE, "sweep/a"]),
        ("sort=created&way=up", ALL[::-1]),
        ("name=nothing", []),
        ("page=99", ALL),
    ],
)
def test_filters_and_orders(client, query, names):
    assert rows(client.get(f"/runs?{query}").text) == names


@pytest.mark.parametrize("query", ["sort=config", "page=0", "page=x", "way=left", f"page={10**30}"])
def test_a_wrong_parameter_is_a_readable_error(client, query):
    answer = client.get(f"/runs?{query}")
    assert answer.status_code == 400 and query.partition("=")[0] in Text(answer.text).said


def test_pages_of_a_long_list(own):
    folder, client = own
    with Store(folder / "keel.sqlite") as store:
        for i in range(60):
            store.create_run(f"more-{i:02}", {}, "grpo", "countdown", "tiny", i)
    first = client.get("/runs?recipe=grpo").text
    assert rows(first) == [f"more-{i:02}" for i in range(59, 9, -1)]
    assert "1 to 50 of 62 runs" in Text(first).said
    following = next(link for link in Text(first).links if "page=2" in link)
    assert "recipe=grpo" in following
    assert rows(client.get(following).text) == [f"more-{i:02}" for i in range(9, -1, -1)] + ["going", "base"]


def test_nothing_hostile_reaches_the_page_as_html(client):
    for path in (
        "/runs",
        f"/runs/{HOSTILE}",
        f"/runs/base?against={HOSTILE}",
        f"/runs?name={HOSTILE}",
        f"/runs/x{HOSTILE}",
    ):
        page = client.get(path).text
        assert "<script>alert" not in page and "alert(1)" in page
        scripts = [attributes for tag, attributes in Text(page).elements if tag == "script"]
        assert all("src" in given or given.get("type") == "application/json" for given in scripts)


def test_one_run_says_all_that_is_stored(client):
    page = client.get("/runs/base").text
    said = Text(page).said
    assert "0.250 → 0.750" in said  # pass@1, of 8 samples 2 and then 6
    assert "+0.500" in said
    assert "Meant to maximise E_pi[r] - beta KL(pi || ref)" in said
    assert "pass@1 rose by 0.500" in said
    assert "reward 0.025 → 0.385" in said  # the means of the first and the last four steps
    assert {"/reports/base", "/tokens?run=base"} <= set(Text(page).links)
    assert "live.js" not in page and "data-points" not in page


def test_the_composition_is_told_slot_by_slot(client):
    assert [(f.slot, f.name, f.part, f.settings) for f in slots(config())] == [
        ("rollout", "", "rollout", (("num_prompts", "2"), ("num_generations", "4"))),
        ("advantage", "centre", "group_centre", ()),
        ("advantage", "scale", "group_std", (("epsilon", "0.0001"),)),
        ("surrogate", "", "surrogate", (("f", "clip(epsilon=0.2)"), ("level", "token"))),
        ("terms", "kl", "summand", (("penalty", "sampled_kl(estimator=k3)"), ("coef", "0.02"))),
    ]
    said = Text(client.get("/runs/base").text).said
    assert "advantage centre group_centre none advantage scale group_std epsilon 0.0001" in said


def test_differences_between_two_runs(client):
    found, same = differences(config(), config(beta=0.5, name="x", extra=[1, 2]))
    assert found == [
        Difference("recipe.arguments.beta", "0.02", "0.5"),
        Difference("method.terms.kl.coef", "0.02", "0.5"),
        Difference("extra", None, "1, 2"),
    ]
    assert same == 24
    assert differences(config(), config()) == ([], 26)
    said = Text(client.get("/runs/base?against=going").text).said
    assert "recipe.arguments.beta 0.02 0.5" in said and "2 settings differ, 24 are the same" in said
    assert client.get("/runs/base?against=goin").status_code == 404


def test_a_run_that_goes_on_tells_its_new_points(own):
    folder, client = own
    page = client.get("/runs/going").text
    assert 'data-points="/points/going"' in page and 'data-since="3"' in page and "live.js" in page
    assert f"step 3 of {STEPS}; training" in Text(page).said
    news = client.get("/points/going?since=1").json()
    assert news["metrics"] == {
        "reward": [[2, 0.2], [3, pytest.approx(0.3)]],
        "entropy": [[2, None], [3, None]],
        "grad_norm": [[2, None], [3, None]],
    }
    assert (news["status"], news["step"], news["planned"]) == ("running", 3, STEPS)
    assert client.get("/points/going?since=3").json()["metrics"] == {}
    with Store(folder / "keel.sqlite") as store:
        store.log_metrics(store.run("going").id, 4, {"reward": 0.5})
        assert client.get("/points/going?since=3").json()["metrics"] == {"reward": [[4, 0.5]]}
        store.finish(store.run("going").id)
    assert client.get("/points/going?since=4").json()["status"] == "finished"
    assert "data-points" not in client.get("/runs/going").text  # what was kept of the page is out of date


def test_a_silent_run_is_doubted(own):
    folder, client = own
    db = sqlite3.connect(folder / "keel.sqlite")
    db.execute("UPDATE runs SET updated = updated - 3600 WHERE name = 'going'")
    db.commit()
    db.close()
    assert re.search(r"nothing new for 1 h 0 min", client.get("/runs/going").text)


def test_a_name_in_a_folder_of_its_own(client):
    assert "sweep/a" in Text(client.get("/runs/sweep%2Fa").text).said
    assert client.get("/runs/sweep/a").status_code == 200


def test_an_unknown_run_names_the_nearest(client):
    for path in ("/runs/bsae", "/points/bsae", "/reports/bsae", "/tokens?run=bsae"):
        answer = client.get(path)
        assert answer.status_code == 404 and "Did you mean 'base'?" in Text(answer.text).said


def test_no_report_and_no_way_out_of_the_folder(own):
    folder, client = own
    answer = client.get("/reports/going")
    assert answer.status_code == 404 and "has written no report" in Text(answer.text).said
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "report.html").write_text("secret")
    with Store(folder / "keel.sqlite") as store:
        store.create_run("../outside", {}, "grpo", "t", "m", 0)
    answer = client.get("/reports/..%2Foutside")
    assert answer.status_code == 404 and "secret" not in answer.text


def test_before_the_first_run(tmp_path):
    from fastapi.testclient import TestClient

    from keel.ui.app import create_app

    client = TestClient(create_app(tmp_path / "none"), base_url="http://127.0.0.1")
    for path in ("/runs", "/tokens"):
        answer = client.get(path)
        assert answer.status_code == 200 and "No runs yet" in answer.text and "keel train" in answer.text
    assert client.get("/runs/x").status_code == 404
    assert not (tmp_path / "none").exists()  # looking makes nothing
    with Store(tmp_path / "none" / "keel.sqlite"):
        assert "No runs yet" in client.get("/runs").text
    assert client.get("/").url.path == "/runs"


def test_a_file_that_is_no_store_is_a_readable_error(tmp_path):
    from fastapi.testclient import TestClient

    from keel.ui.app import create_app

    (tmp_path / "keel.sqlite").write_text("something else, longer than a header")
    answer = TestClient(create_app(tmp_path), base_url="http://127.0.0.1").get("/runs")
    assert answer.status_code == 400 and "no store of Keel" in Text(answer.text).said


def test_looking_changes_no_byte(own):
    folder, client = own
    file = folder / "keel.sqlite"
    before = file.read_bytes(), file.stat().st_mtime_ns
    for path in ("/runs", "/runs/base", "/runs/base?against=going", "/points/going", "/reports/base", "/tokens"):
        assert client.get(path).status_code == 200
    for path in ("/tokens?q=thirty", "/tokens?run=base&order=highest", "/tokens/1", "/tokens/1/group"):
        assert client.get(path).status_code == 200
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_numbers_that_are_none(client):
    assert math.isnan(Store(client.app.state.runs / "keel.sqlite", readonly=True).metrics(2)["entropy"][0][1])
    assert client.get("/runs/going").status_code == 200
