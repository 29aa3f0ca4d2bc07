"""Templates, and the few things that all of them can say."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keel.report import page
from keel.report.figures import Figure
from keel.report.style import THEMES
from keel.ui.assets import address


def render(request: Request, template: str, **context: Any) -> HTMLResponse:
    """A page from a template, which extends `layout.html`; all text is escaped unless it is `Markup`."""
    found = request.app.state.templates.get_template(template)
    current = request.url.path.strip("/").partition("/")[0]
    return HTMLResponse(found.render(request=request, current=current, **context))


def environment() -> Environment:
    """Where templates come from, with their filters and functions.

    Functions: `asset(name)`, `draw(figures, prefix)`, `table(head, rows, caption)` of cells that are HTML, `cell` and
    `script_data` of `keel.report.page`, `query(**changes)`. Filters: `number`, `percent`, `duration`, `when`, `ago`,
    `prose` (`code` in backticks), `segment` (for a part of an address).
    """
    made = Environment(
        loader=PackageLoader("keel.ui", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals |= {
        "asset": address,
        "palette": Markup(page.script_data("palette", THEMES)),
        "draw": draw,
        "table": lambda *given: Markup(page.table(*given)),
        "cell": lambda *given, **named: Markup(page.cell(*given, **named)),
        "script_data": lambda name, value: Markup(page.script_data(name, value)),
        "query": query,
    }
    made.filters |= {
        "number": number,
        "percent": lambda value: "–" if value is None or math.isnan(value) else f"{100 * value:.3g}%",
        "duration": duration,
        "when": when,
        "ago": ago,
        "prose": lambda sentence: Markup(page.prose(sentence)),
        "segment": lambda text: quote(str(text), safe=""),
    }
    return made


def draw(figures: Sequence[Figure | None], prefix: str) -> Markup:
    """Figures side by side; the layout loads plotly for a page that has any."""
    return Markup(page.figures(figures, prefix))


def query(request: Request, **changes: Any) -> str:
    """The address of the same page with other parameters; None and "" leave one out."""
    merged = {**request.query_params, **{name: value for name, value in changes.items()}}
    kept = {name: value for name, value in merged.items() if value is not None and value != ""}
    return f"{request.url.path}?{urlencode(kept)}" if kept else request.url.path


def number(value: float | None, digits: int = 4) -> str:
    """A number as a table shows it.

    >>> number(0.12345), number(-3.0), number(None), number(1234567)
    ('0.1235', '−3', '–', '1,234,567')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
    return shown.replace("-", "−")


def duration(seconds: float) -> str:
    """
    >>> duration(3725), duration(61), duration(2 * 86400)
    ('1 h 2 min', '1 min 1 s', '2 d 0 h')
    """
    whole = max(0, round(seconds))
    for size, name, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {part}"
    return f"{whole} s"


def when(seconds: float) -> Markup:
    """A moment in the time of this machine."""
    moment = time.localtime(seconds)
    exact, shown = time.strftime("%Y-%m-%dT%H:%M:%S%z", moment), time.strftime("%Y-%m-%d %H:%M", moment)
    return Markup('<time datetime="{}">{}</time>').format(exact, shown)


def ago(seconds: float) -> str:
    """How long a moment is past."""
    return f"{duration(time.time() - seconds)} ago"
