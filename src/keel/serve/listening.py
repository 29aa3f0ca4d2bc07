"""An address of this machine, and an application that is served there until somebody stops it."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from keel.core.errors import RunError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0"), is_loopback("somewhere.org")
    (True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        RunError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RunError(f"cannot listen there ({error})", f"{host}:{port}", "Choose another --port.") from error


def address(listening: socket.socket, host: str) -> str:
    """Where to find it, without a slash at the end."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def serve_on(listening: socket.socket, app: Any, ready: Callable[[], None], patience: int) -> None:
    """Serve an application until SIGINT or SIGTERM; requests under way get `patience` seconds."""
    import uvicorn  # of the extras serve and ui

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=patience)
    ready()
    with listening, contextlib.suppress(KeyboardInterrupt):  # which is how one stops it
        uvicorn.Server(config).run(sockets=[listening])
