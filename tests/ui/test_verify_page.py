"""The page of verification, and the table behind it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.ui.reading import Text

import keel
from keel.core.errors import DataError
from keel.ui.pages import verify as page_of_verification
from keel.ui.verification_figures import EXACT, FLOOR, cosines, errors, in_order, placements
from keel.verify.measured import Measured, PlacementError, Row, measured, read, to_text
from keel.verify.page import page
from keel.verify.placements import sweep
from keel.verify.recipes import verify_recipe

ROOT = Path(__file__).parents[2]
PER_PAGE = page_of_verification.PER_PAGE


def labels(answer: str) -> list[str]:
    """The recipes of the table, in their order."""
    body = answer.partition('<table class="verification')[2].partition("</table>")[0]
    return [Text(row.partition("</th>")[0]).said.replace(" ", "") for row in body.split("<tr>")[2:]]


def plain(rows):
    return [row.label.replace(" ", "") for row in rows]


# The table


def test_what_is_written_is_read_again():
    found = [verify_recipe("grpo", full=True), verify_recipe("kl_cov", {"beta": 0.5})]
    points = sweep(seeds=1, distances=(0.1,))
    table = read(to_text(found, points))
    assert table.keel == keel.__version__ and not table.of_another_version
    assert [row.label for row in table.rows] == ["grpo", "kl_cov(beta=0.5)"]
    first = table.rows[0]
    assert first.family == "policy gradient" and table.rows[1].family == "tokens"
    assert first.gradient_relative_error == pytest.approx(found[0].gradient_relative_error, rel=1e-5)
    assert [(w.world, w.cosine) for w in first.comparisons] == [
        (c.world, pytest.approx(c.cosine, rel=1e-5)) for c in found[0].comparisons
    ]
    assert first.groups[-1].deviation is None and first.group_error == pytest.approx(
        found[0].groups[-1].relative_error, rel=1e-5
    )
    assert first.reasons == tuple(found[0].reasons) and first.exact_with == {"scale_rewards": "batch"}
    assert [p.placement for p in table.placements] == [p.placement for p in points]
    assert to_text(found, points) == to_text(found, points)
    assert table.of("kl_cov") == [table.rows[1]] and table.of("none") == []


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"format": 1, "keel": "1", "recipes": [{}], "placements": []}']
)
def test_a_damaged_table_is_an_error(text):
    with pytest.raises(DataError, match=r"keel\.verify\.page|measured\.json"):
        read(text)


def test_the_table_of_the_package_is_that_of_the_documentation():
    text = (ROOT / "docs" / "verification.md").read_text()
    shown = dict(re.findall(r"^\| `([^`]+)` \| \**([a-z ]+?)\** \|", text.partition("## Spread")[0], re.MULTILINE))
    assert {row.label: row.status for row in measured().rows} == shown
    reasons = "\n".join(reason for row in measured().rows for reason in row.reasons)
    assert all(reason in text for reason in reasons.splitlines()) and len(measured().rows) > 150


def test_the_page_of_the_documentation_is_made_of_the_same(tmp_path, monkeypatch):
    from keel.verify import page as module

    found = [verify_recipe("rloo")]
    monkeypatch.setattr(module, "verify", lambda **_: found)
    monkeypatch.setattr(module, "sweep", list)
    monkeypatch.setattr(module, "figure", lambda points, path: None)
    monkeypatch.setattr(module.measured, "__file__", str(tmp_path / "measured.py"))
    module.write(tmp_path)
    assert (tmp_path / "verification.md").read_text() == page(found)
    assert [row.recipe for row in read((tmp_path / "measured.json").read_text()).rows] == ["rloo"]


# The page


def test_all_recipes_by_name(client):
    first, second = (client.get(f"/verify?page={n}").text for n in (1, 2))
    assert labels(first) == plain(measured().rows[:PER_PAGE])
    assert labels(second) == plain(measured().rows[PER_PAGE : 2 * PER_PAGE])
    counts = {status: sum(row.status == status for row in measured().rows) for status in ("holds", "falls short")}
    assert all(f"{count} {status}" in Text(first).said for status, count in counts.items())


@pytest.mark.parametrize(
    "query, wanted",
    [
        ("status=holds", lambda row: row.status == "holds"),
        ("family=entropy", lambda row: row.family == "entropy"),
        ("status=falls+short&q=fixed+point", lambda row: any("fixed point" in reason for reason in row.reasons)),
    ],
)
def test_filters(client, query, wanted):
    expected = [row for row in measured().rows if wanted(row)]
    assert labels(client.get(f"/verify?{query}").text) == plain(expected[:PER_PAGE]) and expected


def test_the_largest_errors_first(client):
    known = [row for row in measured().rows if row.gradient_relative_error is not None]
    worst = max(known, key=lambda row: row.gradient_relative_error)
    shown = client.get("/verify?sort=error").text
    assert labels(shown)[0] == worst.label.replace(" ", "")
    assert f"/methods/{worst.recipe}#verification" in Text(shown).links


def test_nothing_found_and_wrong_parameters(client):
    assert "No recipe is all of this" in Text(client.get("/verify?q=zyzzyva").text).said
    for query in ("status=hold", "family=x", "sort=x", "page=0"):
        assert client.get(f"/verify?{query}").status_code == 400


def test_a_table_of_another_version_says_so(client, monkeypatch):
    older = replace(measured(), keel="0.0.1")
    monkeypatch.setattr(page_of_verification, "verification", lambda: older)
    said = Text(client.get("/verify?family=entropy").text).said
    assert f"is of Keel 0.0.1, and this is {keel.__version__}" in said
    monkeypatch.setattr(page_of_verification, "verification", lambda: None)
    assert "without its measured table" in Text(client.get("/verify").text).said


def test_nothing_is_verified_for_a_page(client, monkeypatch):
    monkeypatch.setattr("keel.verify.recipes.verify_recipe", lambda *_, **__: pytest.fail("it was measured again"))
    monkeypatch.setattr("keel.verify.entry.verify_recipe", lambda *_, **__: pytest.fail("it was measured again"))
    assert client.get("/verify?family=tokens").status_code == 200
    assert client.get("/methods/kl_cov").status_code == 200


# The figures

ROWS = (
    Row("b", "b", "f", "o", "falls short", 0.2, 0.5, 0.3),
    Row("a", "a", "f", "o", "holds", 1e-9, 1.0, None),
    Row("c", "c", "f", "o", "no objective"),
    Row("d", "d", "f", "o", "falls short", 4.0, -0.5, 2e-7),
)


def test_errors_are_drawn_on_a_logarithmic_axis_with_a_place_for_exact():
    drawn = errors(ROWS)
    on, off = drawn.data
    assert (on["name"], on["x"], on["y"]) == ("on-policy", ["a", "b", "d"], [FLOOR, 0.2, 4.0])
    assert (off["name"], off["x"], off["y"]) == ("off-policy", ["b", "d"], [0.3, FLOOR / 2])
    axis = drawn.layout["yaxis"]
    assert axis["type"] == "log" and axis["ticktext"][0] == "exact" and axis["tickvals"][0] == FLOOR < EXACT
    assert 10 ** axis["range"][0] < FLOOR / 2 and 10 ** axis["range"][1] > 4.0
    assert drawn.layout["xaxis"]["categoryarray"] == ["a", "b", "d"]
    assert "on-policy: 1 of 3 exact, the largest 4 (d)" in drawn.description
    assert errors([ROWS[2]]) is None


def test_cosines_have_the_order_of_the_errors():
    drawn = cosines(ROWS)
    assert drawn.data[0]["x"] == ["a", "b", "d"] == plain(in_order(ROWS))
    assert drawn.data[0]["y"] == [1.0, 0.5, -0.5] and drawn.layout["yaxis"]["range"][0] < -0.5
    assert "lowest −0.50, d" in drawn.description
    assert cosines([ROWS[2]]) is None


def test_placements_are_drawn_apart_on_and_off_policy():
    points = tuple(
        PlacementError(name, distance, on, error)
        for on in (True, False)
        for name, error in (("k1 in the reward", 0.0), ("k3", 0.3))
        for distance in (0.01, 1.0)
    )
    first, second = placements(Measured("1", (), points))
    assert [trace["y"] for trace in first.data] == [[FLOOR, FLOOR], [0.3, 0.3]] and len(second.data) == 2
    assert first.data[0]["line"]["color"] != first.data[1]["line"]["color"]
    assert placements(Measured("1", ())) == []
