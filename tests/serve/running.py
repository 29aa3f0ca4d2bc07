"""A real server in a thread, on a free port of the loopback interface."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from keel.serve.app import build_app


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """The address of an application while it is served, without a slash at the end."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def running(app) -> Iterator[str]:
    """The address of OpenAI's API in an application while it is served."""
    with served(app) as root:
        yield f"{root}/v1"


@contextlib.contextmanager
def serving(policy, served: str = "small") -> Iterator[str]:
    """The address of a model while it is served."""
    with running(build_app(policy, served, ("127.0.0.1",))) as url:
        yield url
