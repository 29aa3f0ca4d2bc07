"""Papers that resemble one another, by latent semantic analysis."""

from __future__ import annotations

from collections.abc import Sequence

from keel.papers.catalogue import Paper
from keel.papers.search import latent_space


def related(paper: Paper, papers: Sequence[Paper], limit: int = 6) -> list[tuple[Paper, float]]:
    """The papers nearest to one in the latent space of the catalogue, with their cosines, the nearest first.

    Args:
        paper: one of `papers`.
        papers: among which it is looked.
        limit: the most that are returned; the paper itself is none of them.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    pool = tuple(papers)
    vectors = latent_space().place(pool)
    place = next(i for i, one in enumerate(pool) if one.n == paper.n)
    near = vectors @ vectors[place]
    order = sorted((i for i in range(len(pool)) if i != place), key=lambda i: (-near[i], pool[i].n))
    return [(pool[i], float(near[i])) for i in order[:limit]]
