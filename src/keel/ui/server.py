"""Listening: on this machine only, until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keel.core.errors import UserError
from keel.serve.listening import address, is_loopback, listen, serve_on

PATIENCE = 2  # seconds that requests get to end when the server does


def run_ui(
    runs: Path, host: str = "127.0.0.1", port: int = 8765, ready: Callable[[str], Any] = lambda address: None
) -> None:
    """Serve the pages until Ctrl-C.

    Args:
        runs: the folder of all runs.
        host: where to listen; a loopback address.
        port: 0 takes a free one.
        ready: called with the address when it can be opened.

    Raises:
        UserError: fastapi or uvicorn are not installed, or other machines could reach the host.
        RunError: the address cannot be listened at.
    """
    check_loopback(host)
    try:
        import uvicorn  # noqa: F401

        from keel.ui.app import create_app
        from keel.ui.warming import begin_warming
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UserError(f"{error.name} is not installed", "ui", "pip install 'keel-rl[ui]'") from error
    app = create_app(runs)
    listening = listen(host, port)
    begin_warming()
    serve_on(listening, app, lambda: ready(f"{address(listening, host)}/"), PATIENCE)


def check_loopback(host: str) -> None:
    """Refuse an address that other machines can reach.

    Raises:
        UserError: it is not a loopback address.
    """
    if not is_loopback(host):
        raise UserError(
            f"'{host}' can be reached from other machines, and the pages ask nobody for a key",
            "--host",
            "Take 127.0.0.1; from elsewhere a tunnel leads here: ssh -L 8765:127.0.0.1:8765 MACHINE.",
        )
