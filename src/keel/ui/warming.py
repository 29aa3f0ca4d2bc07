"""What the first reader of some pages would wait for, made while nobody waits."""

from __future__ import annotations

import threading


def begin_warming() -> threading.Thread:
    """Import the recipes and make the space in which papers are near, beside the server."""
    thread = threading.Thread(target=warm, daemon=True)
    thread.start()
    return thread


def warm() -> None:
    """Make what pages keep; what cannot be made here is told by the page that wants it."""
    from keel.core.errors import KeelError
    from keel.papers.search import latent_space
    from keel.ui.recipe_view import entries

    for make in (entries, latent_space):
        try:
            make()
        except KeelError:
            continue
