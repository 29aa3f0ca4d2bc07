"""What goes wrong, as pages that say what and what to do."""

from __future__ import annotations

import sys
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from keel.core.errors import KeelError, UserError
from keel.store.opening import StoreBusy
from keel.ui.guard import HEADERS
from keel.ui.rendering import render

_MENU = "The menu leads to all that there are."


class Missing(UserError):
    """What an address names is not there."""


def install(app: FastAPI) -> None:
    """Have the application answer every error with a page."""
    for kind in (HTTPException, RequestValidationError, KeelError, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    status, what, where, fix = _told(error)
    title = HTTPStatus(status).phrase
    page = render(request, "problem.html", status=status, title=title, what=what, where=where, fix=fix)
    page.status_code = status
    page.headers.update(HEADERS)  # a fault is answered outside of the guard
    return page


def _told(error: Any) -> tuple[int, str, str | None, str | None]:
    """Status, what is wrong, where, what to do."""
    if isinstance(error, Missing):
        return 404, error.what, error.where, error.fix
    if isinstance(error, StoreBusy):
        return 503, error.what, error.where, error.fix
    if isinstance(error, KeelError):
        return (400 if isinstance(error, UserError) else 500), error.what, error.where, error.fix
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["loc"][0] == "path":
            return 404, "There is no page here.", None, _MENU
        return 400, f"{first['msg']}.", str(first["loc"][-1]), None
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return 404, "There is no page here.", None, _MENU
        return error.status_code, str(error.detail), None, None
    print(f"keel: {type(error).__name__}: {error}", file=sys.stderr)
    return 500, "The page could not be made.", None, "The terminal of the server says why."
