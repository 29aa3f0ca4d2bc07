"""A few words of a long text, with what was searched for marked."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

WIDTH = 180  # characters
BEFORE = 50  # characters before the first place found


def excerpt(text: str, wanted: str = "", width: int = WIDTH) -> Markup:
    """One line of a text, around the first place of what is wanted (ASCII letters in either case), as HTML.

    >>> excerpt("6*(2+3)=30", "(2")
    Markup('6*<mark>(2</mark>+3)=30')
    """
    pattern = re.compile(re.escape(wanted), re.IGNORECASE | re.ASCII) if wanted else None
    first = pattern.search(text) if pattern else None
    start = max(0, first.start() - BEFORE) if first and first.end() > width else 0
    end = min(len(text), start + max(width, len(wanted) + BEFORE))
    shown, at = Markup("…") if start else Markup(""), start
    for place in pattern.finditer(text, start, end) if pattern else ():
        shown += _line(text[at : place.start()]) + Markup("<mark>") + _line(place.group()) + Markup("</mark>")
        at = place.end()
    return shown + _line(text[at:end]) + ("…" if end < len(text) else "")


def _line(text: str) -> Markup:
    return escape(text.replace("\n", "↵").replace("\t", "⇥"))
