"""Papers: the literature by date, by use on this machine, or by search; what of each paper runs in Keel."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.responses import Response

from keel.core.errors import ConfigError, UserError
from keel.papers.catalogue import FAMILIES, FIDELITIES, STATUSES, THEMES, Paper, catalogue, newest_first
from keel.papers.feed import feed
from keel.papers.library import Library
from keel.papers.related import related
from keel.papers.search import MODES, Filters, default_mode, search
from keel.papers.trending import trending
from keel.ui.choosing import one_of
from keel.ui.measurements import verified
from keel.ui.problems import Missing
from keel.ui.reading import pages_of, runs_folder
from keel.ui.rendering import render

TITLE, ORDER = "Papers", 6
router = APIRouter(prefix="/papers")

PER_PAGE = 20
IN_KEEL = {"implemented": "runs in Keel", "experiment": "experiment", "context": "context", "imported": "imported"}
BEST = 60  # papers that a query finds; meaning alone would find all
SORTS = {"newest": "newest first", "trending": "trending here"}  # a query has its best matches first
BY = {"lexical": "words", "semantic": "meaning", "sentences": "a sentence model"}  # besides both, which is usual


@dataclass(frozen=True)
class Asked:
    """What a reader looks for.

    Args:
        query: words; "" for none.
        mode: one of `MODES`.
        filters: what the papers must be.
        sort: one of `SORTS`, or None for the usual order: the best match of a query, else the newest.
    """

    query: str = ""
    mode: str = "mixed"
    filters: Filters = Filters()
    sort: str | None = None


@router.get("")
def listing(
    request: Request,
    q: str = "",
    mode: str = "",
    family: str = "",
    status: str = "",
    theme: str = "",
    sort: str = "",
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    """The papers that fit, as many as go on a page."""
    filters = Filters(
        one_of(family, FAMILIES, "family"), one_of(theme, THEMES, "theme"), one_of(status, STATUSES, "status")
    )
    asked = Asked(q.strip(), one_of(mode, MODES, "mode") or default_mode(), filters, one_of(sort, SORTS, "sort"))
    library = Library()
    papers, notice = find(asked, library, request)
    pages = pages_of(len(papers), PER_PAGE, page)
    return render(
        request,
        "papers.html",
        asked=asked,
        papers=papers[max(0, pages.first_row - 1) : pages.last_row],
        pages=pages,
        notice=notice,
        known=len(library.papers()),
        running=sum(paper.runs for paper in catalogue()),
        mode=mode,
        modes={name: said for name, said in BY.items() if name != "sentences" or _sentences_installed()},
        families=FAMILIES,
        themes=THEMES,
        statuses=IN_KEEL,
        sorts=SORTS if asked.query else {"trending": SORTS["trending"]},
    )


@router.get("/feed.xml")
def atom(request: Request) -> Response:
    """The feed of what is new here."""
    text = feed(Library().papers(), address=str(request.url))
    return Response(text, media_type="application/atom+xml; charset=utf-8")


@router.get("/{n:int}")
def one(request: Request, background: BackgroundTasks, n: int) -> Response:
    """One paper; that somebody looked at it is counted in the library."""
    library = Library()
    papers = library.papers()
    paper = next((known for known in papers if known.n == n), None)
    if paper is None:
        raise Missing(f"There is no paper {n}.", None, "The list of papers has the numbers.")
    seen = sum(library.views().get(n, {}).values())
    if _is_looked_at(request):
        background.add_task(library.view, n)
        seen += 1
    near, note = _near(paper, papers)
    answer = render(
        request,
        "paper.html",
        paper=paper,
        seen=seen,
        related=near,
        note=note,
        statuses=STATUSES,
        in_keel=IN_KEEL,
        fidelities=FIDELITIES,
        families=FAMILIES,
        themes=THEMES,
        verified=verified(paper.recipes),
    )
    answer.background = background
    return answer


def find(asked: Asked, library: Library, request: Request) -> tuple[list[Paper], str]:
    """The papers in the order asked for, and what there is to say of them where there are none."""
    papers = library.papers()
    if asked.query:
        try:
            hits = search(asked.query, asked.mode, asked.filters, BEST, papers)  # type: ignore[arg-type]
        except UserError as error:
            return [], str(error)
        chosen = [hit.paper for hit in hits]
    else:
        chosen = newest_first(paper for paper in papers if asked.filters(paper))
    if asked.sort == "newest":
        return newest_first(chosen), ""
    if asked.sort != "trending":
        return chosen, ""
    order = [paper.n for paper, _ in trending(runs_folder(request), library=library)]
    if not order:
        return [], "Nothing trends yet: recent comparisons and views on this machine count."
    places = {n: place for place, n in enumerate(order)}
    return sorted((paper for paper in chosen if paper.n in places), key=lambda paper: places[paper.n]), ""


def _near(paper: Paper, papers: Sequence[Paper]) -> tuple[list[tuple[Paper, float]], str]:
    try:
        return related(paper, papers), ""
    except ConfigError as error:
        return [], f"Related papers are not shown: {error.what}."


def _is_looked_at(request: Request) -> bool:
    """Whether a person opened the page, and no browser fetched it in advance, nor a page of elsewhere as a picture."""
    if "prefetch" in request.headers.get("sec-purpose", ""):
        return False
    return request.headers.get("sec-fetch-dest", "document") == "document"


def _sentences_installed() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None
