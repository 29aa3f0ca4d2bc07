"""Reading saved listing pages: which papers a file names, and which of its entries cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from keel.core.errors import DataError

LOOKED_FOR = (
    "arXiv listings and search results, arXiv's Atom, daily papers of Hugging Face (HTML or JSON), links to arXiv, "
    "OpenReview, the ACL Anthology or a DOI in HTML lists, citation_title in a page's head; in plain text: 'Title:' "
    "fields, arXiv's mails, list items with a link, a table with a column title"
)
PAPER_LINK = re.compile(
    r"https?://(?:www\.|export\.)?(?:arxiv\.org/(?:abs|pdf|html)/|openreview\.net/(?:forum|pdf)\?|doi\.org/10\.|"
    r"(?:www\.)?aclanthology\.org/\w|huggingface\.co/papers/\d|proceedings\.mlr\.press/v|papers\.nips\.cc/|"
    r"proceedings\.neurips\.cc/)",
    re.I,
)
ARXIV_ID = re.compile(r"\b(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?\b")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATES = (
    re.compile(r"(?P<y>\d{4})[-/](?P<m>\d{1,2})[-/](?P<d>\d{1,2})"),
    re.compile(r"(?P<d>\d{1,2})(?:st|nd|rd|th)?\s+(?P<m>[A-Z][a-z]{2,8})\.?,?\s+(?P<y>\d{4})"),
    re.compile(r"(?P<m>[A-Z][a-z]{2,8})\.?\s+(?P<d>\d{1,2})(?:st|nd|rd|th)?,?\s+(?P<y>\d{4})"),
)
_UNFIT = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_ATOM = "{http://www.w3.org/2005/Atom}"


@dataclass(frozen=True)
class Entry:
    """A paper as a page names it.

    Args:
        title, abstract, organisation: its texts.
        authors: names, or how many there are.
        date: of the entry, None where the page has none.
        comments: the authors' remark, or how many readers commented.
        links: addresses, http or https.
        place: line of the file.
    """

    title: str
    abstract: str = ""
    authors: tuple[str, ...] | int | None = None
    date: date | None = None
    comments: int | str | None = None
    links: tuple[str, ...] = ()
    organisation: str = ""
    place: int = 0


@dataclass(frozen=True)
class Problem:
    """Something on a page that could not be read.

    Args:
        place: line of the file.
        what: what is wrong with it, and how it begins.
    """

    place: int
    what: str


@dataclass(frozen=True)
class Page:
    """What a file holds.

    Args:
        kind: the form in which it was read.
        entries: its papers, in their order.
        problems: entries, or values of entries, that could not be read.
    """

    kind: str
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...] = ()


def read_page(path: Path) -> Page:
    """The papers that a saved page names.

    Raises:
        DataError: the file cannot be read, is no text in UTF-8, or holds no paper, with what was looked for.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as text: {error}", str(path), "Save the page as HTML or text, UTF-8."
        ) from error
    page = parse_page(text)
    if not page.entries:
        first = f" {page.problems[0].what} (line {page.problems[0].place})." if page.problems else ""
        raise DataError(f"holds no paper.{first}", str(path), f"Looked for: {LOOKED_FOR}.")
    return page


def parse_page(text: str) -> Page:
    """The papers that a text names, in whichever form it is; none where no form fits."""
    start = text.lstrip()[:2000].lower()
    if start.startswith(("[", "{")):
        return _json(text)
    if "<feed" in start and "http://www.w3.org/2005/atom" in start:
        return _atom(text)
    if re.search(r"<(?:!doctype html|html|head|body|dl|ul|ol|article|div|table|li)\b", start):
        from keel.papers.listing_html import parse_html

        return parse_html(text)
    from keel.papers.listing_text import parse_text

    return parse_text(text)


def parse_date(text: str) -> date | None:
    """The first date in a text, in one of the forms that listings use; None where there is none.

    >>> parse_date("Submitted 15 January, 2025"), parse_date("Jan 5, 2024"), parse_date("in spring")
    (datetime.date(2025, 1, 15), datetime.date(2024, 1, 5), None)
    """
    for form in _DATES:
        for found in form.finditer(text):
            month = found["m"][:3].lower()
            if not month.isdigit() and month not in MONTHS and not found["m"].isdigit():
                continue
            number = int(found["m"]) if found["m"].isdigit() else MONTHS.index(month) + 1
            try:
                return date(int(found["y"]), number, int(found["d"]))
            except ValueError:
                continue
    return None


def make_entry(place: int, title: str, problems: list[Problem], **values: Any) -> Entry | None:
    """An entry from texts; what cannot be read goes to `problems`.

    Args:
        place: line of the file.
        title: the entry is dropped, and reported, where it is empty.
        problems: to which reports are added.
        values: abstract, authors, date, comments, links, organisation; a date as text, authors as text with commas or
            "and", as names, or as a number.
    """
    title = one_line(title)
    if not any(c.isalnum() for c in title):
        said = one_line(str(values.get("abstract") or next(iter(values.get("links") or ()), "")))
        problems.append(Problem(place, f"an entry without a title{f': {said[:60]}' if said else ''}"))
        return None
    links = []
    for link in dict.fromkeys(values.get("links") or ()):
        if link.startswith(("http://", "https://")):
            links.append(link)
        else:
            problems.append(Problem(place, f"a link that is neither http nor https, left out: {link[:60]}"))
    when = values.get("date")
    if isinstance(when, str):
        parsed = parse_date(when)
        if parsed is None and when.strip():
            problems.append(Problem(place, f"a date that cannot be read, left out: {one_line(when)[:60]}"))
        when = parsed
    comments = values.get("comments")
    comments = one_line(comments) or None if isinstance(comments, str) else comments
    if isinstance(comments, str) and comments.isdigit():
        comments = int(comments)
    return Entry(
        title,
        one_line(values.get("abstract") or ""),
        parse_authors(values.get("authors")),
        when,
        comments,
        tuple(links),
        one_line(values.get("organisation") or ""),
        place,
    )


def parse_authors(given: Any) -> tuple[str, ...] | int | None:
    """Names, or their number, from what a page has.

    >>> parse_authors("Ada Lovelace, Alan Turing and Grace Hopper"), parse_authors("8 authors"), parse_authors("")
    (('Ada Lovelace', 'Alan Turing', 'Grace Hopper'), 8, None)
    """
    if given is None or isinstance(given, int):
        return given
    if not isinstance(given, str):
        return tuple(name for item in given if (name := one_line(str(item)))) or None
    number = re.fullmatch(r"\s*·?\s*(\d+)(?:\s+authors?)?\s*", given)
    if number:
        return int(number[1])
    while (bare := re.sub(r"\([^()]*\)", "", given)) != given:  # affiliations, in brackets within brackets
        given = bare
    names = re.split(r",\s*(?:and\s+)?|;|\s+and\s+", one_line(given))
    return tuple(name for item in names if (name := item.strip())) or None


def one_line(text: str) -> str:
    """The text with every run of white space as one space, and without characters that no XML and no terminal takes."""
    return " ".join(_UNFIT.sub("", text).split())


def arxiv_link(text: str) -> str | None:
    """The address of the first arXiv identifier in a text."""
    found = ARXIV_ID.search(text)
    return f"https://arxiv.org/abs/{found[1]}" if found else None


def entries_of_json(data: Any, place: int, problems: list[Problem]) -> list[Entry]:
    """The papers in data as Hugging Face writes it: objects with `title` and `summary` or `authors`, at any depth."""
    entries = []
    for paper, around in _papers_in(data, {}):
        identifier = str(paper.get("id") or "")
        authors = paper.get("authors")
        names = [a.get("name", "") if isinstance(a, Mapping) else str(a) for a in authors or () if not _hidden(a)]
        organisation = paper.get("organization") or around.get("organization") or ""
        if isinstance(organisation, Mapping):
            organisation = organisation.get("fullname") or organisation.get("name") or ""
        link = f"https://arxiv.org/abs/{identifier}" if ARXIV_ID.fullmatch(identifier) else paper.get("url")
        entry = make_entry(
            place,
            str(paper.get("title") or ""),
            problems,
            abstract=str(paper.get("summary") or paper.get("abstract") or ""),
            authors=authors if isinstance(authors, int) else names,
            date=str(paper.get("publishedAt") or paper.get("date") or ""),
            comments=around.get("numComments", paper.get("numComments")),
            links=[str(one) for one in (link, paper.get("githubRepo")) if one],
            organisation=str(organisation),
        )
        if entry:
            entries.append(entry)
    return entries


def _papers_in(data: Any, around: Mapping) -> Iterator[tuple[Mapping, Mapping]]:
    if isinstance(data, list):
        for item in data:
            yield from _papers_in(item, {})
    elif isinstance(data, Mapping):
        if "title" in data and not isinstance(data.get("paper"), Mapping) and ({"summary", "authors"} & set(data)):
            yield data, around
        else:
            for value in data.values():
                yield from _papers_in(value, data if isinstance(value, Mapping) else {})


def _hidden(author: Any) -> bool:
    return isinstance(author, Mapping) and bool(author.get("hidden"))


def _json(text: str) -> Page:
    try:
        data = json.loads(text)
    except ValueError as error:
        return Page("json", (), (Problem(getattr(error, "lineno", 1), f"JSON that cannot be read: {error}"),))
    problems: list[Problem] = []
    return Page("json", tuple(entries_of_json(data, 1, problems)), tuple(problems))


def _atom(text: str) -> Page:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return Page("atom", (), (Problem(error.position[0], f"XML that cannot be read: {error}"),))
    lines = [text.count("\n", 0, found.start()) + 1 for found in re.finditer(r"<entry[\s>]", text)]
    entries, problems = [], list[Problem]()
    for i, node in enumerate(root.iter(f"{_ATOM}entry")):
        said = {name: node.findtext(f"{_ATOM}{name}") or "" for name in ("title", "summary", "content", "published")}
        links = [
            link.get("href", "")
            for link in node.iter(f"{_ATOM}link")
            if link.get("rel", "alternate") == "alternate" and link.get("href")
        ]
        identifier = (node.findtext(f"{_ATOM}id") or "").strip()
        entry = make_entry(
            lines[i] if i < len(lines) else 1,
            said["title"],
            problems,
            abstract=said["summary"] or said["content"],
            authors=[name.text or "" for name in node.iterfind(f"{_ATOM}author/{_ATOM}name")],
            date=said["published"] or node.findtext(f"{_ATOM}updated") or "",
            comments=node.findtext("{http://arxiv.org/schemas/atom}comment"),
            links=links or [one for one in (identifier,) if one.startswith("http")],
        )
        if entry:
            entries.append(entry)
    return Page("atom", tuple(entries), tuple(problems))
