"""Scripts and styles, under addresses that change with their content, so that a browser may keep them for ever."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from importlib import resources

from fastapi.responses import Response
from starlette.exceptions import HTTPException

from keel.report.style import FONT, variables

_KEPT = "public, max-age=31536000, immutable"
_REPORT = ("page.css", "page.js", "tokens.js")


def address(name: str) -> str:
    """Where a script or style of the application is found."""
    return f"/static/{name}?v={_version(name)}"


def answer(name: str, version: str) -> Response:
    """A script or style; one that is asked for by its present version may be kept.

    Raises:
        HTTPException: there is none of that name.
    """
    content = _content(name)
    kind = mimetypes.guess_type(name)[0] or "text/plain"
    kind = "text/javascript" if name.endswith(".js") else kind
    kept = _KEPT if version == _version(name) else "no-cache"
    return Response(content, media_type=kind, headers={"cache-control": kept})


def palette() -> str:
    """The colours of both themes as a style: the system's choice, unless the switch of the page set another."""
    dark = variables("dark")
    return (
        f":root {{ --font: {FONT}; {variables('light')} }}\n"
        f"@media (prefers-color-scheme: dark) {{ @media not print {{ :root:not([data-theme]) {{ {dark} }} }} }}\n"
        f"@media not print {{ :root[data-theme=dark] {{ {dark} }} }}\n"
    )


@cache
def _version(name: str) -> str:
    return hashlib.sha256(_content(name)).hexdigest()[:12]


@cache
def _content(name: str) -> bytes:
    if name == "palette.css":
        return palette().encode()
    if name == "plotly.min.js":
        return (resources.files("plotly") / "package_data" / name).read_bytes()
    if name in _REPORT:
        return resources.files("keel.report").joinpath(name).read_bytes()
    own = resources.files("keel.ui") / "static"
    if not any(entry.name == name for entry in own.iterdir()):
        raise HTTPException(404)
    return own.joinpath(name).read_bytes()
