"""The pages about papers: what they list, find and count."""

import time
from datetime import date
from xml.etree import ElementTree

import pytest
from tests.ui.known_comparisons import store_comparison
from tests.ui.known_runs import HOSTILE
from tests.ui.reading import Text

from keel.compare.outcomes import Arm, Budget, Comparison
from keel.core.errors import ConfigError
from keel.papers.catalogue import Component, Paper, catalogue, newest_first
from keel.papers.library import Library
from keel.papers.related import related
from keel.ui.pages import papers as page_of_papers

PER_PAGE = page_of_papers.PER_PAGE


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A library of the test's own."""
    monkeypatch.setenv("KEEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def numbers(page: str) -> list[int]:
    """The papers that a page lists, in their order."""
    links = Text(page.partition('<ol class="entries"')[2].partition("</ol>")[0]).links
    return [int(link.rpartition("/")[2]) for link in links if link.startswith("/papers/")]


def test_the_newest_come_first(client):
    first, second = (client.get(f"/papers?page={page}").text for page in (1, 2))
    order = [paper.n for paper in newest_first(catalogue())]
    assert numbers(first) == order[:PER_PAGE] and numbers(second) == order[PER_PAGE : 2 * PER_PAGE]
    assert numbers(client.get("/papers?page=999").text) == order[-(len(order) % PER_PAGE or PER_PAGE) :]
    assert "222 papers" in Text(first).said


@pytest.mark.parametrize(
    "query, wanted",
    [
        ("status=implemented", lambda paper: paper.status == "implemented"),
        ("family=diffusion", lambda paper: paper.family == "diffusion"),
        ("theme=behaviour&status=context", lambda paper: "behaviour" in paper.themes and paper.status == "context"),
    ],
)
def test_filters(client, query, wanted):
    order = [paper.n for paper in newest_first(catalogue()) if wanted(paper)]
    answer = client.get(f"/papers?{query}").text
    assert numbers(answer) == order[:PER_PAGE] and 0 < len(order) < 222
    assert f"{len(order)} papers" in Text(answer).said


def test_search_by_words_and_by_meaning(client):
    for mode in ("lexical", "semantic", ""):
        found = client.get(f"/papers?q=covariance+entropy+clip-cov&mode={mode}")
        assert numbers(found.text)[0] == 47, mode
    among = client.get("/papers?q=covariance+entropy&mode=semantic&status=implemented").text
    assert all(paper.runs for paper in catalogue() if paper.n in numbers(among))
    assert "The 60 best matches" in Text(among).said
    by_date = numbers(client.get("/papers?q=covariance+entropy&mode=semantic&sort=newest").text)
    dates = [next(paper.date or date.min for paper in catalogue() if paper.n == n) for n in by_date]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("query", ["q=%3F%3F", "q=zyzzyva&mode=lexical", "sort=trending", "q=%22%20OR%20NEAR("])
def test_what_finds_nothing_says_so(client, query):
    answer = client.get(f"/papers?{query}")
    assert answer.status_code == 200
    assert numbers(answer.text) == [] or "NEAR" in query
    assert 'class="notice"' in answer.text or "NEAR" in query


@pytest.mark.parametrize("query, said", [("family=onlin", "online"), ("status=x", "implemented"), ("page=0", "page")])
def test_a_wrong_parameter_is_a_readable_error(client, query, said):
    answer = client.get(f"/papers?{query}")
    assert answer.status_code == 400 and said in Text(answer.text).said


def test_one_paper_says_what_of_it_runs(client):
    said = Text(client.get("/papers/47").text)
    assert "2025-05-28" in said.said and "17 authors" in said.said and "follows the authors' code" in said.said
    assert {"/methods/clip_cov", "/methods/kl_cov", "/papers?theme=entropy"} <= set(said.links)
    assert "keel train kl_cov" in said.said
    context = next(paper for paper in catalogue() if paper.status == "context")
    assert "Listed as context" in Text(client.get(f"/papers/{context.n}").text).said
    assert client.get("/papers/4711").status_code == 404 and client.get("/papers/x").status_code == 404


def test_papers_have_pages_whose_links_lead_somewhere(client):
    from keel.recipes.registry import recipes

    known = recipes()
    for paper in catalogue()[::4]:
        answer = client.get(f"/papers/{paper.n}", headers={"sec-fetch-dest": "image"})
        assert answer.status_code == 200
        text = Text(answer.text)
        assert " ".join(paper.title.split()) in text.said
        named = {link.removeprefix("/methods/") for link in text.links if link.startswith("/methods/")}
        assert named == set(paper.recipes) and named <= set(known)
        outside = [known for tag, known in text.elements if tag == "a" and known["href"].startswith("http")]
        assert [known["href"] for known in outside] == list(paper.links)
        assert all("noreferrer" in known["rel"] for known in outside)
        assert sum(text.said.count(f"{c.name} not in Keel") > 0 for c in paper.components) == len(paper.missing)


def test_looking_is_counted_in_the_library_and_nowhere_else(own):
    folder, client = own
    before = (folder / "keel.sqlite").read_bytes()
    assert "Opened 1 time on" in Text(client.get("/papers/3").text).said
    assert "Opened 2 times on" in Text(client.get("/papers/3").text).said
    for header in ({"sec-purpose": "prefetch"}, {"sec-fetch-dest": "image"}):
        assert "Opened 2 times on" in Text(client.get("/papers/3", headers=header).text).said
    client.get("/papers/5")
    assert {n: sum(days.values()) for n, days in Library().views().items()} == {3: 2, 5: 1}
    assert numbers(client.get("/papers?sort=trending").text) == [3, 5]
    assert (folder / "keel.sqlite").read_bytes() == before


def test_comparisons_make_papers_trend(own):
    folder, client = own
    arms = (Arm("grpo", "grpo"), Arm("kl_cov", "kl_cov"))
    compared = Comparison("one", arms, (0,), "countdown", "tiny", Budget(10.0, "steps"), created=time.time())
    store_comparison(folder, compared)
    client.get("/papers/3")
    order = numbers(client.get("/papers?sort=trending").text)
    assert 47 in order and order[-1] == 3  # a comparison counts five times as much as a view


def test_a_library_that_cannot_be_written_is_read_all_the_same(client, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KEEL_HOME", str(tmp_path / "file" / "below"))
    assert client.get("/papers").status_code == 200
    assert client.get("/papers/3").status_code == 200


def test_an_imported_paper_stands_beside_the_others(client):
    Library().add(
        [Paper(1, HOSTILE, date(2031, 1, 1), (HOSTILE,), links=("https://a.example/x",), abstract="so it is")]
    )
    first = client.get("/papers").text
    assert numbers(first)[0] == 10_001 and "<script>alert" not in first
    one = client.get("/papers/10001").text
    assert "<script>alert" not in one and HOSTILE in Text(one).said and "so it is" in Text(one).said
    assert "nobody has said yet" in Text(one).said


def test_the_feed(client):
    answer = client.get("/papers/feed.xml")
    assert answer.headers["content-type"].startswith("application/atom+xml")
    root = ElementTree.fromstring(answer.text)
    atom = {"a": "http://www.w3.org/2005/Atom"}
    assert root.find("a:link[@rel='self']", atom).get("href") == "http://127.0.0.1:8765/papers/feed.xml"
    titles = [entry.findtext("a:title", None, atom) for entry in root.findall("a:entry", atom)]
    assert titles == [paper.title for paper in newest_first(catalogue())][: len(titles)] and len(titles) == 50


def test_related_papers_are_the_nearest():
    first = catalogue()[46]
    twin = Paper(9999, first.title, summary=first.summary, family=first.family, components=first.components)
    pool = (*catalogue(), twin)
    (nearest, cosine), *others = related(first, pool, limit=5)
    assert nearest is twin and cosine == pytest.approx(1.0, abs=1e-9)
    assert len(others) == 4 and first not in [paper for paper, _ in others]
    assert [score for _, score in others] == sorted((score for _, score in others), reverse=True)


def test_without_the_package_for_meaning_the_pages_work(client, monkeypatch):
    def lacking(*_):
        raise ConfigError("semantic search needs scikit-learn, which is not installed", "mode")

    monkeypatch.setattr(page_of_papers, "related", lacking)
    assert "needs scikit-learn" in Text(client.get("/papers/47").text).said
    monkeypatch.setattr(page_of_papers, "default_mode", lambda: "lexical")
    assert numbers(client.get("/papers?q=clip-cov").text)[0] == 47


def test_components_are_told_apart(client):
    Library().add([Paper(1, "Apart", components=(Component("here", True), Component("lacking", False)))])
    said = Text(client.get("/papers/10001").text).said
    assert "here in Keel" in said and "lacking not in Keel" in said
