"""What every request must be and every answer carries, whatever page it is about."""

from __future__ import annotations

from typing import Any

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

# Pages load scripts, styles and data from this server alone; plotly sets styles on its elements, and a page of the
# application stands in no frame of another.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Guard:
    """Middleware that refuses foreign host names and all that would change something, and adds `HEADERS`.

    A page of another site can have its own name resolve to this machine and then read what is served here; it cannot
    change the `Host` that the browser sends.

    Args:
        app: the application within.
        hosts: names without ports, in lower case.
    """

    def __init__(self, app: Any, hosts: frozenset[str] = LOOPBACK):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if host_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1")) not in self.hosts:
            await _refuse(send, 421, "This server answers to its own address only.\n")
            return
        if scope["method"] != "GET":
            await _refuse(send, 405, "These pages are only read: GET.\n")
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in there)]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def host_name(host: str) -> str:
    """A `Host` header without its port.

    >>> host_name("LocalHost:8765"), host_name("[::1]:8765"), host_name("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _refuse(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"allow", b"GET")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
