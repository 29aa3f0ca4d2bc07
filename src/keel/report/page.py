"""Pages that stand alone: one HTML file, everything inside, nothing asked of any server."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from keel.core.errors import UserError
from keel.evaluate.intervals import Interval
from keel.report.figures import Figure
from keel.report.style import FONT, THEMES, variables

# The browser is told to load nothing at all, so that a page cannot ask even by mistake.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def document(title: str, body: Iterable[str]) -> str:
    """A page from its parts."""
    parts = list(body)
    drawn = any('class="plot"' in part for part in parts)
    style = (
        f":root {{ --font: {FONT}; {variables('light')} }}\n"
        f"@media (prefers-color-scheme: dark) {{ @media not print {{ :root {{ {variables('dark')} }} }} }}\n"
    )
    scripts = ""
    if drawn:
        from plotly.offline import get_plotlyjs  # late: only those who write a page wait for it

        scripts = (
            f'<script type="application/json" id="palette">{_json(THEMES)}</script>\n'
            f"<script>{get_plotlyjs()}</script>\n<script>{_file('page.js')}</script>\n"
        )
    if any('class="tokens"' in part for part in parts):
        scripts += f"<script>{_file('tokens.js')}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}{_file('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n<noscript><p>The figures need JavaScript; their captions hold the numbers.</p></noscript>\n</main>\n"
        + scripts
        + "</body>\n</html>\n"
    )


def figures(drawn: Sequence[Figure | None], prefix: str) -> str:
    """Figures side by side where there is room; those that are None are left out."""
    shown = "\n".join(
        f"<figure>\n<h3>{text(figure.title)}</h3>\n"
        f'<div class="plot" data-figure="{prefix}-{place}" role="img" aria-label="{text(figure.title)}: '
        f'{text(figure.description)}" style="min-height: {int(figure.layout["height"])}px"></div>\n'
        f"<figcaption>{text(figure.caption)}</figcaption>\n"
        f'<script type="application/json" id="{prefix}-{place}">{_json(figure.to_json())}</script>\n</figure>'
        for place, figure in enumerate(drawn)
        if figure is not None
    )
    return f'<div class="figures">\n{shown}\n</div>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="card scroll" role="region" aria-label="{text(caption)}" tabindex="0">\n<table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
        f'<p class="caption">{text(caption)}</p>'
    )


def cell(interval: Interval | None, signed: bool = False) -> str:
    """A number with its interval below it."""
    if interval is None or interval.value != interval.value:
        return "–"
    form = "+.3f" if signed else ".3f"
    low, high = (f"{end:{form}}" for end in (interval.low, interval.high))
    ends = f" <small>({low} to {high})</small>" if interval.known else ""
    return f"{interval.value:{form}}{ends}".replace("-", "−")


def script_data(name: str, value: object) -> str:
    """Data for a script of the page, which finds it by its id."""
    return f'<script type="application/json" id="{name}">{_json(value)}</script>'


def text(value: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(value), quote=True)


def prose(sentence: str) -> str:
    """Text with `code` in backticks."""
    parts = text(sentence).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def write(path: str | Path, content: str) -> Path:
    """Write a file so that it is there whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode("utf-8", "replace"))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"The file cannot be written ({error.strerror}).", str(path)) from error
    return path


def _json(value: object) -> str:
    """JSON that can stand within a script element whatever it holds."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files("keel.report").joinpath(name).read_text(encoding="utf-8")
