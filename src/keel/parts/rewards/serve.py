"""The worker process: reads batches as lines of JSON, calls one reward function, and writes what it returns.

It is started by `RewardWorker`. The function runs in the main thread, where signals work. What it prints goes to
standard
error: the pipe of the protocol is a descriptor that only this file knows.
"""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

from keel.core.errors import ConfigError, describe
from keel.parts.rewards.functions import call_reward, load_reward, parameters

_GRACE = 2.0  # seconds that a function has to finish once its parent is gone


def serve(reward: str) -> None:
    """Serve until the parent closes the pipe; the first line written says whether the function was found."""
    incoming, outgoing = _take_pipes()
    try:
        function = load_reward(reward)
        accepts = parameters(function)
    except ConfigError as error:
        _write(outgoing, {"refused": [error.what, error.where, error.fix]})
        return
    except BaseException as error:
        _write(outgoing, {"refused": [f"{reward} cannot be loaded: {describe(error)}.", "reward", None]})
        return
    accepted = None if accepts.accepted is None else sorted(accepts.accepted)
    _write(outgoing, {"accepted": accepted, "required": sorted(accepts.required)})

    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(incoming, requests), daemon=True).start()
    while (line := requests.get()) is not None:
        try:
            reply: dict[str, Any] = {"values": call_reward(function, **json.loads(line))}
        except BaseException as error:
            reply = {"error": describe(error)}
        _write(outgoing, reply)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol off descriptors 0 and 1: reading then gives nothing, and printing goes to standard error."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    return incoming, outgoing


def _write(outgoing: BinaryIO, reply: dict[str, Any]) -> None:
    outgoing.write(json.dumps(reply).encode() + b"\n")
    outgoing.flush()


def _listen(incoming: BinaryIO, requests: queue.SimpleQueue[bytes | None]) -> None:
    """Pass requests on; when the parent is gone, end this process and all that it started, even if it hangs."""
    for line in incoming:
        requests.put(line)
    requests.put(None)
    time.sleep(_GRACE)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
