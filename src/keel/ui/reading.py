"""The run store as pages read it: opened for each request, never written, perhaps not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from keel.core.errors import RunError
from keel.store.records import StoredRun
from keel.store.store import Store
from keel.ui.problems import Missing


def runs_folder(request: Request) -> Path:
    """The folder of all runs."""
    return request.app.state.runs


@contextmanager
def reading(request: Request) -> Iterator[Store | None]:
    """The store, for reading; None where no run was begun yet.

    Raises:
        UserError: the file is no store of Keel, or one of a newer Keel.
    """
    file = runs_folder(request) / "keel.sqlite"
    if not file.is_file():
        yield None
        return
    with Store(file, readonly=True) as store:
        yield store


def run_named(store: Store | None, name: str) -> StoredRun:
    """A run with its configuration.

    Raises:
        Missing: there is none of that name; the nearest is named.
    """
    if store is None:
        raise Missing(f"There is no run named '{name}'.", None, "No run was begun yet.")
    try:
        return store.run(name)
    except RunError as error:
        raise Missing(error.what, None, error.fix) from error


@dataclass(frozen=True)
class Pages:
    """Where one is in a list that is shown in pages.

    Args:
        now, last: numbers of pages, from 1.
        first_row, last_row: numbers of the rows that are shown; 0 in an empty list.
        total: rows in all.
    """

    now: int
    last: int
    first_row: int
    last_row: int
    total: int


def pages_of(total: int, size: int, wanted: int) -> Pages:
    """The page wanted, or the last one where there are fewer.

    >>> pages_of(101, 50, 9)
    Pages(now=3, last=3, first_row=101, last_row=101, total=101)
    """
    last = max(1, -(-total // size))
    now = min(wanted, last)
    return Pages(now, last, (now - 1) * size + 1 if total else 0, min(total, now * size), total)
