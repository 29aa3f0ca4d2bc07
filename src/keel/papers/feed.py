"""An Atom feed (RFC 4287) of the papers that are new here."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, date, datetime, time
from xml.etree import ElementTree

from keel.papers.catalogue import FAMILIES, STATUSES, Paper
from keel.papers.importing import normalised
from keel.papers.library import Library

ATOM = "http://www.w3.org/2005/Atom"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "keel.papers")


def feed(papers: Iterable[Paper] | None = None, limit: int = 50, address: str | None = None) -> str:
    """The feed as XML, the latest entry first.

    An entry's `updated` is the day on which the paper was imported, or else published; papers with neither are left
    out. Its identifier follows from the title alone, so that it stays the same in every feed.

    Args:
        papers: of which the latest are taken; the user's library without it.
        limit: the most entries, at least 1.
        address: where the feed can be fetched, for its link `self`.

    Raises:
        ValueError: limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    known = [(p.known_since, p) for p in (Library().papers() if papers is None else papers)]
    dated = sorted([(day, p.n, p) for day, p in known if day is not None], key=lambda item: item[:2], reverse=True)
    ElementTree.register_namespace("", ATOM)
    root = ElementTree.Element(f"{{{ATOM}}}feed")
    _add(root, "id", f"urn:uuid:{_SPACE}")
    _add(root, "title", "Papers on divergence-regularised policy optimisation")
    _add(root, "updated", _moment(dated[0][0]) if dated else datetime.fromtimestamp(0, UTC).isoformat())
    _add(_add(root, "author"), "name", "Keel")
    if address:
        _add(root, "link", rel="self", href=address)
    for day, _, paper in dated[:limit]:
        _entry(root, day, paper)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _entry(root: ElementTree.Element, day: date, paper: Paper) -> None:
    entry = _add(root, "entry")
    _add(entry, "id", f"urn:uuid:{uuid.uuid5(_SPACE, normalised(paper.title))}")
    _add(entry, "title", paper.title)
    _add(entry, "updated", _moment(day))
    if paper.date:
        _add(entry, "published", _moment(paper.date))
    for name in paper.authors if isinstance(paper.authors, tuple) else ():
        _add(_add(entry, "author"), "name", name)
    for number, link in enumerate(paper.links):
        _add(entry, "link", rel="related" if number else "alternate", href=link)
    _add(entry, "category", term=paper.family, label=FAMILIES[paper.family])
    _add(entry, "summary", paper.summary or paper.abstract or paper.title)
    _add(entry, "content", f"{STATUSES[paper.status]} {paper.where}".strip(), type="text")


def _add(parent: ElementTree.Element, name: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    node = ElementTree.SubElement(parent, f"{{{ATOM}}}{name}", attributes)
    node.text = text
    return node


def _moment(day: date) -> str:
    return datetime.combine(day, time(), UTC).isoformat()
