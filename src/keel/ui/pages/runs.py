"""Runs: the list with its filters, and one run: curves while it trains, composition, diagnosis, differences."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from keel.store.listing import FACETS, RUN_ORDERS, count_runs, metrics_since, run_facets, run_names
from keel.store.records import StoredRun
from keel.ui.choosing import one_of
from keel.ui.composition import differences, objective, sections, slots
from keel.ui.problems import Missing
from keel.ui.reading import pages_of, reading, run_named, runs_folder
from keel.ui.rendering import duration, render
from keel.ui.run_view import HEARD, planned_steps, view

TITLE, ORDER = "Runs", 1
PAGE = 50
router = APIRouter()

# A report holds its own scripts; it gets an origin of its own, from which no page of the application can be read.
_REPORT = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; frame-ancestors 'none'"
}


@router.get("/runs")
def listing(
    request: Request,
    name: str = "",
    recipe: str = "",
    task: str = "",
    model: str = "",
    status: str = "",
    sort: str = "",
    way: str = "",
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    """The list of runs."""
    sort = one_of(sort, RUN_ORDERS, "sort") or "created"
    way = one_of(way, ("down", "up"), "way") or "down"
    exact = {key: value or None for key, value in zip(FACETS, (recipe, task, model, status), strict=True)}
    with reading(request) as store:
        if store is None:
            return render(request, "no_runs.html", folder=runs_folder(request))
        total = count_runs(store, exact, name or None)
        facets = run_facets(store)
        everything = sum(count for _, count in facets["status"])
        pages = pages_of(total, PAGE, page)
        found = store.runs(
            name=name or None,
            recipe=exact["recipe"],
            task=exact["task"],
            model=exact["model"],
            status=exact["status"],
            limit=PAGE,
            offset=(pages.now - 1) * PAGE,
            order=sort,
            descending=way == "down",
        )
    if not everything:
        return render(request, "no_runs.html", folder=runs_folder(request))
    return render(
        request,
        "runs.html",
        runs=[_row(run) for run in found],
        total=total,
        everything=everything,
        facets=facets,
        chosen={**exact, "name": name},
        sort=sort,
        way=way,
        pages=pages,
    )


@router.get("/runs/{name:path}")
def one(request: Request, name: str, against: str = "") -> Response:
    """One run, and what its configuration does not share with that of another."""
    with reading(request) as store:
        run = run_named(store, name)
        assert store is not None
        other = run_named(store, against) if against else None
        names = [known for known in run_names(store) if known != name]
        shown = view(store.path, runs_folder(request), name, run.updated)
    config = run.config or {}
    differing, same = differences(config, other.config or {}) if other else ([], 0)
    return render(
        request,
        "run.html",
        run=run,
        view=shown,
        slots=slots(config),
        objective=objective(config),
        sections=sections(config),
        planned=planned_steps(run),
        took=duration((run.finished or run.updated) - run.created),
        said=_said(run),
        other=other,
        against=against,
        differing=differing,
        same=same,
        names=names,
        has_report=_report(request, name).is_file(),
    )


@router.get("/points/{name:path}")
def points(request: Request, name: str, since: Annotated[int, Query(ge=-1, lt=2**62)] = -1) -> Response:
    """The points of every curve after a step, for the page of a run that goes on."""
    with reading(request) as store:
        run = run_named(store, name)
        assert store is not None
        new = metrics_since(store, run.id, since)
    finite = {key: [[step, _finite(value)] for step, value in curve] for key, curve in new.items()}
    return JSONResponse(
        {"status": run.status, "step": run.step, "planned": planned_steps(run), "said": _said(run), "metrics": finite}
    )


@router.get("/reports/{name:path}")
def report(request: Request, name: str) -> Response:
    """The report that the run wrote when it ended."""
    with reading(request) as store:
        run_named(store, name)
    file = _report(request, name)
    if not file.is_file():
        raise Missing(f"The run '{name}' has written no report.", None, "A report is written when a run ends.")
    return HTMLResponse(file.read_text(encoding="utf-8", errors="replace"), headers=_REPORT)


def _report(request: Request, name: str) -> Any:
    """Where the report of a run would be; a name that leads out of the folder of runs leads nowhere."""
    folder = runs_folder(request).resolve()
    file = (folder / name / "report.html").resolve()
    return file if file.is_relative_to(folder) else folder / "report.html" / "none"


def _row(run: StoredRun) -> dict[str, Any]:
    return {"run": run, "scores": _scores(run), "took": duration((run.finished or run.updated) - run.created)}


def _scores(run: StoredRun) -> tuple[str, str]:
    """pass@1 before and after, or the accuracy of comparisons; empty where it was not measured."""
    said = []
    for phase in ("before", "after"):
        measured = (run.summary or {}).get(phase)
        value = (measured.get("pass@1") or measured.get("accuracy")) if isinstance(measured, dict) else None
        first = value[0] if isinstance(value, list) and value else None
        said.append(f"{first:.3f}" if isinstance(first, (int, float)) and math.isfinite(first) else "")
    return said[0], said[1]


def _said(run: StoredRun) -> str:
    """How far a run is, in words."""
    planned = planned_steps(run)
    far = f"step {run.step} of {planned}" if planned else f"step {run.step}"
    if run.status != "running":
        return f"{run.status} at {far}"
    quiet = time.time() - run.updated
    return f"{far}; nothing new for {duration(quiet)}" if quiet > HEARD else f"{far}; training"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
