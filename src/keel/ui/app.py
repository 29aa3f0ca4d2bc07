"""The application: every module of `keel.ui.pages` is a page, and everything is answered from the folder of runs."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from keel.ui import assets, pages, problems
from keel.ui.guard import LOOPBACK, Guard
from keel.ui.rendering import environment

START = "/runs"


@dataclass(frozen=True)
class Page:
    """One entry of the navigation.

    Args:
        name: of its module; the page stands at `/name`.
        title: as the menu says it.
        order: place in the menu, from the left.
    """

    name: str
    title: str
    order: int


def create_app(runs: Path, hosts: frozenset[str] = LOOPBACK) -> FastAPI:
    """The application over a folder of runs; the folder need not exist yet.

    Args:
        runs: the folder that holds `keel.sqlite`.
        hosts: names under which it may be addressed, so that no page elsewhere can have its own name point here.
    """
    app = FastAPI(title="Keel", docs_url=None, redoc_url=None, openapi_url=None)
    modules = find_pages()
    app.state.runs = Path(runs)
    app.state.templates = environment()
    app.state.templates.globals["menu"] = sorted(
        (Page(name, module.TITLE, module.ORDER) for name, module in modules.items()), key=lambda page: page.order
    )
    app.add_middleware(Guard, hosts=hosts)
    problems.install(app)

    @app.get("/")
    def start() -> Response:
        return RedirectResponse(START, 307)

    @app.get("/static/{name}")
    def static(name: str, v: str = "") -> Any:
        return assets.answer(name, v)

    for module in modules.values():
        app.include_router(module.router)
    return app


def find_pages() -> dict[str, ModuleType]:
    """The modules of `keel.ui.pages` by name; one whose name begins with an underscore is no page."""
    names = [found.name for found in pkgutil.iter_modules(pages.__path__) if not found.name.startswith("_")]
    return {name: importlib.import_module(f"keel.ui.pages.{name}") for name in names}
