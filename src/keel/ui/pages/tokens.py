"""Tokens: stored completions with a search, one token by token, and all of one prompt side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from markupsafe import Markup

from keel.core.errors import UserError
from keel.report.tokens_page import token_section
from keel.store.listing import (
    ROLLOUT_ORDERS,
    RolloutFilter,
    count_rollouts,
    group_ids,
    list_rollouts,
    neighbours,
    rollout_stops,
    run_names,
    run_of_rollout,
    search_rollouts,
)
from keel.store.records import StoredRollout
from keel.store.store import Store
from keel.ui.choosing import one_of
from keel.ui.excerpts import excerpt
from keel.ui.problems import Missing
from keel.ui.reading import pages_of, reading, run_named, runs_folder
from keel.ui.rendering import render

TITLE, ORDER = "Tokens", 2
PAGE = 50
ROOM = 12_000  # tokens of completions that stand side by side on one page
STOPS = ("eos", "length", "stop_string", "environment", "data")
router = APIRouter(prefix="/tokens")

Number = Annotated[int, Path(ge=1, lt=2**62)]


@router.get("")
def listing(
    request: Request,
    run: str = "",
    q: Annotated[str, Query(max_length=400)] = "",
    step: str = "",
    group: str = "",
    lowest: str = "",
    highest: str = "",
    stop: str = "",
    order: str = "",
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    before: Annotated[int | None, Query(ge=1, lt=2**62)] = None,
) -> Response:
    """Completions of a run, or of all."""
    by = one_of(order, ROLLOUT_ORDERS, "order") or "newest"
    with reading(request) as store:
        if store is None:
            return render(request, "no_runs.html", folder=runs_folder(request))
        known = run_named(store, run) if run else None
        wanted = RolloutFilter(
            run=known.id if known else None,
            step=_whole("step", step),
            group=_whole("group", group),
            lowest=_number("lowest reward", lowest),
            highest=_number("highest reward", highest),
            stop=stop or None,
        )
        shown = _found(store, wanted, q, before) if q else _page(store, wanted, by, page)
        stops = rollout_stops(store, known.id) if known else STOPS
        names = run_names(store)
    chosen = {"run": run, "q": q, "step": step, "group": group, "lowest": lowest, "highest": highest, "stop": stop}
    return render(
        request,
        "tokens.html",
        chosen=chosen,
        order=by,
        before=before,
        filtered=any(chosen.values()),
        stops=list(dict.fromkeys([*stops, *([stop] if stop else [])])),
        names=names,
        excerpt=excerpt,
        **shown,
    )


@router.get("/{number}")
def one(request: Request, number: Number) -> Response:
    """One completion, token by token."""
    with reading(request) as store:
        run, name, rollout = _rollout(store, number)
        assert store is not None
        earlier, later = neighbours(store, run, rollout)
        size = len(group_ids(store, run, rollout.step, rollout.group))
    return render(
        request,
        "rollout.html",
        name=name,
        rollout=rollout,
        section=Markup(token_section([rollout])),
        earlier=earlier,
        later=later,
        size=size,
    )


@router.get("/{number}/group")
def group(request: Request, number: Number, start: Annotated[int, Query(ge=0, lt=2**31)] = 0) -> Response:
    """All stored completions of the prompt of one completion, in the same step, side by side."""
    with reading(request) as store:
        run, name, rollout = _rollout(store, number)
        assert store is not None
        ids = group_ids(store, run, rollout.step, rollout.group)
        members, after = _that_fit(store, run, ids, min(start, len(ids) - 1))
        rewards = _rewards(store, run, rollout)
    return render(
        request,
        "group.html",
        name=name,
        rollout=rollout,
        members=members,
        section=_linked(token_section(members)),
        start=min(start, len(ids) - 1),
        after=after,
        total=len(ids),
        rewards=rewards,
    )


def _page(store: Store, wanted: RolloutFilter, order: str, page: int) -> dict[str, Any]:
    pages = pages_of(count_rollouts(store, wanted), PAGE, page)
    found = list_rollouts(store, wanted, order, PAGE, (pages.now - 1) * PAGE)
    return {"found": found, "pages": pages, "older": None, "searched": None}


def _found(store: Store, wanted: RolloutFilter, text: str, before: int | None) -> dict[str, Any]:
    answer = search_rollouts(store, wanted, text, before, PAGE)
    older = answer.rollouts[-1].rollout.id if answer.more else None
    return {"found": answer.rollouts, "pages": None, "older": older, "searched": answer.searched}


def _rollout(store: Store | None, number: int) -> tuple[int, str, StoredRollout]:
    """Number and name of the run, and the completion."""
    known = run_of_rollout(store, number) if store is not None else None
    if store is None or known is None:
        raise Missing(
            f"There is no completion {number}.", None, "The list of completions leads to all that are stored."
        )
    return known[0], known[1], store.rollout(known[0], number)


def _that_fit(store: Store, run: int, ids: Sequence[int], start: int) -> tuple[list[StoredRollout], int | None]:
    """As many completions from `start` on as fit one page, at least one, and where the next page starts."""
    members: list[StoredRollout] = []
    for place in range(start, len(ids)):
        member = store.rollout(run, ids[place])
        if members and sum(len(one.tokens) for one in [*members, member]) > ROOM:
            return members, place
        members.append(member)
    return members, None


def _rewards(store: Store, run: int, rollout: StoredRollout) -> dict[str, float] | None:
    """Mean and standard deviation of the rewards of a group, those that were scored."""
    wanted = RolloutFilter(run=run, step=rollout.step, group=rollout.group)
    known = [one.rollout.reward for one in list_rollouts(store, wanted, "oldest", limit=1000)]
    scored = [reward for reward in known if math.isfinite(reward)]
    return {"mean": fmean(scored), "deviation": pstdev(scored)} if scored else None


def _linked(section: str) -> Markup:
    """The completions of a section, with a link from the number of each; other text in it is escaped already."""
    return Markup(re.sub(r"<li>rollout <b>(\d+)</b>", r'<li>rollout <a href="/tokens/\1">\1</a>', section))


def _number(name: str, text: str) -> float | None:
    """A field of the form; an empty one says nothing.

    Raises:
        UserError: it is no finite number.
    """
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"'{text}' is no number.", name, "For example 0.5.")
    return value


def _whole(name: str, text: str) -> int | None:
    value = _number(name, text)
    if value is None or (value.is_integer() and abs(value) < 2**53):
        return None if value is None else int(value)
    raise UserError(f"'{text}' is no whole number.", name, "For example 10.")
