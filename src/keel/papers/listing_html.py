"""Reading listing pages in HTML: of arXiv, of Hugging Face, and lists of any other site."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import urljoin

from keel.papers.listing import (
    ARXIV_ID,
    PAPER_LINK,
    Entry,
    Page,
    Problem,
    arxiv_link,
    entries_of_json,
    make_entry,
    one_line,
    parse_date,
)

VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))
CLOSED_BY = {"li": {"li"}, "dt": {"dt", "dd"}, "dd": {"dt", "dd"}, "tr": {"tr"}, "td": {"td", "th"}, "p": {"p"}}
HIDDEN = frozenset({"script", "style", "template", "noscript"})
NO_TITLE = re.compile(
    r"(?:\[?(?:pdf|abs|abstract|html|arxiv|paper|code|link|project|page|doi|bibtex|other)\]?\W*)+", re.I
)


class Node:
    """An element of a page: its tag, attributes, children, and the line where it begins."""

    def __init__(self, tag: str, attributes: dict[str, str], line: int, parent: Node | None = None) -> None:
        self.tag, self.attributes, self.line, self.parent = tag, attributes, line, parent
        self.children: list[Node | str] = []

    def walk(self) -> Iterator[Node]:
        """All elements below this one, in the order of the page."""
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    def all(self, *tags: str, named: str | None = None) -> list[Node]:
        """The elements below with one of the tags (any without one) and a class that is `named`."""
        return [n for n in self.walk() if (not tags or n.tag in tags) and (named is None or named in n.classes)]

    def first(self, *tags: str, named: str | None = None) -> Node | None:
        """The first of `all`, or None."""
        return next(iter(self.all(*tags, named=named)), None)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def text(self, leave_out: tuple[str, ...] = ()) -> str:
        """The words within, without scripts and without elements that have one of the classes `leave_out`."""
        return one_line("".join(self._pieces(leave_out)))

    def _pieces(self, leave_out: tuple[str, ...]) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            elif child.tag not in HIDDEN and not set(leave_out) & set(child.classes):
                yield from child._pieces(leave_out)
                if child.tag in ("br", "div", "p", "li", "span", "a", "dd", "h1", "h2", "h3", "h4"):
                    yield " " if child.tag not in ("a", "span") else ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("page", {}, 1)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in CLOSED_BY:
            self._close_before(tag)
        node = Node(tag, {name: value or "" for name, value in attrs}, self.getpos()[0], self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_endtag(self, tag: str) -> None:
        node: Node | None = self.at
        while node is not None and node.tag != tag:
            node = node.parent
        if node is not None and node.parent is not None:  # an end without a beginning says nothing
            self.at = node.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)

    def _close_before(self, tag: str) -> None:
        node: Node | None = self.at
        while node is not None and node.tag not in ("ul", "ol", "dl", "table", "div", "body", "article", "section"):
            if node.tag in CLOSED_BY[tag] and node.parent is not None:
                self.at = node.parent
                return
            node = node.parent


def parse_tree(text: str) -> Node:
    """The elements of a page, as forgiving of missing end tags as browsers are of the common ones."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.root


def parse_html(text: str) -> Page:
    """The papers of a page, in the first of the known forms that it has."""
    root = parse_tree(text)
    for kind, read in (
        ("Hugging Face", _props),
        ("arXiv listing", _arxiv_listing),
        ("arXiv search", _arxiv_search),
        ("page of one paper", _citation),
        ("Hugging Face", _cards),
        ("list with links", _linked),
    ):
        problems: list[Problem] = []
        entries = [entry for entry in read(root, problems) if entry is not None]
        if entries or problems:
            return Page(kind, tuple(entries), tuple(problems))
    return Page("html", ())


def _props(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    """Hugging Face writes what its page shows as JSON into an attribute."""
    for node in root.walk():
        props = node.attributes.get("data-props", "")
        if '"title"' in props and ('"summary"' in props or '"authors"' in props):
            try:
                data = json.loads(props)
            except ValueError as error:
                problems.append(Problem(node.line, f"data of the page that cannot be read: {error}"))
                continue
            yield from entries_of_json(data, node.line, problems)


def _arxiv_listing(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    """`<dt>` with the identifier, `<dd>` with title, authors, comments, perhaps the abstract; under dated headings."""
    if not any(node.tag == "dd" and node.first(named="list-title") for node in root.walk()) and not (
        (articles := root.first("dl")) and articles.attributes.get("id") == "articles"
    ):
        return
    when, link = "", None
    for node in root.all("h2", "h3", "dt", "dd"):
        if node.tag in ("h2", "h3"):
            when = node.text() if parse_date(node.text()) else when
        elif node.tag == "dt":
            link = arxiv_link(node.text()) or next(
                (
                    arxiv_link(a.attributes.get("href", ""))
                    for a in node.all("a")
                    if "/abs/" in a.attributes.get("href", "")
                ),
                None,
            )
        else:
            title, comments = node.first(named="list-title"), node.first(named="list-comments")
            authors, abstract = node.first(named="list-authors"), node.first("p")
            names = [a.text() for a in authors.all("a")] if authors else []
            yield make_entry(
                node.line,
                title.text(("descriptor",)) if title else "",
                problems,
                abstract=abstract.text() if abstract else "",
                authors=names or (authors.text(("descriptor",)) if authors else ""),
                date=when,
                comments=comments.text(("descriptor",)) if comments else None,
                links=[link] if link else [],
            )
            link = None


def _arxiv_search(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    for node in root.all("li", named="arxiv-result"):
        title, comments = node.first(named="title"), node.first("p", named="comments")
        authors = node.first(named="authors")
        abstract = node.first(named="abstract-full") or node.first(named="abstract")
        submitted = next((p.text() for p in node.all("p") if "Submitted" in p.text() and p is not abstract), "")
        link = next(
            (a.attributes.get("href", "") for a in node.all("a") if "/abs/" in a.attributes.get("href", "")), ""
        )
        remark = re.sub(r"^Comments:\s*", "", comments.text()) if comments else None
        said = [p.text() for p in abstract.all("a")] if abstract else []
        words = abstract.text() if abstract else ""
        for end in said:  # the buttons that fold it
            words = words.removesuffix(end).strip()
        yield make_entry(
            node.line,
            title.text() if title else "",
            problems,
            abstract=words,
            authors=[a.text() for a in authors.all("a")] if authors else "",
            date=submitted.split("Submitted", 1)[-1].split(";")[0],
            comments=remark,
            links=[urljoin("https://arxiv.org/", link)] if link else [],
        )


def _citation(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    """The head of one paper's page: `citation_title`, `citation_author` and so on."""
    said: dict[str, list[str]] = {}
    line = 1
    for node in root.all("meta"):
        name = node.attributes.get("name", "").lower()
        if name.startswith("citation_"):
            line = node.line if not said else line
            said.setdefault(name, []).append(node.attributes.get("content", ""))
    if "citation_title" not in said:
        return
    link = next((f"https://arxiv.org/abs/{one}" for one in said.get("citation_arxiv_id", ())), None)
    doi = next((f"https://doi.org/{one}" for one in said.get("citation_doi", ())), None)
    address = next(iter(said.get("citation_abstract_html_url", ())), None)
    names = [
        " ".join(reversed([part.strip() for part in one.split(",", 1)])) for one in said.get("citation_author", ())
    ]
    yield make_entry(
        line,
        said["citation_title"][0],
        problems,
        abstract=next(iter(said.get("citation_abstract", ())), ""),
        authors=names,
        date=next((v[0] for k in ("date", "publication_date", "online_date") if (v := said.get(f"citation_{k}"))), ""),
        links=[one for one in (link or address or doi,) if one],
    )


def _cards(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    """Cards of daily papers: an article with a heading that links to /papers/ID."""
    for node in root.all("article"):
        links = [
            a for a in node.all("a") if re.match(r"(?:https://huggingface\.co)?/papers/", a.attributes.get("href", ""))
        ]
        if not links:
            continue
        heading = node.first("h3", "h2", "h4")
        found = ARXIV_ID.search(links[0].attributes["href"])
        words = node.text()
        count = re.search(r"(\d+)\s+authors?\b", words)
        names = [a for a in (item.attributes.get("title", "") for item in node.all("li", "div", "a")) if a]
        comments = next((a.text() for a in links if a.attributes["href"].endswith("#community")), "")
        time = node.first("time")
        abstract = node.first("p")
        yield make_entry(
            node.line,
            heading.text() if heading else "",
            problems,
            abstract=abstract.text() if abstract else "",
            authors=int(count[1]) if count else names or None,
            date=time.attributes.get("datetime", time.text()) if time else None,
            comments=int(comments) if comments.isdigit() else None,
            links=[
                f"https://arxiv.org/abs/{found[1]}"
                if found
                else urljoin("https://huggingface.co/", links[0].attributes["href"])
            ],
        )


def _linked(root: Node, problems: list[Problem]) -> Iterator[Entry | None]:
    """Items, rows, articles and paragraphs that link to a paper; a heading or the longest link text is its title."""
    seen: set[int] = set()
    for link in root.all("a"):
        if not PAPER_LINK.match(link.attributes.get("href", "")):
            continue
        around = _container(link)
        if id(around) in seen:
            continue
        seen.add(id(around))
        links = [a.attributes["href"] for a in around.all("a") if PAPER_LINK.match(a.attributes.get("href", ""))]
        marked = [n.text() for n in around.all("h1", "h2", "h3", "h4", "h5", "strong", "b", "em", "a")]
        titles = [text for text in marked or [around.text()] if text and not NO_TITLE.fullmatch(text)]
        headings = [n.text() for n in around.all("h1", "h2", "h3", "h4", "h5") if n.text()]
        title = headings[0] if headings else max(titles, key=len, default="")
        if len(title.split()) < 2 and not headings:
            said = around.text()[:60]
            problems.append(Problem(around.line, f"a link to a paper without a title: {said or links[0]}"))
            continue
        rest = around.text().replace(title, " ", 1)
        paragraph = next((p.text() for p in around.all("p") if p.text() != title and len(p.text().split()) > 8), "")
        first = links[: 1 if around is not link else None]
        yield make_entry(around.line, title, problems, abstract=paragraph, date=parse_date(rest), links=first)


def _container(link: Node) -> Node:
    """The item that a link stands in: the nearest list item, row, article or paragraph, or else the link itself."""
    node: Node | None = link
    while node is not None and node.tag != "page":
        if node.tag in ("li", "tr", "article", "dd", "p"):
            return node
        node = node.parent
    return link
