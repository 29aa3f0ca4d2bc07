"""The pages about completions: lists, searches, tokens with their numbers, groups side by side."""

import json
import re

import pytest
from tests.ui.known_runs import HOSTILE
from tests.ui.reading import Text, rows

# Numbers 1 to 8 are step 10 of the run `base`, 9 to 16 step 20, 17 step 30, 18 the hostile one.


def numbers(page):
    """The numbers of the completions in a list."""
    return [int(link.rsplit("/", 1)[1]) for link in Text(page).links if re.fullmatch(r"/tokens/\d+", link)]


@pytest.mark.parametrize(
    "query, wanted",
    [
        ("", list(range(18, 0, -1))),
        ("run=base", list(range(17, 0, -1))),
        ("run=base&order=oldest&step=10", list(range(1, 9))),
        ("run=base&step=10&group=1", [8, 7, 6, 5]),
        ("run=base&step=10&lowest=1", [8, 6, 4, 2]),
        ("run=base&step=10&highest=0", [7, 5, 3, 1]),
        ("run=base&stop=length", [17]),
        ("stop=length", [17]),
        ("run=base&step=10&order=highest", [8, 6, 4, 2, 7, 5, 3, 1]),
        ("run=base&step=10&order=lowest", [7, 5, 3, 1, 8, 6, 4, 2]),
        ("run=base&order=longest", [17, *range(16, 0, -1)]),
        ("q=THIRTY-S", [17]),
        ("q=36", []),
        ("q=6*6", [17]),
        ("q=1%2B2%3D", [15, 7]),
        ("q=1%2B2%3D&step=10", [7]),
        ("q=1%2B2%3D&before=15", [7]),
        ("q=6%0A6", []),
        ("q=six%0A6", [17]),  # a search may span lines
        ("q=%3Cb%3E%26&run=base&step=20&lowest=1", [16, 14, 12, 10]),
        ("q=s+i", []),  # every part occurs
        ("q=%25", []),
        ("q=_", []),
        ("q=So", [17]),
        (f"run={HOSTILE}", [18]),
        ("step=99", []),
    ],
)
def test_lists_and_searches(client, query, wanted):
    answer = client.get(f"/tokens?{query}")
    assert answer.status_code == 200
    assert numbers(answer.text) == wanted
    assert wanted or "No completion is like that" in answer.text


@pytest.mark.parametrize(
    "query", ["lowest=much", "highest=inf", "step=1.5", "order=best", "before=0", "q=" + "x" * 401]
)
def test_a_wrong_parameter_is_a_readable_error(client, query):
    assert client.get(f"/tokens?{query}").status_code == 400


def test_what_was_searched_is_marked(client):
    page = client.get("/tokens?q=IS%20THIRTY").text
    assert "so it <mark>is thirty</mark>-six↵6*6" in page
    page = client.get("/tokens?q=%3CSCRIPT%3E").text
    assert "<mark>&lt;script&gt;</mark>alert(1)" in page and "<script>alert" not in page


def test_one_completion_with_its_numbers(client):
    page = client.get("/tokens/17").text
    quantities = json.loads(re.search(r'id="quantities">(.*?)</script>', page).group(1))
    assert [q["name"] for q in quantities] == ["entropy", "advantage", "kl", "weight/clip"]
    shown = re.findall(r'data-v="([^"]*)"', page)
    assert shown == [f"{(t + 1) / 2:g},0,0.25,1" for t in range(5)]
    links = Text(page).links
    assert {"/tokens/17/group", "/tokens/16", "/runs/base", "/tokens?run=base&step=30"} <= set(links)
    assert "tokens.js" in page and "<option>weight/clip</option>" in page


def test_a_group_stands_side_by_side(client):
    page = client.get("/tokens/6/group").text
    assert re.findall(r'rollout <a href="/tokens/(\d+)">', page) == ["5", "6", "7", "8"]
    said = Text(page).said
    assert (
        "4 stored completions of one prompt" in said and "mean reward 0.5" in said and "standard deviation 0.5" in said
    )
    assert page.count('class="tokens"') == 4
    assert "prompt 1 &lt;i&gt;" in page and "<i>" not in page.partition("<main")[2].replace("<i></i>", "")
    assert re.findall(r'data-v="[^,]*,([^,]*),', page)[::3] == ["-1", "0", "1", "2"]


def test_a_large_group_goes_over_several_pages(own):
    from tests.ui.known_runs import rollout

    from keel.store.store import Store
    from keel.ui.pages import tokens

    folder, client = own
    size = tokens.ROOM // 3 + 1  # two fit a page
    with Store(folder / "keel.sqlite") as store:
        run = store.run("base")
        store.log_rollouts(run.id, 35, [rollout(0, m, "x" * size, length=size) for m in range(5)])
    first = client.get("/tokens/21/group")
    assert "1 to 2 of 5" in Text(first.text).said
    assert "/tokens/21/group?start=2" in Text(first.text).links
    last = client.get("/tokens/21/group?start=4")
    assert "5 to 5 of 5" in Text(last.text).said
    assert client.get("/tokens/21/group?start=99").status_code == 200


def test_tokens_that_were_not_stored(own):
    from keel.store.records import StoredRollout
    from keel.store.store import Store

    folder, client = own
    with Store(folder / "keel.sqlite") as store:
        store.log_rollouts(store.run("going").id, 2, [StoredRollout("asked <i>", "told <b>", 0.5, length=2)])
    for path in ("/tokens/19", "/tokens/19/group"):
        said = Text(client.get(path).text).said
        assert "told <b>" in said and "asked <i>" in said and "were not stored" in said


@pytest.mark.parametrize("path", ["/tokens/999", "/tokens/0", "/tokens/x", f"/tokens/{10**30}", "/tokens/999/group"])
def test_a_completion_that_is_not_there(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "There is no" in Text(answer.text).said


def test_the_list_shows_prompt_and_completion(client):
    found = rows(client.get("/tokens?run=base&step=10").text)
    assert found[0] == "prompt 1 <i> 1+3=<b>&"
