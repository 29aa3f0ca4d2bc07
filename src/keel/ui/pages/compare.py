"""Compare: methods under equal conditions, from the first cell on, and the report with a choice of arms and metric."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from markupsafe import Markup

from keel.core.errors import nearest
from keel.ui.choosing import one_of
from keel.ui.comparisons import Overview, View, overview, overviews, report
from keel.ui.problems import Missing
from keel.ui.reading import reading, runs_folder
from keel.ui.rendering import render

TITLE, ORDER = "Compare", 3
router = APIRouter(prefix="/compare")

# A report holds its own scripts; it gets an origin of its own, from which no page of the application can be read.
_REPORT = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; frame-ancestors 'none'"
}
FILES = {
    "report.html": ("text/html", "Report, to keep"),
    "results.csv": ("text/csv", "Cells as CSV"),
    "summary.csv": ("text/csv", "Summary as CSV"),
    "results.json": ("application/json", "All as JSON"),
}


@router.get("")
def listing(request: Request) -> Response:
    """All comparisons."""
    with reading(request) as store:
        found = overviews(runs_folder(request), store)
    return render(request, "comparisons.html", found=found, folder=runs_folder(request))


@router.get("/{name}")
def one(
    request: Request,
    name: str,
    arm: Annotated[list[str] | None, Query()] = None,
    baseline: str = "",
    metric: str = "",
) -> Response:
    """One comparison; without a choice all arms, against the first, by the usual metric."""
    known = _overview(request, name)
    chosen = [one_of(value, known.arms, "arm") for value in arm or known.arms]
    base = one_of(baseline, known.arms, "baseline") or next(a for a in known.arms if a in chosen)
    arms = (base, *(a for a in known.arms if a in chosen and a != base))
    found = report(runs_folder(request), name, known.results, View(arms, metric))
    folder = runs_folder(request) / "comparisons" / name
    return render(
        request,
        "comparison.html",
        known=known,
        rows=_rows(known),
        report=found,
        sections=[Markup(section) for section in found.sections],
        arms=arms,
        baseline=baseline,
        metric=metric,
        metrics=[(name, name) for name in found.metrics],
        all_arms=[(name, name) for name in known.arms],
        files=[(file, label) for file, (_, label) in FILES.items() if (folder / file).is_file()],
    )


@router.get("/{name}/state")
def state(request: Request, name: str) -> Response:
    """How far the cells are, for the page of a comparison that is being run."""
    known = _overview(request, name)
    cells = request.app.state.templates.get_template("comparison_cells.html").render(known=known, rows=_rows(known))
    return JSONResponse({"live": known.is_live, "results": known.results, "said": known.said, "cells": cells})


@router.get("/{name}/files/{file}")
def written(request: Request, name: str, file: str) -> Response:
    """A file that the comparison wrote."""
    known = _overview(request, name)
    path = runs_folder(request) / "comparisons" / known.name / file
    if file not in FILES or not path.is_file():
        raise Missing(
            f"The comparison '{name}' has no file '{file}'.", None, "It is written when all cells have ended."
        )
    content = path.read_text(encoding="utf-8", errors="replace")
    if file == "report.html":
        return HTMLResponse(content, headers=_REPORT)
    kept = {"content-disposition": f'attachment; filename="{file}"'}
    return Response(content, media_type=f"{FILES[file][0]}; charset=utf-8", headers=kept)


def _overview(request: Request, name: str) -> Overview:
    from keel.compare.record import names

    known = names(runs_folder(request))
    if name not in known:
        there = f"There are: {', '.join(known[:8])}." if known else "There are none yet."
        raise Missing(f"There is no comparison '{name}'.{nearest(name, known)}", None, there)
    with reading(request) as store:
        return overview(runs_folder(request), name, store)


def _rows(known: Overview) -> list[tuple[str, list[Any]]]:
    """The cells of each arm, by seed."""
    width = len(known.seeds)
    return [(arm, list(known.cells[place * width : (place + 1) * width])) for place, arm in enumerate(known.arms)]
