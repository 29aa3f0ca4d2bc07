"""Search in papers: by words (SQLite FTS5), by meaning (latent semantic analysis), and by both."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Literal

from keel.core.errors import ConfigError, UserError
from keel.papers.catalogue import FAMILIES, STATUSES, THEMES, Paper, catalogue

if TYPE_CHECKING:
    import numpy as np

Mode = Literal["mixed", "lexical", "semantic", "sentences"]
MODES = {
    "mixed": "lexical and semantic ranks fused",
    "lexical": "the words, stemmed, by BM25",
    "semantic": "latent semantic analysis trained on the catalogue",
    "sentences": "a model of sentence-transformers that is on this machine",
}
FUSION = 60.0  # Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet", 2009
DIMENSIONS = 100
SENTENCES = "sentence-transformers/all-MiniLM-L6-v2"
EMPTY = frozenset(
    ("a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "that", "the", "to", "with")
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Filters:
    """What a paper must be to be found; an empty setting lets all through.

    Args:
        family: one of `FAMILIES`.
        theme: one of `THEMES`.
        status: one of `STATUSES`; "implemented" is what runs in Keel.
        since, until: first and last day of the paper's date; papers without a date fall out.

    Raises:
        ValueError: a value that is none of these.
    """

    family: str | None = None
    theme: str | None = None
    status: str | None = None
    since: date | None = None
    until: date | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("family", FAMILIES), ("theme", THEMES), ("status", STATUSES)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not '{value}'")

    def __call__(self, paper: Paper) -> bool:
        return (
            self.family in (None, paper.family)
            and (self.theme is None or self.theme in paper.themes)
            and self.status in (None, paper.status)
            and (self.since is None or (paper.date is not None and paper.date >= self.since))
            and (self.until is None or (paper.date is not None and paper.date <= self.until))
        )


@dataclass(frozen=True)
class Hit:
    """A paper that was found.

    Args:
        paper: the paper.
        score: higher is better; BM25, a cosine, or a sum of reciprocal ranks, by mode.
    """

    paper: Paper
    score: float


def search(
    query: str,
    mode: Mode = "mixed",
    filters: Filters | None = None,
    limit: int | None = 25,
    papers: Sequence[Paper] | None = None,
) -> list[Hit]:
    """The papers that answer a query, the best first.

    `mixed` adds 1 / (60 + rank) over the lexical and the semantic order; a paper without any of the words has no
    lexical rank. Ranks are taken among all papers, and filtered afterwards.

    Args:
        query: words in any form; no character of it is syntax.
        mode: one of `MODES`.
        filters: what the papers must be.
        limit: the most that are returned; None for all.
        papers: what is searched; the catalogue without it (`Library().papers()` has the imported ones too).

    Raises:
        UserError: the query has no letter or digit.
        ConfigError: an unknown mode, or one whose packages or model are missing.

    >>> [hit.paper.n for hit in search("Clip-Cov entropy mechanism", "lexical", limit=1)]
    [47]
    """
    if mode not in MODES:
        raise ConfigError(f"must be one of {', '.join(MODES)}, not '{mode}'", "mode")
    if not _WORD.search(query):
        raise UserError("a query needs a word", f"'{query}'", "For example: keel papers search entropy bonus")
    papers = tuple(catalogue() if papers is None else papers)
    if not papers:
        return []
    if mode == "mixed":
        scored: dict[int, float] = {}
        for order in (_ranked(lexical(query, papers)), _ranked(semantic(query, papers))):
            for rank, place in enumerate(order, 1):
                scored[place] = scored.get(place, 0.0) + 1 / (FUSION + rank)
    else:
        scored = {"lexical": lexical, "semantic": semantic, "sentences": sentences}[mode](query, papers)
    hits = [Hit(papers[i], scored[i]) for i in _ranked(scored) if filters is None or filters(papers[i])]
    return hits[:limit]


def default_mode() -> Mode:
    """`mixed`, or `lexical` where scikit-learn is not installed."""
    return "mixed" if importlib.util.find_spec("sklearn") else "lexical"


def lexical(query: str, papers: tuple[Paper, ...]) -> dict[int, float]:
    """BM25 of every paper that has one of the words, by place in `papers`; titles count threefold."""
    words = content_words(query)
    asked = " OR ".join(f'"{word}"' for word in words)
    with closing(_index(papers)) as db:
        rows = db.execute("SELECT rowid, -bm25(papers, 3.0, 1.0) FROM papers WHERE papers MATCH ?", (asked,))
        return {int(row): float(score) for row, score in rows}


def containing(topic: str, papers: tuple[Paper, ...]) -> list[Paper]:
    """The papers that have every word of a topic, in their order."""
    asked = " AND ".join(f'"{word}"' for word in content_words(topic))
    if not papers or not asked:
        return []
    with closing(_index(papers)) as db:
        rows = db.execute("SELECT rowid FROM papers WHERE papers MATCH ? ORDER BY rowid", (asked,))
        return [papers[row] for (row,) in rows]


def semantic(query: str, papers: tuple[Paper, ...]) -> dict[int, float]:
    """Cosine between the query and every paper, in the latent space of the catalogue.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    space = latent_space()
    return dict(enumerate((space.place(papers) @ space.vectors([folded(query)])[0]).tolist()))


def sentences(query: str, papers: tuple[Paper, ...]) -> dict[int, float]:
    """Cosine between embeddings of a model of sentence-transformers; `$KEEL_SENTENCES` names its folder.

    Raises:
        ConfigError: the package, or the model, is not on this machine.
    """
    model = _sentence_model(os.environ.get("KEEL_SENTENCES") or SENTENCES)
    vectors = model.encode([query, *(text(paper) for paper in papers)], normalize_embeddings=True)
    return dict(enumerate((vectors[1:] @ vectors[0]).tolist()))


class LatentSpace:
    """TF-IDF of words (one and two) and of 3 to 5 characters within words, and its largest singular directions.

    Args:
        texts: what it is trained on.
        dimensions: how many directions are kept, at most one fewer than texts.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    def __init__(self, texts: Sequence[str], dimensions: int = DIMENSIONS) -> None:
        try:
            from scipy.sparse import hstack
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            fix = "Install it (pip install 'keel-rl[papers]'), or search with --mode lexical."
            raise ConfigError("semantic search needs scikit-learn, which is not installed", "mode", fix) from error
        options = {"sublinear_tf": True}
        self._terms = (
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", stop_words=sorted(EMPTY), **options),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=min(2, len(texts)), **options),
        )
        matrix = hstack([one.fit_transform(texts) for one in self._terms], format="csr")
        kept = max(1, min(dimensions, len(texts) - 1, matrix.shape[1] - 1))
        self._directions = TruncatedSVD(kept, algorithm="arpack", random_state=0).fit(matrix)
        self._places: dict[tuple[Paper, ...], np.ndarray] = {}

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, dimensions]; zero where a text has no term that the space knows."""
        import numpy as np

        found = self._directions.transform(self._weighted(texts))
        size = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, size, out=np.zeros_like(found), where=size > 1e-12)

    def place(self, papers: tuple[Paper, ...]) -> np.ndarray:
        """The vectors of papers, kept for the next query."""
        found = self._places.get(papers)
        if found is None:
            found = self.vectors([folded(text(paper)) for paper in papers])
            self._places = {papers: found}  # replaced whole, so that threads need no lock
        return found

    def _weighted(self, texts: Sequence[str]):
        from scipy.sparse import hstack

        return hstack([one.transform(texts) for one in self._terms], format="csr")


@functools.cache
def latent_space() -> LatentSpace:
    """The space that the packaged catalogue spans."""
    return LatentSpace([folded(text(paper)) for paper in catalogue()])


def text(paper: Paper) -> str:
    """What of a paper is searched: title, summary, abstract, family and components; never its themes."""
    return f"{paper.title}\n{_body(paper)}"


def folded(words: str) -> str:
    """Lower case, in one spelling for British and American forms, for all that is indexed and all that is asked.

    >>> folded("Regularisation of Behaviour"), folded("regularization of behavior")
    ('regularization of behavior', 'regularization of behavior')
    """
    plain = re.sub(r"([a-z]{2})is(e[ds]?|ing|ations?|ers?)\b", r"\1iz\2", words.lower())
    return re.sub(r"([a-z]{3})our(s|al|ed|ing)?\b", r"\1or\2", plain)


def content_words(query: str) -> list[str]:
    """The words of a query, folded; articles and prepositions only where there is nothing else."""
    words = [word for word in _WORD.findall(folded(query)) if word.strip("_")]
    return [word for word in words if word not in EMPTY] or words


def _body(paper: Paper) -> str:
    components = "; ".join(component.name for component in paper.components)
    family = FAMILIES[paper.family] if paper.family else ""
    return "\n".join(part for part in (paper.summary, paper.abstract, components, family) if part)


def _ranked(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda place: (-scores[place], place))


def _index(papers: tuple[Paper, ...]) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE papers USING fts5(title, body, tokenize = 'porter unicode61 remove_diacritics 2')")
    rows = [(i, folded(paper.title), folded(_body(paper))) for i, paper in enumerate(papers)]
    db.executemany("INSERT INTO papers (rowid, title, body) VALUES (?, ?, ?)", rows)
    return db


@functools.cache
def _sentence_model(name: str):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        fix = "Install it (pip install sentence-transformers), or search with --mode semantic."
        raise ConfigError("this mode needs sentence-transformers, which is not installed", "mode", fix) from error
    try:
        return SentenceTransformer(name, local_files_only=True)
    except Exception as error:
        fix = "KEEL_SENTENCES names a folder with one; --mode semantic needs none."
        raise ConfigError(f"the model {name} is not on this machine ({type(error).__name__})", "mode", fix) from error
