"""Listening: on this machine only, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keel.core.errors import RunError, UserError


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
        import uvicorn

        from keel.ui.app import create_app
        from keel.ui.warming import begin_warming
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise UserError(f"{error.name} is not installed", "ui", "pip install 'keel-rl[ui]'") from error
    app = create_app(runs)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    begin_warming()
    ready(f"http://{shown}:{listening.getsockname()[1]}/")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()


def check_loopback(host: str) -> None:
    """Refuse an address that other machines can reach.

    Raises:
        UserError: it is not a loopback address.
    """
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own:
        raise UserError(
            f"'{host}' can be reached from other machines, and the pages ask nobody for a key",
            "--host",
            "Take 127.0.0.1; from elsewhere a tunnel leads here: ssh -L 8765:127.0.0.1:8765 MACHINE.",
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RunError(f"cannot listen there ({error})", f"{host}:{port}", "Choose another --port.") from error
