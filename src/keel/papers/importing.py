"""Importing a saved listing page: what on it is new, what is known, and which family each new paper would join."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.core.errors import ConfigError
from keel.papers.catalogue import Paper, catalogue
from keel.papers.library import Library
from keel.papers.listing import Entry, Page, Problem, read_page
from keel.papers.search import folded, latent_space

ALIKE = 0.92  # ratio of titles from which two are one paper
NEIGHBOURS = 5
_PART = re.compile(r"\d+|[ivx]+|two|three|four")


@dataclass(frozen=True)
class New:
    """A paper of a page that nobody here knew.

    Args:
        paper: as it is, or would be, stored; its family is a proposal.
        neighbours: the papers of the catalogue that the proposal rests on, the nearest first.
    """

    paper: Paper
    neighbours: tuple[Paper, ...] = ()


@dataclass(frozen=True)
class Known:
    """An entry that is there already.

    Args:
        entry: of the page.
        paper: which it is the same as.
        why: by what they were found to be the same.
    """

    entry: Entry
    paper: Paper
    why: str


@dataclass(frozen=True)
class Findings:
    """What became of a page.

    Args:
        kind: the form in which it was read.
        new: what is, or would be, added.
        known: what is there already.
        problems: what could not be read.
        stored: whether the new papers are in the library now.
        note: why no family is proposed, where none is.
    """

    kind: str
    new: tuple[New, ...]
    known: tuple[Known, ...]
    problems: tuple[Problem, ...]
    stored: bool
    note: str = ""


def import_page(path: Path, library: Library | None = None, dry_run: bool = False) -> Findings:
    """Read a saved page and add what is new to the library.

    Args:
        path: HTML, text, Atom or JSON.
        library: to which it is added; the user's own without it.
        dry_run: only say what would be added.

    Raises:
        DataError: the file cannot be read or holds no paper.
        UserError: the library cannot be written.
    """
    library = library or Library()
    page = read_page(path)
    new, known = sort_out(page, library.papers())
    proposals, note = _proposals(new)
    papers = [_as_paper(i, entry, family) for i, (entry, (family, _)) in enumerate(zip(new, proposals, strict=True), 1)]
    if papers and not dry_run:
        papers = list(library.add(papers))
    found = [New(paper, around) for paper, (_, around) in zip(papers, proposals, strict=True)]
    return Findings(page.kind, tuple(found), tuple(known), page.problems, bool(papers) and not dry_run, note)


def sort_out(page: Page, papers: Sequence[Paper]) -> tuple[list[Entry], list[Known]]:
    """The entries that are new, and those that are known, or come a second time on the page."""
    pool = list(papers)
    new: list[Entry] = []
    known: list[Known] = []
    for entry in page.entries:
        candidate = _as_paper(1, entry, "supervised")
        same = same_paper(candidate, pool)
        if same:
            known.append(Known(entry, *same))
        else:
            new.append(entry)
            pool.append(candidate)
    return new, known


def same_paper(one: Paper, papers: Sequence[Paper]) -> tuple[Paper, str] | None:
    """The paper that is the same as another, with the reason; None where there is none.

    The same identifier at arXiv, the same title but for letter case, accents and punctuation, or a title alike to 92 %
    whose numbers are the same ("Part I" and "Part II" are two papers).
    """
    title = normalised(one.title)
    alike: tuple[float, Paper] | None = None
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(title)
    for paper in papers:
        if one.arxiv and one.arxiv == paper.arxiv:
            return paper, f"the same identifier at arXiv, {one.arxiv}"
        other = normalised(paper.title)
        if other == title:
            return paper, "the same title"
        if (one.arxiv and paper.arxiv) or _numbers(other) != _numbers(title):
            continue
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() > ALIKE and matcher.quick_ratio() > ALIKE and (ratio := matcher.ratio()) > ALIKE:
            alike = max(alike or (0.0, paper), (ratio, paper), key=lambda item: item[0])
    return (alike[1], f"a title alike to {100 * alike[0]:.0f} %") if alike else None


def normalised(title: str) -> str:
    """A title without letter case, accents, markup and punctuation.

    >>> normalised("$\\\\beta$-DPO: Müller's  Way")
    'beta dpo muller s way'
    """
    plain = unicodedata.normalize("NFKD", title).casefold()
    return " ".join(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def propose_family(text: str) -> tuple[str, tuple[Paper, ...]]:
    """The family of most of the nearest papers of the catalogue, and those of that family among the nearest.

    Args:
        text: title and abstract.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    return propose_families([text])[0]


def propose_families(texts: Sequence[str], without: Sequence[int] | None = None) -> list[tuple[str, tuple[Paper, ...]]]:
    """`propose_family` of several texts: the nearest five papers vote, each with its cosine.

    Args:
        texts: titles and abstracts.
        without: for each text the number of a paper that has no vote.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    if not texts:
        return []
    space, voters = latent_space(), catalogue()
    near = space.vectors([folded(text) for text in texts]) @ space.place(voters).T
    found = []
    for row, barred in zip(near, without or [0] * len(texts), strict=True):
        order = [i for i in row.argsort(kind="stable")[::-1] if voters[i].n != barred][:NEIGHBOURS]
        votes: dict[str, float] = defaultdict(float)
        for i in order:
            votes[voters[i].family] += max(float(row[i]), 0.0)
        family = max(votes, key=lambda name: votes[name])
        found.append((family, tuple(voters[i] for i in order if voters[i].family == family)))
    return found


def _proposals(entries: Sequence[Entry]) -> tuple[list[tuple[str, tuple[Paper, ...]]], str]:
    try:
        return propose_families([f"{entry.title}\n{entry.abstract}" for entry in entries]), ""
    except ConfigError as error:
        return [("supervised", ())] * len(entries), f"No family is proposed: {error.what}. {error.fix}"


def _as_paper(n: int, entry: Entry, family: str) -> Paper:
    return Paper(
        n,
        entry.title,
        entry.date,
        entry.authors,
        entry.organisation,
        entry.comments,
        family=family,
        links=entry.links,
        status="imported",
        abstract=entry.abstract,
    )


def _numbers(title: str) -> list[str]:
    return [word for word in title.split() if _PART.fullmatch(word)]
