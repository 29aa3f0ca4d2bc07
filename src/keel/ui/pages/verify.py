"""Verify: what verification found of every recipe, as it was measured when the package was made."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

import keel
from keel.report.figures import Figure
from keel.ui.choosing import one_of
from keel.ui.measurements import verification
from keel.ui.reading import pages_of
from keel.ui.rendering import render
from keel.ui.verification_figures import cosines, errors, placements
from keel.verify.measured import STATUSES, Row

TITLE, ORDER = "Verify", 4
router = APIRouter(prefix="/verify")

PER_PAGE = 40


@router.get("")
def listing(
    request: Request,
    q: str = "",
    family: str = "",
    status: str = "",
    sort: Literal["recipe", "error"] = "recipe",
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    """The table, and its figures."""
    table = verification()
    if table is None:
        return render(request, "verify.html", table=None)
    families = sorted({row.family for row in table.rows})
    chosen = {"family": one_of(family, families, "family"), "status": one_of(status, STATUSES, "status")}
    rows = select(table.rows, q, chosen["family"], chosen["status"])
    if sort == "error":
        unknown = float("inf")
        rows.sort(key=lambda row: unknown if row.gradient_relative_error is None else -row.gradient_relative_error)
    pages = pages_of(len(rows), PER_PAGE, page)
    return render(
        request,
        "verify.html",
        table=table,
        pages=pages,
        version=keel.__version__,
        rows=rows[max(0, pages.first_row - 1) : pages.last_row],
        figures=_figures(tuple(sorted(row.label for row in rows))),
        placements=_placements(),
        q=q,
        sort=sort,
        chosen=chosen,
        counts={name: sum(row.status == name for row in rows) for name in STATUSES},
        families=[(name, name) for name in families],
        statuses=[(name, name) for name in STATUSES],
    )


def select(rows: Sequence[Row], words: str, family: str | None, status: str | None) -> list[Row]:
    """The rows of a family and status that have every word in their label, objective or reasons."""
    wanted = words.lower().split()
    return [
        row
        for row in rows
        if family in (None, row.family) and status in (None, row.status) and all(word in _text(row) for word in wanted)
    ]


def _text(row: Row) -> str:
    return " ".join([row.label, row.objective, row.follows or "", *row.reasons]).lower()


@functools.lru_cache(maxsize=64)
def _figures(labels: tuple[str, ...]) -> list[Figure | None]:
    table = verification()
    assert table is not None
    rows = [row for row in table.rows if row.label in set(labels)]
    return [errors(rows), cosines(rows)]


@functools.cache
def _placements() -> list[Figure]:
    table = verification()
    return placements(table) if table else []
