"""The feed has what RFC 4287 requires, and what it says survives being read."""

import re
from dataclasses import replace
from datetime import date, datetime
from xml.etree import ElementTree

import pytest

from keel.papers.catalogue import Paper, catalogue
from keel.papers.feed import feed

ATOM = "{http://www.w3.org/2005/Atom}"
AWKWARD = Paper(
    10_001,
    'Rewards <b>"&" Régularisation</b> ]]>',
    date(2024, 5, 1),
    ("Ada Lovelace", "Alan Turing"),
    family="online",
    links=("https://arxiv.org/abs/2405.00001?a=1&b=2", "https://github.com/x/y"),
    status="imported",
    abstract="An abstract with < and &.",
    added=date(2027, 1, 2),
)


def required(node: ElementTree.Element, entry: bool) -> None:
    """Sections 4.1.1, 4.1.2 and 3.3 of RFC 4287."""
    for name in ("id", "title", "updated"):
        found = node.findall(f"{ATOM}{name}")
        assert len(found) == 1 and found[0].text, f"exactly one {name}"
    identifier = node.findtext(f"{ATOM}id") or ""
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", identifier)
    for when in (*node.findall(f"{ATOM}updated"), *node.findall(f"{ATOM}published")):
        assert datetime.fromisoformat(when.text or "").tzinfo is not None, "a moment has a zone"
    for author in node.findall(f"{ATOM}author"):
        assert len(author.findall(f"{ATOM}name")) == 1
    for link in node.findall(f"{ATOM}link"):
        assert link.get("href", "").startswith("http")
    alternates = [link for link in node.findall(f"{ATOM}link") if link.get("rel", "alternate") == "alternate"]
    assert len(alternates) <= 1, "no two alternates of one type"
    if entry:
        assert len(node.findall(f"{ATOM}content")) == 1 or alternates, "content, or a link alternate"
        assert len(node.findall(f"{ATOM}summary")) == 1


def test_the_feed_is_valid_and_the_latest_comes_first() -> None:
    text = feed([*catalogue(), AWKWARD], address="https://example.org/feed.xml")
    root = ElementTree.fromstring(text.encode())
    assert root.tag == f"{ATOM}feed"
    required(root, entry=False)
    assert root.findall(f"{ATOM}author"), "an author for entries that name none"
    entries = root.findall(f"{ATOM}entry")
    assert len(entries) == 50
    for entry in entries:
        required(entry, entry=True)
    assert len({entry.findtext(f"{ATOM}id") for entry in entries}) == 50
    moments = [datetime.fromisoformat(entry.findtext(f"{ATOM}updated") or "") for entry in entries]
    assert moments == sorted(moments, reverse=True)
    assert root.findtext(f"{ATOM}updated") == entries[0].findtext(f"{ATOM}updated") == "2027-01-02T00:00:00+00:00"


def test_texts_come_back_as_they_were() -> None:
    (entry,) = ElementTree.fromstring(feed([AWKWARD])).findall(f"{ATOM}entry")
    assert entry.findtext(f"{ATOM}title") == AWKWARD.title
    assert entry.findtext(f"{ATOM}summary") == AWKWARD.abstract
    assert entry.findtext(f"{ATOM}published") == "2024-05-01T00:00:00+00:00"
    assert [a.findtext(f"{ATOM}name") for a in entry.findall(f"{ATOM}author")] == ["Ada Lovelace", "Alan Turing"]
    assert [(link.get("rel"), link.get("href")) for link in entry.findall(f"{ATOM}link")] == [
        ("alternate", AWKWARD.links[0]),
        ("related", AWKWARD.links[1]),
    ]


def test_identifiers_stay_when_a_paper_moves_into_the_catalogue() -> None:
    def identifier(one: Paper) -> str | None:
        return ElementTree.fromstring(feed([one])).findtext(f"{ATOM}entry/{ATOM}id")

    assert identifier(AWKWARD) == identifier(replace(AWKWARD, n=223, status="context", added=None))
    assert identifier(AWKWARD) != identifier(replace(AWKWARD, title="Another"))


def test_without_papers_the_feed_is_still_valid() -> None:
    root = ElementTree.fromstring(feed([Paper(1, "No date")]))
    required(root, entry=False)
    assert not root.findall(f"{ATOM}entry")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        feed([], limit=0)
