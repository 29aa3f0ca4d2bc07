"""Reading listings in plain text: arXiv's mails, tables, fields, and list items with links."""

from __future__ import annotations

import csv
import re
from typing import Any

from keel.papers.listing import PAPER_LINK, Page, Problem, arxiv_link, make_entry, parse_date

_FIELDS = {
    "title": "title",
    "author": "authors",
    "authors": "authors",
    "abstract": "abstract",
    "summary": "abstract",
    "date": "date",
    "published": "date",
    "submitted": "date",
    "comment": "comments",
    "comments": "comments",
    "link": "link",
    "links": "link",
    "url": "link",
    "arxiv": "link",
    "id": "link",
    "organisation": "organisation",
    "organization": "organisation",
}
_PASSED_OVER = ("categories", "subjects", "msc-class", "acm-class", "journal-ref", "report-no", "doi", "license")
_FIELD = re.compile(rf"^\s*({'|'.join((*_FIELDS, *_PASSED_OVER))})\s*:\s*(.*)$", re.I)
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,4}[.)])\s+(.+)$")
_MARKDOWN = re.compile(r"\[([^\]]+)\]\((\S+?)\)")


def parse_text(text: str) -> Page:
    """The papers of a text, in the first of the known forms that it has."""
    for read in (_mail, _table, _fields, _items):
        page = read(text)
        if page.entries or page.problems:
            return page
    return Page("text", ())


def _mail(text: str) -> Page:
    r"""arXiv's mails: blocks between dashes, each `\\`, fields, `\\`, abstract, `\\`."""
    entries, problems = [], list[Problem]()
    place = 1
    for block in re.split(r"(?m)^-{20,}.*$", text):
        head = re.search(r"(?ms)^\\\\\s*\n(arXiv:.*?)^\\\\(.*?)(?:^\\\\|\Z)", block)
        if head:
            line = place + block.count("\n", 0, head.start(1))
            values = {key: " ".join(said) for key, said, _ in _read_fields(head[1].splitlines(), line)}
            link = arxiv_link(head[1])
            entry = make_entry(
                line,
                values.get("title", ""),
                problems,
                abstract=head[2],
                authors=values.get("authors", ""),
                date=values.get("date", ""),
                comments=values.get("comments"),
                links=[link] if link else [],
            )
            entries += [entry] if entry else []
        place += block.count("\n")
    return Page("arXiv mail", tuple(entries), tuple(problems))


def _table(text: str) -> Page:
    """Tab- or comma-separated values whose first line names a column `title`."""
    first = text.split("\n", 1)[0]
    for mark in ("\t", ","):
        names = [name.strip().lower() for name in first.split(mark)]
        if "title" in names and len(names) > 1:
            break
    else:
        return Page("table", ())
    entries, problems = [], list[Problem]()
    lines = text.splitlines(keepends=True)
    plain = mark == "\t"  # quotes mean nothing between tabs
    reader = csv.reader(lines, delimiter=mark, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    next(reader)
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(names):
            problems.append(
                Problem(reader.line_num, f"{len(row)} columns in place of {len(names)}: {mark.join(row)[:60]}")
            )
            continue
        values: dict[str, Any] = {_FIELDS[n]: v for n, v in zip(names, row, strict=True) if n in _FIELDS and v.strip()}
        values["links"] = values.pop("link", "").split()
        entry = make_entry(reader.line_num, values.pop("title", ""), problems, **values)
        entries += [entry] if entry else []
    return Page("table", tuple(entries), tuple(problems))


def _fields(text: str) -> Page:
    """`Title: ...` and other fields; a repeated field, or the one that began the first record, begins the next."""
    records: list[tuple[int, dict[str, str]]] = []
    for key, said, line in _read_fields(text.splitlines(), 1):
        if not records or key in records[-1][1] or key == next(iter(records[0][1])):
            records.append((line, {}))
        records[-1][1][key] = " ".join(said)
    if not any("title" in values for _, values in records):
        return Page("fields", ())
    entries, problems = [], list[Problem]()
    for line, values in records:
        link = values.pop("link", "")
        urls = re.findall(r"https?://\S+", link) or [one for one in (arxiv_link(link),) if one]
        if link and not urls:
            problems.append(Problem(line, f"a link that cannot be read, left out: {link[:60]}"))
        entry = make_entry(line, values.pop("title", ""), problems, links=urls, **values)
        entries += [entry] if entry else []
    return Page("fields", tuple(entries), tuple(problems))


def _read_fields(lines: list[str], first: int) -> list[tuple[str, list[str], int]]:
    """Every field with its texts and its line. Lines without a name continue the field, blank ones and rules do not."""
    found: list[tuple[str, list[str], int]] = []
    for number, line in enumerate(lines, first):
        match = _FIELD.match(line)
        if match:
            found.append((_FIELDS.get(match[1].lower(), ""), [match[2].strip()], number))
        elif found and line.strip() and not set(line.strip()) <= set("-="):
            found[-1][1].append(line.strip())
    return [one for one in found if one[0]]


def _items(text: str) -> Page:
    """List items with an address; items without one are reported where others have one."""
    entries, problems = [], list[Problem]()
    bare = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _ITEM.match(line)
        if not match:
            continue
        marked = _MARKDOWN.search(match[1])
        urls = [u.rstrip(").,;") for u in re.findall(r"https?://[^\s<>\]]+", match[1])]
        link = arxiv_link(match[1]) if not urls and re.search(r"arxiv", match[1], re.I) else None
        if not any(PAPER_LINK.match(url) for url in urls) and not link:
            bare.append(Problem(number, f"a list item without the link of a paper: {match[1].strip()[:60]}"))
            continue
        title = marked[1] if marked else re.split(r"https?://|\(?arXiv:", match[1], maxsplit=1, flags=re.I)[0]
        rest = match[1].replace(title, "", 1)
        when = parse_date(rest)
        title = title.strip(' -:,.–—*_|"“”(')
        entry = make_entry(number, title, problems, links=urls or [link], date=when)
        entries += [entry] if entry else []
    return Page("list", tuple(entries), (*problems, *bare)) if entries or problems else Page("list", ())
