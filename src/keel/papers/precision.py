"""How good search is: whether the queries of the four themes find the papers that were collected under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from keel.papers.catalogue import THEMES, Paper, catalogue
from keel.papers.importing import propose_families
from keel.papers.search import Mode, search

CUTS = (10, 25)


@dataclass(frozen=True)
class Measured:
    """The precision of one query.

    Args:
        theme: whose papers count as found rightly.
        mode: of the search.
        papers: how many papers have the theme.
        chance: their share of the catalogue, the expected precision of any order without knowledge.
        first10, first25: share of them among the first 10 and 25 results.
        r_precision: share of them among the first `papers` results.
    """

    theme: str
    mode: Mode
    papers: int
    chance: float
    first10: float
    first25: float
    r_precision: float


def measure(mode: Mode, papers: Sequence[Paper] | None = None) -> list[Measured]:
    """The precision of each theme's query, in the order of `THEMES`.

    Places after the last result count as wrong. No mode reads the themes.

    Raises:
        ConfigError: a package that the mode needs is not installed.
    """
    papers = tuple(catalogue() if papers is None else papers)
    out = []
    for theme, query in THEMES.items():
        right = {p.n for p in papers if theme in p.themes}
        found = [hit.paper.n in right for hit in search(query, mode, limit=None, papers=papers)]
        ten, more, all_of_them = (sum(found[:k]) / k for k in (*CUTS, len(right)))
        out.append(Measured(theme, mode, len(right), len(right) / len(papers), ten, more, all_of_them))
    return out


def families_proposed_rightly() -> tuple[int, float]:
    """How many papers get their own family from their neighbours, and which share the largest family has.

    What is given is title and summary, as on a page that is imported; the paper itself has no vote.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    papers = catalogue()
    found = propose_families([f"{p.title}\n{p.summary}" for p in papers], [p.n for p in papers])
    right = sum(family == p.family for (family, _), p in zip(found, papers, strict=True))
    return right, max(Counter(p.family for p in papers).values()) / len(papers)
