"""Methods: every recipe, and one from its formula to what was measured of it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from keel.core.errors import nearest
from keel.ui.choosing import one_of
from keel.ui.measurements import MEASURES, TOLD, is_apart, machine, results, verification, verified
from keel.ui.problems import Missing
from keel.ui.rendering import render
from keel.verify.measured import STATUSES

TITLE, ORDER = "Methods", 5
router = APIRouter(prefix="/methods")


@router.get("")
def listing(
    request: Request, q: str = "", family: str = "", kind: str = "", status: str = "", paper: str = ""
) -> Response:
    """All recipes by family, or those that fit."""
    from keel.ui.recipe_view import KINDS, entries

    known = entries()
    families = sorted({entry.family for entry in known})
    kinds = {name: said for name, said in KINDS.items() if any(entry.kind == name for entry in known)}
    one_family, one_kind, one_status = (
        one_of(family, families, "family"),
        one_of(kind, kinds, "kind"),
        one_of(status, STATUSES, "status"),
    )
    statuses = verified([entry.name for entry in known])
    words = q.lower().split()
    found = [
        entry
        for entry in known
        if one_family in (None, entry.family)
        and one_kind in (None, entry.kind)
        and one_status in (None, statuses.get(entry.name))
        and all(word in entry.words for word in words)
    ]
    if words:  # a name that begins with what was typed comes before one whose paper mentions it
        groups = [("", sorted(found, key=lambda entry: not entry.name.startswith(words[0])))]
    else:
        groups = [(name, [entry for entry in found if entry.family == name]) for name in families]
    return render(
        request,
        "methods.html",
        q=q,
        groups=[(name, own) for name, own in groups if own],
        count=len(found),
        known=len(known),
        families=[(name, name) for name in families],
        kinds=kinds,
        statuses=statuses,
        chosen={"family": one_family, "kind": one_kind, "status": one_status},
        all_statuses=[(name, name) for name in STATUSES],
    )


@router.get("/{name}")
def one(request: Request, name: str) -> Response:
    """One recipe."""
    from keel.ui.recipe_view import KINDS, entries, recipe_view

    names = [entry.name for entry in entries()]
    if name not in names:
        raise Missing(f"There is no recipe '{name}'.{nearest(name, names)}", None, "`keel methods` lists them.")
    table = verification()
    view = recipe_view(name)
    return render(
        request,
        "method.html",
        view=view,
        entry=view.entry,
        kinds=KINDS,
        rows=table.of(name) if table else [],
        table=table,
        results=(known := results(name)),
        against=next((result.against for result in known if result.against), ""),
        measures=MEASURES,
        told=TOLD,
        apart=is_apart,
        machine=machine(),
        statuses=verified([*view.variants, *([view.entry.baseline] if view.entry.baseline else [])]),
    )
